"""The report as text: what it says of whole and incomplete sweeps, whatever users call their things."""

import csv
import html
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.synthetic_sweep import write_run, write_sweep
from commands.report import report
from flexbert_core.schema import ConfigError
from sweeps.report.cells import Cell
from sweeps.report.page import page
from sweeps.report.subject import differences, of_runs, of_sweep
from sweeps.report.tables import tables
from sweeps.report.writing import latex, markdown, watch_report
from sweeps.results import Judged, SearchResult, Stops, SweepResult, Trial
from sweeps.run_result import read_run
from tests.helpers.runs import ROOT

EVIL = '</script><script>alert(1)</script><img src=x onerror=alert(2)> & "it\'s" {{7*7}} | $x_1$ \\ \u2028'


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> SweepResult:
    folder = tmp_path_factory.mktemp("sweep")
    return write_sweep(folder, {"base": 0.0, "good": -0.03, "same": 0.0}, range(3), lines=40, documents=30)


@pytest.fixture
def incomplete(tmp_path: Path) -> SweepResult:
    return write_sweep(tmp_path, {"base": 0.0, "good": -0.03, "b": 0.0}, range(3), 40, 30, unfinished=[("b", 1)])


def data_of(text: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    return json.loads(found[1])


def cells(table: Sequence[Sequence[Cell]], arm: str) -> list[str]:
    return [cell.text for row in table for cell in row if row[0].text == arm]


def test_the_verdict_table(sweep: SweepResult) -> None:
    first, *others = tables(of_sweep(sweep))
    assert [row[1].text for row in first.rows] == ["baseline", "better", "no difference shown"]
    assert {table.key for table in others} == {"equal-cost", "reaching", "documents", "scores", "mixture"}
    assert [column.head for column in first.columns][:3] == ["arm", "verdict", "difference"]


def test_a_missing_cell_leaves_no_number(incomplete: SweepResult) -> None:
    first = tables(of_sweep(incomplete))[0]
    row = next(row for row in first.rows if row[0].text == "b")
    assert row[1].text == "incomplete: b seed 1 interrupted"
    assert [cell.text for cell in row[2:7]] == ["-", "-", "-", "-", "-"]
    text = page(of_sweep(incomplete))
    assert "Incomplete:</strong> 1 of 9 runs are not finished" in text
    assert [arm["whole"] for arm in data_of(text)["arms"]] == [True, True, False]
    assert "Incomplete: 1 of 9 runs" in markdown(of_sweep(incomplete))
    assert "Incomplete: 1 of 9 runs" in latex(of_sweep(incomplete))


def test_another_held_out_text_is_said(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path, {"base": 0.0, "good": -0.03, "same": 0.0}, range(3), lines=40, documents=0)
    runs = dict(sweep.runs)
    summary = dict(runs["good", 1].summary)
    summary["validation"] = summary["validation"] | {"masked_tokens": 9_999}
    runs["good", 1] = replace(runs["good", 1], summary=summary)
    table = tables(of_sweep(replace(sweep, runs=runs)))[0]
    assert [row[1].text for row in table.rows] == [
        "baseline",
        "better (other held-out text)",
        "no difference shown",
    ]
    assert "Not on the same held-out text as the baseline (other numbers of masked tokens): good." in table.note


def on_other_text(sweep: SweepResult, arm: str) -> SweepResult:
    """As rows of another length make it."""
    runs = dict(sweep.runs)
    for seed in sweep.seeds:
        summary = dict(runs[arm, seed].summary)
        summary["validation"] = summary["validation"] | {"masked_tokens": 9_999}
        runs[arm, seed] = replace(runs[arm, seed], summary=summary)
    return replace(sweep, runs=runs)


def test_losses_of_other_held_out_text_are_compared_nowhere(sweep: SweepResult) -> None:
    """The verdict is of documents, which are the same for all; costs are read off evaluations, which are not."""
    subject = of_sweep(on_other_text(sweep, "good"))
    first, *others = tables(subject)
    assert [row[1].text for row in first.rows] == ["baseline", "better", "no difference shown"]
    found = {table.key: table for table in others}
    assert cells(found["equal-cost"].rows, "good")[1:] == ["-"] * 9
    assert "-" not in cells(found["equal-cost"].rows, "same")
    assert cells(found["reaching"].rows, "good")[1:] == ["other held-out text"] * 3
    for key in ("equal-cost", "reaching"):
        assert "own evaluations, not the loss on held-out documents that verdicts are of" in found[key].note
        assert "(other numbers of masked tokens): good. They are left out." in found[key].note
    assert [arm["other_text"] for arm in data_of(page(subject))["arms"]] == [False, True, False]


def test_a_loss_on_other_text_stands_in_no_picture_of_final_losses(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path, {"base": 0.0, "good": -0.03}, range(2), lines=40, documents=0)
    finals = [run["final"] is None for run in data_of(page(of_sweep(on_other_text(sweep, "good"))))["runs"]]
    assert finals == [False, False, True, True]


def test_arms_that_are_read_before_their_end_are_marked(sweep: SweepResult) -> None:
    """A token of `good` costs 5 % more than the baseline's, one of `same` 10 %: at equal FLOPs they are not done."""
    found = next(table for table in tables(of_sweep(sweep)) if table.key == "equal-cost")
    good, same = cells(found.rows, "good"), cells(found.rows, "same")
    assert "(at" not in good[1] + same[1]
    assert (good[4].split(" (")[1], same[4].split(" (")[1]) == ("at 95%)", "at 91%)")
    assert "read before it, at the share in brackets" in found.note
    assert "The baseline is read" not in found.note
    dear = of_sweep(replace(sweep, baseline="same"))
    note = next(table.note for table in tables(dear) if table.key == "equal-cost")
    assert "The baseline is read at 91% of its FLOPs and 91% of its hours." in note


def test_the_loss_at_a_rung_is_the_one_that_ranked(sweep: SweepResult) -> None:
    """`same` has seed 0 alone, so that all were ranked over it."""
    judged = [Judged("base", 1, {0: 2.0, 1: 4.0}, True), Judged("good", 1, {0: 2.1, 1: 0.1}, False)]
    stops = Stops([0.5], {}, [*judged, Judged("same", 1, {0: 2.05}, True)])
    found = next(table for table in tables(of_sweep(replace(sweep, stops=stops))) if table.key == "rungs")
    told = [[cell.text for cell in row] for row in found.rows]
    assert told == [["base", "2.0000 goes on"], ["good", "2.1000 stopped"], ["same", "2.0500 goes on"]]


def test_what_is_not_finite_is_missing(tmp_path: Path) -> None:
    """A loss and a score."""
    sweep = write_sweep(tmp_path, {"base": 0.0, "good": -0.03}, range(3), lines=40, documents=0)
    runs = dict(sweep.runs)
    run = runs["good", 1]
    summary = dict(run.summary) | {"validation": {"loss": float("nan"), "masked_tokens": 10_000}}
    scores = [{**line, "scores": {**line["scores"], "cola mcc": float("inf")}} for line in run.scores]
    runs["good", 1] = replace(run, summary=summary, scores=scores)
    subject = of_sweep(replace(sweep, runs=runs))
    found = {table.key: table for table in tables(subject)}
    assert cells(found["verdicts"].rows, "good")[1:6] == ["incomplete: good seed 1 not finite", "-", "-", "-", "-"]
    (row,) = [row for row in found["scores"].rows if row[0].text == "glue-quick cola mcc"]
    assert [cell.text for cell in row[2:]] == ["-", "-", "-", "-", "incomplete: good seed 1 not finite"]
    assert "nan" not in re.sub(r"<script.*?</script>", "", page(subject), flags=re.DOTALL)


def test_the_loss_that_verdicts_are_of_is_no_score(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path, {"base": 0.0, "good": -0.03}, range(2), lines=20)
    made = {"evaluations": {"held_out_documents": {"loss": 2.0}, "held_out": {"loss": 2.0}}}
    runs = {cell: replace(run, lines=[*run.lines[:-1], {**run.lines[-1], **made}]) for cell, run in sweep.runs.items()}
    found = next(each for each in tables(of_sweep(replace(sweep, runs=runs))) if each.key == "scores")
    assert {row[0].text for row in found.rows} == {"glue-quick cola mcc", "glue-quick mnli accuracy", "held_out loss"}


def test_one_seed_is_said(tmp_path: Path) -> None:
    text = page(of_sweep(write_sweep(tmp_path, {"base": 0.0, "good": -0.03}, [1], 40, 30)))
    assert "One seed says nothing about seeds: there are no verdicts." in text
    assert "one seed: no verdict" in text


def test_texts_of_users_stay_texts(sweep: SweepResult) -> None:
    names = {arm.name: EVIL if arm.name == "good" else arm.name for arm in sweep.arms}
    arms = [replace(arm, name=names[arm.name], changes={EVIL: EVIL}, notes=[EVIL]) for arm in sweep.arms]
    runs = {(names[arm], seed): replace(run, arm=names[arm]) for (arm, seed), run in sweep.runs.items()}
    paired = {(names[arm], seed): each for (arm, seed), each in sweep.paired.items()}
    subject = of_sweep(replace(sweep, name=EVIL, arms=arms, runs=runs, paired=paired))
    text = page(subject)
    assert text.count("</script>") == 3  # the data's and the two scripts'
    assert "<img" not in text
    assert "49" not in re.findall(r"<h1>(.*?)</h1>", text)[0]
    assert html.unescape(re.findall(r"<h1>(.*?)</h1>", text, re.DOTALL)[0]) == EVIL
    assert EVIL in [arm["name"] for arm in data_of(text)["arms"]]
    told = markdown(subject)
    assert "<script>" not in told
    rows = [line for line in told.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows[:5]} == {10}
    assert r"\$x\_1\$" in latex(subject)
    assert r"\textbackslash{}" in latex(subject)


def test_the_policy_names_exactly_what_is_there(sweep: SweepResult) -> None:
    text = page(of_sweep(sweep))
    policy = re.findall(r'Content-Security-Policy" content="(.*?)"', text)
    assert len(policy) == 1
    assert html.unescape(policy[0]).startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy[0]
    assert not re.findall(r" on\w+=", re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL))
    own = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert not re.findall(r'(?:src|href|style)=(?!"#)', own)


