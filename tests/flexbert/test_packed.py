"""Packed, padded and one by one are the same; a document's neighbours do not exist for it."""

from typing import Any

import pytest
import torch

from flexbert import build
from flexbert.packed import pad, spread_rows, unpad
from tests.helpers.models import ODD_LENGTHS, Batch, batch_of, gradients, tiny

# Measured worst case: 1.2e-6 at hidden states up to 3.3 (other batch shapes take other summation orders).
TOLERANCE = 1e-5


@pytest.mark.parametrize("backend", ["eager", "sdpa", "tiled"])
@pytest.mark.parametrize("changed", range(len(ODD_LENGTHS)))
def test_changing_one_document_changes_no_bit_of_the_others(backend: Any, changed: int) -> None:
    model = build(tiny(attention={"backend": backend})).eval()
    batch = batch_of(ODD_LENGTHS)
    other = batch_of(ODD_LENGTHS, seed=1)
    mixed = batch.split()
    mixed[changed] = (mixed[changed] + 1 + other.split()[changed] % 96) % 97  # every token differs
    with torch.no_grad():
        before = model.encoder(*batch[:3]).split(ODD_LENGTHS)
        after = model.encoder(torch.cat(mixed), batch.cu_seqlens, batch.max_seqlen).split(ODD_LENGTHS)
    same = [torch.equal(first, second) for first, second in zip(before, after, strict=True)]
    assert same == [number != changed for number in range(len(ODD_LENGTHS))]


@pytest.mark.parametrize("backend", ["eager", "sdpa", "tiled"])
def test_a_documents_loss_has_no_gradient_at_its_neighbours(backend: Any) -> None:
    model = build(tiny(attention={"backend": backend}))
    batch = batch_of((30, 70, 20))
    touched = []
    # The gradient at the embeddings' output, token by token
    model.encoder.embedding.register_full_backward_pre_hook(lambda module, out: touched.append(out[0].clone()))
    hidden_states = model.encoder(*batch[:3])
    hidden_states[30:100].square().sum().backward()
    rows = touched[0].abs().sum(1)
    assert rows[30:100].min() > 0
    assert not rows[:30].any()
    assert not rows[100:].any()


@pytest.mark.parametrize("backend", ["eager", "sdpa", "tiled"])
def test_packed_is_padded_is_one_by_one(backend: Any) -> None:
    model = build(tiny(attention={"backend": backend})).eval()
    batch = batch_of(ODD_LENGTHS)
    with torch.no_grad():
        packed = model.encoder(*batch[:3])
        ids = torch.nn.utils.rnn.pad_sequence(batch.split(), batch_first=True)
        mask = torch.arange(max(ODD_LENGTHS)) < torch.tensor(ODD_LENGTHS)[:, None]
        padded = model.encode(ids, mask)
        alone = [model.encoder(s, torch.tensor([0, len(s)], dtype=torch.int32), len(s)) for s in batch.split()]
    assert padded.shape == (len(ODD_LENGTHS), max(ODD_LENGTHS), 48)
    torch.testing.assert_close(padded[mask], packed, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(torch.cat(alone), packed, atol=TOLERANCE, rtol=0)
    assert not padded[~mask].any()


def test_order_of_documents_is_irrelevant() -> None:
    model = build(tiny()).eval()
    batch = batch_of(ODD_LENGTHS)
    lengths = ODD_LENGTHS[::-1]
    turned = Batch(torch.cat(batch.split()[::-1]), torch.tensor([0, *lengths]).cumsum(0).int(), 200, batch.labels)
    with torch.no_grad():
        first = model.encoder(*batch[:3]).split(ODD_LENGTHS)
        second = model.encoder(*turned[:3]).split(lengths)
    for ours, theirs in zip(first, second[::-1], strict=True):
        torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


def test_empty_sequences_change_nothing() -> None:
    model = build(tiny()).eval()
    batch = batch_of((10, 80))
    with torch.no_grad():
        plain = model.encoder(*batch[:3])
        holes = model.encoder(batch.input_ids, torch.tensor([0, 0, 10, 10, 10, 90, 90], dtype=torch.int32), 80)
    assert torch.equal(plain, holes)


def test_unpad_keeps_any_mask_and_pad_undoes_it() -> None:
    ids = torch.arange(12).view(3, 4)
    mask = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]])
    packed = unpad(ids, mask)
    assert packed.input_ids.tolist() == [1, 3, 8, 9, 10, 11]
    assert packed.cu_seqlens.tolist() == [0, 2, 2, 6]
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.max_seqlen == 4
    assert torch.equal(pad(packed.input_ids, packed.slots, 3, 4), ids * mask)
    empty = unpad(ids[:0], mask[:0])
    assert empty.cu_seqlens.tolist() == [0]
    with pytest.raises(ValueError, match=r"of one shape \(batch, seq\), got \(3, 4\) and \(3, 3\)"):
        unpad(ids, mask[:, :3])


