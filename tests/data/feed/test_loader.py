"""The loader's promises: global batches depend on config and step alone; every token as often as promised."""

import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.feed.batches import SEEN, Batch
from data.feed.lanes import LaneCursor
from data.feed.loader import Loader, LoaderConfig, LoaderPhase, build_loader, canonical_lanes
from data.feed.masking import IGNORE
from data.feed.mixture import DataConfig, StreamConfig
from data.feed.workers import worker_death
from data.store.shards import open_stream
from flexbert_core.schema import ConfigError, RunError
from tests.helpers.synthetic import SPECIAL, documents, write_stream, write_tokenizer

STREAMS = {"prose": (0, 150, 400), "code": (1, 60, 900), "notes": (2, 40, 60)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("streams")
    for name, (seed, count, longest) in STREAMS.items():
        write_stream(path / name, "train", documents(seed, count, longest))
    return path


def config(
    folder: Path, phases: list[tuple[int, int, int]], data: dict[str, Any] | None = None, **repeats: float
) -> LoaderConfig:
    """phases: (steps, rows, max_seq_len)."""
    streams = {name: StreamConfig(path=str(folder / name), repeat=repeats.get(name)) for name in STREAMS}
    settings: dict[str, Any] = {"num_workers": 0, "block_documents": 40, "part_documents": 4} | (data or {})
    return LoaderConfig(
        seed=3,
        data=DataConfig(tokenizer=write_tokenizer(folder), streams=streams, **settings),
        phases=[
            LoaderPhase(steps=steps, global_batch_size=rows, max_seq_len=length, masking={"rate": 0.2 + 0.1 * number})
            for number, (steps, rows, length) in enumerate(phases)
        ],
    )


PHASES = [(7, 8, 64), (5, 16, 128), (6, 8, 96)]


def equal(left: Batch, right: Batch) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[key], right[key]) for key in left)


def joined(parts: list[Batch]) -> Batch:
    """The ranks' shares of a step as one batch."""
    starts = np.cumsum([0] + [len(part["input_ids"]) for part in parts])
    bounds = {
        key: torch.cat(
            [
                torch.zeros(1, dtype=torch.int32),
                *(part[key][1:] + start for part, start in zip(parts, starts, strict=False)),
            ]
        ).int()
        for key in ("cu_seqlens", "row_bounds")
    }
    rows = len(parts[0]["sequences"])
    assert [part["first_row"] for part in parts] == [rank * rows for rank in range(len(parts))]
    return {
        **bounds,
        "first_row": 0,
        **{key: parts[0][key] for key in ("phase", "masking_rate")},
        "input_ids": torch.cat([part["input_ids"] for part in parts]),
        "labels": torch.cat([part["labels"] for part in parts]),
        "max_seqlen": max(part["max_seqlen"] for part in parts),
        "sequences": [count for part in parts for count in part["sequences"]],
        "slots": sum(part["slots"] for part in parts),
        "tokens": sum(part["tokens"] for part in parts),
        "masked": sum(part["masked"] for part in parts),
        "masked_streams": torch.cat([part["masked_streams"] for part in parts]),
        "seen": sum(part["seen"] for part in parts),
    }


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_world_size_changes_nothing(folder: Path, world_size: int) -> None:
    one = list(build_loader(config(folder, PHASES)))
    assert len(one) == 18
    ranks = [list(build_loader(config(folder, PHASES), rank, world_size)) for rank in range(world_size)]
    for step, expected in enumerate(one):
        assert equal(joined([rank[step] for rank in ranks]), expected), step


