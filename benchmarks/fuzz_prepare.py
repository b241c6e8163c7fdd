"""Fuzzing of prepare: `python -m benchmarks.fuzz_prepare [COUNT]` (default 500) prepares odd and hostile trees.

Each case is a folder that follows from its number and the seed: files of one source among others, with good and odd
documents, under every kind of name, in every compression, some damaged, behind links, in circles, locked, empty. It is
prepared by the real thing (in this process; every hundredth by the command line, as another user where something is
locked). Counted as failures: anything raised but ConfigError and RunError; a message of more than one line, or of no
place; a refusal that nothing in the tree asks for; a file that is neither read nor counted as skipped; documents that
are not as many as the generator put there, or of another size; a case that takes 300 s. Prints a JSON line; exit code 1
for failures.
"""

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.odd_trees import Tree
from data.keyed import torch_seed
from data.preparation.dataset import load_prepare_config, prepare
from data.store.manifest import MANIFEST
from flexbert_core.schema import ConfigError, RunError

ROOT = Path(__file__).parent.parent
SECONDS = 300
NOBODY = 65534


@dataclass
class Result:
    """What became of the cases."""

    cases: int = 0
    codes: Counter[int] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    files: int = 0
    documents: int = 0
    messages: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[int, str]] = field(default_factory=list)


def fuzz(count: int, seed: int, command_every: int = 100, first: int = 0) -> Result:
    """Prepare `count` trees."""
    signal.signal(signal.SIGALRM, _too_slow)
    result = Result()
    for case in range(first, first + count):
        rng = random.Random(torch_seed(seed, "fuzz prepare", case))
        with tempfile.TemporaryDirectory() as folder:
            os.chmod(folder, 0o777)  # noqa: PTH101 (another user works there)
            tree = Tree(rng, Path(folder))
            signal.alarm(SECONDS)
            try:
                problem = _check(tree, result, command=command_every > 0 and case % command_every == command_every - 1)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt | SystemExit):
                    raise
                last = traceback.extract_tb(error.__traceback__)[-1]
                problem = f"{type(error).__name__}: {str(error)[:300]} at {last.filename}:{last.lineno}"
            finally:
                signal.alarm(0)
                tree.unlock()
        result.cases += 1
        result.sources[tree.source] += 1
        if problem is not None:
            result.failures.append((case, f"{tree.source}, on_error: {tree.on_error}: {problem}"))
    return result


def _too_slow(*_: Any) -> None:
    raise TimeoutError(f"took over {SECONDS} seconds")


def _check(tree: Tree, result: Result, command: bool) -> str | None:
    """Prepare it; gives what is wrong with that."""
    config = tree.folder / "d.yaml"
    node: dict[str, Any] = {"name": tree.source, "paths": [str(tree.top)]}
    if tree.source == "datasets":
        node = {"name": "datasets", "path": str(tree.top)}
    if tree.source == "txt":
        node["document"] = tree.document
    glob = tree.source != "datasets" and tree.rng.random() < 0.15
    if glob:
        node["paths"] = [f"{tree.top}/**"] if tree.rng.random() < 0.5 else [f"{tree.top}/*", str(tree.top)]
    split = tree.rng.choice((0, 0, 0.3))
    stream = {"source": node, "on_error": tree.on_error}
    output = tree.folder / "out"
    dump = {"output": str(output), "tokenizer": {"name": "train", "vocab_size": 320}, "validation_fraction": split}
    config.write_text(yaml.safe_dump({**dump, "streams": {"s": stream}}))
    code, message, says = _run(tree, config, command)
    result.codes[code] += 1
    if code not in (0, 1, 2):
        return f"exit code {code}: {message[-300:]}"
    if code:
        lines = message.splitlines()
        if len(lines) != 1 or not message.isprintable() or "Traceback" in message:
            return f"message: {message[:300]!r}"
        # Where, and that it is one of those that this tree can give.
        if str(tree.folder) not in message and "streams.s" not in message:
            return f"message names no place: {message[:300]!r}"
        result.messages[" ".join(message.split(": ")[-1].split()[:4])] += 1
        return None if _may_fail(tree, glob) else f"failed for no reason: {message[:300]}"
    return _account(tree, output, result, says, glob)


