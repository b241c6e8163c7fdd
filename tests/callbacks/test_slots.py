"""Callbacks, algorithms and loggers that a run file names: they see a run's events, their metrics reach everything that
shows metrics, and their state survives a kill."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.callbacks import SpeedMonitor
from composer.core import Time, Timestamp

from callbacks.step_log import append_line, flat, nested, read_lines, trim_lines
from commands.status import read_status
from flexbert_core.schema import ConfigError
from recipe.config import load_run_config, read_recorded_config
from recipe.phases import PhasePlan
from tests.helpers.ranks import Ranks
from tests.helpers.runs import ROOT, command, environment, launched, run
from tests.helpers.tiny import ROW, ROWS, write_config
from training.parts import Parts, pack, unpack

STEPS = 8
INTERVAL = 2 * ROWS * ROW  # tokens of two steps
MINE: dict[str, Any] = {
    "imports": [str(ROOT / "examples" / "weight_norm.py"), str(ROOT / "tests" / "helpers" / "gate.py")],
    "callbacks": [{"name": "weight_norm", "interval": INTERVAL}],
}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def wait(until: Callable[[], bool], process: "subprocess.Popen[Any]") -> None:
    end = time.monotonic() + 120
    while not until():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def straight(ranks: Ranks, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    ranks.train(1, str(write_config(folder, tiny_data, STEPS, "full", **MINE)))
    return folder


def test_what_a_callback_logs_reaches_file_status_and_tensorboard(straight: Path) -> None:
    found = {line["step"]: line["weights"] for line in lines(straight) if "weights" in line}
    assert {step: each["measured"] for step, each in found.items()} == {2: 1, 4: 2, 6: 3, 8: 4}
    assert len(lines(straight)) == STEPS  # what is logged of a step stands in one line, its evaluation too
    assert lines(straight)[-1].keys() >= {"loss", "validation", "weights", "tokens"}
    from safetensors.torch import load_file

    weights = load_file(straight / "run" / "checkpoints" / f"tokens-{4 * ROWS * ROW}" / "model.safetensors")
    norm = torch.cat([tensor.flatten().double() for tensor in weights.values()]).norm()
    assert found[4]["norm"] == pytest.approx(float(norm), rel=1e-6)
    assert read_status(straight / "run")["others"]["weights/norm"] == found[8]["norm"]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next((straight / "run" / "tensorboard").rglob("*tfevents*")).parent))
    events.Reload()
    assert [event.step for event in events.Scalars("weights/norm")] == [2, 4, 6, 8]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_and_resumed_it_goes_on_counting(
    straight: Path, tiny_data: Path, tmp_path: Path, processes: int
) -> None:
    """Killed before step 6, behind a checkpoint of step 5: the same lines as without the kill."""
    gated = [*MINE["callbacks"], {"name": "gate", "step": 6}]
    config = write_config(tmp_path, tiny_data, STEPS, "full", **{**MINE, "callbacks": gated})
    arguments = command("train", str(config)) if processes == 1 else launched(2, "train", str(config))
    process = subprocess.Popen(
        arguments, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    saved = tmp_path / "run" / "checkpoints" / f"tokens-{5 * ROWS * ROW}"
    waiting = [tmp_path / "run" / f"waiting-{rank}" for rank in range(processes)]
    wait(lambda: saved.exists() and all(file.exists() for file in waiting), process)
    for file in waiting:
        os.kill(int(file.read_text()), signal.SIGKILL)
    process.wait()
    (tmp_path / "run" / "go").touch()
    done = run(arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    ours, theirs = ([line for line in lines(folder) if "loss" in line] for folder in (tmp_path, straight))
    assert [line["step"] for line in ours] == list(range(1, STEPS + 1))
    assert [line["weights"]["measured"] for line in ours if "weights" in line] == [1, 2, 3, 4]
    rel = 0.0 if processes == 1 else 1e-4
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in ours] == pytest.approx([line[name] for line in theirs], rel=rel, abs=0.0)


@pytest.mark.slow
def test_composers_clipping_is_ours(ranks: Ranks, tiny_data: Path, tmp_path: Path) -> None:
    """An algorithm of Composer's changes training: here as trainer.gradient_clip_norm does, which is tested elsewhere."""
    clip = {"name": "composer", "class": "GradientClipping"}
    clip |= {"arguments": {"clipping_type": "norm", "clipping_threshold": 0.05}}
    for name, changes in (("theirs", {"algorithms": [clip]}), ("ours", {"trainer": {"gradient_clip_norm": 0.05}})):
        ranks.train(1, str(write_config(tmp_path / name, tiny_data, 3, "full", **changes)))
    theirs, ours = ([line["loss"] for line in lines(tmp_path / name)] for name in ("theirs", "ours"))
    assert theirs == pytest.approx(ours, rel=1e-6)
    ranks.train(1, str(write_config(tmp_path / "plain", tiny_data, 3, "full")))
    assert [line["loss"] for line in lines(tmp_path / "plain")] != pytest.approx(ours, rel=1e-5)


