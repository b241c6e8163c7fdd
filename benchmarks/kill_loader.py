"""The `loader` part of benchmarks.kills: a process that reads batches with two workers is killed and goes on.

It writes down a digest of each batch, and saves its state now and then.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from rich.progress import Progress

from data.feed.loader import LoaderConfig, LoaderPhase, build_loader
from data.feed.mixture import DataConfig, StreamConfig
from flexbert_core.durable import write_file
from tests.helpers.synthetic import documents, write_stream, write_tokenizer

SAVE_EVERY = 200
ORPHAN_SECONDS = 15  # a worker looks for its parent every five seconds


def configuration(folder: Path, steps: int) -> LoaderConfig:
    streams = {name: StreamConfig(path=str(folder / name)) for name in ("a", "b")}
    data = DataConfig(tokenizer=write_tokenizer(folder), streams=streams, num_workers=2, block_documents=200)
    lengths, rows = (64, 256, 128), (16, 8, 32)
    phases = [
        LoaderPhase(steps=steps // 3, global_batch_size=count, max_seq_len=length)
        for length, count in zip(lengths, rows, strict=True)
    ]
    return LoaderConfig(seed=17, data=data, phases=phases)


def read(folder: Path, steps: int, out: Path) -> None:
    """The process: from its saved state, if there is one, to the end."""
    loader = build_loader(configuration(folder, steps))
    state = out / "state.json"
    if state.exists():
        loader.load_state_dict(json.loads(state.read_text()))
    with (out / "digests").open("a", buffering=1) as log:
        for batch in loader:
            digest = xxhash.xxh3_64()
            for key in ("input_ids", "labels", "cu_seqlens"):
                digest.update(np.ascontiguousarray(batch[key].numpy()).data)
            log.write(f"{loader.dataset.step} {digest.hexdigest()}\n")
            if loader.dataset.step % SAVE_EVERY == 0:
                write_file(state, json.dumps(loader.state_dict()).encode())
    (out / "done").touch()


def start(folder: Path, steps: int, out: Path) -> "subprocess.Popen[bytes]":
    out.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.kill_loader", str(folder), str(steps), str(out)],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def digests(out: Path) -> list[list[str]]:
    """Digests seen of each step. A torn last line is of a batch that was not counted as seen."""
    seen: dict[int, list[str]] = {}
    for line in (out / "digests").read_text().splitlines():
        step, _, digest = line.partition(" ")
        if len(digest) == 16:
            seen.setdefault(int(step), []).append(digest)
    return [seen.get(step, []) for step in range(1, max(seen) + 1)]


def shared_memory() -> set[str]:
    """Named segments; semaphores, which any process of this machine may hold for a moment, are not counted."""
    return {file.name for file in Path("/dev/shm").iterdir() if not file.name.startswith("sem.")}


def group_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def kill(process: "subprocess.Popen[bytes]", rng: random.Random) -> bool:
    """One kill. True when everything of the process was gone soon after."""
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    how = rng.choice(["group", "parent", "worker"] if children else ["group"])
    if how == "group":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        os.kill(process.pid if how == "parent" else rng.choice(children), signal.SIGKILL)
    process.wait(timeout=60)
    end = time.monotonic() + ORPHAN_SECONDS
    while group_alive(process.pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not group_alive(process.pid)


def loader(folder: Path, kills: int, dice: random.Random) -> Iterator[dict[str, Any]]:
    """Raises AssertionError when a step is lost, or other than an undisturbed process has it, or something is left."""
    for number, name in enumerate("ab"):
        write_stream(folder / name, "train", documents(number, 600, 500), shard_bytes=1 << 14)
    shared_before, steps = shared_memory(), 1500 * kills
    assert start(folder, steps, folder / "clean").wait() == 0
    log = folder / "killed" / "digests"
    with Progress(transient=True) as progress:
        for _ in progress.track(range(kills), description="killing a loading process"):
            before = log.stat().st_size if log.exists() else 0
            process, begin = start(folder, steps, folder / "killed"), time.monotonic()
            if dice.random() < 0.15:  # while it starts, or soon after
                time.sleep(dice.uniform(0, 4))
            else:
                while process.poll() is None and not (log.exists() and log.stat().st_size > before):
                    assert time.monotonic() - begin < 120
                    time.sleep(0.01)
                time.sleep(dice.uniform(0, 0.3))
            assert process.poll() is None, "it ended before it was killed"
            assert kill(process, dice), "a worker outlived its parent"
    assert start(folder, steps, folder / "killed").wait() == 0
    expected, found = digests(folder / "clean"), digests(folder / "killed")
    assert len(found) == len(expected) == steps // 3 * 3
    assert all(len(set(seen)) == 1 for seen in found), "a step came out in two ways"
    assert [seen[0] for seen in found] == [seen[0] for seen in expected]
    left = [file.name for file in (folder / "killed").iterdir() if file.name not in ("digests", "state.json", "done")]
    assert not left, left
    assert not shared_memory() - shared_before
    repeats = sum(len(seen) - 1 for seen in found)
    yield {
        "part": "loader",
        "kills": kills,
        "steps": steps,
        "lost": 0,
        "different": 0,
        "read_again": repeats,
        "left": 0,
    }


if __name__ == "__main__":
    read(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
