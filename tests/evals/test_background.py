"""Evaluations beside a run: each checkpoint that is due has one, and only one, whatever ends the run in between."""

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from commands.status import read_status
from flexbert_core.schema import ConfigError
from tests.helpers.ranks import Ranks
from tests.helpers.runs import ROOT, command, run, start
from tests.helpers.tiny import ROW, ROWS, write_config
from training.checkpoints.files import list_checkpoints, tokens_of

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
    assert not list((straight / "run" / "pending-weigh").iterdir())
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
    """Also of a checkpoint that retention has taken away since."""
    failing = f"tokens-{2 * PER_STEP}"
    file = config(tmp_path, tiny_data, refuses=failing)
    text = ranks.train(1, str(file))
    assert text.count(f"evaluation weigh of {failing}: all: refused") == 1
    assert list(evaluated(tmp_path)) == [4, 6]
    assert list(logged(tmp_path)) == [4, 6]
    assert not (tmp_path / "run" / "checkpoints" / failing).exists()
    assert [path.name for path in (tmp_path / "run" / "pending-weigh").iterdir()] == [failing]
    # Mended, the same command makes up for it; what went well is not made again.
    (tmp_path / "weigh.yaml").write_text((tmp_path / "weigh.yaml").read_text().replace(failing, ""))
    ranks.train(1, str(file))
    assert set(evaluated(tmp_path)) == {2, 4, 6}
    assert times_made(tmp_path) == {f"{tokens * PER_STEP}": 1 + (tokens == 2) for tokens in (2, 4, 6)}
    assert not list((tmp_path / "run" / "pending-weigh").iterdir())


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
    from evals.following import following_of

    with pytest.raises(ConfigError, match="no run folder"):
        following_of(tmp_path)


