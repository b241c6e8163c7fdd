"""Random configs of transformers with random weights: from_hf gives their logits, or refuses by the field's name.

And what to_hf writes comes back to the bit, of these and of all presets.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexbert import FlexBertConfig, build, from_hf, to_hf
from flexbert.config import PRESETS
from flexbert_core.schema import ConfigError
from tests.flexbert.hf.own_code import in_transformers
from tests.helpers.hf_forms import kinds, newer, older, rewrite
from tests.helpers.hf_models import CLASSES
from tests.helpers.models import equal, scrambled
from tests.helpers.presets import SIZES
from tests.helpers.tokenizer import tokenizer_of

# Measured worst case over 460 examples: 5.2e-5 on logits up to 6.2, with squared activations in the head; there
# transformers lies 4.9e-5 from its own float64.
TOLERANCE = 1e-4

ACTIVATIONS = ["gelu", "gelu_new", "gelu_pytorch_tanh", "silu", "swish", "relu", "relu2", "tanh", "sigmoid", "mish"]
ACTIVATIONS += ["relu6", "leaky_relu"]
OTHER_ACTIVATIONS = ["quick_gelu", "gelu_fast", "gelu_10", "laplace"]
SHARE = st.sampled_from([0.0, 0.1, 0.5])
THETA = st.sampled_from([1.0, 100.0, 10000.0, 160000.0, 1e6])


@st.composite
def configs(draw: Any) -> tuple[str, dict[str, Any]]:
    """A type of model and fields of its config; rarely an activation that FlexBERT does not have."""
    kind = draw(st.sampled_from(sorted(CLASSES)))
    # Norms of fewer channels than about 6 lose digits: of 2 channels they tell signs only
    heads, head_dim = draw(st.integers(1, 4)), draw(st.sampled_from([6, 8, 16] + [7, 9] * (kind != "modernbert")))
    rare = draw(st.integers(0, 9)) == 0
    activations = st.sampled_from(OTHER_ACTIVATIONS if rare else ACTIVATIONS)
    pad, length = draw(st.integers(0, 3)), draw(st.integers(4, 70))
    fields: dict[str, Any] = {
        "vocab_size": draw(st.integers(10, 90)),
        "hidden_size": heads * head_dim,
        "num_attention_heads": heads,
        "num_hidden_layers": draw(st.integers(1, 5)),
        "intermediate_size": draw(st.integers(1, 40)),
        "max_position_embeddings": length + (pad + 1) * (kind == "roberta"),
        "initializer_range": draw(st.sampled_from([0.02, 0.3])),
        "pad_token_id": pad,
        "bos_token_id": draw(st.integers(0, 9)),
        "eos_token_id": draw(st.integers(0, 9)),
        "classifier_dropout": draw(SHARE),
    }
    eps = st.sampled_from([1e-12, 1e-5, 1e-2])
    if kind != "modernbert":
        return kind, fields | {
            "hidden_act": draw(activations),
            "hidden_dropout_prob": draw(SHARE),
            "attention_probs_dropout_prob": draw(SHARE),
            "type_vocab_size": draw(st.integers(1, 3)),
            "layer_norm_eps": draw(eps),
        }
    flags = ("norm_bias", "attention_bias", "mlp_bias", "classifier_bias", "decoder_bias", "sparse_prediction")
    shares = ("attention_dropout", "embedding_dropout", "mlp_dropout")
    return kind, fields | {
        "hidden_activation": draw(activations),
        "classifier_activation": draw(st.sampled_from(ACTIVATIONS)),
        "global_rope_theta": draw(THETA),
        "local_rope_theta": draw(THETA),
        "global_attn_every_n_layers": draw(st.integers(1, 5)),
        "local_attention": draw(st.integers(2, 40)),
        "norm_eps": draw(eps),
        "cls_token_id": draw(st.integers(0, 9)),
        "sep_token_id": draw(st.integers(0, 9)),
        "initializer_cutoff_factor": draw(st.sampled_from([None, 1.0, 3.0])),
        "classifier_pooling": draw(st.sampled_from(["cls", "mean"])),
        **{name: draw(st.booleans()) for name in flags},
        **{name: draw(SHARE) for name in shares},
    }


def made(kind: str, fields: dict[str, Any], number: int) -> Any:
    """A model of transformers with no weight at 0 or 1."""
    if fields.get("initializer_cutoff_factor", 1.0) is None and "layer_types" in CLASSES[kind][0]().to_dict():
        fields = fields | {"initializer_cutoff_factor": 3.0}  # transformers 5 wants a number
    torch.manual_seed(number)
    config = CLASSES[kind][0](**fields)
    model = CLASSES[kind][1]._from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model.eval()


def copied(model: Any) -> Any:
    """In float32, with fresh buffers: casting a model rounds the frequencies of its positions for good."""
    fresh = type(model)(model.config).eval()
    fresh.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    return fresh


@torch.no_grad()
def both_logits(reference: Any, model: Any, longest: int, number: int) -> tuple[Tensor, Tensor]:
    """Of transformers and ours, sequence by sequence."""
    config, generator = reference.config, torch.Generator().manual_seed(number)
    lengths = sorted({1, 2, (longest + 1) // 2, longest})
    ids = torch.randint(0, config.vocab_size, (sum(lengths),), generator=generator)
    ids[ids == config.pad_token_id] = config.pad_token_id + 1  # it would be taken for padding
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    theirs = torch.cat([reference(input_ids=part[None]).logits[0] for part in ids.split(lengths)])
    return theirs, model.eval()(ids, cu_seqlens, longest).logits


def check(case: tuple[str, dict[str, Any]], saving: dict[str, Any], number: int) -> None:
    kind, fields = case
    original = made(kind, fields, number)
    if saving["vocab_size"] is not None:
        original.resize_token_embeddings(saving["vocab_size"])
    original.to(saving["dtype"])
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        original.save_pretrained(folder / "given", max_shard_size=saving["max_shard_size"])
        rewrite(folder / "given", saving["form"] if kind == "modernbert" else dict)
        if fields.get("hidden_act", fields.get("hidden_activation")) in OTHER_ACTIVATIONS:
            with pytest.raises(ConfigError, match=r": hidden_act(ivation)?: '\w+' has no counterpart here"):
                from_hf(folder / "given")
            return
        model = from_hf(folder / "given")
        theirs, ours = both_logits(copied(original), model, model.config.max_position_embeddings, number)
        torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)
        assert equal(from_hf(original), model)
        encoder = from_hf(folder / "given", task="encoder")
        assert equal(encoder, model.encoder)
        if saving["export"]:
            to_hf(model, tokenizer_of(10), folder / "export")
            assert not (folder / "export" / "modeling_flexbert.py").exists()
            assert equal(from_hf(folder / "export"), model)


SAVING = st.fixed_dictionaries(
    {
        "vocab_size": st.sampled_from([None, 10, 77, 128]),
        "dtype": st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
        "max_shard_size": st.sampled_from(["5GB", "2KB", "20KB"]),
        "form": st.sampled_from([older, newer, lambda node: older(node) | newer(node)]),
        "export": st.sampled_from([True, False, False]),
    }
)
NUMBERS = st.integers(0, 2**31)


@settings(max_examples=60)
@given(configs(), SAVING, NUMBERS)
def test_from_hf_gives_the_logits_of_transformers(case: Any, saving: Any, number: int) -> None:
    check(case, saving, number)


@pytest.mark.slow
@pytest.mark.long
@settings(max_examples=400)
@given(configs(), SAVING, NUMBERS)
def test_from_hf_gives_the_logits_of_transformers_often(case: Any, saving: Any, number: int) -> None:
    check(case, saving, number)


@settings(max_examples=150)
@given(
    st.lists(st.sampled_from(["full_attention", "sliding_attention"]), min_size=1, max_size=8),
    st.lists(st.sampled_from(["default", "linear", "yarn", "dynamic"]), min_size=2, max_size=2),
    st.lists(st.sampled_from([2.0, 2.0, 4.0]), min_size=2, max_size=2),
)
def test_patterns_and_scalings_are_expressed_or_refused(layers: list[str], types: list[str], factors: Any) -> None:
    """A config is taken exactly when it says what FlexBERT has; weights are asked for only then."""
    parameters = {
        kind: {"rope_type": name, "rope_theta": 50.0} | ({} if name == "default" else {"factor": factor})
        for kind, name, factor in zip(("full_attention", "sliding_attention"), types, factors, strict=True)
    }
    node = {"model_type": "modernbert", "num_hidden_layers": len(layers), "layer_types": layers}
    periods = [period for period in range(1, len(layers) + 1) if kinds(len(layers), period) == layers]
    same = types == ["default"] * 2 or (types == ["linear"] * 2 and factors[0] == factors[1])
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "config.json").write_text(json.dumps(node | {"rope_parameters": parameters}))
        with pytest.raises(ConfigError) as caught:
            from_hf(scratch)
    said = str(caught.value).removeprefix(f"{scratch}: ")
    assert said.startswith("model.safetensors: there is none") == bool(periods and same)
    assert said.startswith(("model.safetensors", "layer_types: ", "rope_parameters"))


@pytest.mark.parametrize("preset", sorted(file.stem for file in PRESETS.glob("*.yaml")))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_copies_of_every_preset_that_transformers_saved(preset: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """In several files and half precision: from their class, or from the modeling file of our exports. Exports
    themselves: test_round_trips.py."""
    node = FlexBertConfig.from_yaml(preset).to_dict() | SIZES
    node |= {"bos_token_id": None, "eos_token_id": None, "init": {"name": "default", "std": 0.2}}
    model = scrambled(build(FlexBertConfig.from_dict(node)))
    in_transformers(model).to(dtype).save_pretrained(tmp_path, max_shard_size="40KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    again = from_hf(tmp_path)
    assert again.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor.to(dtype).float()), name
