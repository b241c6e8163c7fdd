"""`main.py publish`: what it pushes, what it leaves, and what it says."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

import main
from evals.publishing.places import MANIFEST
from tests.helpers.publishing import EXPORTS


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def publish(run: Path, *arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(main.app, ["publish", str(run), *arguments], env={"COLUMNS": "10000"})
    assert done.exception is None or isinstance(done.exception, SystemExit), done.output
    assert done.exit_code == code, done.output
    return done.output


def times(folder: Path) -> dict[str, int]:
    return {path.name: (path / MANIFEST).stat().st_mtime_ns for path in folder.glob("tokens-*")}


def test_all_is_pushed_once(run: Path, tmp_path: Path) -> None:
    target = tmp_path / "published"
    to = f"publish.folder={target}"
    shown = publish(run, to, "--dry-run")
    assert shown.count("to be pushed") == len(EXPORTS) + 1
    assert f"{len(EXPORTS)} to be pushed, 0 there; main becomes {EXPORTS[3]}" in shown
    assert not target.exists()
    said = publish(run, to)
    assert f"{target}: {len(EXPORTS)} revisions pushed" in said
    assert sorted(path.name for path in target.iterdir()) == sorted([*EXPORTS, "main"])
    assert (target / "main").resolve() == (target / EXPORTS[3]).resolve()
    for name in EXPORTS:
        for file in (run / "exports" / name).iterdir():
            if file.name != "README.md":
                assert (target / name / file.name).read_bytes() == file.read_bytes()
    before = times(target)
    assert "all is there, nothing to do" in publish(run, to)
    (run / "publish.json").unlink()
    assert "5 revisions pushed" in publish(run, to)  # looked at, and found the same
    assert times(target) == before
    assert f"0 to be pushed, {len(EXPORTS)} there; main stays" in publish(run, to, "--dry-run")


def test_what_is_missing_or_changed_is_pushed(run: Path, tmp_path: Path) -> None:
    target = tmp_path / "published"
    to = f"publish.folder={target}"
    publish(run, to)
    before = times(target)
    shutil.rmtree(target / EXPORTS[1])
    (target / EXPORTS[3] / "model.safetensors").write_bytes(b"short")
    assert "2 revisions pushed" in publish(run, to)
    after = times(target)
    assert {name for name in EXPORTS if after[name] != before[name]} == {EXPORTS[1], EXPORTS[3]}
    assert "5 revisions pushed" in publish(run, to, "publish.licence=mit")
    assert "license: mit" in (target / EXPORTS[0] / "README.md").read_text()


def test_one_revision_alone(run: Path, tmp_path: Path) -> None:
    target = tmp_path / "published"
    to = f"publish.folder={target}"
    publish(run, to, "--only", EXPORTS[1])
    assert sorted(path.name for path in target.iterdir()) == ["main", EXPORTS[1]]
    publish(run, to)
    (run / "publish.json").unlink()
    publish(run, to, "--only", EXPORTS[0])
    assert (target / "main").readlink() == Path(EXPORTS[3])  # an older one takes nobody's place
    line = publish(run, to, "--only", "tokens-5", code=2)
    assert line.startswith("error: --only: tokens-5: ")
    assert len(line.splitlines()) == 1


def test_results_that_were_given_once_stay(run: Path, tmp_path: Path) -> None:
    from evals.models import digest_of

    results = tmp_path / "results"
    results.mkdir()
    node = {
        "evaluation": "glue-quick",
        "model": {"digest": digest_of(run / "exports" / EXPORTS[1]), "tokens": 512},
        "scores": {"mean": 0.5},
        "complete": True,
        "config": {"name": "glue"},
    }
    (results / "results.json").write_text(json.dumps(node))
    to = f"publish.folder={tmp_path / 'published'}"
    publish(run, to)
    assert "1 revision pushed" in publish(run, to, "--results", str(results))
    assert "nothing to do" in publish(run, to)
    assert "glue-quick" in (tmp_path / "published" / EXPORTS[1] / "README.md").read_text()


def test_another_target_begins_anew(run: Path, tmp_path: Path) -> None:
    publish(run, f"publish.folder={tmp_path}/one")
    assert "5 revisions pushed" in publish(run, f"publish.url=file://{tmp_path}/two")
    assert json.loads((tmp_path / "two/main.json").read_text()) == {"revision": EXPORTS[3]}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "its run file has no `publish`: say where to: publish.folder=DIR"),
        (["publish.folder=x", "publish.url=file:///x"], 2, "publish: give exactly one of repo, folder, url"),
        (["name=other"], 2, "name=other: only keys of `publish` can be set here"),
        (["publish.foldr=x"], 2, "unknown key 'foldr', did you mean 'folder'?"),
        (["publish.folder=x", "--results", "nowhere"], 2, "--results: nowhere: no such folder"),
        (["publish.folder=/proc/nowhere"], 1, "/proc/nowhere"),
        (["publish.url=nothing://x/y"], 2, "nothing://"),
    ],
)
def test_mistakes_are_one_line(run: Path, arguments: list[str], code: int, words: str) -> None:
    said = publish(run, *arguments, code=code)
    (line,) = said.splitlines()
    assert line.startswith("error: ")
    assert words in line


def test_no_run_folder(tmp_path: Path) -> None:
    assert "no run folder" in publish(tmp_path, "publish.folder=x", code=2)


def test_two_do_not_publish_one_run(run: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    hold = "import sys; from pathlib import Path; from flexbert_core.durable import lock\n"
    hold += "kept = lock(Path(sys.argv[1]), Path('x'), 'y'); print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(run / ".publish-lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    line = publish(run, f"publish.folder={tmp_path}/x", code=1)
    holder.communicate("")
    assert f"process {holder.pid} is publishing this run" in line
