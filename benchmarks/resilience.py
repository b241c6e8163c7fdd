"""A run of two processes that is killed again and again: `python -m benchmarks.resilience [KILLS [SEED]]`.

It prepares a small dataset, trains a tiny model on it undisturbed, then trains it again and again while it kills, KILLS
times (100) in all, in random order: one rank; all processes; all while a checkpoint is being written; when the disk is
full (a small tmpfs, or where mounting is not permitted a limit on file size), whether the run ends by itself or goes on
until there is room; all, and then the newest checkpoint is cut off somewhere. Moments are random, measured from the
first step after a start. After each, every checkpoint must be whole but the one that was cut off, and no process may be
left. Whenever the run is finished, weights, optimizer state and losses must equal those of the undisturbed one, to the
last bit.

Prints JSON lines and a table.
"""

import contextlib
import json
import os
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from benchmarks.arguments import count, parser_of
from benchmarks.kills import Victim
from flexbert_core.durable import UNFINISHED
from flexbert_core.schema import RunError
from tests.helpers.runs import environment, final_weights, launched, metrics, prepare_dataset, rank, write_config
from training.checkpoints.files import list_checkpoints, load_checkpoint

STEPS = 160
STEPS_PER_KILL = 8  # on average, from the first step after a start
DISK_BYTES = 96 << 20
HOW = ("one rank", "all", "all, in a checkpoint's write", "full disk", "all, newest checkpoint cut off")