def test_every_curve_is_thin_and_ends_where_it_ends(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "a", 0.0, 1, 2500, 0, True)
    text = page(of_runs([read_run(tmp_path / "a")]))
    (run,) = data_of(text)["runs"]
    assert len(run["groups"][0]["y"]["loss"]) == 1000
    assert (run["groups"][0]["x"]["tokens"][0], run["groups"][0]["x"]["tokens"][-1]) == (1_000_000, 2_500_000_000)
    assert "at most 1000 of the logged lines of each run" in text


def test_several_runs_have_no_verdicts(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name, name, 0.0, 1, 40, 0, True)
    subject = of_runs([read_run(tmp_path / name) for name in ("a", "b")])
    (table, _) = tables(subject)
    assert (table.key, [row[1].text for row in table.rows]) == ("runs", ["model.mlp=a", "model.mlp=b"])
    assert "verdicts over" not in page(subject).lower()


def test_differences_look_into_lists() -> None:
    ours, theirs = {"phases": [{"lr": 1}], "seed": 1}, {"phases": [{"lr": 2}], "seed": 2, "x": 1}
    assert differences([ours, theirs]) == [{"phases.0.lr": 1, "seed": 1}, {"phases.0.lr": 2, "seed": 2, "x": 1}]


def test_what_the_ending_says_is_written(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "a", 0.0, 1, 40, 0, True)
    for name, start in (("r.html", "<!doctype html>"), ("r.md", "# a"), ("r.tex", "% \\usepackage")):
        assert report([tmp_path / "a"], tmp_path / name, watch=False) == [tmp_path / name]
        assert (tmp_path / name).read_text().startswith(start)


