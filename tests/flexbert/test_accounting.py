"""Counts against built models, a hand calculation, and tensors that autograd really keeps."""

from typing import Any

import numpy as np
import pytest
import torch

from flexbert import FlexBertConfig, build
from flexbert.accounting import (
    attention_weights_memory,
    batch_flops,
    count_parameters,
    flops_per_token,
    keys_seen,
    memory_estimate,
)
from flexbert.peaks import peak_flops
from tests.helpers.models import batch_of, tiny


def test_parameters_are_counted_exactly() -> None:
    for config in (tiny(), tiny(mlp={"name": "glu", "in_bias": True}, head={"name": "mlm", "decoder_bias": False})):
        assert count_parameters(config) == sum(parameter.numel() for parameter in build(config).parameters())
    assert count_parameters(FlexBertConfig.from_yaml("modernbert-large")) == 395_881_664


@pytest.mark.parametrize("seq_len", [1, 2, 10, 64, 65, 66, 129, 500])
@pytest.mark.parametrize("side", [1, 3, 64])
def test_keys_are_what_a_window_sees(seq_len: int, side: int) -> None:
    places = torch.arange(seq_len)
    seen = ((places[:, None] - places[None, :]).abs() <= side).sum().item()
    assert keys_seen((side, side), np.array([seq_len, seq_len], float)).tolist() == [seen, seen]
    assert keys_seen((-1, -1), np.array([seq_len], float)) == seq_len**2
    behind = sum(min(place, side) + 1 for place in range(seq_len))
    assert keys_seen((side, 0), np.array([seq_len], float)) == behind
    assert keys_seen((-1, 0), np.array([seq_len], float)) == seq_len * (seq_len + 1) // 2


def test_flops_of_base_by_hand() -> None:
    config = FlexBertConfig.from_yaml("modernbert-base")
    late = 768 * 768 + 768 * 2304 + 1152 * 768  # the last layer's is for masked tokens only, but keys and values
    matrices = 22 * 3 * 768 * 768 + 21.3 * late
    attention = 4 * 768 * (7.3 * 1024 + 14 * (129 - 64 * 65 / 1024))  # layer 21 is global
    head = 0.3 * 2 * (768 * 768 + 768 * 50368)
    assert flops_per_token(config, 1024, 0.3) == pytest.approx(3 * (2 * matrices + attention + head))
    assert flops_per_token(config, 8192, 0.3) > flops_per_token(config, 1024, 0.3)


def test_flops_of_a_decoder_are_those_of_the_head_that_has_it() -> None:
    """Tied, of its own, of another width, or a plain parameter."""
    import tests.flexbert.parts  # noqa: F401  registers test_narrow

    late = 48 * 48 + 48 * 80 + 40 * 48  # Wo, Wi and Wo of the last layer

    def head_weights(head: Any) -> float:
        config = tiny(head=head)
        plain = flops_per_token(config, 100, 0.0)
        last_layer = late + 2 * 48 * 100  # weights, and products with keys and values
        return (flops_per_token(config, 100, 0.5) - plain) / (3 * 2 * 0.5) - last_layer

    tied = 48 * 48 + 97 * 48
    assert head_weights("mlm") == pytest.approx(tied)
    assert head_weights({"name": "mlm", "tied": False}) == pytest.approx(tied)
    assert head_weights({"name": "mlm", "transform": False}) == pytest.approx(97 * 48)
    assert head_weights({"name": "test_narrow", "width": 8}) == pytest.approx(8 * 48 + 97 * 8)
    assert head_weights("test_parameter") == pytest.approx(97 * 48)


def test_devices_are_told_apart() -> None:
    names = (
        "NVIDIA H100 80GB HBM3",
        "NVIDIA H100 PCIe",
        "NVIDIA H200",
        "NVIDIA A100-SXM4-80GB",
        "NVIDIA A10",
        "NVIDIA L4",
    )
    assert [peak_flops(name) for name in names] == [989.5e12, 756e12, 989.5e12, 312e12, 125e12, 121e12]
    assert peak_flops("NVIDIA RTX A4000") is None  # no A40
    assert peak_flops("NVIDIA GeForce GTX 1080") is None


def test_flops_of_a_packed_batch_are_those_of_its_sequences() -> None:
    config = FlexBertConfig.from_yaml("modernbert-base")
    lengths, masked = [1024, 10, 300, 129], [300, 0, 100, 30]
    parts = [flops_per_token(config, size, part / size) * size for size, part in zip(lengths, masked, strict=True)]
    assert batch_flops(config, lengths, masked) == pytest.approx(sum(parts), rel=1e-12)
    assert batch_flops(config, [sum(lengths)], [sum(masked)]) > 1.02 * sum(parts)  # packing is not one long sequence


@pytest.mark.parametrize(
    "lengths", [pytest.param((512,) * 4, marks=pytest.mark.slow), (100, 400, 30, 482, 512, 5, 7, 500)], ids=str
)
@pytest.mark.parametrize(
    ("preset", "within"), [("modernbert-tiny", 0.15), ("bert-base", 0.15), ("mosaicbert-base", 0.3), ("neobert", 0.15)]
)
def test_memory_estimate_is_near_what_autograd_keeps(preset: str, within: float, lengths: tuple[int, ...]) -> None:
    """Within the 30 % that memory_estimate says, most much nearer."""
    small = {"num_hidden_layers": 4, "vocab_size": 8192}
    config = FlexBertConfig.model_validate(FlexBertConfig.from_yaml(preset).model_dump() | small)
    model = build(config)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(*batch_of(lengths, vocab_size=8192))
    measured = sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in weights)
    tokens = sum(lengths)
    logits = 2 * 4 * int(0.3 * tokens) * config.vocab_size  # alive during the loss only
    estimate = memory_estimate(config, tokens, 0.3) - 16 * count_parameters(config) - logits
    estimate += attention_weights_memory(config, 512) * tokens  # no flash-attn on the CPU
    assert estimate == pytest.approx(measured, rel=within)


def test_memory_of_a_rank_that_shares() -> None:
    """149,655,232 parameters, 4.4 M in a block: what is shared is divided, what is gathered at a time comes on top."""
    config = FlexBertConfig.from_yaml("modernbert-base")
    attention, mlp, norms = 4 * 768**2, 768 * 2304 + 1152 * 768, 2 * 768
    block = attention + mlp + norms
    outside = 149_655_232 - (22 * block - 768)  # the first block has no attention norm
    alone, shared = memory_estimate(config, 1024), memory_estimate(config, 1024, shards=8)
    assert alone - shared == 16 * 149_655_232 * 7 // 8 - 8 * (outside + 2 * block)
    assert memory_estimate(config, 1024, averages=1) - alone == 4 * 149_655_232
    assert memory_estimate(config, 1024, shards=8, averages=1) - shared == 4 * 149_655_232 // 8