def test_composers_tokens_go_on_after_a_restart(ranks: Ranks, tiny_data: Path, tmp_path: Path) -> None:
    """Composer's timestamp is restored whole: its callbacks count intervals in tokens and samples, not in steps."""
    monitor = {"name": "composer", "class": "SpeedMonitor", "arguments": {"window_size": 2}}
    ranks.train(1, str(write_config(tmp_path, tiny_data, 4, "full", callbacks=[monitor])))
    state = json.loads((tmp_path / "run/checkpoints" / f"tokens-{3 * ROWS * ROW}" / "state.json").read_text())["run"]
    timestamp = Timestamp()
    timestamp.load_state_dict(unpack(state["timestamp"], {}))
    assert timestamp.batch == Time.from_batch(3)
    assert timestamp.sample == Time.from_sample(3 * ROWS)
    assert timestamp.token == Time.from_token(lines(tmp_path)[2]["real_tokens"])
    assert state["parts"].keys() == {"composer/SpeedMonitor"}
    assert "throughput" in lines(tmp_path)[-1]


class Odd:
    pass


def test_states_of_all_kinds_come_back() -> None:
    state = {
        "tensor": torch.arange(6).reshape(2, 3).T,
        "numbers": [1, 2.5, None, True],
        "nested": {"a": (1, (2,)), 3: {"b": {4}}},
        "array": torch.randn(3, generator=torch.Generator().manual_seed(0)).numpy(),
        "time": Time.from_timestring("200tok"),
        "bytes": b"\xff\x00",
    }
    tensors: dict[str, torch.Tensor] = {}
    back = unpack(json.loads(json.dumps(pack(state, "x", tensors))), tensors)
    assert torch.equal(back.pop("tensor"), state["tensor"])
    assert (back.pop("array") == state["array"]).all()
    assert back == {key: value for key, value in state.items() if key not in ("tensor", "array")}
    timestamp = Timestamp(batch=3, token=7).state_dict()
    assert unpack(json.loads(json.dumps(pack(timestamp, "x", {}))), {}) == timestamp
    with pytest.raises(TypeError, match="x/odd is a Odd"):
        pack({"odd": Odd()}, "x", {})


