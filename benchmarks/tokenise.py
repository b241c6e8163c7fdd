"""The tokenising stage of prepare beside a bare loop over the tokenizer's batch API: same text, tokenizer and cores.

`python -m benchmarks.tokenise [REPEATS]` prints JSON lines. Text: the prose of ../shared/data, or where that is absent
the builtin corpus, as documents of about 600 tokens in JSON lines. The two take turns, each REPEATS times (default 5).

    ours   the whole stage: fork worker processes, load the tokenizer in each, read and parse the JSON lines, check
           digests, tokenise, write and hash MDS shards, count tokens, sync to disk, collect
    peer   the same documents as a list in memory, `encode_batch` on them by 1,000 (Rust threads on all cores); what it
           returns is only counted. `encode_batch_fast`, which leaves out the character offsets, is measured too.

CPU seconds are of all processes and threads of each; they can be compared where other work shares the machine. So can
the ratios of neighbours: each of ours over the peer's run that follows it, of which the median is given.
"""

import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.arguments import count, parser_of

# Read when the tokenizer is first used: the peer's threads.
os.environ["TOKENIZERS_PARALLELISM"] = "true"

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from rich.console import Console

from data.preparation.config import PrepareConfig
from data.preparation.dataset import _read, tokenising_steps
from data.preparation.executors import Stage
from data.preparation.executors.local import Local
from data.preparation.output import claim
from data.preparation.sources import SOURCES, Fault
from data.tokenizer import corpus_tokenizer
from flexbert_core.schema import validate

PROSE, TOKENIZER = Path("../shared/data/prose"), Path("../shared/data/tokenizers/gpt-neox-olmo/tokenizer.json")
DOCUMENT_CHARACTERS, PEER_BATCH, FILES = 2500, 1000, 8


def documents() -> list[str]:
    """The text as documents of about DOCUMENT_CHARACTERS, cut at line ends."""
    if PROSE.is_dir():
        nodes: list[Any] = [{"name": "jsonl", "paths": [f"{PROSE}/*.jsonl.xz"]}]
    else:
        nodes = [{"name": "builtin", "part": part} for part in ("stdlib-code", "python-docs", "packages-docs")]
    found = []
    for source in (SOURCES.build(SOURCES.parse(node)) for node in nodes):
        for text in (text for unit in source.find().units for text in source.read(unit) if not isinstance(text, Fault)):
            found += _cut(text)
    return found


def _cut(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = text.find("\n", start + DOCUMENT_CHARACTERS) + 1 or len(text)
        end = min(end, start + 2 * DOCUMENT_CHARACTERS)
        yield text[start:end]
        start = end


def set_up(folder: Path, texts: list[str]) -> PrepareConfig:
    """Write the corpus, and the config of its preparation."""
    (folder / "corpus").mkdir()
    for part in range(FILES):
        lines = (json.dumps({"text": text}) + "\n" for text in texts[part::FILES])
        (folder / "corpus" / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
    tokenizer = {"name": "load", "path": str(TOKENIZER)} if TOKENIZER.exists() else {"name": "train"}
    node = {
        "output": str(folder / "out"),
        "tokenizer": tokenizer,
        "validation_fraction": 0,
        "deduplicate": "none",
        "streams": {"text": {"source": {"name": "jsonl", "paths": [str(folder / "corpus")]}}},
    }
    return validate(PrepareConfig, node, "benchmarks.tokenise")


class Clock(PipelineStep):
    """Leaves the CPU seconds of its process in WORK/cpu/PID whenever a task is done."""

    type, name = "STATS", "clock"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        yield from data
        (self.folder / str(os.getpid())).write_text(str(time.process_time()))


def measure(work: Callable[[], Any], others: Path) -> tuple[float, float]:
    """Seconds of wall clock, and of processors: of this process and of those that left theirs in `others`."""
    _remove(others)
    others.mkdir()
    start, processors = time.perf_counter(), time.process_time()
    work()
    wall, own = time.perf_counter() - start, time.process_time() - processors
    return wall, own + sum(float(file.read_text()) for file in others.iterdir() if file.name != str(os.getpid()))


def main(repeats: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = documents()
        config = set_up(folder, texts)
        output, executor = Path(config.output), Local(Local.Config(workers=None))
        executor.start()  # as prepare does, long before this stage: the imports are done while it reads
        claim(config, output)
        plans = _read(config, output, executor, Console(stderr=True))
        tokenizer = corpus_tokenizer(output / "tokenizer")
        work_folder = output / ".work"
        cpu = work_folder / "cpu"
        steps = [*tokenising_steps(config, work_folder), Clock(cpu)]
        stage = Stage("tokenising", "tokenise", steps, [plan.kept_bytes for plan in plans], work_folder)

        def ours() -> None:
            (work_folder / "done").mkdir()
            executor.run(stage)

        def peer(method: str) -> Callable[[], None]:
            encode = getattr(tokenizer, method)

            def loop() -> None:
                for start in range(0, len(texts), PEER_BATCH):
                    encode(texts[start : start + PEER_BATCH], add_special_tokens=False)

            return loop

        peer("encode_batch")()  # the threads and the tokenizer's cache are warm
        works = {"ours": ours, **{method: peer(method) for method in ("encode_batch", "encode_batch_fast")}}
        times: dict[str, list[tuple[float, float]]] = {key: [] for key in works}
        for _ in range(repeats):
            for key, work in works.items():
                if key == "ours":
                    for path in (stage.logs, output / "text", work_folder / "done"):
                        _remove(path)
                times[key].append(measure(work, cpu))
        count = sum(
            json.loads(file.read_text())["train"]["documents"] for file in (work_folder / "done").glob("*.json")
        )
        assert count == len(texts), "the stage did not do all documents"
        report(times, texts, executor.workers)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


def report(times: dict[str, list[tuple[float, float]]], texts: list[str], workers: int) -> None:
    size = sum(len(text.encode()) for text in texts)
    medians = {key: [statistics.median(column) for column in zip(*pairs, strict=True)] for key, pairs in times.items()}
    facts = {
        "documents": len(texts),
        "text_mb": round(size / 1e6, 1),
        "workers": workers,
        "repeats": len(times["ours"]),
    }
    print(json.dumps({"benchmark": "tokenise", **facts}))
    for key, (wall, processors) in medians.items():
        speed = {"mb_per_sec": round(size / wall / 1e6, 2), "mb_per_cpu_sec": round(size / processors / 1e6, 2)}
        spread = [round(size / each[0] / 1e6, 2) for each in times[key]]
        print(json.dumps({"benchmark": "tokenise", "what": key, **speed, "all_mb_per_sec": spread}))
    for key in ("encode_batch", "encode_batch_fast"):
        wall, processors = (
            round(
                statistics.median(
                    peer[column] / own[column] for own, peer in zip(times["ours"], times[key], strict=True)
                ),
                3,
            )
            for column in (0, 1)
        )
        print(json.dumps({"benchmark": "tokenise", "ours_over": key, "wall_ratio": wall, "cpu_ratio": processors}))


if __name__ == "__main__":
    parser = parser_of(__doc__)
    parser.add_argument("repeats", type=count, nargs="?", default=5, metavar="REPEATS")
    main(parser.parse_args().repeats)
