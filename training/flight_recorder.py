"""What NCCL was doing when a collective timed out: torch's flight recorder, on for runs of several ranks on CUDA."""

import os
from collections.abc import MutableMapping
from pathlib import Path

PREFIX = "nccl-trace-rank-"
"""Of the files in the run folder, with the rank behind it; `torchfrtrace` reads them."""
_EVENTS = "2000"  # of a rank's newest collectives and sends: torch's documentation has it as an example


def record(folder: Path, environment: MutableMapping[str, str] = os.environ) -> None:
    """Set it up, before the ranks meet: torch reads its variables then. One that is set already stays.

    folder: of the run. torch names the first two since 2.8, and before (ProcessGroupNCCL.hpp) the others.
    """
    file = str(folder.absolute() / PREFIX)
    environment.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"):
        environment.setdefault(name, _EVENTS)
    for name in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):
        environment.setdefault(name, file)
