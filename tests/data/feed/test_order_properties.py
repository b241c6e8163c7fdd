"""The order's promises on random corpora, mixtures, lanes, row lengths and batch sizes, against a plain reading of the
corpus: every token as often as promised, whatever changes on the way, and resumed anywhere."""

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from data.feed.batches import SEEN, count_seen, join_pieces
from data.feed.loader import LoaderConfig, LoaderPhase, MixtureDataset, build_loader
from data.feed.mixture import DataConfig, StreamConfig, StreamShare
from data.feed.packing import SPECIAL_TOKENS_PER_SEQUENCE
from tests.helpers.synthetic import write_stream, write_tokenizer

NAMES = ("a", "b", "c")
Token = tuple[int, int, int]
"""Stream, document of the stream, position."""


@dataclass
class Corpus:
    """Streams on disk, and their documents' lengths in order."""

    folder: Path
    lengths: list[list[int]]

    def number(self, dataset: MixtureDataset, stream: int, shard: int, index: int) -> int:
        """Which document of the stream a place in a shard is."""
        return sum(info.documents for info in dataset.streams[stream].manifest.shards[:shard]) + index


@contextmanager
def corpus(lengths: list[list[int]], shard_bytes: int, chunk: int) -> Iterator[Corpus]:
    folder = Path(tempfile.mkdtemp())
    try:
        for name, documents in zip(NAMES, lengths, strict=False):
            tokens = [np.full(length, 7) for length in documents]
            write_stream(folder / name, "train", tokens, shard_bytes=shard_bytes, chunk=chunk)
        yield Corpus(folder, lengths)
    finally:
        shutil.rmtree(folder)


def dataset_of(
    found: Corpus, phases: list[LoaderPhase], shares: list[dict[str, Any]], rank: int = 0, world: int = 1, **data: Any
) -> MixtureDataset:
    streams = {
        name: StreamConfig(path=str(found.folder / name), **share)
        for name, share in zip(NAMES, shares, strict=False)
        if (found.folder / name).exists()
    }
    config = DataConfig(tokenizer=write_tokenizer(found.folder), streams=streams, **data)
    return MixtureDataset(LoaderConfig(seed=5, data=config, phases=phases), rank, world)


def phase(steps: int, rows: int, length: int, **options: Any) -> LoaderPhase:
    return LoaderPhase(steps=steps, global_batch_size=rows, max_seq_len=length, **options)


def pieces_of(found: Corpus, dataset: MixtureDataset, rows: list[Any]) -> list[tuple[int, int, int, int, int]]:
    """(stream, document, start, stop, pass) of the rows' pieces, in order."""
    documents, pieces = join_pieces(rows)
    return [
        (int(s), found.number(dataset, int(s), int(shard), int(index)), int(start), int(stop), int(number))
        for s, shard, index, number, start, stop in zip(
            documents.stream,
            documents.shard,
            documents.index,
            documents.number,
            pieces.start,
            pieces.stop,
            strict=True,
        )
    ]


def check_rows(rows: list[Any], length: int) -> None:
    for part in rows:
        pieces, sequences = part.pieces, part.sequences
        used = np.add.reduceat(
            pieces.stop - pieces.start + SPECIAL_TOKENS_PER_SEQUENCE, np.cumsum(sequences) - sequences
        )
        assert (used <= length).all()
        assert (sequences > 0).all()


def passed(dataset: MixtureDataset, lanes: dict[int, Any], number: int) -> bool:
    """True when every lane has shown all of pass `number`: it stands behind it, and has nothing put back."""
    for number_of_lane, lane in lanes.items():
        for line, place in zip(dataset.order.lines, lane.cursor.at, strict=True):
            end = line.stretch(number_of_lane, number)[1]
            if place.number < number or (place.number == number and place.token < end):
                return False
        if lane.cursor.behind is not None:
            return False
    return True


