"""What tests register is taken back."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flexbert.registry import ModelSlot
from flexbert_core.schema import Registry


@contextmanager
def registries_as_before() -> Iterator[None]:
    """Afterwards all registries and the modules of imported files are as they were: both or neither, since a file that
    counts as imported does not register its entries again."""
    before = [(table, dict(table)) for registry in _registries() for table in _tables(registry)]
    modules = set(sys.modules)
    try:
        yield
    finally:
        for table, entries in before:
            table.clear()
            table.update(entries)
        for name in set(sys.modules) - modules:
            if name.startswith(("imported_", "flexbert_export_", "transformers_modules")):
                del sys.modules[name]


def _registries() -> list[Registry]:
    # By type: isinstance asks modules' deprecated objects for their class, and they warn
    held = (value for module in list(sys.modules.values()) for value in list(vars(module).values()))
    return list({id(value): value for value in held if issubclass(type(value), Registry)}.values())


def _tables(registry: Registry) -> list[dict[str, Any]]:
    return [registry.entries, registry.registered_by] if isinstance(registry, ModelSlot) else [registry.entries]
