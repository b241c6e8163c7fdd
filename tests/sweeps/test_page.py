"""The page in a real browser: no error, no request, and everything that a reader does with it."""

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report_page import CHROMIUM, write_page
from benchmarks.synthetic_sweep import write_run, write_sweep
from sweeps.report.page import page
from sweeps.report.subject import of_runs, of_sweep
from sweeps.results import Judged, Stops
from sweeps.run_result import read_run
from sweeps.statistics import verdicts

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make setup-dev")
if not CHROMIUM.exists():
    pytest.skip(f"{CHROMIUM} is not there: apt-get install chromium", allow_module_level=True)

EFFECTS = {"base": 0.0, "good": -0.03, "bad": 0.03, '=evil "<b>", & co': 0.0}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(tmp_path_factory.mktemp("page"), EFFECTS, 3, 60)


class Watched:
    """A tab, and what must not happen in it."""

    def __init__(self, browser: Any, file: Path, **options: Any) -> None:
        self.tab = browser.new_page(accept_downloads=True, **options)
        self.wrong: list[str] = []
        self.tab.on("console", lambda message: self.wrong.append(f"console: {message.text}"))
        self.tab.on("pageerror", lambda error: self.wrong.append(f"error: {error}"))
        self.tab.on("request", lambda request: self._note(request.url, file.as_uri()))
        self.tab.goto(file.as_uri())
        self.tab.wait_for_selector("figure[data-drawn]", state="attached")

    def _note(self, url: str, own: str) -> None:
        if url != own and not url.startswith("blob:"):
            self.wrong.append(f"request: {url}")

    def lines(self, chart: str) -> list[str]:
        """Names of what a picture has drawn."""
        return self.tab.evaluate(
            "title => [...document.querySelectorAll('figure')].find(each => each.querySelector('h3').textContent === title)"
            ".querySelector('.plot').data.map(each => each.name).filter(Boolean)",
            chart,
        )

    def arms(self) -> list[str]:
        return self.tab.locator("#verdicts tbody tr td:first-child").all_text_contents()


@pytest.fixture
def watched(browser: Any, file: Path) -> Iterator[Watched]:
    found = Watched(browser, file, viewport={"width": 1200, "height": 900})
    yield found
    found.tab.close()
    assert found.wrong == []


def test_every_picture_is_drawn_without_an_error_or_a_request(watched: Watched) -> None:
    figures = watched.tab.locator("figure")
    for place in range(figures.count()):
        figures.nth(place).scroll_into_view_if_needed()
        watched.tab.wait_for_selector(f'figure[data-chart="{place}"][data-drawn]')
    drawn = watched.tab.evaluate("[...document.querySelectorAll('.plot')].map(each => each.data.length)")
    assert min(drawn) > 0
    titles = watched.tab.locator("figure h3").all_text_contents()
    assert titles[0] == "Held-out loss less the baseline's, same seed"
    assert {"Throughput", "MFU", "Memory", "Mixture so far", "Held-out loss against cost"} <= set(titles)


def test_tables_are_sorted_by_click_and_by_keyboard(watched: Watched) -> None:
    head = watched.tab.locator("#verdicts th button", has_text="difference")
    head.click()
    assert watched.arms()[0] == "good"
    assert watched.arms()[-1] == "base"  # which has no difference from itself
    head.focus()
    watched.tab.keyboard.press("Enter")
    assert watched.arms()[0] == "bad"
    assert watched.arms()[-1] == "base"
    assert watched.tab.locator('#verdicts th[aria-sort="descending"]').text_content() == "difference"


def test_arms_are_hidden_and_shown(watched: Watched) -> None:
    assert "good" in watched.lines("Held-out loss less the baseline's, same seed")
    watched.tab.get_by_label("good").focus()
    watched.tab.keyboard.press("Space")
    assert "good" not in watched.lines("Held-out loss less the baseline's, same seed")
    assert watched.tab.locator("#shown").text_content() == "3 of 4"
    watched.tab.locator("#all").click()
    assert "good" in watched.lines("Held-out loss less the baseline's, same seed")