lengths = st.lists(st.one_of(st.integers(1, 40), st.integers(1, 400)), min_size=1, max_size=40)
corpora = st.lists(lengths, min_size=1, max_size=3)
shares = st.one_of(
    st.just([{}, {}, {}]),
    st.lists(st.fixed_dictionaries({"repeat": st.sampled_from([0.5, 1.0, 2.0, 3.7])}), min_size=3, max_size=3),
    st.lists(st.fixed_dictionaries({"weight": st.sampled_from([1, 2, 5, 30])}), min_size=3, max_size=3),
    st.lists(st.fixed_dictionaries({"tokens": st.sampled_from([1000, 5000, 20_000])}), min_size=3, max_size=3),
)
reading = st.fixed_dictionaries(
    {
        "part_documents": st.sampled_from([1, 3, 2048]),
        "block_documents": st.sampled_from([3, 20, 16384]),
        "shuffle_shards": st.sampled_from([None, 1, 2]),
        "lanes": st.sampled_from([1, 2, 4]),
    }
)
formats = st.tuples(st.sampled_from([300, 1 << 12, 1 << 20]), st.sampled_from([1, 2, 8]))
few = settings(max_examples=10, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])


@few
@given(
    corpora,
    shares,
    reading,
    formats,
    st.lists(st.tuples(st.integers(1, 4), st.sampled_from([4, 8, 12]), st.integers(3, 200)), max_size=4),
)
def test_every_token_once_a_pass(
    lengths: list[list[int]],
    shares: list[dict[str, Any]],
    reading: dict[str, Any],
    formats: tuple[int, int],
    changes: list[tuple[int, int, int]],
) -> None:
    """Row length and batch size change at will (also as a batch-size warm-up does); then on to the end of the pass."""
    check_every_token_once(lengths, shares, reading, formats, changes)


few_long = st.lists(st.one_of(st.integers(1, 300), st.integers(1025, 1600)), min_size=2, max_size=4)


@settings(few, max_examples=5)
@given(
    st.lists(few_long, min_size=2, max_size=2),
    st.sampled_from([[{}, {}, {}], [{"weight": 2}, {"weight": 3}, {}]]),
    reading,
    formats,
    st.lists(st.tuples(st.integers(1, 4), st.sampled_from([4, 8]), st.sampled_from([50, 200, 3000])), max_size=3),
)
def test_every_token_once_a_pass_where_blocks_end_inside_documents(
    lengths: list[list[int]],
    shares: list[dict[str, Any]],
    reading: dict[str, Any],
    formats: tuple[int, int],
    changes: list[tuple[int, int, int]],
) -> None:
    """Documents of over 1024 tokens are divided where a block has its share: the next block goes on inside them."""
    check_every_token_once(lengths, shares, reading, formats, changes)


def check_every_token_once(
    lengths: list[list[int]],
    shares: list[dict[str, Any]],
    reading: dict[str, Any],
    formats: tuple[int, int],
    changes: list[tuple[int, int, int]],
) -> None:
    assume(sum(map(len, lengths)) >= reading["lanes"])
    with corpus(lengths, *formats) as found:
        phases = [phase(steps, rows, length) for steps, rows, length in [*changes, (10**6, 4, 64)]]
        dataset = dataset_of(found, phases, shares, **reading)
        shown: Counter[tuple[Token, int]] = Counter()
        for _, current, rows, lanes in dataset.plan():
            check_rows(rows, current.max_seq_len)
            for stream, document, start, stop, number in pieces_of(found, dataset, rows):
                assert stop <= lengths[stream][document]
                for place in range(start, stop):
                    shown[(stream, document, place), number] += 1
                    assert shown[(stream, document, place), number] == 1
            if passed(dataset, lanes, 0):
                break
        first = {token for token, number in shown if number == 0}
        assert first == {
            (stream, document, place)
            for stream, documents in enumerate(lengths)
            for document, length in enumerate(documents)
            for place in range(length)
        }