@pytest.mark.parametrize("lanes", [1, 2])
def test_more_ranks_than_lanes(folder: Path, lanes: int) -> None:
    settings = {"lanes": lanes}
    one = list(build_loader(config(folder, PHASES, settings)))
    ranks = [list(build_loader(config(folder, PHASES, settings), rank, 4)) for rank in range(4)]
    assert all(equal(joined([rank[step] for rank in ranks]), expected) for step, expected in enumerate(one))


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("ahead", [1, 4, 5, 40])
def test_workers_change_nothing(folder: Path, workers: int, ahead: int) -> None:
    """Also in groups: of up to as many batches as a worker keeps ahead."""
    expected = list(build_loader(config(folder, PHASES)))
    loader = build_loader(config(folder, PHASES, {"num_workers": workers, "prefetch_batches": ahead}))
    assert loader.group == min(ahead, 2**16 // (16 * 128))
    states, batches = [], []
    for batch in loader:
        batches.append(batch)
        states.append(loader.state_dict())
    assert all(map(equal, batches, expected))
    assert len(batches) == len(expected)
    plain = build_loader(config(folder, PHASES))
    assert states == [plain.state_dict() for _ in plain]


def test_resume_at_every_step(folder: Path) -> None:
    loader = build_loader(config(folder, PHASES))
    states, batches = [loader.state_dict()], []
    for batch in loader:
        batches.append(batch)
        states.append(loader.state_dict())
    for step, state in enumerate(states):
        again = build_loader(config(folder, PHASES, {"num_workers": step % 2}))
        again.load_state_dict(state)
        rest = list(again)
        assert len(rest) == len(batches) - step
        assert all(map(equal, rest, batches[step:])), step
        assert again.state_dict() == states[-1]


def _epoch_documents(folder: Path) -> dict[int, list[list[int]]]:
    found: dict[int, list[list[int]]] = {}
    for number, name in enumerate(STREAMS):
        stream = open_stream(folder / name / "train")
        found[number] = [
            stream.document(shard, index).tolist()
            for shard in range(len(stream.manifest.shards))
            for index in range(len(stream.lengths(shard)))
        ]
    return found


def _restored(batch: Batch) -> list[int]:
    """The batch's tokens before masking, without [CLS] and [SEP]."""
    ids = torch.where(batch["labels"] != IGNORE, batch["labels"], batch["input_ids"])
    return [token for token in ids.tolist() if token not in (SPECIAL["cls"], SPECIAL["sep"])]


def counted(folder: Path, times: list[int]) -> Counter[int]:
    """Tokens of the corpus, each stream's as often as said."""
    expected: Counter[int] = Counter()
    for number, docs in _epoch_documents(folder).items():
        for document in docs:
            for token, count in Counter(document).items():
                expected[token] += count * times[number]
    return expected


def at_pass(loader: Loader, number: int) -> bool:
    """True once lane 0 stands at the start of a block with every stream at the start of this pass or at its line's end
    before it."""
    cursor = loader.dataset.cursors[0]
    ends = [line.tokens for line in loader.dataset.order.lines]
    return not cursor.taken and all(
        (place.number, place.token) in ((number, -1), (number - 1, end))
        for place, end in zip(cursor.at, ends, strict=True)
    )


def _states_over_restarts(folder: Path, store: Path, rank: int, out: "multiprocessing.Queue[Any]") -> None:
    """In one of two processes: each state comes from a loader that was resumed from the one before."""
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    states: list[Any] = []
    for _ in range(4):
        loader = build_loader(config(folder, PHASES, {"lanes": 4}), rank, 2)
        if states:
            loader.load_state_dict(states[-1])
        list(zip(range(3), loader, strict=False))
        states.append(loader.state_dict())
    if rank == 0:
        out.put(states)


@pytest.mark.slow
def test_two_ranks_resume_again_and_again(folder: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")  # the tests' process may have trained, with its own process group
    out = context.Queue()
    ranks = [
        context.Process(target=_states_over_restarts, args=(folder, tmp_path / "store", rank, out), daemon=True)
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    found = out.get(timeout=240)
    for process in ranks:
        process.join(60)
    one = build_loader(config(folder, PHASES, {"lanes": 4}))
    assert found == [one.state_dict() for step, _ in enumerate(one, 1) if step % 3 == 0][:4]


def test_a_pass_shows_every_token_once(folder: Path) -> None:
    """One lane and one row per step: a pass of all streams ends on a row border, so counts can be compared exactly."""
    loader = build_loader(config(folder, [(9, 1, 64), (3, 1, 300), (10_000, 1, 128)], {"lanes": 1}))
    counts: Counter[int] = Counter()
    for batch in loader:
        counts.update(_restored(batch))
        if at_pass(loader, 1):
            break
    assert counts == counted(folder, [1, 1, 1])


def test_repeats(folder: Path) -> None:
    """repeat 0.5, 1 and 2.25: when prose has been seen twice, code has been four times and notes nine times."""
    loader = build_loader(config(folder, [(100_000, 1, 128)], {"lanes": 1}, prose=0.5, notes=2.25))
    counts: Counter[int] = Counter()
    for batch in loader:
        counts.update(_restored(batch))
        cursor = loader.dataset.cursors[0]
        if cursor.at and not cursor.taken and cursor.at[0].number * 2 + (cursor.at[0].token > 0) > 3:
            break
    expected = counted(folder, [2, 4, 9])
    longest = max(len(document) for docs in _epoch_documents(folder).values() for document in docs)
    # The block after the last pass of each stream has begun: at most its share of tokens, and a document, apart.
    block = loader.dataset.order.block_tokens
    assert abs(counts.total() - expected.total()) < 2 * block + 3 * longest
    extra, missing = counts - expected, expected - counts
    assert extra.total() + missing.total() < 2 * block + 3 * longest


def test_batch_layout(folder: Path) -> None:
    for batch in build_loader(config(folder, PHASES)):
        ids, bounds = batch["input_ids"], batch["cu_seqlens"].long()
        assert ids.dtype == batch["labels"].dtype == torch.int64
        assert batch["cu_seqlens"].dtype == torch.int32
        assert bounds[0] == 0
        assert bounds[-1] == len(ids)
        assert (bounds.diff() >= 3).all()
        assert batch["max_seqlen"] == int(bounds.diff().max())
        assert (ids[bounds[:-1]] == SPECIAL["cls"]).all()
        assert (ids[bounds[1:] - 1] == SPECIAL["sep"]).all()
        assert sum(batch["sequences"]) == len(bounds) - 1
        row_ends = bounds[np.cumsum(batch["sequences"])]
        assert batch["row_bounds"].tolist() == [0, *row_ends]
        row_tokens = torch.diff(row_ends, prepend=torch.zeros(1, dtype=torch.int64))
        assert (row_tokens <= batch["slots"] // len(batch["sequences"])).all()
        assert batch["masked"] == int((batch["labels"] != IGNORE).sum())
        seen = dict(zip(SEEN, batch["seen"].sum(0), strict=True))
        assert seen["tokens"] + 2 * seen["sequences"] == len(ids)
        assert seen["sequences"] == len(bounds) - 1


def test_passes_differ_in_order_and_masks(folder: Path) -> None:
    loader = build_loader(config(folder, [(100_000, 1, 128)], {"lanes": 1}))
    rows: list[set[tuple[int, ...]]] = [set(), set()]
    number = 0
    for batch in loader:
        rows[number].add(tuple(batch["input_ids"].tolist()))
        number += at_pass(loader, number + 1)
        if number == 2:
            break
    assert abs(len(rows[0]) - len(rows[1])) < 0.05 * len(rows[0])
    assert not rows[0] & rows[1]


def test_canonical_lanes() -> None:
    assert canonical_lanes([4608, 576]) == 64
    assert canonical_lanes([768, 4608, 24]) == 8
    assert canonical_lanes([3]) == 1
    assert canonical_lanes([128]) == 64


def test_state_is_small_and_plain(folder: Path) -> None:
    loader = build_loader(config(folder, PHASES))
    batches = iter(loader)
    for _ in range(13):  # inside the third phase: two earlier row lengths may be in the cursor
        next(batches)
    state = loader.state_dict()
    assert state["step"] == 13
    assert len(state["lanes"]) == 8
    assert [LaneCursor.from_list(lane).to_list() for lane in state["lanes"]] == state["lanes"]


def test_errors(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"phases\[0\].global_batch_size: 8 is no multiple of 3 ranks"):
        build_loader(config(folder, PHASES), 0, 3)
    with pytest.raises(ConfigError, match=r"phases\[0\].global_batch_size: 8 is no multiple of data.lanes 16"):
        build_loader(config(folder, PHASES, {"lanes": 16}))
    with pytest.raises(ConfigError, match="cannot fill 512 lanes.*data.lanes"):
        build_loader(config(folder, [(1, 512, 64)], {"lanes": 512}))
    with pytest.raises(ConfigError, match=r"data.streams.prose.path: .*no such stream folder"):
        build_loader(config(tmp_path, PHASES))
    loader = build_loader(config(folder, PHASES))
    with pytest.raises(ConfigError, match="written with 4 lanes, the config gives 8"):
        loader.load_state_dict({"step": 0, "lanes": [LaneCursor().to_list()] * 4})
    with pytest.raises(ValueError, match="weight and repeat differ"):
        DataConfig(
            tokenizer="t", streams={"a": StreamConfig(path="a", weight=1), "b": StreamConfig(path="b", repeat=1)}
        )
    with pytest.raises(ValueError, match="b has no weight"):
        DataConfig(tokenizer="t", streams={"a": StreamConfig(path="a", weight=1), "b": StreamConfig(path="b")})


def test_damage_met_while_reading_is_one_plain_error_behind_the_batches_before(tmp_path: Path) -> None:
    for name, (seed, count, longest) in STREAMS.items():
        write_stream(tmp_path / name, "train", documents(seed, count, longest))
    loaders = [
        build_loader(config(tmp_path, [(1000, 8, 64)], {"num_workers": workers, "prefetch_batches": 3}))
        for workers in (0, 1, 2)
    ]
    shard = sorted((tmp_path / "code" / "train").glob("*.mds"))[2]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    for loader in loaders:
        with pytest.raises(
            RunError, match=rf"stream 'code': shard .*{shard.name}: damaged: documents \d+ to \d+"
        ) as caught:
            for _ in loader:
                pass
        assert "Traceback" not in str(caught.value)
    states = [loader.state_dict() for loader in loaders]
    assert states == states[:1] * 3
    assert states[0]["step"] % loaders[0].group, "the damage lies within a group"


def _workers(loader: Loader) -> tuple[Iterator[Batch], list[int]]:
    """A started loader behind its first batch, and its workers' process ids."""
    before = set(multiprocessing.active_children())
    batches = iter(loader)
    next(batches)
    return batches, [child.pid or 0 for child in multiprocessing.active_children() if child not in before]


@pytest.mark.parametrize("busy", [False, True])
def test_a_killed_worker_is_one_plain_error(folder: Path, busy: bool) -> None:
    """Never a hang: also when the training process is not waiting for the loader at that moment."""
    batches, workers = _workers(build_loader(config(folder, [(100_000, 8, 64)], {"num_workers": 2})))
    assert len(workers) == 2

    def go_on() -> None:
        try:
            os.kill(workers[1], signal.SIGKILL)
            if busy:
                time.sleep(1)
            for _ in batches:
                pass
        except RuntimeError as error:  # raised by PyTorch's signal handler outside the loader
            raise worker_death(error) or error from None

    with pytest.raises(RunError, match=rf"DataLoader worker \(pid.* {workers[1]}\).*(killed by|exited unexp)"):
        go_on()


def test_a_bug_in_a_worker_ends_the_run_with_that_exception(folder: Path) -> None:
    loader = build_loader(config(folder, PHASES, {"num_workers": 2}))
    loader.dataset.mixtures = []  # as if ours: the workers' copies have nothing to take a phase's mixture from
    with pytest.raises(IndexError, match="list index out of range"):
        next(iter(loader))


@pytest.mark.slow
def test_no_shared_memory(folder: Path) -> None:
    """Neither the workers nor this process map any: nothing can be left behind, or be another run's."""
    batches, workers = _workers(build_loader(config(folder, [(100_000, 8, 64)], {"num_workers": 2})))
    for _ in range(20):
        next(batches)
    for pid in (*workers, os.getpid()):
        mapped = [line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "/dev/shm" in line]
        assert [line for line in mapped if "/dev/shm/sem." not in line] == []
