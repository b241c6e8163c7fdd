"""Realised shares of the mixture: over an epoch, over any stretch of rows, behind a change. Plans only, no tokens read."""

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.feed.batches import join_pieces
from data.feed.loader import LoaderConfig, LoaderPhase, MixtureDataset
from data.feed.mixture import DataConfig, StreamConfig, StreamShare, stream_weights
from flexbert_core.schema import ConfigError
from tests.helpers.synthetic import write_stream, write_tokenizer

MEDIANS = {"tweets": 20, "web": 250, "wiki": 500, "papers": 2000, "books": 9000}
TOKENS = {"tweets": 300_000, "web": 3_000_000, "wiki": 1_500_000, "papers": 1_500_000, "books": 1_500_000}
WEIGHTS = {"tweets": 2, "web": 60, "wiki": 20, "papers": 10, "books": 8}
ROWS, LENGTH, LANES = 64, 512, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixture")
    for number, (name, median) in enumerate(MEDIANS.items()):
        rng = np.random.default_rng(number)
        lengths = np.clip(rng.lognormal(np.log(median), 1.0, 20 + 2 * TOKENS[name] // median), 1, 10**5).astype(int)
        lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), TOKENS[name]))]
        write_stream(path / name, "train", [np.full(length, 7) for length in lengths], shard_bytes=1 << 21)
    return path


def dataset(folder: Path, shares: dict[str, dict[str, Any]], phases: list[LoaderPhase] | None = None) -> MixtureDataset:
    streams = {name: StreamConfig(path=str(folder / name), **share) for name, share in shares.items()}
    data = DataConfig(tokenizer=write_tokenizer(folder), streams=streams, lanes=LANES)
    return MixtureDataset(LoaderConfig(seed=3, data=data, phases=phases or [phase(10**6)]), 0, 1)


def phase(steps: int, **options: Any) -> LoaderPhase:
    return LoaderPhase(steps=steps, global_batch_size=ROWS, max_seq_len=LENGTH, **options)


def tokens_by_row(mixture: MixtureDataset, steps: int) -> np.ndarray:
    """(rows, streams): tokens of each stream in each row, in global order."""
    rows = []
    for _, _, taken, _ in islice(mixture.plan(), steps):
        documents, pieces = join_pieces(taken)
        row = np.repeat(np.arange(ROWS), np.concatenate([part.sequences for part in taken]))
        tokens = np.zeros((ROWS, len(mixture.streams)))
        np.add.at(tokens, (row, documents.stream), pieces.stop - pieces.start)
        rows.append(tokens)
    return np.concatenate(rows)


def worst(rows: np.ndarray, shares: np.ndarray, length: int) -> float:
    """The largest deviation of any stream's share over any `length` consecutive rows, in share points."""
    sums = np.cumsum(np.vstack([np.zeros(rows.shape[1]), rows]), 0)
    windows = sums[length:] - sums[:-length]
    return float(np.abs(windows / windows.sum(1, keepdims=True) - shares).max())


@pytest.mark.parametrize("rule", ["weight", "repeat"])
def test_shares_hold_over_an_epoch_and_over_any_10_000_rows(folder: Path, rule: str) -> None:
    repeats = {"tweets": 3.3, "web": 1, "wiki": 2, "papers": 0.37, "books": 1.5}
    values = WEIGHTS if rule == "weight" else repeats
    mixture = dataset(folder, {name: {rule: value} for name, value in values.items()})
    tokens = {name: stream.manifest.tokens for name, stream in zip(MEDIANS, mixture.streams, strict=True)}
    amounts = {name: value * (tokens[name] if rule == "repeat" else 1) for name, value in values.items()}
    shares = np.array(list(amounts.values())) / sum(amounts.values())
    epoch = sum(tokens.values()) // LENGTH  # rows that hold as many tokens as the corpus
    rows = tokens_by_row(mixture, 2 * epoch // ROWS + 1)
    assert len(rows) > 20_000
    for start in (0, epoch // 2, epoch):
        total = rows[start : start + epoch].sum(0)
        assert np.abs(total / total.sum() - shares).max() < 0.001
    assert worst(rows, shares, 10_000) < 0.01


def test_shares_hold_right_behind_a_change(folder: Path) -> None:
    """Three mixtures of 10,000 rows, each with its own shares from its first row to its last."""
    parts = [{"web": 60, "wiki": 20, "books": 20}, {"tweets": 10, "papers": 70, "web": 20}, {"books": 50, "wiki": 50}]
    steps = -(-10_000 // ROWS)
    phases = [phase(steps, streams={name: StreamShare(weight=w) for name, w in part.items()}) for part in parts]
    rows = tokens_by_row(dataset(folder, {name: {} for name in MEDIANS}, phases), 3 * steps)
    for number, part in enumerate(parts):
        shares = np.array([part.get(name, 0) / 100 for name in MEDIANS])
        own = rows[number * steps * ROWS : (number + 1) * steps * ROWS]
        assert np.abs(own.sum(0) / own.sum() - shares).max() < 0.005
        assert worst(own, shares, 2_500) < 0.02
        assert own[:, shares == 0].sum() == 0


def test_unequal_shares_would_be_seen(folder: Path) -> None:
    """The measure can fail: a mixture that is off by two share points is not within one."""
    off = WEIGHTS | {"web": 58, "wiki": 22}
    rows = tokens_by_row(dataset(folder, {name: {"weight": value} for name, value in off.items()}), 200)
    assert worst(rows, np.array(list(WEIGHTS.values())) / 100, 10_000) > 0.01


def test_weights() -> None:
    tokens = {"a": 100, "b": 300}

    def weights(**shares: dict[str, Any]) -> dict[str, float]:
        return stream_weights({name: StreamShare(**share) for name, share in shares.items()}, tokens)

    assert weights(a={}, b={}) == {"a": 0.25, "b": 0.75}
    assert weights(a={"repeat": 3}, b={}) == {"a": 0.5, "b": 0.5}
    assert weights(a={"weight": 1}, b={"weight": 3}) == {"a": 0.25, "b": 0.75}
    assert weights(a={"tokens": "1K"}, b={"tokens": 1000}) == {"a": 0.5, "b": 0.5}
    assert weights(b={"weight": 7}) == {"a": 0.0, "b": 1.0}


def test_min_length_favours_long_documents(folder: Path) -> None:
    shares = {name: {"weight": weight, "min_length": 400} for name, weight in WEIGHTS.items() if name != "tweets"}
    mixture = dataset(folder, shares)
    lengths: list[int] = []
    for _, _, rows, _ in islice(mixture.plan(), 50):
        lengths += join_pieces(rows)[0].length.tolist()
    assert min(lengths) >= 400
    with pytest.raises(ConfigError, match=r"data.streams.tweets.min_length: 40000: the stream has no document of more"):
        dataset(folder, {"web": {}, "tweets": {"min_length": 40_000}})
