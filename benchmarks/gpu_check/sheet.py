"""The processes of the sections, and the sheet that their lines go to."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).parent.parent.parent
MARGIN = 5  # seconds between the time that a section is told and its end


class Section:
    """A section's process, started ahead: it imports what it needs while the one before it runs."""

    def __init__(self, name: str, folder: Path, command: list[str], variables: dict[str, str]) -> None:
        """command: prints JSON lines on stdout. variables: of its environment, beside this process's."""
        self.name, self.log = name, folder / f"{name}.log"
        own = {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **own, **variables}, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
            )  # fmt: skip

    def end(self) -> None:
        """Kill it, and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                assert pipe is not None
                pipe.close()

    def run(self, seconds: float, take: Callable[[dict[str, Any]], None]) -> None:
        """Let it begin; `take` gets each line. After so many seconds it is ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        late = threading.Event()

        def stop() -> None:
            late.set()
            os.killpg(self.process.pid, signal.SIGKILL)

        timer = threading.Timer(seconds, stop)
        timer.start()
        found = 0
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{max(1.0, seconds - MARGIN)}\n")
            self.process.stdin.close()
        try:
            for raw in self.process.stdout:
                try:
                    line = json.loads(raw)
                except ValueError:
                    continue  # `ready`
                found += 1
                take({"section": self.name, **line})
            code = self.process.wait()
        finally:
            timer.cancel()
            self.end()
        if late.is_set():
            take(self._failed(f"not done after {seconds:.0f} s, and ended"))
        elif code or not found:
            take(self._failed(f"exit code {code}: {self._last()}"))

    def _failed(self, why: str) -> dict[str, Any]:
        return {"section": self.name, "check": self.name, "verdict": "FAIL", "error": f"{why} ({self.log})"}

    def _last(self) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1].strip()[:300] if lines else "it printed nothing"


class Sheet:
    """The lines: on stdout, and in a file."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.verdicts = file, dict[str, list[str]]()
        self.start = time.monotonic()

    def take(self, line: dict[str, Any]) -> None:
        self.verdicts.setdefault(line["verdict"], []).append(line["check"])
        text = json.dumps({**line, "at": round(time.monotonic() - self.start, 1)})
        for out in (sys.stdout, self.file):
            out.write(text + "\n")
            out.flush()
        os.fsync(self.file.fileno())

    def close(self, cut_off: bool, before: str = "") -> bool:
        """The last lines; whether all is good. before: PASS or FAIL."""
        counts = {verdict: len(checks) for verdict, checks in sorted(self.verdicts.items())}
        bad = self.verdicts.get("FAIL", [])
        good = not bad and not cut_off and bool(self.verdicts.get("PASS"))
        self.take({"check": "all", "verdict": "INFO", "counts": counts, "failed": bad, "cut_off": cut_off})
        for out in (sys.stdout, self.file):
            out.write(f"{before}{'PASS' if good else 'FAIL'}\n")
            out.flush()
        return good
