"""The host never waits for the device inside a training step, so that it can queue the next kernels meanwhile."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flexbert import build
from flexbert.dropout import TokenKeys, keyed_dropout
from flexbert.model import FlexBertForMaskedLM
from flexbert.packed import check_packed, unpad
from tests.helpers import flash
from tests.helpers.models import batch_of, tiny
from tests.helpers.waits import Waits

MODEL = {
    "num_hidden_layers": 4,
    "attention": {"name": "multihead", "global_attn_every_n_layers": 3, "backend": "flash2", "out_dropout": 0.1},
}


CASES: dict[str, dict[str, Any]] = {
    "rope": {},
    "alibi": {"position": "alibi"},
    "learned": {"position": "learned", "embedding": {"name": "tokens", "token_types": 2}},
    "sinusoidal": {"position": {"name": "sinusoidal", "learned_scale": True}},
    "shared heads": {"attention": {**MODEL["attention"], "num_key_value_heads": 1, "qk_norm": "rmsnorm"}},
    "loss": {"loss": {"name": "cross_entropy", "z_loss": 0.1, "label_smoothing": 0.1}},
}
TASKS: dict[str, tuple[Any, dict[str, Any]]] = {
    "first token": ("classification", {"name": "classification", "pooling": "cls"}),
    "mean": ("classification", {"name": "classification", "pooling": "mean", "norm": True}),
    "tokens": ("tokens", {"name": "tokens"}),
}


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that itself waits for nothing."""
    flash.install(monkeypatch)


@pytest.fixture
def model(flash_attn: None) -> FlexBertForMaskedLM:
    return build(tiny(**MODEL))


def _waits(forward: Callable[..., Tensor], keyed: bool = True) -> list[str]:
    """Those of a forward, which gives a loss, and backward, less the checks of a batch's values, which are made on the
    CPU only. keyed: with dropout as in pretraining."""
    ids, cu_seqlens, max_seqlen, _ = batch_of((40, 1, 23))
    with Waits() as checks:
        check_packed(ids, cu_seqlens, max_seqlen)
    with Waits() as step, keyed_dropout(TokenKeys(0, 0, cu_seqlens, len(ids)) if keyed else None):
        forward(ids, cu_seqlens, max_seqlen).backward()
    for name in checks.found:
        step.found.remove(name)
    return step.found


LABELS = torch.where(torch.arange(64) % 3 == 0, torch.arange(64), -100)


@pytest.mark.usefixtures("flash_attn")
@pytest.mark.parametrize("case", CASES)
def test_a_training_step_never_waits_for_the_device(case: str) -> None:
    model = build(tiny(**{**MODEL, **CASES[case]}))
    types = torch.arange(64) % 2 if case == "learned" else None

    def step(num_masked: int | None) -> list[str]:
        return _waits(lambda *batch: model(*batch, labels=LABELS, token_type_ids=types, num_masked=num_masked).loss)

    assert step(22) == []
    assert step(None) == ["nonzero"]


@pytest.mark.usefixtures("flash_attn")
@pytest.mark.parametrize("case", TASKS)
def test_fine_tuning_never_waits_for_the_device(case: str) -> None:
    task, head = TASKS[case]
    model: Any = build(tiny(**MODEL, head=head), task)
    labels = torch.tensor([0, 1, -100]) if task == "classification" else torch.where(LABELS >= 0, 1, -100)
    assert _waits(lambda *batch: model(*batch, labels=labels).loss, keyed=False) == []


@pytest.mark.usefixtures("flash_attn")
@pytest.mark.parametrize("case", [*CASES, *TASKS])
def test_a_model_reads_no_value_of_a_tensor(case: str) -> None:
    """On the meta device tensors have no values: .item(), .tolist(), .cpu() and the like are errors there."""
    task, head = TASKS.get(case, ("encoder", {"name": "mlm"}))
    model: Any = build(tiny(**{**MODEL, **CASES.get(case, {}), "head": head}), task).to("meta")
    ids = torch.zeros(64, dtype=torch.int64, device="meta")
    cu_seqlens = torch.zeros(4, dtype=torch.int32, device="meta")
    with keyed_dropout(None if case in TASKS else TokenKeys(0, 0, cu_seqlens, len(ids))):
        out = model(ids, cu_seqlens, 40)
        (out if task == "encoder" else out.logits).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with pytest.raises((RuntimeError, NotImplementedError)):
        unpad(ids[None], ids[None])  # this one waits, and says so


def test_the_number_of_masked_tokens_changes_nothing(model: FlexBertForMaskedLM) -> None:
    ids, cu_seqlens, max_seqlen, _ = batch_of((40, 1, 23), vocab_size=model.config.vocab_size)
    labels = torch.where(torch.arange(64) % 3 == 0, ids, -100)
    model.eval()
    counted, given = (model(ids, cu_seqlens, max_seqlen, labels=labels, num_masked=count).loss for count in (None, 22))
    assert torch.equal(counted, given)


@pytest.mark.parametrize("count", [0, 1, 21, 23, 64])
def test_another_number_of_masked_tokens_is_refused(count: int) -> None:
    """A smaller one would leave labels out of the loss, a larger one would look for a target -100."""
    model = build(tiny())
    batch = batch_of((40, 1, 23))
    labels = torch.where(torch.arange(64) % 3 == 0, batch.input_ids, -100)
    with pytest.raises(ValueError, match=rf"^num_masked: {count}, but 22 labels are not -100: give that"):
        model(*batch[:3], labels=labels, num_masked=count)
    with pytest.raises(ValueError, match=rf"^num_masked: {count} without labels"):
        model(*batch[:3], num_masked=count)
