"""What a process holds open, over all its streams; what the storage refuses is one line, and no advice that destroys."""

import errno
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from data.store.prefetch import Job, Prefetcher
from data.store.shards import Stream, open_stream
from flexbert_core.schema import ConfigError, RunError
from tests.helpers.remote import in_fresh_process, until
from tests.helpers.synthetic import documents, write_stream
from tests.helpers.users import as_nobody

MANY_STREAMS = """
import os, resource
from flexbert_core.schema import RunError
resource.setrlimit(resource.RLIMIT_NOFILE, (60, 64))
streams = [open_stream(FOLDER + name) for name in ("/a/train", "/b/train", "/c/train")]
streams[1].lengths(0)
held = []
try:
    while True:
        held.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    pass
try:
    streams[0].lengths(0)
    said = ""
except RunError as error:
    said = str(error)
for handle in held:
    os.close(handle)
assert said.startswith("stream 'a': shard ") and "Too many open files: raise the limit of open files" in said, said
assert "delete" not in said, said
first = [stream.document(0, 0).tolist() for stream in streams]
for shard in range(40):
    for stream in streams:
        stream.document(shard, 0)
def files_open():
    names = ["/proc/self/fd/" + name for name in os.listdir("/proc/self/fd")]
    return [os.readlink(name) for name in names if os.path.exists(name)]
files = files_open()
assert sum(file.endswith(".mds") for file in files) == 16, files
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (64, 64)
assert [stream.document(0, 0).tolist() for stream in streams] == first
del stream, streams
assert not any(file.endswith(".mds") for file in files_open()), files_open()
"""


def test_a_mixture_of_many_shards_stays_within_the_open_files(tmp_path: Path) -> None:
    """A process holds a quarter of the files that it may open, over all its streams; when others hold the rest, the
    dataset is not to blame."""
    for seed, name in enumerate("abc"):
        write_stream(tmp_path / name, "train", documents(seed, 120, 40), shard_bytes=256)
    in_fresh_process(f"FOLDER = {str(tmp_path)!r}\n" + MANY_STREAMS)


def test_what_was_fetched_ahead_and_evicted_is_closed(tmp_path: Path) -> None:
    file = tmp_path / "shard"
    file.write_bytes(b"1234")
    fetched = threading.Event()

    def fetch() -> int:
        handle = os.open(file, os.O_RDONLY)
        file.unlink()
        fetched.set()
        return handle

    def held() -> bool:
        prefetcher.close_unlinked()
        links = [path for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
        return any(str(path.readlink()).startswith(str(file)) for path in links)

    prefetcher = Prefetcher(100)
    prefetcher.announce([Job("shard", 4, fetch)])
    assert fetched.wait(10)
    until(lambda: not held())
    assert prefetcher.take("shard") is None


@pytest.fixture
def stream(open_folder: Path) -> Stream:
    return open_stream(write_stream(open_folder / "prose", "train", documents(0, 300, 100)))


def _lock_folder(stream: Stream) -> None:
    Path(stream.path).chmod(0)


def _lock_shard(stream: Stream) -> None:
    (Path(stream.path) / stream.manifest.shards[1].file).chmod(0)


@pytest.mark.parametrize("lock", [_lock_folder, _lock_shard])
def test_what_this_user_may_not_read(stream: Stream, lock: Callable[[Stream], None]) -> None:
    lock(stream)
    uses = [lambda: stream.lengths(1), lambda: stream.count(lambda lengths: lengths)]
    with as_nobody():
        if lock is _lock_folder:
            uses.append(stream.check_files)
            with pytest.raises(
                ConfigError, match=r"prose/train/stream.json: Permission denied: give this user the right"
            ):
                open_stream(stream.path)
        for use in uses:
            with pytest.raises(
                RunError, match=r"^stream 'prose': shard .*mds: Permission denied: give this user the right to read it$"
            ):
                use()


def test_a_path_that_no_storage_takes(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"stream.json: File name too long: see to the disk"):
        open_stream(tmp_path / ("x" * 300))


@pytest.mark.parametrize("first_use", [True, False])
def test_a_disk_that_fails_while_it_is_read(stream: Stream, first_use: bool) -> None:
    """Reading this process's memory at its beginning fails as a broken disk does."""
    if not first_use:
        stream.document(1, 0)
    stream.lengths(1)
    memory = os.open("/proc/self/mem", os.O_RDONLY)
    os.dup2(memory, stream.opened[1].handle)
    try:
        name = stream.manifest.shards[1].file
        message = rf"^stream 'prose': shard .*{name}: {os.strerror(errno.EIO)}: see to the disk [^\n]*$"
        with pytest.raises(RunError, match=message):
            stream.document(1, 0)
    finally:
        os.close(memory)


def test_a_disk_that_fails_at_a_head(stream: Stream) -> None:
    file = Path(stream.path) / stream.manifest.shards[1].file
    file.unlink()
    file.symlink_to("/proc/self/mem")
    with pytest.raises(RunError, match=rf"^stream 'prose': shard .*{file.name}: {os.strerror(errno.EIO)}: see to"):
        stream.count(lambda lengths: lengths)
    shutil.rmtree(stream.path)