@pytest.mark.parametrize("padding", [-1e4, float("-inf"), float("nan"), 0.5, 2, -1])
def test_a_mask_of_other_values_than_0_and_1_is_refused(padding: float) -> None:
    """Read as truth, an additive mask, 0 at real tokens, would select the padding."""
    ids = torch.arange(8).view(2, 4)
    mask = torch.tensor([[0, 0, 0, padding], [0, 0, padding, padding]])
    for form in (mask, mask + (mask == 0)):
        with pytest.raises(
            ValueError, match=r"^attention_mask: holds .*: expected 1 \(or true\) where a token is real"
        ):
            build(tiny(), "encoder").encode(ids, form)
    right = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    for form in (right, right.bool(), right.float(), right.to(torch.uint8)):
        assert unpad(ids, form).slots.tolist() == [0, 1, 2, 4, 5]


def test_spread_rows_have_the_gradients_of_indexing() -> None:
    rows = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    index = torch.tensor([4, 0, 3])
    assert torch.equal(spread_rows(rows[:3], index, 6)[index], rows[:3])
    assert torch.autograd.gradcheck(lambda x: spread_rows(x[:3], index, 6), (rows,))


@pytest.mark.parametrize(
    ("ids", "bounds", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), [0, 3], r"input_ids \(total_tokens,\) int64, got \(2, 3\)"),
        (torch.zeros(3, dtype=torch.int32), [0, 3], r"got \(3,\) torch.int32"),
        (torch.zeros(3, dtype=torch.int64), [], r"cu_seqlens \(num_seqs \+ 1,\) int32"),
        (torch.zeros(3, dtype=torch.int64), [0, 2], "rise from 0 to 3 tokens, got 0 to 2"),
        (torch.zeros(3, dtype=torch.int64), [1, 3], "rise from 0 to 3 tokens, got 1 to 3"),
        (torch.zeros(3, dtype=torch.int64), [0, 4, 3], "rise from 0"),
    ],
)
def test_malformed_batches_are_refused(ids: torch.Tensor, bounds: list[int], message: str) -> None:
    encoder = build(tiny(num_hidden_layers=1)).encoder
    with pytest.raises(ValueError, match=message):
        encoder(ids, torch.tensor(bounds, dtype=torch.int32), 4)
    with pytest.raises(ValueError, match=r"int32, got \(2,\) torch.int64"):
        encoder(torch.zeros(3, dtype=torch.int64), torch.tensor([0, 3]), 3)


@pytest.mark.parametrize("backend", ["eager", "sdpa", "tiled"])
def test_a_sequence_longer_than_said_is_refused(backend: Any) -> None:
    """Windows are left out, and tables cut short, by max_seqlen: too small a one would give other numbers in silence."""
    encoder = build(tiny(num_hidden_layers=2, attention={"backend": backend})).encoder
    batch = batch_of((3, 100, 0, 7))
    with pytest.raises(ValueError, match="max_seqlen to be that of the longest sequence, 100, got 99"):
        encoder(*batch[:2], 99)
    with torch.no_grad():
        torch.testing.assert_close(encoder(*batch[:2], 200), encoder(*batch[:3]), atol=TOLERANCE, rtol=0)


def test_gradients_of_two_identical_runs_have_the_same_bits() -> None:
    batch = batch_of((500, 20, 480, 20, 20, 31, 33, 370, 1))
    runs = []
    for _ in range(2):
        model = build(tiny(max_position_embeddings=512))
        loss = model(*batch).loss
        assert loss is not None
        loss.backward()
        runs.append(gradients(model))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