def _run(tree: Tree, config: Path, command: bool) -> tuple[int, str, str]:
    says = io.StringIO()
    if command:
        run = [sys.executable, str(ROOT / "main.py"), "prepare", str(config)]
        user = NOBODY if tree.locked and os.geteuid() == 0 else None
        done = subprocess.run(
            run, capture_output=True, text=True, errors="replace", check=False, timeout=SECONDS, user=user
        )
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        return done.returncode, "\n".join(errors) if done.returncode in (1, 2) else done.stderr, done.stderr
    with contextlib.redirect_stderr(says), _as_nobody(tree):
        try:
            prepare(load_prepare_config(config), workers=1)
        except ConfigError as error:
            return 2, str(error), says.getvalue()
        except RunError as error:
            return 1, str(error), says.getvalue()
    return 0, "", says.getvalue()


@contextlib.contextmanager
def _as_nobody(tree: Tree) -> Iterator[None]:
    """Root may read what is locked."""
    if not tree.locked or os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def _may_fail(tree: Tree, glob: bool) -> bool:
    there = tree.read_files()
    broken = any(os.path.islink(path) and not os.path.exists(path) for path in tree.entries()[0])  # noqa: PTH110, PTH114
    hopeless = not any(text for content in there.values() for text in content.texts or ())
    odd = any(content.odd or content.whole or content.texts is None for content in there.values())
    few = sum(len(content.texts or ()) for content in there.values()) < 60  # may leave a split empty
    return bool(tree.locked) or broken or hopeless or few or glob or (odd and tree.on_error == "fail")


def _account(tree: Tree, output: Path, result: Result, says: str, glob: bool) -> str | None:
    manifests = [json.loads(path.read_text()) for path in sorted((output / "s").glob(f"*/{MANIFEST}"))]
    read, skipped = manifests[0]["read"], manifests[0]["skipped"]
    entries, folders = tree.entries()
    files = read["files"] + sum(skipped["files"].values())
    result.files += files
    result.documents += read["documents"]
    if "Traceback" in says or f"read {read['documents']:,} documents from {read['files']:,} files" not in says:
        return f"does not say what was read: {says[:300]!r}"
    if tree.source != "datasets" and not glob and files != len(entries) - (folders - 1):
        return f"{len(entries) - (folders - 1)} files and folders are there, accounted for {files}: {read} {skipped}"
    if tree.on_error == "fail" and any(content.whole for content in tree.read_files().values()):
        return "a fault was passed over"
    kept = sum(manifest["documents"] for manifest in manifests)
    left = sum(m["empty_documents"] + m["duplicate_documents"] + m["over_max_bytes"] for m in manifests)
    if kept + left != read["documents"]:
        return f"{read['documents']} documents read, {kept} kept, {left} dropped"
    wanted = tree.read_files()
    if glob or any(content.texts is None for content in wanted.values()):
        return None
    texts = [text for content in wanted.values() for text in content.texts or ()]
    odd = sum(content.odd for content in wanted.values())
    if (len(texts), odd) != (read["documents"], sum(skipped["documents"].values())):
        return f"{len(texts)} documents and {odd} odd rows are there: {read} {skipped}"
    if len({text for text in texts if text}) != kept:
        return f"{len({text for text in texts if text})} different texts are there, {kept} were kept"
    size = len("".join({text for text in texts if text}).encode())
    found = sum(manifest["bytes"] for manifest in manifests)
    return None if size == found else f"{size} bytes of text are there, {found} were kept"


def main(count: int) -> int:
    start, result = time.monotonic(), fuzz(count, seed=17)
    for case, problem in result.failures[:20]:
        print(f"case {case}: {problem}", file=sys.stderr)
    line = {
        "cases": result.cases,
        "exit_codes": dict(sorted(result.codes.items())),
        "sources": dict(result.sources.most_common()),
        "files_accounted_for": result.files,
        "documents": result.documents,
        "failures": len(result.failures),
        "messages": dict(result.messages.most_common(20)),
        "seconds": round(time.monotonic() - start, 1),
    }
    print(json.dumps(line))
    return 1 if result.failures else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 500))