@few
@given(
    corpora,
    reading,
    formats,
    st.lists(st.integers(0, 60), min_size=3, max_size=3),
    st.sampled_from(["split", "truncate", "drop"]),
    st.integers(10, 100),
)
def test_filters_hide_what_they_say_and_nothing_else(
    lengths: list[list[int]],
    reading: dict[str, Any],
    formats: tuple[int, int],
    shortest: list[int],
    long_documents: str,
    max_seq_len: int,
) -> None:
    room = max_seq_len - SPECIAL_TOKENS_PER_SEQUENCE
    kept: dict[tuple[int, int], int] = {}
    for stream, documents in enumerate(lengths):
        for document, length in enumerate(documents):
            visible = {"split": length, "truncate": min(length, room), "drop": length if length <= room else 0}
            if length >= shortest[stream] and visible[long_documents]:
                kept[stream, document] = visible[long_documents]
    assume({stream for stream, _ in kept} == set(range(len(lengths))))
    assume(len(kept) >= 4 * reading["lanes"])
    with corpus(lengths, *formats) as found:
        shares = [{"min_length": length} for length in shortest]
        dataset = dataset_of(found, [phase(10**6, 4, max_seq_len)], shares, long_documents=long_documents, **reading)
        shown: Counter[tuple[Token, int]] = Counter()
        for _, current, rows, lanes in dataset.plan():
            check_rows(rows, current.max_seq_len)
            for stream, document, start, stop, number in pieces_of(found, dataset, rows):
                shown.update(((stream, document, place), number) for place in range(start, stop))
            if passed(dataset, lanes, 0):
                break
        assert max(shown.values()) == 1
        expected = {(*document, place) for document, visible in kept.items() for place in range(visible)}
        assert {token for token, number in shown if number == 0} == expected
        assert {token for token, _ in shown} <= expected


mixtures = st.lists(
    st.tuples(
        st.integers(1, 5),
        st.sampled_from([4, 8]),
        st.sampled_from([16, 64, 150]),
        st.dictionaries(st.sampled_from(NAMES), st.sampled_from([1, 3, 10]), min_size=1),
    ),
    min_size=1,
    max_size=5,
)


@few
@given(st.lists(lengths, min_size=3, max_size=3), reading, formats, mixtures)
def test_a_change_of_mixture_loses_and_repeats_nothing(
    lengths: list[list[int]],
    reading: dict[str, Any],
    formats: tuple[int, int],
    changes: list[tuple[int, int, int, dict[str, int]]],
) -> None:
    """Several changes in a row, streams coming and going; then all streams to the end of the pass."""
    assume(sum(map(len, lengths)) >= reading["lanes"])
    with corpus(lengths, *formats) as found:
        phases = [
            phase(steps, rows, length, streams={name: StreamShare(weight=weight) for name, weight in mixture.items()})
            for steps, rows, length, mixture in changes
        ]
        dataset = dataset_of(found, [*phases, phase(10**6, 4, 64)], [{}, {}, {}], **reading)
        shown: Counter[tuple[Token, int]] = Counter()
        totals = np.zeros((3, len(SEEN)), np.int64)
        for step, _, rows, lanes in dataset.plan():
            found_pieces = pieces_of(found, dataset, rows)
            totals += count_seen(*join_pieces(rows), 3)
            for stream, document, start, stop, number in found_pieces:
                shown.update(((stream, document, place), number) for place in range(start, stop))
            if step >= sum(change[0] for change in changes) and passed(dataset, lanes, 0):
                break
        assert max(shown.values()) == 1
        everything = {
            (stream, document, place)
            for stream, documents in enumerate(lengths)
            for document, length in enumerate(documents)
            for place in range(length)
        }
        assert {token for token, number in shown if number == 0} == everything
        for stream in range(3):
            tokens = [(token, number) for token, number in shown if token[0] == stream]
            seen = dict(zip(SEEN, totals[stream].tolist(), strict=True))
            assert seen["tokens"] == len(tokens)
            assert seen["documents"] == sum(token[2] == 0 for token, _ in tokens)
            assert seen["unique_documents"] == len({token[1] for token, _ in tokens}) == len(lengths[stream])
            assert seen["repeated_tokens"] == sum(number > 0 for _, number in tokens)


def trace(found: Corpus, dataset: MixtureDataset) -> list[list[Any]]:
    """Every step's pieces and row keys."""
    return [
        [pieces_of(found, dataset, rows), [(part.key, part.first, part.count) for part in rows]]
        for _, _, rows, _ in dataset.plan()
    ]


