"""The modeling file's heads and losses: those of transformers' tasks, and of FlexBERT's own heads."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from flexbert import FlexBertConfig, build
from flexbert.hf import modeling_flexbert as modeling
from tests.flexbert.hf.own_code import LENGTHS, LOGITS, TASKS, close, inputs, own
from tests.helpers.architectures import PARALLEL
from tests.helpers.models import batch_of, gradients, scrambled
from tests.helpers.presets import small


@pytest.mark.parametrize("task", ["mlm", "sequence", "tokens"])
def test_losses_of_microbatches_add_up_to_the_loss_of_the_step(task: str) -> None:
    """Trainer gives the number of labels of the whole step, and divides no more (accepts_loss_kwargs)."""
    model = own(task, PARALLEL, num_labels=3)
    assert model.accepts_loss_kwargs
    given = inputs()
    if task == "sequence":
        given["labels"] = torch.tensor([0, 1, -100, 2, 1])
    elif task == "tokens":
        given["labels"] = torch.where(given["labels"] < 0, -100, given["labels"] % 3)
    count = int((given["labels"] != -100).sum())
    model(**given).loss.backward()
    whole = gradients(model) | {}
    model.zero_grad()
    total = torch.zeros(())
    for rows in ([0], [1, 2], [3], [4]):
        part = model(
            **{name: value[rows] for name, value in given.items()}, num_items_in_batch=torch.tensor(count)
        ).loss
        part.backward()
        total = total + part.detach()
    close(total, model(**given).loss)
    for name, gradient in gradients(model).items():
        close(gradient, whole[name])
    expected = F.cross_entropy(model(**given).logits.flatten(0, -2), given["labels"].flatten())
    close(model(**given).loss, expected)
    nothing = given | {"labels": torch.full_like(given["labels"], -100)}
    assert float(model(**nothing).loss) == 0.0
    close(model(**given, num_items_in_batch=2 * count).loss, expected / 2)


def test_problem_types_of_sequences() -> None:
    for kind, labels, loss in (
        ("regression", torch.rand(5, 3), F.mse_loss),
        ("multi_label_classification", torch.randint(0, 2, (5, 3)).float(), F.binary_cross_entropy_with_logits),
        ("single_label_classification", torch.tensor([0, 2, 1, 1, 0]), F.cross_entropy),
    ):
        for told in (kind, None):
            if told is None and kind == "regression":
                continue  # several scores and float labels are taken for several labels, as in transformers
            model = own("sequence", PARALLEL, num_labels=3, problem_type=told)
            output = model(**inputs() | {"labels": labels})
            close(output.loss, loss(output.logits, labels))
            assert model.config.problem_type == kind
            parts = [model(**{k: v[i : i + 1] for k, v in (inputs() | {"labels": labels}).items()},
                           num_items_in_batch=labels.numel()).loss for i in range(5)]  # fmt: skip
            close(torch.stack(parts).sum(), output.loss)
    one = own("sequence", PARALLEL, num_labels=1)
    for labels in (torch.rand(5), torch.rand(5, 1)):
        output = one(**inputs() | {"labels": labels})
        close(output.loss, F.mse_loss(output.logits.flatten(), labels.flatten()))
    for bad in (torch.rand(5, 2), torch.rand(4)):
        with pytest.raises(ValueError, match=r"labels: .* do not fit scores \(5, 1\)"):
            one(**inputs() | {"labels": bad})


@pytest.mark.parametrize("preset", ["bert-base", "neobert", "mosaicbert-base"])
@pytest.mark.parametrize("head", [{"name": "classification"}, {"name": "classification", "pooling": "mean", "norm": True,
                                  "activation": "gelu", "dense_bias": False}, {"name": "tokens"}], ids=["cls", "mean", "tokens"])  # fmt: skip
def test_task_heads_compute_what_flexberts_do(head: Any, preset: str) -> None:
    task = "tokens" if head["name"] == "tokens" else "classification"
    node = small(preset).config.to_dict() | {"head": head}
    ours: Any = scrambled(build(FlexBertConfig.from_dict(node), task, num_labels=3))
    theirs = TASKS["tokens" if task == "tokens" else "sequence"](modeling.FlexBertConfig(ours.config.to_dict()))
    theirs.load_state_dict(ours.state_dict())  # the same names
    assert theirs.config.num_labels == 3
    batch, expected = batch_of(LENGTHS), ours(*batch_of(LENGTHS)[:3]).logits
    for left in (False, True):
        given = inputs(left)
        logits = theirs.eval()(given["input_ids"], given["attention_mask"]).logits
        close(logits if task == "classification" else logits[given["attention_mask"].bool()], expected, LOGITS)
    assert len(batch.input_ids) == sum(LENGTHS)


@pytest.mark.parametrize("task", ["sequence", "tokens"])
def test_a_head_for_another_task_starts_anew(task: str, tmp_path: Path) -> None:
    """The masked-token head's dense layer has the name of the classifier's, and must not pass for it."""
    pretrained = own(config=PARALLEL)
    pretrained.save_pretrained(tmp_path / "mlm")
    torch.manual_seed(1)
    model = TASKS[task].from_pretrained(tmp_path / "mlm", num_labels=5)
    for name, tensor in pretrained.encoder.state_dict().items():
        assert torch.equal(tensor, model.encoder.state_dict()[name])
    for name, parameter in model.head.named_parameters():
        wanted = 0.2 if parameter.ndim == 2 else 0.0  # config.initializer_range
        assert float(parameter.std()) == pytest.approx(wanted, rel=0.2), name
    if task == "sequence":
        assert not torch.equal(model.head.dense.weight, pretrained.head.dense.weight)
    model.save_pretrained(tmp_path / "tuned")
    again = TASKS[task].from_pretrained(tmp_path / "tuned")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert again.config.flexbert["head"] == model.config.flexbert["head"]
    assert again.config.flexbert["head"]["num_labels"] == again.config.num_labels == 5
    assert pretrained.config.flexbert["head"]["name"] == "mlm"
    with pytest.raises(ValueError, match="is no masked-token head"):
        modeling.FlexBertForMaskedLM.from_pretrained(tmp_path / "tuned")
    other = TASKS[task].from_pretrained(tmp_path / "tuned", num_labels=2, ignore_mismatched_sizes=True)
    assert other.head.classifier.weight.shape == (2, 48)
