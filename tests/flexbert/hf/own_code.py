"""Models of the modeling file that exports carry."""

from typing import Any

import torch
from torch import Tensor

from flexbert.hf import modeling_flexbert as modeling
from tests.helpers.architectures import SANDWICH
from tests.helpers.models import batch_of, scrambled, tiny

LENGTHS = (1, 63, 0, 30, 5)  # a row of one token, a row of padding only
TASKS = {"mlm": modeling.FlexBertForMaskedLM, "sequence": modeling.FlexBertForSequenceClassification}
TASKS |= {"tokens": modeling.FlexBertForTokenClassification, "encoder": modeling.FlexBertModel}
# Measured over all presets: 1.9e-5 on logits up to 10, with gte-en-mlm-base's NTK angles, elsewhere 1.1e-5; 5.2e-6 on
# gradients.
LOGITS, GRADIENTS = 5e-5, 1e-5


def in_transformers(model: Any, **config: Any) -> Any:
    """The modeling file's model with the same weights."""
    theirs = modeling.FlexBertForMaskedLM(modeling.FlexBertConfig(model.config.to_dict(), **config))
    faults = theirs.load_state_dict(model.state_dict(), strict=False)
    tied = {"head.output.weight"} if model.config.head.tied else set()  # the token table, which has been loaded
    assert (set(faults.missing_keys), faults.unexpected_keys) == (tied, [])
    return theirs.eval()


def padded(rows: list[Tensor], fill: int, slots: int = 70, left: bool = False) -> Tensor:
    made = torch.full((len(rows), slots), fill)
    for row, values in zip(made, rows, strict=True):
        row[slots - len(values) if left else 0 : slots if left else len(values)] = values
    return made


def inputs(left: bool = False, vocab: int = 97, slots: int = 70) -> dict[str, Tensor]:
    batch = batch_of(LENGTHS, vocab)
    parts = {"input_ids": (batch.split(), 0), "labels": (list(batch.labels.split(list(LENGTHS))), -100)}
    parts["attention_mask"] = ([torch.ones(length, dtype=torch.int64) for length in LENGTHS], 0)
    return {name: padded(rows, fill, slots, left) for name, (rows, fill) in parts.items()}


def own(task: str = "mlm", config: dict[str, Any] = SANDWICH, **changes: Any) -> Any:
    """A model of the modeling file with fresh weights, large enough to see mistakes."""
    torch.manual_seed(0)
    node = tiny(**config).to_dict()
    return scrambled(TASKS[task](modeling.FlexBertConfig(node, **{"initializer_range": 0.2, **changes})))


def close(one: Tensor, other: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(one, other, atol=atol, rtol=0)
