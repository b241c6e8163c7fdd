"""A causal encoder is the decoder that transformers has of the same architecture, forward and backward."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import ModernBertDecoderConfig, ModernBertDecoderForCausalLM

from flexbert import FlexBertConfig, build
from flexbert.encoder import require_causal
from flexbert.registry import ATTENTIONS
from flexbert_core.schema import ConfigError
from tests.helpers.models import ODD_LENGTHS, batch_of, tiny

PER_SIDE, LAYERS, WIDTH, HEADS = 3, 4, 32, 2


def config() -> FlexBertConfig:
    return FlexBertConfig.from_yaml("modernbert-tiny").model_copy(
        update={
            "vocab_size": 64,
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "intermediate_size": 48,
            "attention": ATTENTIONS.parse(
                {"name": "multihead", "global_attn_every_n_layers": 3, "window_per_side": PER_SIDE}
            ),
        }
    )


def decoder_of(model: Any) -> Any:
    """transformers' ModernBertDecoder with the model's weights: it has three matrices where we have one."""
    position = model.config.position
    theirs = ModernBertDecoderForCausalLM(
        ModernBertDecoderConfig(
            vocab_size=64,
            hidden_size=WIDTH,
            intermediate_size=48,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=128,
            global_attn_every_n_layers=3,
            local_attention=PER_SIDE + 1,
            global_rope_theta=position.global_theta,
            local_rope_theta=position.local_theta,
            layer_types=["full_attention" if layer % 3 == 0 else "sliding_attention" for layer in range(LAYERS)],
            pad_token_id=0, eos_token_id=1, bos_token_id=1, cls_token_id=1, sep_token_id=1,
            attn_implementation="eager",
        )
    )  # fmt: skip
    state = model.state_dict()
    new: dict[str, Tensor] = {}
    for name, target in theirs.state_dict().items():
        ours = name.replace("model.", "encoder.", 1) if name.startswith("model.") else name
        ours = ours.replace("encoder.embeddings.tok_embeddings", "encoder.embedding.tokens")
        ours = ours.replace("encoder.embeddings.norm", "encoder.embedding.norm")
        ours = ours.replace("lm_head.", "head.").replace("decoder.weight", "encoder.embedding.tokens.weight")
        ours = ours.replace("decoder.bias", "head.decoder_bias")
        part = next((at for at, key in enumerate("qkv") if f".{key}_proj." in ours), None)
        if part is not None:
            fused = ours.replace(f".{'qkv'[part]}_proj.", ".Wqkv.")
            new[name] = state[fused][part * WIDTH : (part + 1) * WIDTH]
        else:
            new[name] = state[ours.replace("decoder.", "") if ours not in state and "decoder." in ours else ours]
        assert new[name].shape == target.shape, name
    theirs.load_state_dict(new)
    return theirs.eval()


def test_it_is_the_decoder_of_transformers() -> None:
    model = build(config(), seed=3).eval()
    theirs = decoder_of(model)
    # Their window counts the token itself, and versions differ in whether the config's is halved.
    for layer in theirs.model.layers:
        if layer.attn.sliding_window is not None:
            layer.attn.sliding_window = PER_SIDE + 1
    theirs.config.sliding_window = PER_SIDE + 1
    theirs.get_input_embeddings().padding_idx = None  # it would leave out the gradient of that token
    ids, bounds, longest, *_ = batch_of(ODD_LENGTHS)
    ids = ids % 64
    targets = torch.roll(ids, -1)
    states = model.encoder(ids, bounds, longest, causal=True)
    weight, bias = model.head.decoder(model.encoder.token_table)
    ours = F.linear(model.head(states), weight, bias)
    found = []
    for begin, end in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
        if end > begin:
            found.append(theirs(ids[None, begin:end]).logits[0])
    expected = torch.cat(found)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
    F.cross_entropy(ours, targets).backward()
    F.cross_entropy(expected, targets).backward()
    table, other = model.encoder.token_table.grad, theirs.get_input_embeddings().weight.grad
    assert table is not None
    torch.testing.assert_close(table, other, atol=1e-5, rtol=0)
    for layer in range(LAYERS):
        q = theirs.model.layers[layer].attn.q_proj.weight.grad
        mine: Any = model.encoder.layers[layer].get_parameter("attn.Wqkv.weight").grad  # pyright: ignore
        torch.testing.assert_close(mine[:WIDTH], q, atol=1e-5, rtol=0)


def test_what_comes_later_changes_no_bit_of_what_is_before() -> None:
    model = build(tiny(), seed=1).eval()
    ids, bounds, longest, *_ = batch_of((20, 9))
    other = ids.clone()
    other[12] = (other[12] + 1) % 50
    with torch.no_grad():
        first, second = (model.encoder(each, bounds, longest, causal=True) for each in (ids, other))
        both_sides = model.encoder(ids, bounds, longest)
    assert torch.equal(first[:12], second[:12])
    assert torch.equal(first[20:], second[20:])
    assert not torch.equal(first[12:20], second[12:20])
    assert not torch.allclose(first, both_sides)


def test_an_attention_that_does_not_say_so_is_refused() -> None:
    class Blind(torch.nn.Module):
        class Config(ATTENTIONS.entries["multihead"].Config):  # pyright: ignore
            pass

    ATTENTIONS.register("blind")(Blind)
    try:
        with pytest.raises(ConfigError, match=r"^model\.attention: 'blind' does not say that it can be causal"):
            require_causal(tiny(attention={"name": "blind"}))
        require_causal(tiny())
    finally:
        del ATTENTIONS.entries["blind"]
