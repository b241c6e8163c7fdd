"""A run file's `imports`: what torch.compile makes of a run, counted, and run as it was traced, which takes no compiler;
with INDUCTOR in the environment, compiled as ever.

The environment's COUNTS names a folder; COUNTS/RANK.json holds [step, "compiled" or "ran", shape of the first input].
"""

import atexit
import json
import os
from pathlib import Path
from typing import Any

import torch

EVENTS: list[Any] = []


def _backend(self: Any, graph: Any, inputs: list[Any]) -> Any:
    compiled = _inductor(self, graph, inputs) if "INDUCTOR" in os.environ else graph.forward
    shape = [int(size) for size in next((each.shape for each in inputs if isinstance(each, torch.Tensor)), ())]
    EVENTS.append(["compiled", shape])

    def run(*arguments: Any) -> Any:
        EVENTS.append(["ran", shape])
        return compiled(*arguments)

    return run


def _write() -> None:
    (Path(os.environ["COUNTS"]) / f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(EVENTS))


if "COUNTS" in os.environ:
    wrapper: Any = torch._TorchCompileInductorWrapper
    _inductor = wrapper.__call__
    wrapper.__call__ = _backend
    atexit.register(_write)
    _exit = os._exit
    os._exit = lambda code: (_write(), _exit(code))  # pyright: ignore  # ranks of tests.helpers.ranks leave by it
