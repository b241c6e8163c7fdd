"""flash-attn on a CPU: a package of its signature whose function itself waits for nothing. It attends to nobody."""

import sys
import types
from importlib.machinery import ModuleSpec
from typing import Any

import pytest
from torch import Tensor

from flexbert.kernels import gpu


def attend(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    return q + k.repeat_interleave(groups, 1) + v.repeat_interleave(groups, 1)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that attention.backend: flash2 runs here."""
    module: Any = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = attend
    module.__spec__ = ModuleSpec("flash_attn", None)  # transformers looks for it
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(gpu, "why_not", lambda *_: "")
