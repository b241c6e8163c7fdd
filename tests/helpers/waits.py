"""Where a host would wait for a device: the operations whose result's value or size it has to fetch from there."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive", "equal", "bincount")


class Waits(TorchDispatchMode):
    """Lists them, by name, while it is entered. also: other operations, such as `lift_fresh`, which makes a tensor of
    Python's numbers: on a device a copy that the host waits for."""

    def __init__(self, *also: str) -> None:
        super().__init__()
        self.names = {*NAMES, *also}
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.names or (name == "repeat_interleave" and not (kwargs or {}).get("output_size")):
            self.found.append(name)
        return func(*args, **(kwargs or {}))
