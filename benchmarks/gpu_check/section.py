"""A section in a process of its own: `python -m benchmarks.gpu_check.section NAME DEVICE SIZE FOLDER`.

It imports what it needs, says `ready`, waits for a number of seconds on stdin, and prints a JSON line for each check.
Whatever else writes to stdout, libraries among it, goes to stderr.
"""

import json
import os
import sys
import time
import traceback
import warnings
from importlib import import_module
from pathlib import Path
from typing import TextIO

from benchmarks.gpu_check.place import Place, failed
from benchmarks.gpu_check.sections import is_ours, lines


def main(name: str, device: str, size: str, folder: str) -> None:
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    warnings.filterwarnings("ignore")
    try:
        import_module(f"benchmarks.gpu_check.{name.partition('.')[0]}")
    except ImportError as error:
        traceback.print_exc()
        line = failed(name, error)
        if not is_ours(error.name):
            line["fix"] = f"bring {error.name}: python -m benchmarks.gpu_check --help says how"
        _ready(out)
        out.write(json.dumps(line) + "\n")
        return
    seconds = _ready(out)
    place = Place(device, Path(folder), size == "small", time.monotonic() + seconds)
    place.folder.mkdir(parents=True, exist_ok=True)
    try:
        for line in lines(name, place):
            out.write(json.dumps(line) + "\n")
    except Exception as error:
        traceback.print_exc()
        out.write(json.dumps(failed(name, error)) + "\n")


def _ready(out: TextIO) -> float:
    """Wait for the word to begin; the seconds that the section has."""
    out.write("ready\n")
    return float(sys.stdin.readline() or 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stderr.flush()
    os._exit(0)  # without what libraries do at the end, which may take long, or for ever
