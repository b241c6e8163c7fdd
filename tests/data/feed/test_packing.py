"""The packing plan: every token once, rows never over-full, tight, and re-packed at another length without loss."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.feed.packing import SPECIAL_TOKENS_PER_SEQUENCE, Plan, Spans, cut, pack


def whole(lengths: list[int]) -> Spans:
    stop = np.array(lengths, np.int64)
    return Spans(np.arange(len(stop)), np.zeros_like(stop), stop)


def tokens_of(spans: Spans) -> list[tuple[int, int]]:
    return [(int(d), t) for d, a, b in zip(spans.document, spans.start, spans.stop, strict=True) for t in range(a, b)]


def check_rows(plan: Plan) -> None:
    for row in range(plan.num_rows):
        pieces = plan.row(row)
        assert len(pieces) > 0
        used = (pieces.stop - pieces.start + SPECIAL_TOKENS_PER_SEQUENCE).sum()
        assert used <= plan.max_seq_len
        assert (pieces.stop > pieces.start).all()


@settings(max_examples=200)
@given(st.lists(st.integers(1, 300), max_size=80), st.integers(3, 70), st.integers(0, 5))
def test_every_token_once(lengths: list[int], max_seq_len: int, seed: int) -> None:
    plan = pack(whole(lengths), max_seq_len, np.random.default_rng(seed))
    check_rows(plan)
    assert sorted(tokens_of(plan.pieces)) == tokens_of(whole(lengths))


@settings(max_examples=200)
@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=60),
    st.lists(st.tuples(st.integers(3, 70), st.floats(0, 1)), max_size=4),
)
def test_repacking_the_rest_loses_and_repeats_nothing(lengths: list[int], changes: list[tuple[int, float]]) -> None:
    spans, seen = whole(lengths), []
    for number, (max_seq_len, share) in enumerate([*changes, (64, 1.0)]):
        plan = pack(spans, max_seq_len, np.random.default_rng(number))
        check_rows(plan)
        taken = int(share * plan.num_rows)
        for row in range(taken):
            seen += tokens_of(plan.row(row))
        spans = plan.remaining(taken)
        joined = list(zip(spans.document, spans.start, spans.stop, strict=True))
        assert all(a[0] != b[0] or a[2] < b[1] for a, b in pairwise(joined))  # neighbours are one span
    assert len(spans) == 0
    assert sorted(seen) == tokens_of(whole(lengths))


def slow_best_fit_decreasing(lengths: list[int], capacity: int) -> int:
    """Rows that textbook best-fit-decreasing opens."""
    space: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [(left, row) for row, left in enumerate(space) if left >= length]
        if fits:
            space[min(fits)[1]] -= length
        else:
            space.append(capacity - length)
    return len(space)


@settings(max_examples=200)
@given(st.lists(st.integers(1, 510), min_size=1, max_size=150), st.sampled_from([512, 513, 640, 1000]))
def test_opens_the_rows_of_best_fit_decreasing(lengths: list[int], capacity: int) -> None:
    plan = pack(whole(lengths), capacity, np.random.default_rng(0))
    assert plan.num_rows == slow_best_fit_decreasing([length + 2 for length in lengths], capacity)


def test_rows_are_shuffled_by_the_generator() -> None:
    lengths = np.random.default_rng(0).integers(1, 400, 500).tolist()
    plans = [pack(whole(lengths), 512, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    rows = [[tuple(plan.row(row).document) for row in range(plan.num_rows)] for plan in plans]
    assert rows[0] == rows[1] != rows[2]
    assert sorted(rows[0]) == sorted(rows[2])
    # best-fit-decreasing opens rows by falling length: unshuffled, the fullest single documents would come first
    longest = [max(lengths[document] for document in row) for row in rows[0]]
    assert longest != sorted(longest, reverse=True)


@pytest.mark.parametrize("max_seq_len", [512, 2048, 8192])
def test_a_thousandth_and_one_row_over_full_rows_at_most(max_seq_len: int) -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(6, 1.2, 4000), 1, 200_000).astype(int)
    plan = pack(whole(lengths.tolist()), max_seq_len, np.random.default_rng(0))
    used = (plan.pieces.stop - plan.pieces.start + SPECIAL_TOKENS_PER_SEQUENCE).sum()
    assert plan.num_rows <= 1.001 * -(-used // max_seq_len) + 1


def test_nothing_gives_no_rows() -> None:
    plan = pack(whole([]), 512, np.random.default_rng(0))
    assert plan.num_rows == 0
    assert len(plan.remaining(0)) == 0


@settings(max_examples=100)
@given(st.lists(st.integers(1, 300), max_size=80), st.integers(3, 70), st.integers(0, 5))
def test_without_packing_each_piece_has_a_row_to_itself(lengths: list[int], max_seq_len: int, seed: int) -> None:
    plan = pack(whole(lengths), max_seq_len, np.random.default_rng(seed), together=False)
    check_rows(plan)
    assert np.diff(plan.row_starts).tolist() == [1] * len(cut(whole(lengths), max_seq_len))
    assert sorted(tokens_of(plan.pieces)) == tokens_of(whole(lengths))
    left = plan.remaining(plan.num_rows // 2)
    assert len(tokens_of(left)) == sum(
        len(tokens_of(plan.row(row))) for row in range(plan.num_rows // 2, plan.num_rows)
    )
