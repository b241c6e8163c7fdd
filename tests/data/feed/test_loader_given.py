"""What the loader is given it uses, or refuses by name: states, shares, filters, ranks, tokenizers, splits."""

import json
import logging
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from torch.utils.data import DataLoader

from data.feed.batches import join_pieces
from data.feed.loader import LoaderConfig, LoaderPhase, MixtureDataset, build_loader
from data.feed.mixture import DataConfig, StreamConfig, StreamShare, stream_weights
from data.store.shards import open_stream
from flexbert_core.schema import ConfigError, RunError
from tests.helpers.remote import settings
from tests.helpers.servers import run_web
from tests.helpers.synthetic import documents, write_stream, write_tokenizer

# Documents by length: most of a's tokens lie in short ones, a few of c's in long ones.
LENGTHS = {"a": [20] * 900 + [200] * 40, "b": [100] * 160, "c": [90] * 100 + [500] * 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("given")
    for number, (name, lengths) in enumerate(LENGTHS.items()):
        rng = np.random.default_rng(number)
        shuffled = rng.permutation(lengths)
        write_stream(path / name, "train", [rng.integers(5, 512, length) for length in shuffled], chunk=4)
    write_tokenizer(path)
    return path


def config(
    folder: Path, shares: dict[str, dict[str, Any]], phases: list[LoaderPhase] | None = None, **data: Any
) -> LoaderConfig:
    streams = {name: StreamConfig(path=str(folder / name), **share) for name, share in shares.items()}
    given: dict[str, Any] = {"tokenizer": str(folder / "tokenizer"), "num_workers": 0, "block_documents": 100, **data}
    seed = given.pop("seed", 1)
    return LoaderConfig(seed=seed, data=DataConfig(streams=streams, **given), phases=phases or [phase(12)])


def phase(steps: int, **options: Any) -> LoaderPhase:
    given = {"global_batch_size": 4, "max_seq_len": 128, **options}
    return LoaderPhase(steps=steps, **given)


# What is shown of each document, in plain Python: a row has room for 126 tokens.
FILTERS: dict[str, tuple[dict[str, Any], Callable[[int], int]]] = {
    "min_length": ({"min_length": 100}, lambda n: n if n >= 100 else 0),
    "truncate": ({"long_documents": "truncate"}, lambda n: min(n, 126)),
    "drop": ({"long_documents": "drop"}, lambda n: n if n <= 126 else 0),
}


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("other", ["b", "c"])
def test_repeat_counts_what_is_shown(folder: Path, name: str, other: str) -> None:
    """While what is shown of one stream is seen once, so is that of the other; here over four passes."""
    options, shown = FILTERS[name]
    hidden = {"min_length": options["min_length"]} if "min_length" in options else {}
    long = {"long_documents": options["long_documents"]} if "long_documents" in options else {}
    names = ["a", other]
    dataset = MixtureDataset(config(folder, dict.fromkeys(names, hidden), [phase(10**6)], **long), 0, 1)
    once = [sum(map(shown, LENGTHS[stream])) for stream in names]
    mixture = dataset.mixtures[0].tokens
    np.testing.assert_allclose(np.array(mixture) / sum(mixture), np.array(once) / sum(once))
    seen = np.zeros(2)
    for _, _, rows, _ in dataset.plan():
        found, pieces = join_pieces(rows)
        np.add.at(seen, found.stream, pieces.stop - pieces.start)
        if seen.sum() >= 4 * sum(once):
            break
    np.testing.assert_allclose(seen / once, 4, rtol=0.1)


@pytest.mark.parametrize("repeat", [0.5, 3.0])
def test_repeat_without_filters_is_as_it_was(folder: Path, repeat: float) -> None:
    """To the last bit, also where truncate and min_length hide nothing: the order of runs depends on it."""
    dataset = MixtureDataset(config(folder, {"a": {"repeat": repeat}, "b": {}}), 0, 1)
    tokens = {name: sum(LENGTHS[name]) for name in "ab"}
    weights = stream_weights(dataset.config.data.streams, tokens)
    assert dataset.mixtures[0].tokens == tuple(weights[name] * dataset.order.block_tokens for name in "ab")
    idle = {"a": {"repeat": repeat, "min_length": 16}, "b": {"min_length": 64}}
    phases = [phase(3, max_seq_len=514, long_documents="truncate")]
    assert MixtureDataset(config(folder, idle, phases), 0, 1).mixtures[0].tokens == dataset.mixtures[0].tokens


def test_a_stream_of_which_nothing_is_shown_is_refused(folder: Path) -> None:
    phases = [phase(3, max_seq_len=16, long_documents="drop")]
    with pytest.raises(ConfigError, match=r"^data.streams.a: no document is left by min_length and long_documents"):
        MixtureDataset(config(folder, {"a": {}, "b": {}}, phases), 0, 1)


def next_rows(dataset: MixtureDataset, steps: int) -> list[np.ndarray]:
    return [batch.ids for batch in islice(dataset, steps)]


def cursors(dataset: MixtureDataset, steps: int) -> dict[str, Any]:
    """The state after so many steps."""
    *_, last = islice(dataset, steps)
    return json.loads(json.dumps({"step": steps, "lanes": [last.cursors[lane] for lane in sorted(last.cursors)]}))


@pytest.mark.parametrize("name", FILTERS)
def test_a_run_begun_when_repeat_counted_all_tokens_goes_on_so(
    folder: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    options, _ = FILTERS[name]
    hidden = {"min_length": options["min_length"]} if "min_length" in options else {}
    long = {"long_documents": options["long_documents"]} if "long_documents" in options else {}
    given = config(folder, {"a": hidden, "b": hidden}, **long)
    old = MixtureDataset(given, 0, 1)
    weights = stream_weights(given.data.streams, {name: sum(LENGTHS[name]) for name in "ab"})
    tokens = tuple(weights[name] * old.order.block_tokens for name in "ab")
    old.mixtures = [mixture._replace(tokens=tokens) for mixture in old.mixtures]
    again = MixtureDataset(given, 0, 1)
    again.load_state_dict(cursors(old, 5))
    assert "this run goes on as it was begun" in caplog.text
    for here, there in zip(next_rows(again, 7), next_rows(old, 12)[5:], strict=True):
        np.testing.assert_array_equal(here, there)
    caplog.clear()
    new = MixtureDataset(given, 0, 1)
    again.load_state_dict(cursors(new, 5))
    assert caplog.text == ""
    for here, there in zip(next_rows(again, 7), next_rows(new, 12)[5:], strict=True):
        np.testing.assert_array_equal(here, there)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # fsspec's own session and loop
def test_counting_reads_the_heads_of_remote_shards(folder: Path, tmp_path: Path) -> None:
    """The same number, and no shard comes into the cache for it."""
    with run_web(folder) as endpoint:
        stream = open_stream(f"{endpoint}/a/train", settings(tmp_path))
        assert stream.count(lambda lengths: np.where(lengths >= 100, lengths, 0)) == 40 * 200
        assert not list((tmp_path / "cache").glob("*-*"))


def test_counting_meets_a_damaged_head(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "c", tmp_path / "c")
    stream = open_stream(tmp_path / "c" / "train")
    shard = tmp_path / "c" / "train" / stream.manifest.shards[1].file
    content = bytearray(shard.read_bytes())
    content[8] ^= 1
    shard.write_bytes(content)
    with pytest.raises(RunError, match=rf"^stream 'c': shard .*{shard.name}: damaged: offsets: expected xxh3_64"):
        stream.count(lambda lengths: lengths)
    shard.unlink()
    with pytest.raises(RunError, match=rf"^stream 'c': shard .*{shard.name}: No such file"):
        stream.count(lambda lengths: lengths)


@pytest.mark.parametrize("share", [{}, {"repeat": 2.0}, {"weight": 1.0}])
def test_a_mixture_that_says_no_min_length_keeps_that_of_the_data(folder: Path, share: dict[str, Any]) -> None:
    streams = {name: StreamShare(**share) for name in "ab"}
    dataset = MixtureDataset(config(folder, {"a": {"min_length": 100}, "b": {}}, [phase(9, streams=streams)]), 0, 1)
    for _, _, rows, _ in dataset.plan():
        assert join_pieces(rows)[0].length.min() >= 100
    streams["a"] = StreamShare(min_length=0, **share)
    dataset = MixtureDataset(config(folder, {"a": {"min_length": 100}, "b": {}}, [phase(9, streams=streams)]), 0, 1)
    assert min(join_pieces(rows)[0].length.min() for _, _, rows, _ in dataset.plan()) == 20


@pytest.mark.parametrize(("workers", "ahead"), [(0, 4), (1, 4), (2, 4), (3, 2)])
def test_order_in_a_loader_of_ones_own(folder: Path, workers: int, ahead: int) -> None:
    given = config(folder, {"a": {}, "b": {}}, prefetch_batches=ahead)
    expected = [batch["input_ids"].numpy() for batch in build_loader(given)]
    for dataset in (MixtureDataset(given, 0, 1), build_loader(given).dataset):
        found = [packed.ids for packed in DataLoader(dataset, batch_size=None, num_workers=workers)]
        assert len(found) == len(expected) == 12
        for here, there in zip(found, expected, strict=True):
            np.testing.assert_array_equal(here, there)


@pytest.mark.parametrize("workers", [0, 2])
def test_without_packing_every_row_is_one_piece_and_a_pass_loses_nothing(folder: Path, workers: int) -> None:
    """c's documents of 500 tokens are cut into pieces of 126. A pass over both streams has 160 + 100 + 6 * 4 rows."""
    pieces = sorted([100] * 160 + [90] * 100 + [126, 126, 126, 122] * 6)
    shares: dict[str, dict[str, Any]] = {"b": {}, "c": {}}
    data = {"packing": False, "num_workers": workers, "lanes": 1}
    given = config(folder, shares, [phase(len(pieces) // 4)], **data)
    batches = list(build_loader(given))
    assert all(set(batch["sequences"]) == {1} for batch in batches)
    assert sorted(np.concatenate([np.diff(batch["cu_seqlens"]) - 2 for batch in batches]).tolist()) == pieces
    assert all(batch["slots"] == 4 * 128 for batch in batches)

    loader = build_loader(given)
    for _ in islice(loader, 30):
        state = loader.state_dict()
    again = build_loader(given)
    again.load_state_dict(state)
    rest = [batch["input_ids"].numpy() for batch in again]
    assert len(rest) == len(batches) - 30
    for here, there in zip(rest, batches[30:], strict=True):
        np.testing.assert_array_equal(here, there["input_ids"].numpy())
    packed = build_loader(config(folder, shares, [phase(len(pieces) // 4)], lanes=1))
    with pytest.raises(ConfigError, match=r"^data\.packing: True here, False where"):
        packed.load_state_dict(state)


OTHER: dict[str, tuple[dict[str, Any], str]] = {
    "seed": ({"seed": 2}, r"^seed: 2 here, 1 where"),
    "part_documents": ({"part_documents": 8}, r"^data.part_documents: 8 here, 2048 where"),
    "block_documents": ({"block_documents": 50}, r"^data.block_documents: 50 here, 100 where"),
    "shuffle_shards": ({"shuffle_shards": 1}, r"^data.shuffle_shards: 1 here, None where"),
}


@pytest.mark.parametrize("key", OTHER)
def test_a_state_of_another_order_is_refused(folder: Path, key: str) -> None:
    options, message = OTHER[key]
    state = json.loads(json.dumps(build_loader(config(folder, {"a": {}, "b": {}})).state_dict()))
    other = build_loader(config(folder, {"a": {}, "b": {}}, **options))
    with pytest.raises(ConfigError, match=message):
        other.load_state_dict(state)
    other.load_state_dict({key: state[key] for key in ("step", "lanes")})  # an older one, which has no facts


@pytest.mark.parametrize("names", ["ba", "ac", "abc"])
def test_a_state_of_other_streams_is_refused(folder: Path, names: str) -> None:
    state = build_loader(config(folder, {"a": {}, "b": {}})).state_dict()
    with pytest.raises(ConfigError, match=r"^data.streams: .* here, .* where the loader's state was taken"):
        build_loader(config(folder, {name: {} for name in names})).load_state_dict(state)


def test_an_older_state_of_another_number_of_streams_is_refused(folder: Path) -> None:
    state = cursors(MixtureDataset(config(folder, {"a": {}, "b": {}}), 0, 1), 2)
    with pytest.raises(ConfigError, match=r"^data.streams: 3 here"):
        build_loader(config(folder, {name: {} for name in "abc"})).load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 13}, r"^step: 13 in the loader's state, the phases have 0 to 12$"),
        ({"step": -3}, r"^step: -3 in the loader's state"),
        ({"lanez": []}, r"^lanez: no key of a loader's state"),
        ({"step": None}, r"^step: missing in the loader's state"),
        ({"lanes": None}, r"^lanes: missing in the loader's state"),
    ],
)
def test_what_is_no_state_is_refused(folder: Path, change: dict[str, Any], message: str) -> None:
    loader = build_loader(config(folder, {"a": {}}))
    state = {key: value for key, value in {**loader.state_dict(), **change}.items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        loader.load_state_dict(state)


def test_the_state_behind_the_last_step_is_one(folder: Path) -> None:
    loader = build_loader(config(folder, {"a": {}}))
    assert len(list(loader)) == 12
    again = build_loader(config(folder, {"a": {}}))
    again.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    assert list(again) == []


def test_the_tokenizer_is_opened(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^data.tokenizer: /no/such: no such folder"):
        build_loader(config(folder, {"a": {}}, tokenizer="/no/such"))
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(ConfigError, match=r"^data.tokenizer: .*: holds no tokenizer.json"):
        MixtureDataset(config(folder, {"a": {}}, tokenizer=str(tmp_path / "tokenizer")), 0, 1)
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"^data.tokenizer: .*: its fingerprint .* is not the streams'"):
        build_loader(config(folder, {"a": {}}, tokenizer=str(tmp_path / "tokenizer")))


@pytest.mark.parametrize(
    ("streams", "message"),
    [
        ({"a": {"repeat": 2.0}, "b": {"tokens": 100}}, "repeat and tokens differ"),
        ({"a": {"weight": 2.0}, "b": {"repeat": 1.0}}, "weight and repeat differ"),
        ({"a": {"weight": 2.0}, "b": {}}, "b has no weight"),
        ({"a": {"weight": 2.0}, "bb": {"weight": 1.0}}, r"phases\[0\].streams.bb: no stream of data.streams, did you"),
        ({}, "at least 1 item"),
    ],
)
def test_a_phases_mixture_is_checked(folder: Path, streams: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(folder, {"a": {}, "b": {}}, [phase(3, streams={name: StreamShare(**s) for name, s in streams.items()})])


def test_another_split_in_the_place_of_train_is_refused(tmp_path: Path) -> None:
    write_stream(tmp_path / "a", "validation", documents(0, 50, 30))
    write_tokenizer(tmp_path)
    shutil.copytree(tmp_path / "a" / "validation", tmp_path / "a" / "train")
    with pytest.raises(ConfigError, match=r"^data.streams.a.path: .*/a/train: stream.json says split 'validation'"):
        build_loader(config(tmp_path, {"a": {}}))


def test_one_stream_under_two_names_is_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    shares = {name: StreamConfig(path=str(folder / "a")) for name in ("x", "y")}
    data = DataConfig(tokenizer=str(folder / "tokenizer"), streams=shares, num_workers=0)
    with caplog.at_level(logging.WARNING):
        build_loader(LoaderConfig(seed=1, data=data, phases=[phase(2)]))
    assert "data.streams.y: holds the very documents of stream x" in caplog.text


@pytest.mark.parametrize(("rank", "world_size"), [(2, 2), (5, 2), (-1, 2), (1, 1)])
def test_a_rank_that_is_none_is_refused(folder: Path, rank: int, world_size: int) -> None:
    with pytest.raises(ConfigError, match=rf"^rank: {rank}: there are {world_size} ranks, from 0 to {world_size - 1}$"):
        build_loader(config(folder, {"a": {}}), rank, world_size)


def test_parts_shorter_than_a_chunk_are_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    build_loader(config(folder, {"a": {}}, part_documents=4))
    assert caplog.text == ""
    build_loader(config(folder, {"a": {}}, part_documents=1))
    assert "data.part_documents: 1 is less than a chunk of stream a: 4 documents stay together" in caplog.text