class Disk:
    """Where the killed run writes, and how it gets full: a tmpfs with ballast, or a file size limit on rank 0."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._ballast = folder, folder / "ballast"
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
        self.is_small = subprocess.run(mount, capture_output=True, check=False).returncode == 0

    def fill(self, victim: Victim, free: int) -> None:
        """Leave so many bytes at most."""
        if not self.is_small:
            rank(victim.process.pid, 0).rlimit(psutil.RLIMIT_FSIZE, (free, free))
            return
        with self._ballast.open("wb") as file:
            while (room := shutil.disk_usage(self.folder).free - free) > 0:
                with contextlib.suppress(OSError):  # the run was quicker: look again
                    os.posix_fallocate(file.fileno(), 0, file.seek(0, os.SEEK_END) + room)

    def empty(self) -> None:
        self._ballast.unlink(missing_ok=True)

    def close(self) -> None:
        if self.is_small:
            subprocess.run(["umount", "--lazy", str(self.folder)], check=True)


class Course:
    """The run that is killed."""

    def __init__(self, folder: Path, config: Path, overrides: list[str], disk: Disk, dice: random.Random) -> None:
        self.folder, self.disk, self.dice = folder, disk, dice
        self.checkpoints = folder / "runs" / "small" / "checkpoints"
        self._command = launched(2, "train", str(config), *overrides)
        self.log = disk.folder.with_name("killed.log")
        self.cut_off = set[Path]()  # and not written again since

    @property
    def step(self) -> int:
        return max(metrics(self.folder, "tokens"), default=0)

    def start(self) -> Victim:
        self.log.write_bytes(b"")
        return Victim(self._command, self.log)

    def wait_for_step(self, victim: Victim, step: int) -> bool:
        """False when it ended before."""
        end = time.monotonic() + 300
        while self.step < step and victim.process.poll() is None:
            assert time.monotonic() < end, f"no step in 300 s: {self.log.read_text()[-2000:]}"
            time.sleep(0.002)
        return victim.process.poll() is None

    def kill(self, how: str) -> dict[str, Any] | None:
        """Start the run, wait for a random moment, do it. None when the run was finished before."""
        begin, facts = self.step, dict[str, Any]()
        victim = self.start()
        if not self.wait_for_step(victim, begin + 1) or not self.wait_for_step(
            victim, self.step + self.dice.randrange(2 * STEPS_PER_KILL)
        ):
            assert victim.process.returncode == 0, self.log.read_text()[-2000:]
            return None
        if how == "full disk":
            facts |= self._full_disk(victim)
        elif how == "all, in a checkpoint's write":
            end = time.monotonic() + 60
            while not any(self.checkpoints.glob(UNFINISHED + "tokens-*")) and victim.process.poll() is None:
                assert time.monotonic() < end
            time.sleep(self.dice.uniform(0, 0.004))
        else:
            time.sleep(self.dice.uniform(0, 0.3))
        if how == "one rank":
            with contextlib.suppress(psutil.Error, StopIteration):
                rank(victim.process.pid, self.dice.randrange(2)).kill()
            facts["exit_code"] = victim.wait(120)
        elif victim.process.poll() is None:
            victim.kill_all()
        victim.wait_for_rest()
        self.disk.empty()
        facts["half_written"] = len(list(self.checkpoints.glob(UNFINISHED + "*")))
        damaged = {path for path in list_checkpoints(self.checkpoints) if not _is_whole(path)}
        facts["unreadable"] = len(damaged - self.cut_off)
        self.cut_off &= damaged
        if how == HOW[4]:
            self._cut_off()
        return {"step": self.step, **facts}

    def _full_disk(self, victim: Victim) -> dict[str, Any]:
        self.disk.fill(victim, self.dice.choice([0, 1 << 12, 1 << 18, 1 << 20]))
        goes_on = self.wait_for_step(victim, self.step + STEPS_PER_KILL)
        if goes_on:
            self.disk.empty()
            self.wait_for_step(victim, self.step + STEPS_PER_KILL)
        else:
            victim.wait(120)
        return {
            "ended_by_itself": not goes_on,
            "exit_code": victim.process.returncode,
            "said": "NOT WRITTEN" in (text := self.log.read_text()) or "error: " in text,
        }

    def _cut_off(self) -> None:
        """Damage the newest checkpoint, if there is another whole one."""
        *others, newest = [path for path in list_checkpoints(self.checkpoints) if _is_whole(path)]
        if others:
            file = self.dice.choice(sorted(newest.iterdir()))
            os.truncate(file, self.dice.randrange(file.stat().st_size))
            self.cut_off.add(newest)


def _is_whole(path: Path) -> bool:
    try:
        load_checkpoint(path)
    except RunError:
        return False
    return True


def resilience(folder: Path, kills: int, dice: random.Random) -> Iterator[dict[str, Any]]:
    """One dict a kill, and a last one. AssertionError when anything is lost."""
    dataset = prepare_dataset(folder)
    overrides = [f"phases.0.tokens={STEPS // 2 * 1024}", f"phases.1.tokens={STEPS // 4 * 2048}"]
    overrides += [f"phases.2.tokens={STEPS // 4 * 2048}", "checkpoint.interval=4K", "evaluation.interval=100K"]
    straight = folder / "straight"
    config = write_config(straight, dataset)
    victim = Victim(launched(2, "train", str(config), *overrides), folder / "straight.log")
    assert victim.wait(3600) == 0, (folder / "straight.log").read_text()[-2000:]
    disk = Disk(folder / "disk")
    try:
        config = write_config(folder / "disk" / "killed", dataset)
        course = Course(folder / "disk" / "killed", config, overrides, disk, dice)
        hows, equal = [HOW[number % len(HOW)] for number in range(kills)], 0
        dice.shuffle(hows)
        for number, how in enumerate(hows, 1):
            damaged = set(course.cut_off)
            while (facts := course.kill(how)) is None:
                _check_equal(course.folder, straight)
                equal, damaged = equal + 1, set[Path]()
                shutil.rmtree(course.folder / "runs")
                course.cut_off.clear()
            text = course.log.read_text()
            assert all(f"SKIPPING DAMAGED CHECKPOINT {path}" in text for path in damaged), text[-2000:]
            yield {"kill": number, "how": how, **facts}
        assert course.start().wait(3600) == 0, course.log.read_text()[-2000:]
        _check_equal(course.folder, straight)
        yield {"kills": kills, "runs_equal": equal + 1, "runs_different": 0, "steps": STEPS, "tmpfs": disk.is_small}
    finally:
        disk.close()


def _check_equal(folder: Path, straight: Path) -> None:
    for kind, of in {"files": final_weights, "losses of steps": metrics}.items():
        ours, theirs = of(folder), of(straight)
        differ = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
        assert not differ, f"{kind} differ from the undisturbed run's: {differ}"


def table(lines: list[dict[str, Any]]) -> str:
    """What the README quotes."""
    rows = ["| killed | times | in the middle of a write | unreadable states |", "|---|---|---|---|"]
    for how in (*HOW, "sum"):
        own = [line for line in lines if how in ("sum", line["how"])]
        half, unreadable = (sum(line[key] for line in own) for key in ("half_written", "unreadable"))
        rows.append(f"| {how} | {len(own)} | {half} | {unreadable} |")
    return "\n".join(rows)


def main(kills: int, seed: int) -> None:
    os.environ.update({key: value for key, value in environment().items() if key in ("OMP_NUM_THREADS", "COLUMNS")})
    begin, lines = time.monotonic(), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as folder:
        for facts in resilience(Path(folder), kills, random.Random(seed)):
            lines.append(facts)
            seconds = round(time.monotonic() - begin)
            print(json.dumps({"benchmark": "resilience", "seconds": seconds, **facts}), flush=True)
    print(table(lines[:-1]))
    unreadable = sum(line["unreadable"] for line in lines[:-1])
    assert not unreadable, f"{unreadable} unreadable states"


if __name__ == "__main__":
    parser = parser_of(__doc__)
    parser.add_argument("kills", type=count, nargs="?", default=100, metavar="KILLS")
    parser.add_argument("seed", type=int, nargs="?", default=0, metavar="SEED")
    given = parser.parse_args()
    main(given.kills, given.seed)