@pytest.mark.slow
def test_axes_and_smoothing(watched: Watched) -> None:
    plot = "document.querySelectorAll('.plot')[0]"
    watched.tab.locator("#axis").select_option("hours")
    assert watched.tab.evaluate(f"{plot}.layout.xaxis.title.text") == "hours of training"
    watched.tab.locator("#logx").check()
    assert watched.tab.evaluate(f"{plot}.layout.xaxis.type") == "log"
    watched.tab.locator("figure", has_text="Training loss").first.scroll_into_view_if_needed()
    rough = "document.querySelectorAll('.plot')[2].data.find(each => each.name === 'base').y.at(-1)"
    watched.tab.wait_for_function("document.querySelectorAll('.plot')[2].data")
    before = watched.tab.evaluate(rough)
    watched.tab.locator("#smooth").fill("0.9")
    assert watched.tab.locator("#smoothness").text_content() == "0.9"
    assert watched.tab.evaluate(rough) > before  # a falling curve's mean of the past


def test_dark_and_light(browser: Any, file: Path, watched: Watched) -> None:
    colour = "getComputedStyle(document.body).backgroundColor"
    light = watched.tab.evaluate(colour)
    watched.tab.locator("#theme").click()
    dark = watched.tab.evaluate(colour)
    assert dark != light
    ink = watched.tab.evaluate("document.querySelector('.plot').layout.font.color")
    assert ink == watched.tab.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--ink').trim()")
    preferring = Watched(browser, file, color_scheme="dark")
    assert preferring.tab.evaluate(colour) == dark
    preferring.tab.locator("#theme").click()
    assert preferring.tab.evaluate(colour) == light
    preferring.tab.close()
    assert preferring.wrong == []


def test_a_phone_needs_no_sideways_scrolling(browser: Any, file: Path) -> None:
    phone = Watched(browser, file, viewport={"width": 390, "height": 844})
    for place in range(phone.tab.locator("figure").count()):
        phone.tab.locator("figure").nth(place).scroll_into_view_if_needed()
        phone.tab.wait_for_selector(f'figure[data-chart="{place}"][data-drawn]')
    assert phone.tab.evaluate("document.documentElement.scrollWidth") == 390
    phone.tab.close()
    assert phone.wrong == []


def table_of(watched: Watched, button: Any) -> list[list[str]]:
    with watched.tab.expect_download() as download:
        button.click()
    return list(csv.reader(io.StringIO(Path(download.value.path()).read_text(), newline="")))


def test_csv_files(watched: Watched) -> None:
    head, *body = table_of(watched, watched.tab.locator('button[data-table="verdicts"]'))
    assert head[:3] == ["arm", "verdict", "difference"]
    assert [row[0] for row in body] == ["base", "good", "bad", "'" + list(EFFECTS)[3]]  # no formula for a spreadsheet
    assert float(body[1][2]) == pytest.approx(-0.03, abs=0.01)
    figure = watched.tab.locator("figure").nth(1)
    head, *body = table_of(watched, figure.locator("button.csv"))
    assert head == ["arm", "seed", "tokens", "FLOPs", "hours", "Held-out loss"]
    assert len(body) == 4 * 3 * 20
    figure.locator("summary").click()
    figure.locator("tbody tr").first.wait_for()  # the browser tells the page of an opened table in its own time
    assert figure.locator("tbody tr").count() == len(body)


