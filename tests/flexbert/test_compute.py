"""Other ways to compute the same: blocks compiled, blocks run again in backward."""

import copy

import pytest
import torch

from flexbert import build
from flexbert.model import FlexBertForMaskedLM
from tests.helpers.models import Batch, batch_of, tiny


def _step(model: FlexBertForMaskedLM, batch: Batch, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        loss = model(*batch).loss
    assert loss is not None
    model.zero_grad()
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_compiled_blocks_compute_the_same(dtype: torch.dtype | None) -> None:
    """Every kind of block, as layers of one model."""
    model = build(tiny(num_hidden_layers=3, block="prenorm"))
    for index, kind in enumerate(("postnorm", "sandwich"), 1):
        model.encoder.layers[index] = build(tiny(block=kind)).encoder.layers[index]
    compiled = copy.deepcopy(model)
    compiled.encoder.compile_blocks()
    assert compiled.state_dict().keys() == model.state_dict().keys()
    graphs = torch._dynamo.utils.counters["stats"]
    made = []
    # One T, other sequences and numbers of masked tokens: the compiled code serves all, the last block's too
    for seed, lengths in ((0, (40, 24)), (1, (1, 30, 33)), (7, (64,))):
        batch = batch_of(lengths, vocab_size=model.config.vocab_size, seed=seed)
        made.append((int((batch.labels != -100).sum()), graphs["unique_graphs"]))
        found, eager, exact = _step(compiled, batch, dtype), _step(model, batch, dtype), _step(model, batch)
        for ours, plain, reference in zip(found, eager, exact, strict=True):
            if dtype is None:
                torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5 * float(plain.abs().max()))
            else:  # both are roundings of the float32 step: neither may be the worse one by much
                errors = [float((each - reference).norm() / reference.norm()) for each in (ours, plain)]
                assert errors[0] < 1.5 * errors[1] + 0.002
    counts, before = zip(*made, strict=True)
    assert len(set(counts)) > 1
    assert len({-(-count // 4) for count in counts}) == 1, "what is compiled once is a sixteenth of 64 tokens wide"
    assert before[0] < before[1] == before[2] == graphs["unique_graphs"]


@pytest.mark.parametrize("every", [1, 2])
def test_blocks_that_run_again_give_the_same_gradients_and_keep_less(every: int) -> None:
    model = build(tiny(num_hidden_layers=4, mlp={"name": "glu", "out_dropout": 0.2}))
    batch = batch_of((40, 1, 23), vocab_size=model.config.vocab_size)

    def kept_bytes(recompute_every: int) -> tuple[int, list[torch.Tensor]]:
        model.encoder.recompute_every = recompute_every
        kept = dict[int, int]()

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.train()
            torch.manual_seed(0)
            loss = model(*batch).loss
        assert loss is not None
        return sum(kept.values()), _step(model, batch)

    (plain, expected), (less, found) = kept_bytes(0), kept_bytes(every)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert less < plain * (0.75 if every == 2 else 0.6)
