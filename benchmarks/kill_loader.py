"""Kills a loading process at random moments and lets it go on: nothing lost, nothing repeated, nothing left behind.

`python -m benchmarks.kill_loader [KILLS]` prints one JSON line. The process reads batches with two workers, writes down
a digest of each, and saves its state now and then. It is killed (SIGKILL) with its whole group, alone, or by the death
of one of its workers, until it has been killed as often as asked; then it is left to finish. Its digests must be those
of an undisturbed process, step by step; no worker may outlive its parent, and no shared memory may be left.
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
from pathlib import Path

import numpy as np
import xxhash
from rich.progress import Progress

from data.loader import LoaderConfig, LoaderPhase, build_loader
from data.masking import MaskingConfig
from data.mixture import DataConfig, StreamConfig
from durable import write_file
from tests.data.synthetic import documents, write_stream

SAVE_EVERY = 200
ORPHAN_SECONDS = 15  # a worker looks for its parent every five seconds


def configuration(folder: Path, steps: int) -> LoaderConfig:
    streams = {name: StreamConfig(path=str(folder / name)) for name in ("a", "b")}
    data = DataConfig(tokenizer="none", streams=streams, num_workers=2, block_documents=200)
    lengths, rows = (64, 256, 128), (16, 8, 32)
    phases = [
        LoaderPhase(steps=steps // 3, global_batch_size=count, max_seq_len=length, masking=MaskingConfig())
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
        [sys.executable, "-m", "benchmarks.kill_loader", "--read", str(folder), str(steps), str(out)],
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


def main(kills: int) -> None:
    rng, folder = random.Random(17), Path(tempfile.mkdtemp())
    for number, name in enumerate("ab"):
        write_stream(folder / name, "train", documents(number, 600, 500), shard_bytes=1 << 14)
    shared_before = shared_memory()
    steps = 300 * kills
    clean = start(folder, steps, folder / "clean")
    assert clean.wait() == 0
    done = orphans = 0
    with Progress(transient=True) as progress:
        bar = progress.add_task("kills", total=kills)
        while done < kills:
            process = start(folder, steps, folder / "killed")
            first = (folder / "killed" / "digests").stat().st_size if (folder / "killed" / "digests").exists() else 0
            wait = rng.uniform(0, 1.5)
            begin = time.monotonic()
            while process.poll() is None:  # some kills while it starts, most while it reads
                reading = (folder / "killed" / "digests").exists()
                reading = reading and (folder / "killed" / "digests").stat().st_size > first
                if (reading or rng.random() < 0.002) and time.monotonic() - begin > wait:
                    break
                time.sleep(0.01)
            if process.poll() is not None:
                break
            orphans += not kill(process, rng)
            done += 1
            progress.update(bar, completed=done)
    final = start(folder, steps, folder / "killed")
    finished = final.wait() == 0 and (folder / "killed" / "done").exists()
    expected, found = digests(folder / "clean"), digests(folder / "killed")
    line = {
        "measure": "kills of a loading process",
        "kills": done,
        "finished": finished,
        "steps": len(expected),
        "steps_equal": sum(set(a) == set(b) for a, b in zip(expected, found, strict=False)),
        "steps_lost": sum(not b for b in found) + max(0, len(expected) - len(found)),
        "processes_left": orphans,
        "shared_memory_left": len(shared_memory() - shared_before),
        "files_left": len(list((folder / "killed").glob(".*"))),
    }
    shutil.rmtree(folder)
    print(json.dumps(line), flush=True)
    if not finished or line["steps_equal"] != line["steps"] or orphans:
        sys.exit(1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--read"]:
        read(Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
