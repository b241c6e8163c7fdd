"""The tokenising stage of prepare beside a bare loop over the tokenizer's batch API: same text, tokenizer and cores.

`python -m benchmarks.tokenise [REPEATS]` prints JSON lines. Text: the prose of ../shared/data, or where that is absent
the builtin corpus, as documents of about 600 tokens in JSON lines. The two take turns, each REPEATS times (default 5).

    ours   the whole stage: start worker processes, read and parse the JSON lines, check digests, tokenise, write and
           hash MDS shards, count tokens, sync to disk, collect
    peer   the same documents as a list in memory, `encode_batch` on them by 1,000 (Rust threads on all cores); what it
           returns is only counted. `encode_batch_fast`, which leaves out the character offsets, is measured too.

CPU seconds are of all processes and threads of each, so that they can be compared where other work shares the machine.
"""

import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Read when the tokenizer is first used: the peer's threads.
os.environ["TOKENIZERS_PARALLELISM"] = "true"

from data.executors.local import Local
from data.plan import PrepareConfig
from data.preparation import _claim, _read, tokenise
from data.sources import SOURCES
from data.tokenizer import corpus_tokenizer
from schema import validate

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
        for text in (text for unit in source.units() for text in source.read(unit)):
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


class ProcessorTime:
    """CPU seconds of this process and all that descend from it, while the block runs (those that end: sampled)."""

    def __enter__(self) -> "ProcessorTime":
        self._seen: dict[int, tuple[float, float]] = {}
        self._stop = threading.Event()
        self._sample()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()
        self.seconds = sum(last - first for first, last in self._seen.values())

    def _run(self) -> None:
        while not self._stop.wait(0.05):
            self._sample()

    def _sample(self) -> None:
        first = not self._seen
        times, parents = {}, {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            pid = int(stat.parent.name)
            parents[pid] = int(fields[1])
            times[pid] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        for pid, seconds in times.items():
            ancestor = pid
            while ancestor not in (0, os.getpid()):
                ancestor = parents.get(ancestor, 0)
            if ancestor:
                begin = self._seen[pid][0] if pid in self._seen else seconds if first else 0.0
                self._seen[pid] = (begin, seconds)


def measure(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of wall clock and of processors."""
    with ProcessorTime() as processors:
        start = time.perf_counter()
        work()
        wall = time.perf_counter() - start
    return wall, processors.seconds


def main(repeats: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = documents()
        config = set_up(folder, texts)
        output, executor = Path(config.output), Local(Local.Config(workers=None))
        _claim(config, output)
        plans = _read(config, output, executor)
        tokenizer = corpus_tokenizer(output / "tokenizer")
        stage = output / ".work"

        def ours() -> None:
            tokenise(config, output, plans, executor)

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
                    for path in (stage / "logs" / "tokenise", output / "text", stage / "done"):
                        _remove(path)
                times[key].append(measure(work))
        count = sum(json.loads(file.read_text())["train"]["documents"] for file in (stage / "done").glob("*.json"))
        assert count == len(texts), "the stage did not do all documents"
        report(times, texts, executor.workers)


def _remove(path: Path) -> None:
    import shutil

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
        ratio = [round(medians[key][column] / medians["ours"][column], 3) for column in (0, 1)]
        print(json.dumps({"benchmark": "tokenise", "ours_over": key, "wall_ratio": ratio[0], "cpu_ratio": ratio[1]}))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
