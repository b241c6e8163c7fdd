"""All that one GPU can prove of this project, in one go of at most 9 minutes. It needs no network.

`python -m benchmarks.gpu_check [--minutes 9] [--sections NAME,...] [--output DIR]` prints a JSON line for each check as
it is done, with a verdict: PASS, FAIL, SKIP (a package is missing, or the time ended) or INFO (a figure). The
last line is PASS or FAIL, and the exit code 0 or 1. The lines are in DIR/DATE/results.jsonl as well, so nothing is lost
when it is cut off; a section's own output is in DIR/DATE/SECTION.log. Without a CUDA device it says so (exit code 2).

    machine         versions, the rate of a square product, of a copy
    attention.NAME  a kernel against eager, bits over 5 backwards, times, deterministic and not
    one_rank        DDP and FSDP2 over a group of one rank (NCCL): gradients of one process; our collectives
    waits           whether the host waits for the device in a microbatch, in an update, in a run's step
    runs            main.py train: to its end, the same bits again, killed and resumed, compiled, ddp -> fsdp2
    speed           tokens/s by turns, ours and transformers', at 1024, 8192 and real lengths; memory; 25 kernels
    loop            a step of a run against one of a bare loop

Each section is a process: one that fails, hangs or loses its CUDA context ends alone, and the next one runs.

A bare GPU machine needs Python 3.11 or newer, torch 2.7 or newer with CUDA, and transformers, numba, matplotlib, rich,
psutil, typer, tensorboard, torchmetrics, torchvision, pyarrow, pandas, py-cpuinfo and what those bring. The rest is
carried as wheels, 12 MB. Where there is a network, for that machine's Python (here 3.12):

    git archive --prefix=flexbert/ -o flexbert.tar HEAD
    pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \\
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \\
        --platform manylinux1_x86_64 -r benchmarks/gpu_check/carried.txt -d wheels

Both together are 20 MB. There, in the unpacked folder:

    python3 -m pip install --no-index --no-deps --target site ../wheels/*.whl
    PYTHONPATH=site python3 -m benchmarks.gpu_check

`--rehearse` runs every section at toy size on the CPU, without a limit of time unless one is given. It proves this
program, and says nothing of a GPU; its last line is REHEARSED PASS or REHEARSED FAIL.
"""

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.arguments import count, names_of, parser_of
from benchmarks.gpu_check.sections import SECONDS
from benchmarks.gpu_check.sheet import MARGIN, Section, Sheet


def go(names: list[str], folder: Path, minutes: float, rehearse: bool) -> bool:
    """Run the sections; whether nothing failed. Each is started ahead, while the one before it runs."""

    def start(name: str) -> Section:
        what = ["cpu", "small"] if rehearse else ["cuda", "full"]
        command = [sys.executable, "-m", "benchmarks.gpu_check.section", name, *what, str(folder / name)]
        hidden = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if rehearse else {}
        return Section(name, folder, command, hidden)

    folder.mkdir(parents=True)
    with (folder / "results.jsonl").open("w") as file:
        sheet = Sheet(file)
        sheet.take({"check": "begin", "verdict": "INFO", "folder": str(folder), "sections": names})
        cut_off = True
        try:
            run_all(names, start, sheet, minutes)
            cut_off = False
        except (KeyboardInterrupt, SystemExit):
            pass  # asked to stop: what there is is told
        return sheet.close(cut_off, "REHEARSED " if rehearse else "")


def run_all(names: list[str], start: Callable[[str], Section], sheet: Sheet, minutes: float) -> None:
    """One after the other; none takes the time of those after it."""
    until = time.monotonic() + 60 * minutes - 3
    scale = min(1.0, 60 * minutes / (sum(SECONDS.values()) + 15))
    waiting: list[Section] = []
    try:
        for place, name in enumerate(names):
            if not waiting:
                waiting.append(start(name))
            section = waiting[0]
            later = scale * sum(SECONDS.get(each, 0) for each in names[place + 1 :])
            seconds = until - time.monotonic() - later
            if place + 1 < len(names):
                waiting.append(start(names[place + 1]))
            if seconds < MARGIN:
                sheet.take({"section": name, "check": name, "verdict": "FAIL", "error": "no time left"})
            else:
                section.run(seconds, sheet.take)
            section.end()
            waiting.remove(section)
    finally:
        for section in waiting:
            section.end()


def _stop(_number: int, _frame: Any) -> None:
    raise SystemExit(1)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--minutes", type=count, help="for all; default 9, for which the sections are cut; 60 with --rehearse"
    )
    parser.add_argument("--sections", type=names_of(SECONDS), default=list(SECONDS), help="by commas; default: all")
    parser.add_argument("--output", type=Path, default=Path("results/gpu_check"), help="default: %(default)s")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on the CPU: proves this program only")
    arguments = parser.parse_args()
    if not arguments.rehearse:
        _need_device()
    signal.signal(signal.SIGTERM, _stop)
    minutes = arguments.minutes or (60 if arguments.rehearse else 9)
    folder = (arguments.output / time.strftime("%Y%m%d-%H%M%S")).absolute()
    if folder.exists():
        parser.error(f"--output: {folder} is there: give another folder, or wait a second")
    sys.exit(0 if go(arguments.sections, folder, minutes, arguments.rehearse) else 1)


def _need_device() -> None:
    """End with exit code 2 and one line where there is no CUDA device."""
    try:
        import torch
    except ImportError:
        _refuse("torch is not installed: --help says what a bare machine needs")
    if not torch.cuda.is_available():
        _refuse("torch sees no CUDA device: run it on a machine with a GPU, or try the program with --rehearse")


def _refuse(why: str) -> None:
    sys.stderr.write(f"benchmarks.gpu_check: {why}\n")
    sys.exit(2)


if __name__ == "__main__":
    main()