@pytest.mark.parametrize(
    ("runs", "output", "watch", "line"),
    [
        (
            ["a"],
            "r.txt",
            False,
            "r.txt: the ending says what is written: give one of .html, .md, .tex, .png, .pdf, .svg",
        ),
        (["a", "b"], "r.png", False, "r.png: a picture is of one run"),
        (["a"], "r.png", True, "--watch: "),
        (["a", "b"], None, False, "--output: say where the page of several runs goes"),
        (["a", "a"], "r.html", False, "given twice"),
        (["idle"], "r.html", False, "nothing to draw: metrics.jsonl has no line with a loss of training yet"),
        (["a"], "no/r.html", False, "give a file in a folder that exists"),
        (["nothing"], "r.html", False, "no run folder"),
    ],
)
def test_bad_input_is_named(tmp_path: Path, runs: list[str], output: str | None, watch: bool, line: str) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name, name, 0.0, 1, 20, 0, True)
    (tmp_path / "idle").mkdir()
    (tmp_path / "idle" / "config.yaml").write_text("name: idle\n")
    with pytest.raises(ConfigError) as error:
        report([tmp_path / run for run in runs], tmp_path / output if output else None, watch)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_watching_ends_when_nothing_trains(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "a", 0.0, 1, 20, 0, True)
    waits: list[float] = []
    watch_report([tmp_path / "a"], tmp_path / "r.html", waits.append)
    assert len(waits) == 3
    assert data_of((tmp_path / "r.html").read_text())["reload"] is None
    assert [file.name for file in tmp_path.iterdir()] == ["a", "r.html"] or len(list(tmp_path.iterdir())) == 2