@pytest.mark.slow
def test_two_entries_have_a_process_each(ranks: Ranks, tiny_data: Path, tmp_path: Path) -> None:
    config(tmp_path, tiny_data)
    shutil.copy(tmp_path / "weigh.yaml", tmp_path / "again.yaml")
    entries = [{"name": "eval", "files": [str(tmp_path / f"{name}.yaml")]} for name in ("weigh", "again")]
    file = write_config(tmp_path, tiny_data, STEPS, "full", evaluations=entries)
    ranks.train(1, str(file))
    for name in ("weigh", "again"):
        assert "error" not in (tmp_path / "run" / f"evaluations-{name}.log").read_text()
    lines = [json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    assert sorted(line["evaluation"] for line in lines if line["step"] == STEPS) == ["again", "weigh"]


def test_an_evaluation_of_two_entries_is_refused(ranks: Ranks, tiny_data: Path, tmp_path: Path) -> None:
    entry = {"name": "eval", "files": ["glue-quick"]}
    file = write_config(tmp_path, tiny_data, STEPS, "full", evaluations=[entry, entry])
    codes, text = ranks.run(1, "train", str(file))
    assert codes == [2], text
    assert "evaluations: 'glue-quick' is named by two entries `eval`" in text


@pytest.mark.slow
def test_a_process_that_ends_early_is_said(ranks: Ranks, tiny_data: Path, tmp_path: Path) -> None:
    entry = {"name": "eval", "files": ["glue-quick"], "set": [f"data={tmp_path}/no/such"]}
    text = ranks.train(1, str(write_config(tmp_path, tiny_data, STEPS, "full", evaluations=[entry])))
    assert text.count("EVALUATIONS ENDED (exit code 2)") == 1, text
    assert "evaluations-glue-quick.log" in text


@pytest.mark.slow
def test_a_file_that_is_gone_is_said_in_one_line(straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight / "run", tmp_path / "run")
    recorded = tmp_path / "run" / "config.yaml"
    recorded.write_text(recorded.read_text().replace(f"{straight}/weigh.yaml", f"{tmp_path}/weigh.yaml"))
    done = run(command("follow", str(tmp_path / "run")))
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert f"{tmp_path}/weigh.yaml: no such file" in done.stderr


@pytest.mark.slow
def test_a_signal_ends_the_waiting_and_the_next_start_makes_up(ranks: Ranks, tiny_data: Path, tmp_path: Path) -> None:
    file = config(tmp_path, tiny_data)
    weigh = tmp_path / "weigh.yaml"
    text = weigh.read_text()
    weigh.write_text(text.replace("{name: weigher", "{name: weigher, seconds: 600"))
    process = start(file)
    end = time.monotonic() + 120
    while not (tmp_path / "run" / "summary.json").exists() or not list((tmp_path / "made").iterdir()):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 85
    weigh.write_text(text)
    ranks.train(1, str(file))
    assert set(evaluated(tmp_path)) == {2, 4, 6}


@pytest.mark.slow
def test_a_checkpoint_of_no_step_ends_no_run(ranks: Ranks, tiny_data: Path, tmp_path: Path) -> None:
    killer = {"name": "killer", "steps": [5], "event": "batch_start"}
    imports = [str(ROOT / "tests" / "helpers" / "killer.py")]
    file = config(
        tmp_path, tiny_data, imports=imports, callbacks=[killer], checkpoint={"interval": PER_STEP, "keep": 9}
    )
    ranks.run(1, "train", str(file))
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.copytree(checkpoints / f"tokens-{3 * PER_STEP}", checkpoints / f"tokens-{3 * PER_STEP + 1}")
    ranks.train(1, str(file))  # that one is of no step
    assert set(evaluated(tmp_path)) == {2, 4, 6}


@pytest.mark.slow
def test_scores_of_other_weights_do_not_count(straight: Path, tmp_path: Path) -> None:
    from evals.following import following_of

    shutil.copytree(straight / "run", tmp_path / "run")
    (following,) = following_of(tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / f"tokens-{STEPS * PER_STEP}"
    assert following.missing(last) == []
    following.pin(last)
    assert following.waiting() == []
    text = following.lines.read_text()
    mark = json.loads((last / "manifest.json").read_text())["files"]["model.safetensors"]["xxh3_64"]
    following.lines.write_text(text.replace(mark, "0" * 16))
    assert following.missing(last) == ["weigh"]
    following.pin_all()
    assert [path.name for path in following.waiting()][-1] == last.name
    following.pin_all(up_to=0)
    assert following.waiting() == []


@pytest.mark.slow
@pytest.mark.long
def test_a_rollback_gives_up_the_scores_of_its_steps(ranks: Ranks, tiny_data: Path, tmp_path: Path) -> None:
    """Checkpoints of both histories are evaluated; only those of the newer one are the run's."""
    steps = 24
    changes = {
        "imports": [str(ROOT / "tests" / "helpers" / "gate.py")],
        "phases": [
            {"name": "all", "tokens": steps * PER_STEP, "max_seq_len": ROW, "global_batch_size": ROWS, "lr": 1e-2}
        ],
        "trainer": {"log_interval": 1, "spike_guard": {"sigmas": 0.5, "window": 8, "skip": 2}},
        "checkpoint": {"interval": PER_STEP, "keep": 99},
    }
    ranks.train(1, str(write_config(tmp_path / "alone", tiny_data, steps, "full", **changes)))
    ledger = (tmp_path / "alone" / "run" / "ledger.jsonl").read_text().splitlines()
    first, last = next(json.loads(line)["skip"] for line in ledger if "skip" in line)

    folder = tmp_path / "followed"
    file = config(folder, tiny_data, every=PER_STEP, callbacks=[{"name": "gate", "step": last}], **changes)
    process = start(file)
    end = time.monotonic() + 180
    while not ((folder / "run" / "evaluations.jsonl").exists() and last - 1 in evaluated(folder)):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.1)
    given_up = evaluated(folder)
    (folder / "run" / "go").touch()
    assert process.wait(180) == 0
    lines = [json.loads(line) for line in (folder / "run" / "evaluations.jsonl").read_text().splitlines()]
    made = [line for line in lines if line["step"] in range(first, last)]
    assert len({line["weights"] for line in made}) == len(made) > last - first  # some of both histories
    truth = {}
    for path in list_checkpoints(folder / "run" / "checkpoints"):
        (table,) = (
            tensor
            for name, tensor in load_file(path / "model.safetensors").items()
            if name.endswith("embedding.tokens.weight")
        )
        truth[tokens_of(path) // PER_STEP] = {"weight": pytest.approx(table.abs().mean().item())}
    assert set(truth) >= set(range(1, steps + 1)) - set(range(first, last))
    found = {line["step"]: line["scores"] for line in lines}
    assert {step: found[step] for step in truth} == truth
    assert given_up[last - 1] != found.get(last - 1)
    newest = {}
    for text in (folder / "run" / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        if "weigh" in line.get("evaluations", {}):
            newest[line["step"]] = line["evaluations"]["weigh"]
    assert {step: newest[step] for step in truth} == truth