@settings(few, max_examples=5)
@given(
    st.lists(lengths, min_size=3, max_size=3),
    shares,
    reading,
    formats,
    mixtures,
    st.sampled_from(["split", "truncate", "drop"]),
)
def test_any_world_size_and_any_restart(
    lengths: list[list[int]],
    shares: list[dict[str, Any]],
    reading: dict[str, Any],
    formats: tuple[int, int],
    changes: list[tuple[int, int, int, dict[str, int]]],
    long_documents: str,
) -> None:
    assume(sum(map(len, lengths)) >= reading["lanes"])
    # Short documents exist in every stream, so that `drop` leaves something.
    lengths = [[*documents, *[5] * 4 * reading["lanes"]] for documents in lengths]
    with corpus(lengths, *formats) as found:
        phases = [
            phase(steps, 2 * rows, length, streams={name: StreamShare(weight=w) for name, w in mixture.items()})
            for steps, rows, length, mixture in changes
        ]
        phases += [phase(3, 8, 32), phase(2, 16, 100)]
        options = {**reading, "long_documents": long_documents}
        whole = trace(found, dataset_of(found, phases, shares, **options))
        for world in (2, 4, 8):
            ranks = [trace(found, dataset_of(found, phases, shares, rank, world, **options)) for rank in range(world)]
            for step, expected in enumerate(whole):
                assert [piece for rank in ranks for piece in rank[step][0]] == expected[0]
        states, dataset = [], dataset_of(found, phases, shares, **options)
        for step, _, _, lanes in dataset.plan():
            cursors = [lanes[lane].cursor.to_list() for lane in range(reading["lanes"])]
            states.append(json.dumps({"step": step + 1, "lanes": cursors}))
        for state in states[:: max(1, len(states) // 4)]:
            again = dataset_of(found, phases, shares, **options)
            again.load_state_dict(json.loads(state))
            step = again.step
            assert [part[0] for part in trace(found, again)] == [part[0] for part in whole[step:]]


def test_the_state_stays_small(tmp_path: Path) -> None:
    """It grows with changes of the mixture in quick succession; what was put back is used up, and forgotten."""
    rng = np.random.default_rng(0)
    for name in NAMES:
        write_stream(tmp_path / name, "train", [np.full(n, 7) for n in rng.integers(1, 200, 400)])
    found = Corpus(tmp_path, [])
    names = [["a", "b"], ["b", "c"], ["a", "c"], ["a"], ["a", "b", "c"]] * 4
    phases = [phase(12, 8, 64, streams={name: StreamShare(weight=1) for name in some}) for some in names]
    phases.append(phase(1500, 8, 64))
    dataset = dataset_of(found, phases, [{}, {}, {}], block_documents=64)
    sizes = [len(json.dumps(lanes[0].cursor.to_list())) for _, _, _, lanes in dataset.plan()]
    assert max(sizes) < 4000
    assert sizes[-1] < 2 * sizes[0]


@pytest.mark.parametrize(
    ("share", "message"),
    [({"min_length": 5000}, r"streams.a.min_length: 5000: the stream has no document of more than")],
)
def test_a_filter_that_hides_all_is_refused(tmp_path: Path, share: dict[str, Any], message: str) -> None:
    write_stream(tmp_path / "a", "train", [np.full(50, 7)] * 20)
    config = DataConfig(
        tokenizer=write_tokenizer(tmp_path),
        streams={"a": StreamConfig(path=str(tmp_path / "a"), **share)},
        num_workers=0,
    )
    with pytest.raises(Exception, match=message):
        build_loader(LoaderConfig(seed=1, data=config, phases=[phase(3, 4, 64)]))


def test_nothing_to_show_is_one_plain_error(tmp_path: Path) -> None:
    """What a manifest cannot tell before: every document is longer than a row, and long ones are dropped."""
    write_stream(tmp_path / "a", "train", [np.full(50, 7)] * 20)
    streams = {"a": StreamConfig(path=str(tmp_path / "a"))}
    config = DataConfig(tokenizer=write_tokenizer(tmp_path), streams=streams, num_workers=0, long_documents="drop")
    with pytest.raises(Exception, match="stream 'a': no document is left by min_length and long_documents"):
        next(iter(build_loader(LoaderConfig(seed=1, data=config, phases=[phase(3, 4, 16)]))))
