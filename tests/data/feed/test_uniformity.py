"""Statistical tests of the order. Each turns the order of many seeds into a z-score that is standard normal if the order
is uniform in the respect tested, and fails beyond 5: a false alarm once in 1.7 million choices of the seeds. The seeds
are fixed, so a result changes only with the order itself. Every test is shown to fail on an order with a planted bias.

What is uniform, and what is not by design: a pass is a uniformly random order of *parts* (runs of consecutive
documents), so the place of any document in a pass is uniform; documents of one part are dealt to one or two blocks of
one lane, and shuffled there. With shuffle_shards=N, N shards are mixed at a time: a document's place is still uniform,
but the documents of a shard lie close together in a pass.
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import data.feed.lanes
import data.feed.order
from data.feed.lanes import Lane
from data.feed.loader import LoaderConfig, LoaderPhase, MixtureDataset
from data.feed.mixture import DataConfig, StreamConfig
from data.feed.packing import Spans
from data.keyed import keyed_generator
from data.store.shards import open_stream
from tests.helpers.synthetic import write_stream, write_tokenizer

LIMIT = 5.0
DOCUMENTS, LENGTH, MAX_SEQ_LEN, LANES = 512, 14, 64, 4  # four documents fill a row
ROWS = DOCUMENTS // 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stream of documents of one length, in 16 shards of 32."""
    path = tmp_path_factory.mktemp("uniform")
    write_stream(path / "s", "train", [np.full(LENGTH, 7)] * DOCUMENTS, shard_bytes=32 * (2 * LENGTH + 10) + 200)
    assert [shard.documents for shard in open_stream(path / "s" / "train").manifest.shards] == [32] * 16
    return path


def lanes(folder: Path, seed: int, shuffle_shards: int | None = None) -> tuple[list[Lane], MixtureDataset]:
    data = DataConfig(
        tokenizer=write_tokenizer(folder),
        streams={"s": StreamConfig(path=str(folder / "s"))},
        lanes=LANES,
        block_documents=32,  # four blocks a lane
        part_documents=4,
        shuffle_shards=shuffle_shards,
    )
    phase = LoaderPhase(steps=10**6, global_batch_size=LANES, max_seq_len=MAX_SEQ_LEN)
    dataset = MixtureDataset(LoaderConfig(seed=seed, data=data, phases=[phase]), 0, 1)
    return [Lane(dataset.order.lines, seed, lane) for lane in range(LANES)], dataset


