"""SIGKILLs of real processes that share a cache, in the middle of their downloads."""

import json
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from tests.helpers.remote import until
from tests.helpers.servers import Bucket
from tests.helpers.synthetic import documents, write_stream

ROOT = Path(__file__).parents[3]

# Children are forked from one process that has imported everything, so that a life takes milliseconds. Each reads the
# stream in its own order, with prefetch; each is killed at a random moment, most of them while they download.
SCRIPT = """
import fcntl, json, os, random, signal, sys, time
import boto3
from pathlib import Path
from data.store.cache import PARTIAL, CacheConfig
from data.store.shards import open_stream
from data.store.transfer import open_store

url, folder, limit, kills, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
config = CacheConfig(cache=str(folder), cache_limit=limit)
rng = random.Random(seed)

def read(order):
    stream = open_stream(url, config)
    for shard in order:
        stream.prefetch([shard, *rng.sample(order, 2)])
        for index in range(len(stream.lengths(shard))):
            stream.document(shard, index)  # hashed chunk by chunk

def child(seed):
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        rng.seed(seed)
        order = list(range(count))
        rng.shuffle(order)
        read(order)
        code = 0
    finally:
        os._exit(code)

def measure():
    global largest, partials
    if not folder.exists():
        return
    # Under the lock: else a file that goes between two looks counts beside the one that took its room.
    with open(folder / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        total = 0
        for name in os.listdir(folder):
            if "-" in name:
                partials += name.endswith(PARTIAL)
                try:
                    total += os.stat(folder / name).st_size
                except FileNotFoundError:
                    pass
    largest = max(largest, total)

count = int(sys.argv[6])
largest = partials = killed = left = 0
while killed < kills:
    pids = [child(1000 * killed + number) for number in range(rng.choice([1, 2]))]
    for pid in pids:
        end = time.monotonic() + rng.uniform(0.05, 0.5)
        while time.monotonic() < end:
            measure()
            time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
        killed += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        left += any(name.endswith(PARTIAL) for name in os.listdir(folder)) if folder.exists() else 0
    measure()
last = child(-1)
code = os.waitstatus_to_exitcode(os.waitpid(last, 0)[1])
measure()
open_stream(url, config).check_files()  # as every run does at its start; the last child's prefetch ended with it
names = os.listdir(folder)
print(json.dumps({"code": code, "killed": killed, "largest": largest, "partials": partials, "left": left, "names": names}))
"""


@pytest.mark.slow
def test_kills_leave_nothing_behind(s3: str, bucket: Bucket, tmp_path: Path) -> None:
    folder = write_stream(tmp_path / "prose", "train", documents(8, 400, 4000), shard_bytes=1 << 15)
    manifest = json.loads((folder / "stream.json").read_text())
    sizes = [shard["bytes"] for shard in manifest["shards"]]
    url = bucket.upload(folder, f"{uuid.uuid4()}/train")
    limit = sum(sizes) // 2
    assert len(sizes) >= 8
    shared_memory = set(Path("/dev/shm").iterdir())
    arguments = [url, str(tmp_path / "cache"), str(limit), "60", "7", str(len(sizes))]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["code"] == 0
    assert found["killed"] >= 60
    assert found["left"] >= 6, "too few were killed in the middle of a download for this test to mean anything"
    assert limit // 2 < found["largest"] <= limit
    good = {f"{shard['xxh3_64']}-{shard['bytes']}" for shard in manifest["shards"]}
    assert set(found["names"]) <= good | {"lock"}
    left = set(Path("/dev/shm").iterdir()) - shared_memory
    until(lambda: left.isdisjoint(Path("/dev/shm").iterdir()), 120)  # what tests at the same time have there goes