@pytest.mark.slow
def test_csv_files_of_tables_hold_numbers_and_nothing_for_what_is_not_known(browser: Any, tmp_path: Path) -> None:
    """Whatever people see of them: intervals, dashes, minus signs, words behind numbers."""
    sweep = write_sweep(tmp_path, {"base": 0.0, "good": -0.03, "gone": 0.0}, range(3), 60, unfinished=[("gone", 1)])
    judged = [
        Judged("base", 1, {0: 2.5}, True),
        Judged("good", 1, {0: 2.25}, True),
        Judged("gone", 1, {0: None}, False),
    ]
    stops = Stops([0.5], {arm.name: [30_000_000] for arm in sweep.arms}, judged)
    subject = of_sweep(replace(sweep, stops=stops))
    (tmp_path / "r.html").write_text(page(subject))
    found = Watched(browser, tmp_path / "r.html")
    read = {}
    for key in ("verdicts", "equal-cost", "reaching", "rungs", "documents", "scores"):
        head, *body = table_of(found, found.tab.locator(f'button[data-table="{key}"]'))
        assert len(set(head)) == len(head)
        assert all(len(row) == len(head) for row in body)
        assert not any("\u2212" in field or "\u2013" in field or field.startswith("[") for row in body for field in row)
        read[key] = {row[0]: dict(zip(head, row, strict=True)) for row in body}
    found.tab.close()
    assert found.wrong == []
    verdict = next(each for each in verdicts(subject.sweep or sweep) if each.arm == "good")
    good, gone = read["verdicts"]["good"], read["verdicts"]["gone"]
    assert (float(good["95 % low"]), float(good["95 % high"])) == (verdict.low, verdict.high)
    assert (gone["difference"], gone["95 % low"], gone["95 % high"], gone["p (Holm)"]) == ("", "", "", "")
    assert read["verdicts"]["base"]["95 % high"] == ""
    assert [read["rungs"][arm]["rung 1"] for arm in ("base", "good", "gone")] == ["goes on", "goes on", "stopped"]
    assert [read["rungs"][arm]["rung 1: loss"] for arm in ("base", "good", "gone")] == ["2.5", "2.25", ""]
    assert float(read["equal-cost"]["good"]["FLOPs: share of the arm's own"]) == pytest.approx(1 / 1.05, rel=0.01)
    assert float(read["equal-cost"]["good"]["hours: 95 % low"]) < 0
    assert read["reaching"]["gone"]["tokens: share"] == ""


def test_print(watched: Watched) -> None:
    """What was never scrolled to is on paper, too."""
    watched.tab.locator("#theme").click()
    paper = watched.tab.pdf()
    assert paper[:5] == b"%PDF-"
    assert len(re.findall(rb"/Type\s*/Page\b", paper)) >= 2
    assert watched.tab.evaluate("[...document.querySelectorAll('figure')].every(each => each.dataset.drawn)")
    assert watched.tab.evaluate("document.documentElement.dataset.theme") == "dark"