def passes(folder: Path, seed: int, count: int, shuffle_shards: int | None = None) -> np.ndarray:
    """(count, LANES, rows of a lane, 4): which document is where, in `count` passes."""
    order, dataset = lanes(folder, seed, shuffle_shards)
    shard_starts = np.cumsum([0] + [info.documents for info in dataset.streams[0].manifest.shards])
    found = np.empty((count, LANES, ROWS // LANES, 4), np.int64)
    for lane in order:
        for number in range(count):
            at = 0
            while at < ROWS // LANES:
                for rows in lane.take(1, MAX_SEQ_LEN, dataset.mixtures[0]):
                    which = rows.pieces.document
                    assert (rows.documents.number[which] == number).all()
                    place = shard_starts[rows.documents.shard[which]] + rows.documents.index[which]
                    found[number, lane.lane, at] = place
                    at += 1
    return found


def collect(folder: Path, seeds: int, count: int, shuffle_shards: int | None = None) -> np.ndarray:
    """(seeds x count, LANES, rows, 4)"""
    return np.concatenate([passes(folder, seed, count, shuffle_shards) for seed in range(seeds)])


def chi_square_z(counts: np.ndarray, expected: float | np.ndarray, freedom: int) -> float:
    """The chi-square statistic as a standard normal number (Wilson and Hilferty 1931, cube root)."""
    statistic = float(((counts - expected) ** 2 / expected).sum())
    spread = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


def place_z(found: np.ndarray) -> float:
    """Is each part's place along its lane uniform? The four documents of a part lie in one of a lane's four blocks."""
    rows = found.shape[2]
    place = np.broadcast_to((np.arange(rows) * 4 // rows)[None, None, :, None], found.shape)
    counts = np.zeros((DOCUMENTS // 4, 4))
    np.add.at(counts, (found // 4, place), 1)
    return chi_square_z(counts / 4, counts.sum() / 4 / counts.size, (DOCUMENTS // 4 - 1) * 3)


def lane_z(found: np.ndarray) -> float:
    """Does each part of a shard come to every lane alike?"""
    lane = np.broadcast_to(np.arange(LANES)[None, :, None, None], found.shape)
    counts = np.zeros((DOCUMENTS // 4, LANES))
    np.add.at(counts, (found // 4, lane), 1)
    return chi_square_z(counts / 4, counts.sum() / 4 / counts.size, (DOCUMENTS // 4 - 1) * (LANES - 1))


def neighbour_z(found: np.ndarray) -> float:
    """Do documents that lie side by side on disk share a row more often than two documents of one block do?"""
    part = found // 4  # the documents of a part lie in one block
    together = sum(int((part[..., a] == part[..., b]).sum()) for a in range(4) for b in range(a))
    blocks = found.reshape(*found.shape[:2], 4, -1)  # 32 documents each, in 8 rows
    pairs = 0
    for block in blocks.reshape(-1, 32):
        _, sizes = np.unique(block // 4, return_counts=True)
        pairs += int((sizes * (sizes - 1) // 2).sum())
    probability = 3 / 31
    return (together - pairs * probability) / math.sqrt(pairs * probability * (1 - probability))


def lag_z(found: np.ndarray) -> float:
    """Are consecutive rows of a lane alike in where their documents come from, beyond what lies in one block?"""
    mean = found.mean(-1).reshape(*found.shape[:2], 4, -1)  # by block
    centred = mean - mean.mean(-1, keepdims=True)
    products = (centred[..., 1:] * centred[..., :-1]).sum(-1)
    rows = centred.shape[-1]
    # Of exchangeable rows, centred by their own mean, neighbours correlate by -1 / (rows - 1).
    expected = -centred.var(-1) * rows / (rows - 1) * (rows - 1) / rows
    excess = (products - expected).reshape(-1)
    return float(excess.mean() / (excess.std() / math.sqrt(len(excess))))


def repeat_z(found: np.ndarray) -> float:
    """Does the order of one pass tell that of the next? Correlation of documents' places along consecutive passes."""
    place = np.empty((len(found), DOCUMENTS))
    rows = found.shape[2]
    for number, one in enumerate(found):
        lane_place = np.broadcast_to(np.arange(rows)[None, :, None], one.shape)
        place[number, one.reshape(-1)] = lane_place.reshape(-1)
    first, second = place[0::2].reshape(-1, 128, 4).mean(-1), place[1::2].reshape(-1, 128, 4).mean(-1)
    r = np.array([np.corrcoef(a, b)[0, 1] for a, b in zip(first, second, strict=True)])
    return float(r.mean() * math.sqrt(len(r) * 127))


TESTS: dict[str, Callable[[np.ndarray], float]] = {
    "place": place_z,
    "lane": lane_z,
    "neighbour": neighbour_z,
    "lag": lag_z,
    "repeat": repeat_z,
}


@pytest.fixture(scope="module")
def sample(folder: Path) -> np.ndarray:
    return collect(folder, 60, 4)


@pytest.mark.parametrize("name", TESTS)
def test_the_order_is_uniform(sample: np.ndarray, name: str) -> None:
    assert all(sorted(one.reshape(-1)) == list(range(DOCUMENTS)) for one in sample[:8])
    assert abs(TESTS[name](sample)) < LIMIT


def test_the_order_is_uniform_with_few_shards_mixed(folder: Path) -> None:
    found = collect(folder, 60, 4, shuffle_shards=2)
    # A shard's 8 parts fall into one or two lanes together: counts may spread by up to the square root of 8 more.
    for name in ("place", "lane", "neighbour", "repeat"):
        assert abs(TESTS[name](found)) < (LIMIT if name in ("neighbour", "repeat") else 3 * LIMIT)
    own = np.broadcast_to(np.arange(LANES)[None, :, None, None], found.shape)
    lanes_of_a_shard = [len(set(own[one][found[one] // 32 == shard])) for one in range(40) for shard in range(16)]
    assert max(lanes_of_a_shard) <= 2


@pytest.mark.slow
def test_scores_are_those_of_a_uniform_order(folder: Path) -> None:
    """Over many independent samples the z-scores are standard normal: neither the order nor the tests are off."""
    scores = np.array([[test(passes(folder, 1000 + seed, 6)) for test in TESTS.values()] for seed in range(30)])
    bound = LIMIT / math.sqrt(30)
    for name, mean, spread in zip(TESTS, scores.mean(0), scores.std(0), strict=True):
        assert abs(mean) < bound, name
        assert 0.55 < spread < 1.55, name


def test_planted_documents_unshuffled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents of a block stay in the order of the disk: neighbours share rows."""

    class Still:
        def permutation(self, count: int) -> np.ndarray:
            return np.arange(count)

    def keyed(seed: int, purpose: str, *index: int) -> object:
        return Still() if purpose == "documents" else keyed_generator(seed, purpose, *index)

    monkeypatch.setattr(data.feed.lanes, "keyed_generator", keyed)
    assert neighbour_z(collect(folder, 10, 2)) > 2 * LIMIT


def test_planted_rows_unshuffled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows come in the order in which the packer opened them, and documents of two parts fill two rows by turns."""

    class ByTurns:
        def __init__(self, pattern: list[int]) -> None:
            self.pattern = np.array(pattern)

        def permutation(self, count: int) -> np.ndarray:
            return (np.arange(0, count, len(self.pattern))[:, None] + self.pattern).reshape(-1)

    def keyed(seed: int, purpose: str, *index: int) -> ByTurns:
        return ByTurns([0, 1, 4, 5, 2, 3, 6, 7] if purpose == "documents" else [0])

    monkeypatch.setattr(data.feed.lanes, "keyed_generator", keyed)
    assert lag_z(collect(folder, 20, 4)) > 2 * LIMIT


def test_planted_parts_unshuffled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts come in the order of the disk: a document's place and lane are always the same."""

    class Still:
        def permutation(self, count: int) -> np.ndarray:
            return np.arange(count)

    monkeypatch.setattr(data.feed.order, "keyed_generator", lambda *_: Still())
    found = collect(folder, 10, 4)
    assert place_z(found) > 2 * LIMIT


def test_planted_key_without_the_pass(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The generator's key forgets the number of the pass: every pass is the first again."""

    def keyed(seed: int, purpose: str, stream: int, number: int) -> np.random.Generator:
        return keyed_generator(seed, purpose, stream)

    monkeypatch.setattr(data.feed.order, "keyed_generator", keyed)
    assert repeat_z(collect(folder, 20, 4)) > 2 * LIMIT


def test_planted_lane_that_gets_its_own_documents(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lane's stretch does not move from pass to pass, and parts are shuffled within quarters of the stream only."""

    class Quarters:
        def __init__(self, rng: np.random.Generator) -> None:
            self.rng = rng

        def permutation(self, count: int) -> np.ndarray:
            quarter = count // LANES
            return np.concatenate([first + self.rng.permutation(quarter) for first in range(0, count, quarter)])

    monkeypatch.setattr(data.feed.order, "keyed_generator", lambda *key: Quarters(keyed_generator(*key)))
    monkeypatch.setattr(
        data.feed.order.StreamLine,
        "stretch",
        lambda self, lane, number: (self.tokens * lane // self.lanes, self.tokens * (lane + 1) // self.lanes),
    )
    found = collect(folder, 10, 4)
    assert lane_z(found) > 2 * LIMIT
    assert abs(place_z(found)) < LIMIT  # what this one does not see


def test_rows_hold_four_documents() -> None:
    """The sums above rest on it."""
    spans = Spans(np.arange(8), np.zeros(8, np.int64), np.full(8, LENGTH))
    plan = data.feed.lanes.pack(spans, MAX_SEQ_LEN, np.random.default_rng(0))
    assert np.diff(plan.row_starts).tolist() == [4, 4]
