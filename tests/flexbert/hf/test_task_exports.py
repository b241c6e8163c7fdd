"""Fine-tuned models as transformers' own classes, or with code of their own, and back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from flexbert import build, from_hf, to_hf
from flexbert.config import without_init
from flexbert.encoder import FlexBertEncoder
from flexbert.hf.verify import PARITY_FILE
from flexbert_core.schema import ConfigError, RunError
from tests.helpers.architectures import BERT, IDS
from tests.helpers.hf_models import CLASSES, FIELDS, SIZES, batch_for
from tests.helpers.models import ODD_LENGTHS, batch_of, scrambled, tiny
from tests.helpers.tokenizer import tokenizer_of

SLOW = pytest.mark.slow
ROBERTA = {**BERT, "position": {"name": "learned", "offset": 4}}
POOLED = {"name": "classification", "activation": "gelu", "dense_bias": False, "norm": True}
CASES: list[Any] = [
    (BERT, {"name": "classification"}, "BertForSequenceClassification"),
    (BERT, {"name": "tokens"}, "BertForTokenClassification"),
    (ROBERTA, {"name": "classification"}, "RobertaForSequenceClassification"),
    (ROBERTA, {"name": "tokens"}, "RobertaForTokenClassification"),
    ({}, POOLED, "ModernBertForSequenceClassification"),
    (
        {},
        {**POOLED, "pooling": "mean", "activation": "silu", "dense_bias": True},
        "ModernBertForSequenceClassification",
    ),
    ({}, {"name": "tokens"}, "FlexBertForTokenClassification"),
    ({"norm": "rmsnorm"}, {"name": "classification", "pooling": "mean"}, "FlexBertForSequenceClassification"),
]


def same(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize(
    ("changes", "head", "architecture"),
    [pytest.param(*case, id=f"{case[2]}-{i}", marks=() if i in (0, 3, 5, 6) else SLOW) for i, case in enumerate(CASES)],
)
def test_a_fine_tuned_model_is_what_transformers_loads(
    changes: dict[str, Any], head: dict[str, Any], architecture: str, tmp_path: Path
) -> None:
    task: Any = "tokens" if head["name"] == "tokens" else "classification"
    config = tiny(**{**changes, **IDS, "head": {**head, "num_labels": 3, "dropout": 0.25}})
    model: Any = scrambled(build(config, task)).eval()
    compared = to_hf(model, tokenizer_of(97), tmp_path / "export", labels=["yes", "no", "so"])
    assert compared.largest_difference < 2e-5
    auto = f"AutoModelFor{'Token' if task == 'tokens' else 'Sequence'}Classification"
    exported = getattr(transformers, auto).from_pretrained(tmp_path / "export", trust_remote_code=True)
    assert type(exported).__name__ == architecture
    assert exported.config.architectures == [architecture]
    assert exported.config.id2label == {0: "yes", 1: "no", 2: "so"}
    batch = batch_of(ODD_LENGTHS)
    batch = batch._replace(input_ids=batch.input_ids.where(batch.input_ids != 3, 5))  # RoBERTa counts no padding
    logits = model(*batch[:3]).logits
    assert logits.abs().max() > 0.1
    theirs = torch.cat([exported(input_ids=ids[None]).logits[0].reshape(-1, 3) for ids in batch.split()])
    torch.testing.assert_close(theirs, logits, atol=2e-5, rtol=0)
    again = from_hf(tmp_path / "export", task)
    assert same(again.state_dict(), model.state_dict())
    assert without_init(again.config) == without_init(config)  # an export with code leaves it out
    assert same(from_hf(tmp_path / "export", "encoder").state_dict(), model.encoder.state_dict())
    card = (tmp_path / "export" / "README.md").read_text()
    assert f"{'token' if task == 'tokens' else 'text'}-classification" in card
    assert auto in card


@pytest.mark.parametrize("model_type", CLASSES)
@pytest.mark.parametrize("task", ["classification", "tokens"])
def test_models_that_transformers_fine_tuned_compute_the_same_here(model_type: str, task: Any, tmp_path: Path) -> None:
    """The reference is transformers' own class with random weights, saved by it."""
    kind = {"bert": "Bert", "roberta": "Roberta", "modernbert": "ModernBert"}[model_type]
    name = f"{kind}For{'Token' if task == 'tokens' else 'Sequence'}Classification"
    torch.manual_seed(0)
    config = CLASSES[model_type][0](**{**SIZES, **FIELDS[model_type], "num_labels": 4})
    reference = scrambled(getattr(transformers, name)(config)).eval()
    reference.save_pretrained(tmp_path / "tuned")
    if (model_type, task) == ("modernbert", "tokens"):
        with pytest.raises(ConfigError, match="has a dense layer and a norm before its classifier, which .* has not"):
            from_hf(tmp_path / "tuned", task)
        return
    ours = from_hf(tmp_path / "tuned", task).eval()
    batch = batch_for(reference, ODD_LENGTHS)
    theirs = torch.cat([reference(input_ids=ids[None]).logits[0].reshape(-1, 4) for ids in batch.split()])
    torch.testing.assert_close(ours(*batch[:3]).logits, theirs, atol=1e-5, rtol=0)


def test_what_has_no_head_for_the_task_says_so(tmp_path: Path) -> None:
    to_hf(build(tiny(**BERT, **IDS)), tokenizer_of(97), tmp_path / "bert")
    with pytest.raises(
        ConfigError, match=r"classifier.weight: missing in the weights: an encoder without a head for tokens"
    ):
        from_hf(tmp_path / "bert", "tokens")
    model = build(tiny(**BERT, **IDS), "classification", num_labels=3)
    with pytest.raises(ConfigError, match="labels: 2 for a model of 3 classes"):
        to_hf(model, tokenizer_of(97), tmp_path / "out", labels=["a", "b"])
    assert not (tmp_path / "out").exists()


def test_the_comparison_is_told_and_kept(tmp_path: Path) -> None:
    compared = to_hf(build(tiny()), tokenizer_of(97), tmp_path / "export")
    assert 0 < compared.largest_difference < 1e-5
    assert (len(compared.lengths), max(compared.lengths)) == (6, 256)
    kept = json.loads((tmp_path / "export" / PARITY_FILE).read_text())
    assert kept["largest_logit_difference"] == compared.largest_difference
    assert kept["sequence_lengths"] == compared.lengths


class WrongWhereMasked(FlexBertEncoder):
    """Right for all tokens, wrong for those that are asked for by themselves, as in training."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        states = super().forward(*args, **kwargs)
        return states * 1.01 if kwargs.get("wanted") is not None else states


class WrongWhenLong(FlexBertEncoder):
    def forward(self, input_ids: Any, cu_seqlens: Any, max_seqlen: int, *args: Any, **kwargs: Any) -> Any:
        states = super().forward(input_ids, cu_seqlens, max_seqlen, *args, **kwargs)
        return states * 1.01 if max_seqlen == 256 else states


@pytest.mark.parametrize("encoder", [WrongWhereMasked, WrongWhenLong])
@pytest.mark.parametrize(
    "changes", [pytest.param({}, id="modernbert"), pytest.param({"norm": "rmsnorm"}, id="own code", marks=SLOW)]
)
def test_what_is_wrong_at_masked_places_or_full_length_is_not_published(
    encoder: Any, changes: Any, tmp_path: Path
) -> None:
    model = build(tiny(**changes))
    model.encoder.__class__ = encoder
    with pytest.raises(RunError, match="export's logits differ from the model's by .*: not published"):
        to_hf(model, tokenizer_of(97), tmp_path / "export")
    assert list(tmp_path.iterdir()) == []
