"""Which process of a job failed first, told on each of its nodes.

torchrun knows the processes of its own node. When one is gone, those of other nodes fail too, and say only that another
rank's process ended. So each node's launcher leaves word in the store by which the nodes met, which the head node's
launcher holds as long as it lives, and reads the others'.
"""

import contextlib
import json
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta

from torch.distributed import DistError, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.run import get_args_parser

_COUNT, _WORD, _READ = "flexbert/failures", "flexbert/failure/", "flexbert/failures-read"
_DEFAULT_PORT = 29400  # of torchrun's c10d rendezvous
# Other nodes' processes end within a second or two of the first, with gloo; the head node's launcher keeps the store.
_WAIT_SECONDS = 10.0


@dataclass(frozen=True)
class Failure:
    """When its node saw it, by that node's clock, and what happened."""

    when: float
    text: str


def seen(rank: int, process: ProcessFailure) -> Failure:
    """A process of this node that has just failed."""
    code = process.exitcode
    how = f"ended with exit code {code}"
    if code < 0:
        with contextlib.suppress(ValueError):
            how = f"was killed by {signal.Signals(-code).name}"
    return Failure(time.time(), f"rank {rank} on {socket.gethostname()} {how}")


def first(own: Failure, arguments: Sequence[str], seconds: float = _WAIT_SECONDS) -> Failure:
    """The first failure of the job, as far as its nodes say within so many seconds. arguments: of torchrun."""
    options = get_args_parser().parse_args(list(arguments))
    nodes = int(str(options.nnodes).rpartition(":")[2])
    if options.standalone or nodes == 1:
        return own
    host, _, port = str(options.rdzv_endpoint).partition(":")
    if not host:
        host, port = options.master_addr, str(options.master_port)
    try:
        # Without a time-out of ours torch tries for 5 minutes to reach a store that is gone.
        wait = timedelta(seconds=seconds)
        store = TCPStore(host, int(port or _DEFAULT_PORT), is_master=False, timeout=wait, wait_for_workers=False)
        return agreed(own, store, nodes, seconds)
    except (DistError, RuntimeError, OSError):  # the head node's launcher is gone
        return own


def agreed(own: Failure, store: Store, nodes: int, seconds: float) -> Failure:
    """The earliest of what all nodes leave in the store."""
    number = store.add(_COUNT, 1)
    store.set(f"{_WORD}{number}", json.dumps(asdict(own)))
    deadline = time.monotonic() + seconds
    while (count := store.add(_COUNT, 0)) < nodes and time.monotonic() < deadline:
        time.sleep(0.1)
    said = [own]
    for other in range(1, count + 1):
        said.append(Failure(**json.loads(store.get(f"{_WORD}{other}"))))
    with contextlib.suppress(DistError, RuntimeError):  # the head node's launcher ends last, if it can
        store.add(_READ, 1)
        while store.add(_READ, 0) < count and time.monotonic() < deadline:
            time.sleep(0.1)
    return min(said, key=lambda failure: failure.when)
