"""Kill -9 at random moments, again and again, and see that nothing is lost, repeated or left over.

`python -m benchmarks.kills [PART] [KILLS] [SEED]` prints JSON lines; PART: one of PARTS, default all of them, KILLS: of
each (default 100). A part is a function of (folder, kills, random generator) that yields one dict per line and raises
AssertionError when something is wrong; another one is a function here and a line in PARTS.

    prepare    two streams with filters and near-duplicates, prepared by two worker processes. A run is killed, as a
               whole process group or by one of its workers, at a moment drawn evenly from the length of an undisturbed
               run, and started again until it finishes, then a new one begins. Each finished dataset must be equal to
               the undisturbed one byte for byte, with nothing else in the folder, no process left and nothing new in
               /dev/shm.
    loader     a process that reads batches with two workers (benchmarks/kill_loader.py). It is killed as a group, by
               itself, or by one of its workers, and goes on from its last saved state. Its batches must be those of an
               undisturbed process, step by step; no process may outlive it, nothing may be left in /dev/shm.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.arguments import count, parser_of
from benchmarks.kill_loader import loader
from data.keyed import keyed_generator

Part = Callable[[Path, int, random.Random], Iterator[dict[str, Any]]]
SHARED_MEMORY = Path("/dev/shm")
WORDS = [first + second for first in "bcdfghklmnprst" for second in ("a", "en", "or", "ist", "ung", "elo")]


class Victim:
    """A command in a process group of its own; it and what descends from it carry a mark in their environment."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.mark = uuid.uuid4().hex
        environment = {**os.environ, "KILLS_MARK": self.mark, "PYTHONPATH": str(Path.cwd())}
        with log.open("ab") as file:
            self.process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)

    def processes(self) -> list[int]:
        """All that live."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
            except OSError:  # gone, or not ours
                continue
        return found

    def kill_all(self) -> None:
        """SIGKILL to the whole process group."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def kill_one(self, dice: random.Random) -> bool:
        """SIGKILL to one process other than the first, if there is any."""
        others = [pid for pid in self.processes() if pid != self.process.pid]
        if not others:
            return False
        try:
            os.kill(dice.choice(sorted(others)), signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True

    def wait(self, seconds: float) -> int:
        """Exit code. AssertionError when it hangs, or when a process outlives it by 30 s."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill_all()
            raise AssertionError(f"the command hung for {seconds:.0f} s") from None
        self.wait_for_rest()
        return code

    def wait_for_rest(self) -> None:
        deadline = time.monotonic() + 30
        while alive := self.processes():
            assert time.monotonic() < deadline, f"processes {alive} outlive the command"
            time.sleep(0.05)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_shared_memory(before: set[Path]) -> None:
    """AssertionError when /dev/shm holds more than before, and still does after a minute (others use it, too)."""
    deadline = time.monotonic() + 60
    while new := set(SHARED_MEMORY.iterdir()) - before:
        assert time.monotonic() < deadline, f"new in /dev/shm: {new}"
        time.sleep(0.5)


PREPARE = """
import sys
from data.preparation.dataset import load_prepare_config, prepare

if __name__ == "__main__":
    config = load_prepare_config(sys.argv[1], [f"output={sys.argv[2]}"])
    prepare(config, workers=2)
"""
# What is left in OUTPUT/.work when a dataset is finished.
KEPT = {".work/lock", ".work/prepare.log"}


def prepare(folder: Path, kills: int, dice: random.Random) -> Iterator[dict[str, Any]]:
    config = _corpus(folder)
    (folder / "prepare.py").write_text(PREPARE)

    def start(output: Path) -> Victim:
        return Victim([sys.executable, str(folder / "prepare.py"), str(config), str(output)], folder / "log")

    shared = set(SHARED_MEMORY.iterdir())
    begin = time.monotonic()
    assert start(folder / "whole").wait(600) == 0, (folder / "log").read_text()[-2000:]
    length = time.monotonic() - begin
    whole = {path: content for path, content in tree(folder / "whole").items() if path not in KEPT}
    yield {"undisturbed_seconds": round(length, 1), "files": len(whole)}

    done = {"group": 0, "one": 0}
    datasets = finished_before = 0
    stages: dict[str, int] = {}
    output = folder / "out"
    while sum(done.values()) < kills:
        victim = start(output)
        time.sleep(dice.uniform(0.0, 1.0) * length)
        stage = _stage(output)
        how = dice.choice(["group", "one"])
        if victim.process.poll() is not None:
            finished_before += 1
        elif how == "group":
            victim.kill_all()
            victim.wait_for_rest()
            done[how] += 1
        else:
            done[how] += victim.kill_one(dice)
        if how == "one":
            code = victim.wait(600)
            assert code in (0, 1), f"exit code {code}: {(folder / 'log').read_text()[-2000:]}"
        stages[stage] = stages.get(stage, 0) + 1
        if victim.process.returncode == 0 or dice.random() < 0.2:  # else: killed again on its way
            assert start(output).wait(600) == 0, (folder / "log").read_text()[-2000:]
            _check(output, whole)
            check_shared_memory(shared)
            shutil.rmtree(output)
            datasets += 1
            yield {"kills": sum(done.values()), "datasets_equal": datasets}
    if output.exists():
        assert start(output).wait(600) == 0, (folder / "log").read_text()[-2000:]
        _check(output, whole)
        datasets += 1
    check_shared_memory(shared)
    yield {
        "kills_of_a_process_group": done["group"],
        "kills_of_one_process": done["one"],
        "killed_while": stages,
        "runs_that_finished_before_the_kill": finished_before,
        "datasets_equal": datasets,
    }


def _check(output: Path, whole: dict[str, bytes]) -> None:
    found = {path: content for path, content in tree(output).items() if path not in KEPT}
    assert set(found) == set(whole), f"files differ: {set(found) ^ set(whole)}"
    assert found == whole, f"contents differ: {[path for path in whole if found[path] != whole[path]]}"


def _stage(output: Path) -> str:
    """What a prepare run is about."""
    for name, pattern in {
        "merging": "*/*/index.json",
        "tokenising": ".work/logs/tokenise",
        "tokenizer": "tokenizer",
        "planning": ".work/plan",
        "reading": ".work/scan",
    }.items():
        if any(output.glob(pattern)):
            return name
    return "starting"


def _corpus(folder: Path) -> Path:
    for stream, files in {"a": 6, "b": 3}.items():
        (folder / stream).mkdir()
        for part in range(files):
            rows = (json.dumps({"text": text}) for text in _texts(stream, part))
            (folder / stream / f"{part}.jsonl").write_text("\n".join(rows) + "\n")
    filters = [{"name": "length", "min_characters": 60}, {"name": "minhash", "buckets": 4, "hashes_per_bucket": 4}]
    node = {
        "output": "unset",
        "validation_fraction": 0.1,
        "shard_bytes": 16384,
        "tokenizer": {"name": "train", "vocab_size": 384},
        "streams": {
            name: {
                "source": {"name": "jsonl", "paths": [str(folder / name)]},
                "filters": filters[: 2 if name == "a" else 1],
            }
            for name in "ab"
        },
    }
    (folder / "config.yaml").write_text(json.dumps(node))  # JSON is YAML
    return folder / "config.yaml"


def _texts(stream: str, part: int) -> Iterator[str]:
    """90 documents of 3 to 400 words; some repeat an earlier one, or nearly."""
    rng = keyed_generator(1, f"kills {stream}", part)
    texts: list[str] = []
    for number in range(90):
        words = rng.choice(WORDS, int(np.exp(rng.uniform(1.0, 6.0))) + 1)
        if texts and number % 9 == 0:
            words = np.array(texts[int(rng.integers(len(texts)))].split())
            words[: number % 2] = "changed"
        texts.append(" ".join(words))
    yield from texts


PARTS: dict[str, Part] = {"prepare": prepare, "loader": loader}


def main(names: list[str], kills: int, seed: int) -> None:
    for name in names:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            for facts in PARTS[name](Path(folder), kills, random.Random(seed)):
                seconds = round(time.monotonic() - start)
                print(json.dumps({"benchmark": "kills", "part": name, "seconds": seconds, **facts}), flush=True)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    part = arguments.pop(0) if arguments and arguments[0] in PARTS else None
    parser = parser_of(__doc__)
    parser.usage = f"%(prog)s [{'|'.join(PARTS)}] [KILLS [SEED]]"
    parser.add_argument("kills", type=count, nargs="?", default=100, metavar="KILLS")
    parser.add_argument("seed", type=int, nargs="?", default=0, metavar="SEED")
    given = parser.parse_args(arguments)
    main([part] if part else list(PARTS), given.kills, given.seed)
