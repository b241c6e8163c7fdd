"""benchmarks.gpu_check: its runner with real processes that fail in all ways, its sections on a CPU, its refusal."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from benchmarks.gpu_check import attention, machine, runs, speed, waits
from benchmarks.gpu_check.__main__ import run_all
from benchmarks.gpu_check.place import Place
from benchmarks.gpu_check.sections import SECONDS
from benchmarks.gpu_check.sheet import Section, Sheet
from flexbert.kernels.attention import KERNELS
from tests.helpers.runs import ROOT, environment, run

SCRIPTS = {
    "good": 'print(\'ready\'); seconds = float(input()); print(\'{"check": "a", "verdict": "PASS"}\')',
    "bad": 'input(); print(\'{"check": "b", "verdict": "FAIL"}\')',
    "noise": 'input(); print(\'not JSON\'); print(\'{"check": "c", "verdict": "PASS"}\')',
    "raises": 'input(); print(\'{"check": "d", "verdict": "PASS"}\', flush=True); raise RuntimeError(\'no kernel image\')',
    "dies": "import os; os.kill(os.getpid(), 11)",
    "silent": "input()",
    "hangs": 'import subprocess, sys; input(); print(\'{"check": "e", "verdict": "PASS"}\', flush=True); subprocess.run([sys.executable, \'-c\', \'import time; time.sleep(600)\'])',
}


@pytest.fixture
def sheet(tmp_path: Path) -> Iterator[Sheet]:
    with (tmp_path / "results.jsonl").open("w") as file:
        yield Sheet(file)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_a_section_that_fails_ends_alone(tmp_path: Path, sheet: Sheet) -> None:
    """Whatever it does: its lines so far stay, a line says how it ended, and the next one runs."""
    before = set(psutil.Process().children(recursive=True))
    names = ["dies", "raises", "silent", "bad", "noise", "hangs", "good"]
    run_all(names, lambda name: Section(name, tmp_path, [sys.executable, "-c", SCRIPTS[name]], {}), sheet, 1 / 5)
    assert not sheet.close(cut_off=False)
    found = [(line.get("section"), line["check"], line["verdict"]) for line in lines(tmp_path)]
    assert found == [
        ("dies", "dies", "FAIL"),
        ("raises", "d", "PASS"),
        ("raises", "raises", "FAIL"),
        ("silent", "silent", "FAIL"),
        ("bad", "b", "FAIL"),
        ("noise", "c", "PASS"),
        ("hangs", "e", "PASS"),
        ("hangs", "hangs", "FAIL"),
        ("good", "good", "FAIL"),  # the one before it took all the time there was
        (None, "all", "INFO"),
    ]
    errors = {line["check"]: line.get("error", "") for line in lines(tmp_path)}
    assert errors["dies"].startswith("exit code -11: it printed nothing (")
    assert errors["raises"].startswith("exit code 1: RuntimeError: no kernel image (")
    assert errors["hangs"].startswith("not done after ")
    assert errors["good"] == "no time left"
    assert set(psutil.Process().children(recursive=True)) <= before
    assert (tmp_path / "results.jsonl").read_text().splitlines()[-1] == "FAIL"


def test_sections_have_the_time_that_those_before_them_leave(tmp_path: Path, sheet: Sheet) -> None:
    start = time.monotonic()
    run_all(["good", "good"], lambda name: Section(name, tmp_path, [sys.executable, "-c", SCRIPTS[name]], {}), sheet, 1)
    assert time.monotonic() - start < 20
    assert sheet.close(cut_off=False, before="REHEARSED ")
    assert (tmp_path / "results.jsonl").read_text().splitlines()[-1] == "REHEARSED PASS"
    assert sum(SECONDS.values()) <= 9 * 60 - 15


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so() -> None:
    done = run([sys.executable, "-m", "benchmarks.gpu_check"])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "benchmarks.gpu_check: torch sees no CUDA device: run it on a machine with a GPU, or try the program with "
        "--rehearse\n"
    )


def test_what_is_carried_is_what_a_run_is_pinned_to() -> None:
    pinned = {}
    for name in ("requirements.txt", "constraints.txt"):
        rows = [row.partition("#")[0].strip() for row in (ROOT / name).read_text().splitlines()]
        pinned |= {row.split("==")[0].lower(): row for row in rows if "==" in row}
    carried = [row for row in (ROOT / "benchmarks/gpu_check/carried.txt").read_text().splitlines() if row[0] != "#"]
    different = [row for row in carried if pinned.get(row.split("==")[0].lower(), row) != row]
    assert different == ["zstd==1.5.6.1"]  # constraints.txt's has no wheel for Python 3.12
    assert len(carried) > 20


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place("cpu", tmp_path, small=True)


def verdicts(found: Any) -> dict[str, str]:
    return {line["check"]: line["verdict"] for line in found}


def test_machine(place: Place) -> None:
    found = {line["check"]: line for line in machine.check(place)}
    assert found["versions"]["packages"]["torch"] == torch.__version__.split("+")[0]
    assert found["square product"]["tflops"] >= 0
    assert found["copy"]["gigabytes_per_second"] > 0


def test_attention_passes_a_kernel_that_agrees_and_fails_one_that_does_not(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = verdicts(attention.check(place, "sdpa"))
    judged = {check: verdict for check, verdict in good.items() if "is eager's" in check}
    assert len(judged) == 6
    assert set(judged.values()) == {"PASS"}
    assert sum("deterministic False" in check for check in good) == 2
    real = KERNELS["sdpa"]
    wide = lambda q, k, v, plan, window, *rest: real(q, k, v, plan, tuple(w + (w > 0) for w in window), *rest)  # noqa: E731
    monkeypatch.setitem(KERNELS, "sdpa", wide)
    bad = verdicts(attention.check(place, "sdpa"))
    assert {check.split("window ")[1] for check, verdict in bad.items() if verdict == "FAIL"} == {
        f"{side}, {heads} key heads" for side in (64, 7) for heads in (12, 4)
    }


def test_a_kernel_that_cannot_run_is_skipped_with_the_reason(place: Place) -> None:
    (line,) = attention.check(place, "flash2")
    assert (line["verdict"], line["check"]) == ("SKIP", "attention: flash2")
    assert "flash-attn needs a CUDA device, not cpu" in line["why"]


def test_losses_and_bits_that_differ_are_seen(tmp_path: Path) -> None:
    for name, loss in (("a", 2.0), ("b", 2.1)):
        checkpoint = tmp_path / name / "run" / "checkpoints" / "tokens-8"
        checkpoint.mkdir(parents=True)
        metrics = [{"step": 1, "loss": 3.0}, {"step": 1, "validation": {}}, {"step": 2, "loss": loss}]
        (tmp_path / name / "run" / "metrics.jsonl").write_text("\n".join(map(json.dumps, metrics)))
        for file in ("model.safetensors", "optimizer.safetensors"):
            (checkpoint / file).write_bytes(name.encode() if file[0] == "o" else b"same")
    assert runs.apart(tmp_path / "a", tmp_path / "b") == pytest.approx(0.05)
    assert runs.apart(tmp_path / "a", tmp_path / "a") == 0


@pytest.mark.slow
def test_one_rank(tmp_path: Path) -> None:
    """In a process of its own, as it runs: a process has one default group, and another test may have made it."""
    command = [sys.executable, "-m", "benchmarks.gpu_check.section", "one_rank", "cpu", "small", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), input="300\n", capture_output=True, text=True, check=True
    )
    ready, *said = done.stdout.splitlines()
    assert ready == "ready"
    found = verdicts(json.loads(line) for line in said)
    assert len(found) == 8
    assert set(found.values()) == {"PASS"}


@pytest.mark.slow
def test_speed(place: Place) -> None:
    found = {line["check"]: line for line in speed.check(place)}
    assert {line["verdict"] for line in found.values()} <= {"PASS", "INFO", "SKIP"}
    assert found["speed: compiled, 4 x 32"]["rounds"] == 5
    assert found["speed: compiled, 4 x 32"]["tokens_per_second"] > 0
    assert found["speed: peer, sdpa, real lengths to 32"]["share_of_square_product"] >= 0
    assert found["speed: peer, flash"]["verdict"] == "SKIP"
    assert found[f"speed: kernel {speed.KERNELS_SHOWN}"]["calls"] >= 1


@pytest.mark.slow
def test_waits(place: Place) -> None:
    """On a CPU nothing is judged; sdpa asks for lengths, and that is heard."""
    found = {line["check"]: line for line in waits.check(place)}
    assert {line["verdict"] for line in found.values()} == {"INFO"}
    assert found["waits: of a microbatch"]["places"]["nonzero"] > 0


@pytest.mark.slow
def test_the_whole_of_it_can_be_cut_off(tmp_path: Path) -> None:
    """By SIGTERM in the middle of a section: what was found stays, the last line is there, and no process goes on."""
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--rehearse", "--sections", "machine,runs"]
    process = subprocess.Popen(
        [*command, "--output", str(tmp_path)], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    )
    end = time.monotonic() + 240
    while not list(tmp_path.glob("*/runs/plain/run/metrics.jsonl")):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=30)[0].splitlines()
    assert process.returncode == 1
    assert output[-1] == "REHEARSED FAIL"
    assert json.loads(output[-2])["cut_off"] is True
    (file,) = tmp_path.glob("*/results.jsonl")
    assert file.read_text().splitlines() == output
    assert any(line["check"] == "square product" for line in lines(file.parent))
    psutil.wait_procs(children, timeout=10)
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.slow
@pytest.mark.long
def test_runs_and_loop_from_the_command_line(tmp_path: Path) -> None:
    """Killed and resumed runs among them: the bits are the same on the CPU."""
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--rehearse", "--sections", "runs,loop"]
    done = run([*command, "--output", str(tmp_path)], timeout=900, extra={"OMP_NUM_THREADS": "1"})
    (file,) = tmp_path.glob("*/results.jsonl")
    found = verdicts(lines(file.parent))
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-1] == "REHEARSED PASS"
    assert found["run: the bits of killed are those of plain"] == "PASS"
    assert found["run: the losses of fsdp2 are those of plain"] == "PASS"
    assert found["loop: a step of a run takes as long as one of a bare loop"] == "INFO"
