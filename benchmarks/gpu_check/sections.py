"""The sections in their order: what each runs, and how long it may take of 9 minutes."""

from collections.abc import Iterator
from importlib import import_module

from benchmarks.gpu_check.place import Line, Place

ATTENTION = ("torch_flash", "flash2", "flash3", "flex", "sdpa")
SECONDS: dict[str, int] = {
    "machine": 25,
    **{f"attention.{kernel}": 30 if kernel == "flex" else 20 for kernel in ATTENTION},
    "one_rank": 45,
    "waits": 45,
    "runs": 110,
    "speed": 140,
    "loop": 50,
}
"""Together 9 minutes less the start. What a section does not use the next ones may."""


def lines(name: str, place: Place) -> Iterator[Line]:
    """Those of a section. Its module is imported here: what it needs may be missing."""
    module, _, argument = name.partition(".")
    check = import_module(f"benchmarks.gpu_check.{module}").check
    return check(place, *([argument] if argument else []))


def is_ours(module: str | None) -> bool:
    """Whether a module that cannot be imported is of this project: then it is broken, and not missing."""
    ours = ("benchmarks", "callbacks", "commands", "data", "flexbert", "flexbert_core", "main", "ranks", "recipe")
    return (module or "").partition(".")[0] in (*ours, "tests", "training", "")
