"""The host never waits for the device inside a training step, so that it can queue the next kernels meanwhile."""

import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flexbert import build, kernels_gpu
from flexbert.dropout import TokenKeys, keyed_dropout
from flexbert.model import FlexBertForMaskedLM
from flexbert.packed import check_packed, unpad
from tests.flexbert.conftest import batch_of, tiny

MODEL = {
    "num_hidden_layers": 4,
    "attention": {"name": "multihead", "global_attn_every_n_layers": 3, "backend": "flash2", "out_dropout": 0.1},
}


def _flash(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Tensor:
    return q + k + v


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> FlexBertForMaskedLM:
    module: Any = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = _flash
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(kernels_gpu, "why_not", lambda *_: "")
    return build(tiny(**MODEL))


class _Waits(TorchDispatchMode):
    """Counts the operations whose result's value or size the host has to fetch from the device."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive", "equal", "bincount")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.NAMES or (name == "repeat_interleave" and not (kwargs or {}).get("output_size")):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def _waits(model: FlexBertForMaskedLM, num_masked: int | None) -> list[str]:
    """Those of a forward and backward, less the checks of a batch's values, which are made on the CPU only."""
    ids, cu_seqlens, max_seqlen, _ = batch_of((40, 1, 23), vocab_size=model.config.vocab_size)
    labels = torch.where(torch.arange(64) % 3 == 0, ids, -100)
    with _Waits() as checks:
        check_packed(ids, cu_seqlens)
    keys = TokenKeys(0, 0, cu_seqlens, len(ids))
    with _Waits() as step, keyed_dropout(keys):
        loss = model(ids, cu_seqlens, max_seqlen, labels=labels, num_masked=num_masked).loss
        assert loss is not None
        loss.backward()
    assert step.found[: len(checks.found)] == checks.found
    return step.found[len(checks.found) :]


def test_a_training_step_never_waits_for_the_device(model: FlexBertForMaskedLM) -> None:
    assert _waits(model, 22) == []
    assert _waits(model, None) == ["nonzero"]


def test_the_encoder_reads_no_value_of_a_tensor(model: FlexBertForMaskedLM) -> None:
    """On the meta device tensors have no values: .item(), .tolist(), .cpu() and the like are errors there."""
    encoder = model.encoder.to("meta")
    ids = torch.zeros(64, dtype=torch.int64, device="meta")
    cu_seqlens = torch.zeros(4, dtype=torch.int32, device="meta")
    with keyed_dropout(TokenKeys(0, 0, cu_seqlens, len(ids))):
        encoder(ids, cu_seqlens, 40).sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
    with pytest.raises((RuntimeError, NotImplementedError)):
        unpad(ids[None], ids[None])  # this one waits, and says so


def test_the_number_of_masked_tokens_changes_nothing(model: FlexBertForMaskedLM) -> None:
    ids, cu_seqlens, max_seqlen, _ = batch_of((40, 1, 23), vocab_size=model.config.vocab_size)
    labels = torch.where(torch.arange(64) % 3 == 0, ids, -100)
    model.eval()
    counted, given = (model(ids, cu_seqlens, max_seqlen, labels=labels, num_masked=count).loss for count in (None, 22))
    assert torch.equal(counted, given)
