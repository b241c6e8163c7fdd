"""Evaluations beside a run: each checkpoint that is due has one, and only one, whatever ends the run in between."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from commands.status import read_status
from flexbert_core.schema import ConfigError
from tests.helpers.ranks import Ranks
from tests.helpers.runs import ROOT, command, run
from tests.helpers.tiny import ROW, ROWS, write_config

STEPS = 6
PER_STEP = ROWS * ROW


def config(folder: Path, data: Path, every: int | None = 2 * PER_STEP, refuses: str = "", **changes: Any) -> Path:
    """A run file with an evaluation beside it, after each second step; checkpoints come after the third, too."""
    folder.mkdir(exist_ok=True)
    (folder / "made").mkdir(exist_ok=True)
    (folder / "weigh.yaml").write_text(
        f"imports: [{ROOT}/tests/helpers/weigher.py]\n"
        f"evaluation: {{name: weigher, count_in: {folder}/made, refuses: '{refuses}'}}\n"
    )
    entry = {"name": "eval", "files": [str(folder / "weigh.yaml")], **({"every": every} if every else {})}
    changes = {"checkpoint": {"interval": 3 * PER_STEP, "keep": 1}, **changes}
    return write_config(folder, data, STEPS, "full", evaluations=[entry], **changes)


def evaluated(folder: Path) -> dict[int, Any]:
    """Scores by step, in evaluations.jsonl; fails when one stands there twice."""
    lines = [json.loads(line) for line in (folder / "run" / "evaluations.jsonl").read_text().splitlines()]
    scores = [(line["step"], line["scores"]) for line in lines if "scores" in line]
    assert len({step for step, _ in scores}) == len(scores)
    return dict(scores)


def logged(folder: Path) -> dict[int, Any]:
    """Scores by step, in metrics.jsonl; fails when one stands there twice."""
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [(line["step"], line["evaluations"]["weigh"]) for line in lines if "weigh" in line.get("evaluations", {})]
    assert len({step for step, _ in found}) == len(found)
    return dict(found)


def times_made(folder: Path) -> dict[str, int]:
    """How often each checkpoint was evaluated."""
    names = [file.name.split("-")[1] for file in (folder / "made").iterdir()]
    return {name: names.count(name) for name in names}


@pytest.fixture(scope="module")
def straight(ranks: Ranks, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    ranks.train(1, str(config(folder, tiny_data)))
    return folder


@pytest.mark.slow
def test_each_checkpoint_that_is_due_is_evaluated_and_logged_with_its_step(straight: Path) -> None:
    scores = evaluated(straight)
    assert list(scores) == [2, 4, 6]
    last = load_file(straight / "run" / "exports" / f"tokens-{6 * PER_STEP}" / "model.safetensors")
    (table,) = (tensor for name, tensor in last.items() if name.endswith("tok_embeddings.weight"))
    assert scores[6] == {"weight": pytest.approx(table.abs().mean().item())}
    assert logged(straight) == scores
    assert set(times_made(straight).values()) == {1}
    assert not list((straight / "run" / "pending").iterdir())
    status = read_status(straight / "run")
    assert status["evaluations"]["weigh"]["scores"] == scores[6]
    assert status["evaluations"]["weigh"]["tokens"] == 6 * PER_STEP


@pytest.mark.slow
@pytest.mark.parametrize("event", ["batch_start", "batch_end"])
def test_a_kill_leaves_none_out_and_none_twice(
    ranks: Ranks, tiny_data: Path, straight: Path, tmp_path: Path, event: str
) -> None:
    killer = {"name": "killer", "steps": [3, 5], "event": event}
    imports = [str(ROOT / "tests" / "helpers" / "killer.py")]
    file = config(tmp_path, tiny_data, imports=imports, callbacks=[killer])
    for _ in killer["steps"]:
        codes, text = ranks.run(1, "train", str(file))
        assert codes == [-signal.SIGKILL], text
    ranks.train(1, str(file))
    assert evaluated(tmp_path) == evaluated(straight)
    assert logged(tmp_path) == logged(straight)


@pytest.mark.slow
def test_what_fails_is_a_warning_and_tried_again(ranks: Ranks, tiny_data: Path, tmp_path: Path) -> None:
    file = config(tmp_path, tiny_data, refuses=f"tokens-{4 * PER_STEP}")
    text = ranks.train(1, str(file))
    assert text.count(f"evaluation weigh of tokens-{4 * PER_STEP}: all: refused") == 1
    assert list(evaluated(tmp_path)) == [2, 6]
    assert list(logged(tmp_path)) == [2, 6]
    # Mended, the same command makes up for it; what went well is not made again.
    (tmp_path / "weigh.yaml").write_text((tmp_path / "weigh.yaml").read_text().replace(f"tokens-{4 * PER_STEP}", ""))
    ranks.train(1, str(file))
    assert set(evaluated(tmp_path)) == {2, 4, 6}
    assert times_made(tmp_path) == {f"{tokens * PER_STEP}": 1 + (tokens == 4) for tokens in (2, 4, 6)}


@pytest.mark.slow
def test_a_finished_run_catches_up_with_an_evaluation_that_is_added(straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight, tmp_path / "copy")
    folder = tmp_path / "copy"
    (folder / "run" / "evaluations.jsonl").unlink()
    shutil.rmtree(folder / "run" / "evaluations")
    done = run(command("follow", str(folder / "run")))
    assert done.returncode == 0, done.stderr
    assert list(evaluated(folder)) == [4, 6]  # what retention has kept
    again = run(command("follow", str(folder / "run")))
    assert again.returncode == 0
    assert list(evaluated(folder)) == [4, 6]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["gleu"], "eval: 'gleu': no such evaluation, did you mean 'glue'"),
        (["no/such.yaml"], "eval: no/such.yaml: no such file"),
        ([], r"evaluations\[0\]\.files: "),
    ],
)
def test_wrong_evaluations_never_start(
    ranks: Ranks, tiny_data: Path, tmp_path: Path, files: list[str], message: str
) -> None:
    file = write_config(tmp_path, tiny_data, STEPS, "full", evaluations=[{"name": "eval", "files": files}])
    codes, text = ranks.run(1, "train", str(file))
    assert codes == [2], text
    assert message.replace("\\", "") in text
    assert not (tmp_path / "run").exists()


def test_what_has_nothing_to_follow_says_so(tiny_data: Path, tmp_path: Path) -> None:
    from evals.following import Following

    with pytest.raises(ConfigError, match="no run folder"):
        Following(tmp_path)
