"""Section `runs`: `main.py train` in processes of its own: to its end, the same bits again, killed and resumed.

All runs go side by side, as many as the cores allow, since none of them is timed.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.gpu_check.data import write_config, write_data
from benchmarks.gpu_check.place import Line, Place, failed, told
from training.checkpoints.files import list_checkpoints

ROOT = Path(__file__).parent.parent.parent
GATE = ROOT / "tests" / "helpers" / "gate.py"
KILLED_BEFORE = 5  # the step
VOCABULARY = 512
_ROUNDING = 0.02  # of bfloat16, in a loss


@dataclass
class Asked:
    """A run. kill: before KILLED_BEFORE, and resumed with `then`."""

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    kill: bool = False
    then: tuple[str, ...] = ()


STRAIGHT = [
    Asked("compiled, killed", {"trainer": {"compile": True}}, kill=True),  # the longest: two compilations
    Asked("compiled", {"trainer": {"compile": True}}),
    Asked("plain"),
    Asked("killed", kill=True),
    Asked("ddp, killed, resumed as fsdp2", kill=True, then=("trainer.parallelism=fsdp2",)),
    Asked("fsdp2", {"trainer": {"parallelism": "fsdp2"}}),
    Asked("plain again"),
    Asked("auto", {"trainer": {"microbatch_size": "auto"}}),
    Asked("muon", {"optimizer": "muon"}),
    Asked("muon again", {"optimizer": "muon"}),
    Asked("adamw", {"optimizer": "adamw"}),
    Asked("adamw again", {"optimizer": "adamw"}),
]
SAME_BITS = [
    *(("plain", "plain again"), ("plain", "killed"), ("compiled", "compiled, killed")),
    *(("muon", "muon again"), ("adamw", "adamw again")),
]
SAME_LOSSES = ["compiled", "fsdp2", "ddp, killed, resumed as fsdp2", "auto"]


def check(place: Place) -> Iterator[Line]:
    asked = [each for each in STRAIGHT if not place.small or each.name in ("plain", "killed", "fsdp2")]
    steps, row, rows = (8, 32, 4) if place.small else (40, 128, 8)
    data = write_data(place.folder / "data", VOCABULARY, row, 600)
    model = {"vocab_size": VOCABULARY, "hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 4}
    model |= {"intermediate_size": 192, "max_position_embeddings": 2 * row}
    files = {
        each.name: write_config(
            place.folder / each.name.replace(", ", "-").replace(" ", "-"), data, model, steps, row, rows,
            **(each.changes | ({"imports": [str(GATE)], "callbacks": [gate()]} if each.kill else {})),
        )
        for each in asked
    }  # fmt: skip
    at_once = max(1, min(6, len(os.sched_getaffinity(0)) // 2))
    with ThreadPoolExecutor(at_once) as pool:
        found = dict(
            zip(files, pool.map(lambda each: _ended(place, each, files[each.name], steps), asked), strict=True)
        )
    for name, error in found.items():
        yield failed(f"run: {name}", error) if error else told(f"run: {name} comes to its end", True, steps=steps)
    good = {name for name, error in found.items() if error is None}
    for first, second in SAME_BITS:
        if {first, second} <= good:
            different = other_bits(files[first].parent, files[second].parent)
            yield told(f"run: the bits of {second} are those of {first}", not different, different=different)
    for name in SAME_LOSSES:
        if {"plain", name} <= good:
            off = apart(files["plain"].parent, files[name].parent)
            yield told(f"run: the losses of {name} are those of plain", off <= _ROUNDING, relative=round(off, 5))
    for name in sorted(good):
        yield told(f"run: {name}", **summary(files[name].parent))


def gate() -> dict[str, Any]:
    """The callback that holds a run until it has been seen there (tests/helpers/gate.py)."""
    return {"name": "gate", "step": KILLED_BEFORE}


def _ended(place: Place, asked: Asked, file: Path, steps: int) -> Exception | None:
    """Run it to its end; what was wrong, if anything."""
    try:
        if asked.kill:
            _killed(place, file)
        log = file.with_name("train.log")
        _wait(_start(place, file, log, *asked.then), log, place)
        done = json.loads((file.parent / "run" / "summary.json").read_text())
        if done["steps"] != steps or not Path(done["export"] or "").is_dir():
            raise RuntimeError(f"{done['steps']} of {steps} steps, export {done['export']}")
    except Exception as error:
        return error
    return None


def _start(place: Place, file: Path, log: Path, *overrides: str) -> "subprocess.Popen[bytes]":
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    variables |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    if not place.on_gpu:
        variables["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, str(ROOT / "main.py"), "train", str(file), *overrides]
    with log.open("ab") as output:
        return subprocess.Popen(
            command, cwd=ROOT, env=variables, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )


def _wait(process: "subprocess.Popen[bytes]", log: Path, place: Place) -> None:
    """Raises RuntimeError for another exit code than 0, with the last line of its log."""
    try:
        code = process.wait(min(max(place.left, 1), 1e6))
    except subprocess.TimeoutExpired:
        code = "no exit code: no time left"
    finally:
        process.kill()
    if code:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise RuntimeError(f"{code}: {lines[-1] if lines else 'it printed nothing'} ({log})")


def _killed(place: Place, file: Path) -> None:
    """Start it, and kill it and its loader's processes where it waits at the gate."""
    log, run = file.with_name("killed.log"), file.parent / "run"
    process = _start(place, file, log)
    while process.poll() is None and place.left > 1 and not (run / "waiting-0").exists():
        time.sleep(0.02)
    if not (run / "waiting-0").exists():
        _wait(process, log, place)
        raise RuntimeError(f"it did not come to step {KILLED_BEFORE} ({log})")
    deadline = time.monotonic() + 30  # the thread that writes checkpoints
    while len(list_checkpoints(run / "checkpoints")) < KILLED_BEFORE - 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for child in children:
        if child.is_running():
            child.kill()
    (run / "go").touch()


def other_bits(first: Path, second: Path) -> list[str]:
    """Files of the last checkpoint that differ: weights, optimizer states."""
    last = [list_checkpoints(folder / "run" / "checkpoints")[-1] for folder in (first, second)]
    names = ("model.safetensors", "optimizer.safetensors")
    return [name for name in names if (last[0] / name).read_bytes() != (last[1] / name).read_bytes()]


def apart(first: Path, second: Path) -> float:
    """Largest relative difference of the losses of a step; infinite where steps lack."""
    ours, theirs = _losses(first), _losses(second)
    if ours.keys() != theirs.keys():
        return float("inf")
    return max(abs(theirs[step] / loss - 1) for step, loss in ours.items())


def _losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line.get("loss") is not None}


def summary(folder: Path) -> dict[str, Any]:
    """What a run says at its end."""
    found = json.loads((folder / "run" / "summary.json").read_text())
    said = [
        line for line in (folder / "train.log").read_text(errors="replace").splitlines() if "deterministic:" in line
    ]
    return {
        "validation_loss": round(found["validation"]["loss"], 6),
        "seconds": round(found["seconds"], 1),
        "says": said[-1].strip() if said else None,
    }