@pytest.mark.slow
def test_seeds_that_never_cost_alike_have_no_mean(browser: Any, tmp_path: Path) -> None:
    """One seed of `slow` begins after the baseline's end in hours, and so does every one of `late`. `other` was
    measured on other text."""
    effects = {"base": 0.0, "good": -0.03, "slow": 0.0, "late": 0.0, "other": 0.0}
    sweep = write_sweep(tmp_path, effects, range(3), lines=60)
    for (arm, seed), run in sweep.runs.items():
        if arm == "late" or (arm, seed) == ("slow", 1):
            lines = [line | {"slots_per_second": line["slots_per_second"] / 1000} for line in map(dict, run.lines)]
            (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if arm == "other":
            summary = {**run.summary, "validation": {"loss": 2.0, "masked_tokens": 5}}
            (run.folder / "summary.json").write_text(json.dumps(summary))
    runs = {(arm, seed): read_run(run.folder, arm, seed) for (arm, seed), run in sweep.runs.items()}
    (tmp_path / "r.html").write_text(page(of_sweep(replace(sweep, runs=runs))))
    found = Watched(browser, tmp_path / "r.html", viewport={"width": 1200, "height": 3000})
    gap = "Held-out loss less the baseline's, same seed"
    assert found.lines(gap) == ["good", "slow", "late"]
    assert "other (other held-out text)" in found.tab.locator("#arms li").all_text_contents()
    found.tab.locator("#axis").select_option("hours")
    assert found.lines(gap) == ["good"]
    assert found.lines("Held-out loss") == [
        "base",
        "good",
        *(f"slow, seed {seed}" for seed in range(3)),
        "late",
        "other",
    ]
    assert found.tab.evaluate("document.querySelectorAll('.plot')[1].layout.xaxis.title.text") == "hours of training"
    found.tab.close()
    assert found.wrong == []


@pytest.mark.slow
def test_a_watched_page_keeps_arms_hidden_by_name_and_for_itself(browser: Any, tmp_path: Path) -> None:
    """The page that comes next has another arm in front, and in the same tab there is a page of another sweep."""
    for name, effects in (("one", {"base": 0.0, "good": -0.03, "bad": 0.03}), ("two", {"x": 0.0, "y": 0.0, "z": 0.0})):
        sweep = write_sweep(tmp_path / name, effects, range(2), 40)
        (tmp_path / f"{name}.html").write_text(page(of_sweep(sweep), reload_seconds=3600))
    found = Watched(browser, tmp_path / "one.html", viewport={"width": 1200, "height": 900})
    found.tab.get_by_label("good").click()
    grown = write_sweep(tmp_path / "grown", {"base": 0.0, "new": 0.0, "good": -0.03, "bad": 0.03}, range(2), 40)
    (tmp_path / "one.html").write_text(page(of_sweep(grown), reload_seconds=3600))
    found.tab.reload()
    found.tab.wait_for_selector("figure[data-drawn]", state="attached")
    assert found.lines("Held-out loss less the baseline's, same seed") == ["new", "bad"]
    assert found.tab.locator("#shown").text_content() == "3 of 4"
    assert found.wrong == []
    found.tab.goto((tmp_path / "two.html").as_uri())
    found.tab.wait_for_selector("figure[data-drawn]", state="attached")
    assert found.tab.locator("#shown").text_content() == "3 of 3"
    found.tab.close()


@pytest.mark.slow
@pytest.mark.parametrize(("lines", "axis"), [((40, 40), "FLOPs"), ((40, 20), "tokens (slots)")])
def test_loss_is_drawn_against_flops_where_tokens_are_the_same(
    browser: Any, tmp_path: Path, lines: tuple[int, int], axis: str
) -> None:
    """Of runs with other tokens, as under `equal: flops`, tokens are no constant."""
    for name, count in zip("ab", lines, strict=True):
        write_run(tmp_path / name, name, 0.0, 1, count, 0, finished=True)
    (tmp_path / "r.html").write_text(page(of_runs([read_run(tmp_path / name) for name in "ab"])))
    found = Watched(browser, tmp_path / "r.html", viewport={"width": 1200, "height": 3000})
    assert set(found.lines("Held-out loss against cost")) == {"a", "b"}
    figure = found.tab.locator("figure", has_text="Held-out loss against cost")
    assert figure.locator(".plot").evaluate("plot => plot.layout.xaxis.title.text") == axis
    head, *_ = table_of(found, figure.locator("button.csv"))
    assert head == ["arm", axis, "loss"]
    found.tab.close()
    assert found.wrong == []


@pytest.mark.slow
def test_of_many_arms_the_baseline_and_the_seven_best_are_drawn(browser: Any, tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path, {"base": -0.5, **{f"a{place}": 0.1 * place for place in range(13)}}, range(2), 20)
    (tmp_path / "r.html").write_text(page(of_sweep(sweep)))
    found = Watched(browser, tmp_path / "r.html")
    assert found.lines("Held-out loss less the baseline's, same seed") == [f"a{place}" for place in range(7)]
    assert found.tab.locator("#shown").text_content() == "8 of 14"
    found.tab.close()
    assert found.wrong == []


def test_one_run_and_several(browser: Any, tmp_path: Path) -> None:
    runs = []
    for name in ("a", "b"):
        write_run(tmp_path / name, name, 0.0, 1, 40, 0, finished=name == "a")
        runs.append(read_run(tmp_path / name))
    for given, names in ((runs[:1], ["a"]), (runs, ["a", "b"])):
        (tmp_path / "r.html").write_text(page(of_runs(given)))
        found = Watched(browser, tmp_path / "r.html")
        assert found.lines("Held-out loss") == names
        found.tab.close()
        assert found.wrong == []
