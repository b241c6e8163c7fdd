"""Locks that are held and locks that cannot be had are told apart; what cannot be written leaves nothing."""

import errno
import fcntl
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from flexbert_core.durable import UNFINISHED, HeldError, holder, lock, write_file
from flexbert_core.schema import RunError

HOLD = """
import sys
from pathlib import Path
from flexbert_core.durable import lock
with lock(Path(sys.argv[1]), Path("x"), "working"):
    print(flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("host", ["", "node7"])
def test_a_lock_that_is_held_says_by_whom(tmp_path: Path, host: str) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        written = (tmp_path / "lock").read_text()
        assert written == f"{process.pid} on {socket.gethostname()}"
        if host:
            (tmp_path / "lock").write_text(written.replace(socket.gethostname(), host))
        where = f" on {host}" if host else ""
        with pytest.raises(HeldError, match=rf"^owner: process {process.pid}{where} is working: wait for it to end"):
            lock(tmp_path / "lock", Path("owner"), "working")
        assert holder(tmp_path / "lock") == process.pid
        process.communicate()
    lock(tmp_path / "lock", Path("owner"), "working").close()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_no_other_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refused(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "lockf", refused)
    monkeypatch.setattr(fcntl, "fcntl", refused)
    with pytest.raises(
        RunError, match=rf"^{tmp_path}/lock: cannot be locked \({os.strerror(code)}\): mount its"
    ) as caught:
        lock(tmp_path / "lock", Path("owner"), "working")
    assert not isinstance(caught.value, HeldError)  # for which some wait
    assert holder(tmp_path / "lock") is None


def test_a_full_disk_leaves_no_unfinished_file(tmp_path: Path) -> None:
    (tmp_path / f"{UNFINISHED}a").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_file(tmp_path / "a", "content")
    assert list(tmp_path.iterdir()) == []