def test_watching_a_sweep_ends_with_its_command(tmp_path: Path) -> None:
    """Here that of another process, of which no run trains: it searches, or its jobs wait in a queue. A run that died
    before its first line keeps nothing alive."""
    sweep = write_sweep(tmp_path, {"base": 0.0, "good": 0.0}, range(2), lines=20)
    runs = dict(sweep.runs)
    runs["good", 1] = replace(runs["good", 1], state="waiting", lines=(), summary={})
    subject = of_sweep(replace(sweep, runs=runs))
    assert not subject.alive
    code = "import sys; from pathlib import Path; from flexbert_core.durable import lock\n"
    code += "with lock(Path(sys.argv[1]), Path('.'), 'training'): print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        process.stdout.readline()
        assert subject.alive
        process.stdin.close()
    assert not subject.alive


def test_runs_that_the_sweep_file_no_longer_has_are_told(tmp_path: Path) -> None:
    """An arm that lost was taken out of the file: Holm's family is smaller than what was tried. Trials are no arms."""
    whole = write_sweep(tmp_path / "made", {"base": 0.0, "good": -0.03, "lost": 0.03}, range(3), lines=20)
    runs = {}
    for (arm, seed), run in whole.runs.items():
        folder = tmp_path / "runs" / f"{arm}-s{seed}"
        runs[arm, seed] = replace(run, folder=Path(shutil.copytree(run.folder, folder)))
    shutil.copytree(whole.runs["lost", 0].folder, tmp_path / "runs" / "search-0-s1000")
    trials = [Trial(0, {}, {}, "finished", 2.0)]
    whole = replace(whole, folder=tmp_path, runs=runs, search=SearchResult(1, 1000, trials))
    less = {cell: run for cell, run in runs.items() if cell[0] != "lost"}
    cut = replace(whole, arms=[arm for arm in whole.arms if arm.name != "lost"], runs=less)
    assert "no longer has" not in tables(of_sweep(whole))[0].note
    told = f" 3 finished runs are in {tmp_path / 'runs'} of arms or seeds that the sweep file no longer has"
    assert told in tables(of_sweep(cut))[0].note


def test_csv_of_names_is_readable() -> None:
    """Python's own reader is what tests/sweeps/test_page.py holds the page's CSV files against."""
    assert next(csv.reader(['"a ""b"", c",1'])) == ['a "b", c', "1"]
    assert Cell("x").bar is None