def test_a_torn_line_takes_no_other_with_it(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    append_line(file, {"step": 1})
    with file.open("a") as out:
        out.write('{"step": 2, "lo')  # as a kill or a full disk leaves it
    append_line(file, {"step": 2, "loss": 3.0})
    append_line(file, {"step": 3})
    assert list(read_lines(file)) == [{"step": 1}, {"step": 2, "loss": 3.0}, {"step": 3}]
    assert len(file.read_text().splitlines()) == 4


def test_lines_that_are_dropped_take_no_other_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even when the machine is lost just then: what stays is on the disk before it has the file's name."""
    file, synced, sync = tmp_path / "ledger.jsonl", list[str](), os.fsync

    def noted(handle: int) -> None:
        sync(handle)
        synced.append(str(Path(f"/proc/self/fd/{handle}").readlink()))

    monkeypatch.setattr(os, "fsync", noted)
    for step in (1, 2, 3):
        append_line(file, {"step": step})
    trim_lines(file, 1, keep=lambda line: "3" in line)
    assert list(read_lines(file)) == [{"step": 1}, {"step": 3}]
    beside, folder = synced
    assert Path(beside).parent == tmp_path != Path(beside)
    assert folder == str(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_names_nest_and_flatten() -> None:
    node = {"loss": 1.0, "streams": {"a": {"loss": 2.0}}, "unknown": None}
    assert nested(flat(node, "train"))["train"]["streams"] == {"a": {"loss": 2.0}}
    assert nested({"a/b": 1, "a/b/c": 2}) == {"a": {"b": 1, "b/c": 2}}
    assert nested({"a/b/c": 2, "a/b": 1}) == {"a": {"b": {"c": 2}}, "a/b": 1}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("callbacks=[{name: composer,class: SpeedMonitr}]", "callbacks[0]: class: Composer has no callback 'SpeedMonitr', did you mean 'SpeedMonitor'?"),
        ("callbacks=[{name: composer,class: SpeedMonitor,arguments: {windowsize: 3}}]", "callbacks[0]: arguments: SpeedMonitor has no 'windowsize', did you mean 'window_size'?"),
        ("algorithms=[{name: composer,class: SpeedMonitor}]", "algorithms[0]: class: Composer has no algorithm 'SpeedMonitor'"),
        ("callbacks=[speedmonitor]", "callbacks[0]: unknown callback 'speedmonitor', valid names: composer"),
        ("loggers=[{name: wandb}]", "loggers[0].project: is required and missing"),
        ("wandb.project=x", "wandb: is an entry of `loggers`"),
    ],
)  # fmt: skip
def test_a_wrong_part_never_starts(tiny_data: Path, tmp_path: Path, change: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_run_config(write_config(tmp_path, tiny_data, 1, "full"), [change])
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_arguments_that_the_class_itself_refuses_name_the_key(tiny_data: Path, tmp_path: Path) -> None:
    wrong = "callbacks=[{name: composer,class: SpeedMonitor,arguments: {window_size: nine}}]"
    config = load_run_config(write_config(tmp_path, tiny_data, 1, "full"), [wrong])
    with pytest.raises(ConfigError, match=r"^callbacks\[0\]\.arguments: SpeedMonitor: "):
        Parts(config, PhasePlan(config), tmp_path)


def test_a_config_recorded_with_a_wandb_section_still_loads(tiny_data: Path, tmp_path: Path) -> None:
    config = load_run_config(write_config(tmp_path, tiny_data, 1, "full"))
    from omegaconf import OmegaConf

    node = config.model_dump(mode="json")
    for name in ("callbacks", "algorithms", "loggers"):
        del node[name]
    for wandb, expected in (
        (None, ["tensorboard"]),
        ({"project": "p", "entity": None, "mode": "offline"}, ["tensorboard", "wandb"]),
    ):
        OmegaConf.save(OmegaConf.create({**node, "wandb": wandb}), tmp_path / "config.yaml")
        assert [each.name for each in read_recorded_config(tmp_path / "config.yaml").loggers] == expected


def test_a_callback_of_composers_is_built(tiny_data: Path, tmp_path: Path) -> None:
    monitor = "callbacks=[{name: composer,class: SpeedMonitor,arguments: {window_size: 7}}]"
    config = load_run_config(write_config(tmp_path, tiny_data, 1, "full"), [monitor])
    (part,) = Parts(config, PhasePlan(config), tmp_path).callbacks
    assert isinstance(part, SpeedMonitor)
    assert part.history_wct.maxlen == 8


TALKER = """
from composer.core import Callback
from flexbert_core.schema import Component
from recipe.slots import CALLBACKS

@CALLBACKS.register("talker")
class Talker(Callback):
    class Config(Component):
        pass
    def __init__(self, config, *, plan, folder):
        pass
    def batch_end(self, state, logger):
        logger.log_metrics({"mine/text": "much", "mine/number": 7})
"""


def test_what_is_no_number_is_said_once(ranks: Ranks, tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "talker.py").write_text(TALKER)
    mine = {"imports": [str(tmp_path / "talker.py")], "callbacks": ["talker"]}
    text = ranks.train(1, str(write_config(tmp_path, tiny_data, 3, "full", **mine)))
    assert text.count("metric mine/text: 'much' is no number: left out") == 1
    assert [line["mine"] for line in lines(tmp_path)] == [{"number": 7}] * 3
