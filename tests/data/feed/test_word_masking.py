"""Whole words and spans: each masking is what a loop in plain Python makes of the same draws, and has its statistics."""

from functools import partial
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from tokenizers import Tokenizer, models

from data.feed.masking import MASKINGS, Masking, Vocabulary
from data.feed.philox import RowNames, philox4x32

UNK, CLS, SEP, MASK, FIRST, GOES_ON, VOCAB = 0, 1, 2, 3, 4, 24, 40
KEY = 77
RATES = (0.15, 0.5, 1.0)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    """Ids from GOES_ON on go on with a word, as `##` says."""
    folder = tmp_path_factory.mktemp("pieces")
    names = ["[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(FIRST, GOES_ON))]
    names += [f"##p{number}" for number in range(GOES_ON, VOCAB)]
    pieces = models.WordPiece({name: number for number, name in enumerate(names)}, unk_token="[UNK]")
    Tokenizer(pieces).save(str(folder / "tokenizer.json"))
    special = np.arange(VOCAB) < FIRST
    return Vocabulary(MASK, special, np.flatnonzero(~special), lambda: folder)


def made(config: dict[str, Any], vocabulary: Vocabulary) -> Masking:
    return MASKINGS.build(MASKINGS.parse(config), vocabulary=vocabulary)


def some_rows(seed: int, count: int, documents: int = 3, longest: int = 40) -> tuple[np.ndarray, np.ndarray, RowNames]:
    """Rows of a few documents of words of one to four tokens, some unknown tokens among them."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        row = list[int]()
        for _ in range(int(rng.integers(1, documents + 1))):
            words = [[int(rng.integers(FIRST, GOES_ON)), *rng.integers(GOES_ON, VOCAB, rng.integers(0, 4)).tolist()]
                     if rng.random() > 0.05 else [UNK] for _ in range(int(rng.integers(0, longest)))]  # fmt: skip
            row += [CLS, *(token for word in words for token in word), SEP]
        rows.append(row)
    ids = np.array([token for row in rows for token in row], np.uint16)
    names = RowNames(np.full(count, KEY, np.uint64), np.arange(count, dtype=np.uint32))
    return ids, np.cumsum([len(row) for row in rows]), names


@numba.njit
def philox(place: int, number: int, purpose: int, key: np.uint64) -> tuple[np.uint32, np.uint32, np.uint32, np.uint32]:
    return philox4x32(np.uint32(place), np.uint32(number), np.uint32(purpose), np.uint32(0), key)


def four(place: int, number: int, purpose: int) -> list[int]:
    return [int(each) for each in philox(place, number, purpose, np.uint64(KEY))]


def draw(place: int, number: int, purpose: int) -> int:
    """Of the token at a place of a row: four of them share a counter."""
    return four(place // 4, number, purpose)[place % 4]


def words_of(row: list[int]) -> list[list[int]]:
    """Places of each word's tokens; special tokens are none."""
    words = list[list[int]]()
    for place, token in enumerate(row):
        if token >= GOES_ON and place and row[place - 1] >= FIRST:
            words[-1].append(place)
        elif token >= FIRST:
            words.append([place])
    return words


def chosen_words(row: list[int], number: int, rate: float) -> dict[int, int]:
    """Of selected places, the place whose draw decides their fate."""
    return {place: place for word in words_of(row) if draw(word[0], number, 0) < rate * 2**32 for place in word}


def chosen_spans(row: list[int], number: int, rate: float, p: float, longest: int, whole: bool) -> dict[int, int]:
    words = words_of(row) if whole else [[place] for place, token in enumerate(row) if token >= FIRST]
    budget, order, chosen = rate * sum(map(len, words)), list(range(len(words))), dict[int, int]()
    weights = [p * (1 - p) ** (n - 1) for n in range(1, longest + 1)]
    for turn in range(len(words)):
        shuffle, length, chance, _ = four(turn, number, 3)
        other = turn + shuffle * (len(words) - turn) // 2**32
        order[turn], order[other] = order[other], order[turn]
        start, size = order[turn], 1
        if words[start][0] in chosen:
            continue
        while size < longest and length >= round(sum(weights[:size]) / sum(weights) * 2**32):
            size += 1
        for word in range(start, min(start + size, len(words))):
            if word > start and words[word][0] != words[word - 1][-1] + 1:
                break
            if words[word][0] in chosen:
                continue
            over = len(chosen) + len(words[word]) > budget
            if over and chance * len(words[word]) >= (budget - len(chosen)) * 2**32:
                return chosen
            chosen |= dict.fromkeys(words[word], words[start][0])
            if over:
                return chosen
    return chosen


def hidden(row: list[int], number: int, chosen: dict[int, int]) -> list[int]:
    """80 % [MASK], 10 % random, 10 % as it was, by one draw for each place that decides."""
    out = list(row)
    for place, decides in chosen.items():
        fate = draw(decides, number, 2) / 2**32
        if fate < 0.8:
            out[place] = MASK
        elif fate < 0.9:
            out[place] = FIRST + draw(place, number, 1) * (VOCAB - FIRST) // 2**32
    return out


CASES: list[tuple[dict[str, Any], Any]] = [
    *(({"name": "words", "rate": rate}, partial(chosen_words, rate=rate)) for rate in RATES),
    *(({"name": "spans", "rate": rate}, partial(chosen_spans, rate=rate, p=0.2, longest=10, whole=True)) for rate in RATES),
    ({"name": "spans", "rate": 0.3, "p": 0.5, "longest": 3}, partial(chosen_spans, rate=0.3, p=0.5, longest=3, whole=True)),
    ({"name": "spans", "rate": 0.3, "p": 1.0}, partial(chosen_spans, rate=0.3, p=1.0, longest=10, whole=True)),
    ({"name": "spans", "rate": 0.3, "longest": 1}, partial(chosen_spans, rate=0.3, p=0.2, longest=1, whole=True)),
    ({"name": "spans", "rate": 0.3, "whole_words": False}, partial(chosen_spans, rate=0.3, p=0.2, longest=10, whole=False)),
]  # fmt: skip


@pytest.mark.parametrize(("config", "chosen"), CASES, ids=lambda each: str(each) if isinstance(each, dict) else "")
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_it_is_what_the_plain_loop_makes(
    config: dict[str, Any], chosen: Any, dtype: str, vocabulary: Vocabulary
) -> None:
    ids, ends, names = some_rows(3, 30)
    before, masked = ids.tolist(), ids.astype(dtype)
    targets = made(config, vocabulary).mask(masked, ends, names)
    expected, positions, begin = list[int](), list[int](), 0
    for number, end in enumerate(ends.tolist()):
        row = before[begin:end]
        found = chosen(row, number)
        expected += hidden(row, number, found)
        positions += [begin + place for place in sorted(found)]
        begin = end
    assert targets.position.tolist() == positions
    assert targets.token.tolist() == [before[place] for place in positions]
    assert masked.tolist() == expected
    assert (positions == []) is False


@pytest.mark.parametrize("name", ["words", "spans"])
@pytest.mark.parametrize("rate", [0.15, 0.3, 0.6])
def test_the_share_is_the_rate_and_no_word_is_cut(name: str, rate: float, vocabulary: Vocabulary) -> None:
    ids, ends, names = some_rows(4, 3000)
    before = ids.copy()
    targets = made({"name": name, "rate": rate}, vocabulary).mask(ids, ends, names)
    selected = np.zeros(len(ids), bool)
    selected[targets.position] = True
    ordinary = before >= FIRST
    assert not selected[~ordinary].any()
    goes_on = np.append(False, (before[1:] >= GOES_ON) & (before[:-1] >= FIRST))
    assert (selected[1:] == selected[:-1])[goes_on[1:]].all()
    # Words have 2.5 tokens on average and 4 at most, which are drawn together: six standard deviations.
    assert abs(selected[ordinary].mean() - rate) < 6 * np.sqrt(rate * (1 - rate) * 4 / ordinary.sum())


def test_spans_have_the_papers_lengths(vocabulary: Vocabulary) -> None:
    """In a row so long and a rate so low that spans hardly meet, the mean is 3.8 words (SpanBERT, section 3.1)."""
    ids = np.full(2_000_000, FIRST, np.uint16)
    names = RowNames(np.full(1, KEY, np.uint64), np.zeros(1, np.uint32))
    targets = made({"name": "spans", "rate": 0.002}, vocabulary).mask(ids, np.array([len(ids)]), names)
    breaks = np.flatnonzero(np.diff(targets.position) > 1)
    lengths = np.diff(np.concatenate([[-1], breaks, [len(targets.position) - 1]]))
    weights = 0.2 * 0.8 ** np.arange(10) / (1 - 0.8**10)
    mean = (weights * np.arange(1, 11)).sum()
    assert round(mean, 1) == 3.8
    assert lengths.mean() == pytest.approx(mean, rel=0.05)
    shares = np.bincount(lengths, minlength=11)[1:11] / len(lengths)
    assert np.abs(shares - weights).max() < 6 * np.sqrt(0.2 / len(lengths)) + 0.01  # some spans meet


def test_all_tokens_of_a_span_have_one_fate(vocabulary: Vocabulary) -> None:
    ids = np.full(60_000, FIRST, np.uint16)
    names = RowNames(np.full(1, KEY, np.uint64), np.zeros(1, np.uint32))
    targets = made({"name": "spans", "rate": 0.01}, vocabulary).mask(ids, np.array([len(ids)]), names)
    runs = np.split(targets.position, np.flatnonzero(np.diff(targets.position) > 1) + 1)
    shares = np.array([(ids[run] == MASK).mean() for run in runs])
    assert ((shares == 0) | (shares == 1)).mean() > 0.95  # two spans that touch may differ
    assert abs((shares == 1).mean() - 0.8) < 6 * np.sqrt(0.16 / len(runs)) + 0.03


@pytest.mark.parametrize("name", ["words", "spans"])
def test_a_row_is_masked_alike_whatever_is_beside_it(name: str, vocabulary: Vocabulary) -> None:
    ids, ends, names = some_rows(5, 12)
    masking = made({"name": name}, vocabulary)
    whole = ids.copy()
    masking.mask(whole, ends, names)
    begin = 0
    for number, end in enumerate(ends.tolist()):
        alone = ids[begin:end].copy()
        masking.mask(
            alone, np.array([end - begin]), RowNames(names.key[number : number + 1], names.number[number : number + 1])
        )
        assert (alone == whole[begin:end]).all()
        begin = end


@pytest.mark.parametrize("name", ["words", "spans"])
def test_odd_shapes(name: str, vocabulary: Vocabulary) -> None:
    masking = made({"name": name, "rate": 1.0}, vocabulary)
    none = RowNames(np.zeros(0, np.uint64), np.zeros(0, np.uint32))
    assert len(masking.mask(np.zeros(0, np.uint16), np.zeros(0, np.int64), none).position) == 0
    # A row of one token; one without any to select; an empty one; a document as long as a row.
    rows = [[FIRST], [CLS, UNK, SEP], [], [CLS, *[GOES_ON] * 510, SEP]]
    ids = np.array([token for row in rows for token in row], np.uint16)
    names = RowNames(np.full(4, KEY, np.uint64), np.arange(4, dtype=np.uint32))
    targets = masking.mask(ids, np.cumsum([len(row) for row in rows]), names)
    assert targets.position.tolist() == [0, *range(5, 515)]


@pytest.mark.parametrize(("config", "refused"), [({"name": "words"}, True), ({"name": "spans"}, True), ({"name": "spans", "whole_words": False}, False)])  # fmt: skip
def test_a_tokenizer_that_knows_no_words_is_refused(config: dict[str, Any], refused: bool, tmp_path: Path) -> None:
    Tokenizer(models.BPE({"a": 0, "b": 1}, [])).save(str(tmp_path / "tokenizer.json"))
    vocabulary = Vocabulary(0, np.array([True, False]), np.array([1]), lambda: tmp_path)
    if refused:
        with pytest.raises(ValueError, match="does not tell where words begin"):
            made(config, vocabulary)
    else:
        made(config, vocabulary)
