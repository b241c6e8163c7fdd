"""What the modeling file's models take and return: as transformers' own do, or refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch

from flexbert.hf import modeling_flexbert as modeling
from tests.flexbert.hf.own_code import close, inputs, own
from tests.helpers.architectures import PARALLEL, SANDWICH
from tests.helpers.models import tiny


@pytest.mark.parametrize("config", [SANDWICH, PARALLEL], ids=["sandwich", "parallel"])
def test_attentions_and_hidden_states(config: Any) -> None:
    model, given = own(config=config), inputs()
    output = model(**given, output_attentions=True, output_hidden_states=True)
    close(output.logits, model(**given).logits)  # eager as sdpa
    assert len(output.attentions) == 4
    assert len(output.hidden_states) == 5
    real = given["attention_mask"].bool()
    for weights in output.attentions:
        assert weights.shape == (5, 3, 70, 70)
        close(weights.sum(-1), torch.ones(5, 3, 70))
        for row in (0, 1, 3, 4):  # no real token looks at padding
            assert not weights[row][:, real[row]][..., ~real[row]].any()
    narrow = own(config=config | {"attention": {"window_per_side": 3, "global_attn_every_n_layers": 3}})
    far = (torch.arange(20)[:, None] - torch.arange(20)).abs() > 3
    for layer, weights in enumerate(narrow(given["input_ids"][:, :20], output_attentions=True).attentions):
        assert bool(weights[:, :, far].any()) == (layer % 3 == 0)
    for tensor in (output.hidden_states[0], output.attentions[0]):
        tensor.retain_grad()
    output.logits.sum().backward()
    assert output.hidden_states[0].grad.any()
    assert output.attentions[0].grad.any()
    by_config = own(config=config, attn_implementation="eager", output_attentions=True, output_hidden_states=True)
    assert by_config(**given).attentions is not None
    assert by_config(**given).hidden_states is not None
    assert by_config(**given, output_attentions=False, output_hidden_states=False).hidden_states is None


def test_tuples_embeddings_and_positions() -> None:
    model, given = own(), inputs()
    as_tuple = model(**given, output_hidden_states=True, return_dict=False)
    as_output = model(**given, output_hidden_states=True)
    assert isinstance(as_tuple, tuple)
    assert len(as_tuple) == 3
    assert torch.equal(as_tuple[0], as_output.loss)
    assert torch.equal(as_tuple[1], as_output.logits)
    assert isinstance(own(return_dict=False)(given["input_ids"]), tuple)
    assert isinstance(own("encoder", return_dict=False)(given["input_ids"]), tuple)
    mask = given["attention_mask"]
    rows = model.get_input_embeddings()(given["input_ids"])
    assert torch.equal(model(inputs_embeds=rows, attention_mask=mask).logits, model(given["input_ids"], mask).logits)
    for config in (SANDWICH, PARALLEL, {"position": "learned"}, {"position": "sinusoidal"}):
        model, ids = own(config=config), given["input_ids"][1:2, :60]
        plain = model(ids).logits
        assert torch.equal(model(ids, position_ids=torch.arange(60)[None]).logits, plain)
        order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
        moved = model(ids[:, order], position_ids=order[None]).logits
        close(moved, plain[:, order])  # tokens and places moved together: nothing has changed


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "unknown": ({"head_mask": torch.ones(3)}, TypeError, "head_mask"),
    "misspelt": ({"token_type_id": torch.zeros(2, 5)}, TypeError, "token_type_id"),
    "no input": ({"input_ids": None}, ValueError, "give one of them"),
    "two inputs": ({"inputs_embeds": torch.zeros(2, 5, 48)}, ValueError, "give one of them"),
    "flat": ({"input_ids": torch.zeros(5, dtype=torch.int64)}, ValueError, "expected shape"),
    "square mask": ({"attention_mask": torch.ones(2, 1, 5, 5)}, ValueError, "attention_mask: expected shape"),
    "short mask": ({"attention_mask": torch.ones(2, 4)}, ValueError, "attention_mask: expected shape"),
    "additive mask": ({"attention_mask": torch.full((2, 5), -1e9)}, ValueError, "attention_mask: expected 1"),
    "numbered mask": (
        {"attention_mask": torch.tensor([[1, 1, 2, 2, 0]] * 2)},
        ValueError,
        "attention_mask: expected 1",
    ),
    "positions": ({"position_ids": torch.arange(4)[None]}, ValueError, "position_ids: expected shape"),
    "types": ({"token_type_ids": torch.zeros(1, 5)}, ValueError, "token_type_ids: expected shape"),
    "no types": ({"token_type_ids": torch.ones(2, 5).long()}, ValueError, "token_type_ids: this model has none"),
    "labels": ({"labels": torch.zeros(2, 4).long()}, ValueError, "labels: .* do not fit"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_not_supported_is_refused_by_name(case: str) -> None:
    change, kind, message = WRONG[case]
    model = own(config=PARALLEL)
    with pytest.raises(kind, match=message):
        model(**{"input_ids": torch.ones(2, 5, dtype=torch.int64), **change})


def test_what_the_class_cannot_do_is_refused_by_name(tmp_path: Path) -> None:
    model = own(config=PARALLEL)
    model.save_pretrained(tmp_path)
    for name in ("flash_attention_2", "flex_attention"):
        with pytest.raises((ValueError, ImportError), match="(?i)flash|flex"):
            type(model).from_pretrained(tmp_path, attn_implementation=name)
    for name in ("eager", "sdpa"):
        loaded = type(model).from_pretrained(tmp_path, attn_implementation=name)
        assert loaded.config._attn_implementation == name
    ids, calls = inputs()["input_ids"], []
    plain = loaded.eval()(ids).logits
    loaded.encoder.layers[0].register_forward_hook(lambda _, __, output: calls.append(output[1] is not None))
    loaded.set_attn_implementation("eager")
    close(loaded(ids).logits, plain)
    assert calls == [True]
    loaded.config._attn_implementation_internal = "flash_attention_3"  # past transformers' own check
    with pytest.raises(ValueError, match="attn_implementation: 'flash_attention_3' is not supported"):
        loaded(ids)
    with pytest.raises(NotImplementedError, match="prune_heads"):
        model.prune_heads({0: [1]})
    for name in ("is_decoder", "add_cross_attention"):
        with pytest.raises(ValueError, match=f"config.{name}"):
            modeling.FlexBertModel(modeling.FlexBertConfig(tiny(**PARALLEL).to_dict(), **{name: True}))
    with pytest.raises(ValueError, match=r"config\.flexbert: is empty"):
        modeling.FlexBertModel(modeling.FlexBertConfig())
