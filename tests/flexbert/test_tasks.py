"""Classification: heads against transformers and formulas written here, and labels that cannot be meant."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import BertForSequenceClassification, BertForTokenClassification

from flexbert import build, from_hf
from flexbert_core.schema import ConfigError
from tests.helpers.hf_models import reference_model
from tests.helpers.models import batch_of, gradients, tiny


@pytest.mark.parametrize("task", ["classification", "tokens"])
def test_classifiers_equal_those_of_transformers(task: Any) -> None:
    reference_class: Any = {"classification": BertForSequenceClassification, "tokens": BertForTokenClassification}[task]
    bert = reference_model("sdpa", "bert")
    bert.config.num_labels = 3
    theirs = reference_class(bert.config).eval()
    theirs.bert.load_state_dict(bert.bert.state_dict(), strict=False)
    model = build(from_hf(bert).config, task, num_labels=3).eval()
    model.encoder.load_state_dict(from_hf(bert).encoder.state_dict())
    head = {"classifier.weight": theirs.classifier.weight, "classifier.bias": theirs.classifier.bias}
    if task == "classification":
        head |= {f"dense.{name}": value for name, value in theirs.bert.pooler.dense.named_parameters()}
    model.head.load_state_dict(head)
    batch = batch_of((9, 65, 1), vocab_size=96)
    expected = [theirs(input_ids=ids[None]).logits[0] for ids in batch.split()]
    logits = model(*batch[:3]).logits
    joined = torch.stack(expected) if task == "classification" else torch.cat(expected)
    torch.testing.assert_close(logits, joined, atol=1e-5, rtol=0)
    labels = torch.arange(len(logits)) % 3
    labels[1] = -100
    loss = model(*batch[:3], labels=labels).loss
    assert loss is not None
    torch.testing.assert_close(loss, F.cross_entropy(joined, labels))
    loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())
    with pytest.raises(ValueError, match="labels"):
        model(*batch[:3], labels=labels[:-1])


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_pooling_takes_each_sequence_alone_and_empty_ones_as_zeros(pooling: str) -> None:
    head = {"name": "classification", "pooling": pooling, "num_labels": 4, "activation": "gelu", "norm": True}
    model = build(tiny(head=head), "classification").eval()
    lengths = (5, 0, 70, 0)
    batch = batch_of(lengths)
    logits = model(*batch[:3]).logits
    assert logits.shape == (4, 4)
    states = model.encoder(*batch[:3]).split(lengths)
    pooled = [part[0] if pooling == "cls" else part.mean(0) for part in (states[0], states[2])]
    zero = torch.zeros(48)
    rows = torch.stack([pooled[0], zero, pooled[1], zero])
    expected = model.head.classifier(model.head.norm(F.gelu(model.head.dense(rows))))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    empty = batch_of(())
    assert model(*empty[:3]).logits.shape == (0, 4)
    scores = model(*batch[:3], labels=torch.rand(4, 4)).loss
    torch.testing.assert_close(
        model(*batch[:3], labels=torch.ones(4, 4)).loss, F.binary_cross_entropy_with_logits(logits, torch.ones(4, 4))
    )
    assert scores is not None
    one = build(tiny(head={**head, "num_labels": 1}), "classification").eval()
    values = torch.tensor([1.0, 2.0, 3.0, 4.0])
    torch.testing.assert_close(
        one(*batch[:3], labels=values).loss, (one(*batch[:3]).logits.squeeze(1) - values).square().mean()
    )


def test_head_of_the_task_is_kept_or_replaced() -> None:
    config = tiny(head={"name": "classification", "pooling": "mean"})
    assert build(config, "classification", num_labels=7).config.head.num_labels == 7
    assert build(config, "classification").config == config
    assert build(config, "tokens", num_labels=5).config.head.model_dump() == {
        "name": "tokens",
        "num_labels": 5,
        "dropout": 0.1,
    }
    encoder = build(config, "encoder", seed=3).state_dict()
    classifier = build(config, "classification", seed=3).state_dict()
    assert all(torch.equal(classifier[f"encoder.{name}"], tensor) for name, tensor in encoder.items())


@pytest.mark.parametrize("task", ["mlm", "encoder"])
def test_labels_of_a_task_without_any_are_refused(task: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^num_labels: 7 for task '{task}', which has no labels: leave it out$"):
        build(tiny(), task, num_labels=7)


def test_a_head_for_another_classification_keeps_what_both_say() -> None:
    config = tiny(head={"name": "classification", "num_labels": 5, "dropout": 0.0, "pooling": "mean"})
    assert build(config, "tokens").config.head.model_dump() == {"name": "tokens", "num_labels": 5, "dropout": 0.0}
    tokens = tiny(head={"name": "tokens", "num_labels": 7, "dropout": 0.25})
    head = build(tokens, "classification", num_labels=3).config.head
    assert (head.num_labels, head.dropout, head.activation) == (3, 0.25, "tanh")
    pretraining = tiny(head={"name": "mlm", "activation": "relu", "dense_bias": False})
    assert build(pretraining, "classification").config.head.model_dump() == {
        **{"name": "classification", "num_labels": 2, "dropout": 0.1, "pooling": "cls", "dense_bias": True},
        **{"activation": "tanh", "norm": False},
    }


@pytest.mark.parametrize("classes", [[0, 0], [0, 1], [-100, 0]])
def test_classes_for_a_single_score_are_refused(classes: list[int]) -> None:
    """Their cross entropy is 0 whatever the model says."""
    ids, cu_seqlens, max_seqlen, _ = batch_of((4, 5))
    sequences, tokens = (build(tiny(), task, num_labels=1) for task in ("classification", "tokens"))
    with pytest.raises(
        ValueError, match="^labels: of classes, for num_labels 1: with a single class the loss is always 0"
    ):
        sequences(ids, cu_seqlens, max_seqlen, labels=torch.tensor(classes))
    with pytest.raises(ValueError, match="^labels: of classes, for num_labels 1"):
        tokens(ids, cu_seqlens, max_seqlen, labels=torch.zeros_like(ids))
    for wrong in (torch.zeros(9), torch.zeros(9, dtype=torch.int32)):
        with pytest.raises(ValueError, match=f"^labels: {wrong.dtype}: expected int64"):
            build(tiny(), "tokens")(ids, cu_seqlens, max_seqlen, labels=wrong)


def test_yes_no_questions_without_an_answer_are_ignored() -> None:
    ids, cu_seqlens, max_seqlen, _ = batch_of((4, 5, 6))
    model = build(tiny(), "classification", num_labels=2).eval()
    answers = torch.tensor([[1.0, -100.0], [0.0, 0.25], [-100.0, -100.0]])
    output = model(ids, cu_seqlens, max_seqlen, labels=answers)
    scores = output.logits[[0, 1, 1], [0, 0, 1]].sigmoid()
    expected = -(scores[0].log() + (1 - scores[1]).log() + 0.25 * scores[2].log() + 0.75 * (1 - scores[2]).log()) / 3
    torch.testing.assert_close(output.loss, expected)
    nothing = model(ids, cu_seqlens, max_seqlen, labels=torch.full((3, 2), -100.0)).loss
    assert nothing == 0
    for wrong in (-1.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=f"^labels: {wrong:g} is no answer of a yes-no question: expected 0 to 1"):
            model(ids, cu_seqlens, max_seqlen, labels=answers.clone().fill_(wrong))
