"""Damaged, odd and hostile folders of documents, and what is in them: for benchmarks.fuzz_prepare."""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import random
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

NAMES = (
    *(
        "a",
        "b",
        "web[1]",
        "#x",
        "q?",
        "100%",
        "new\nline",
        "tab\t",
        "back\\slash",
        "-dash",
        "sp ace ",
        "é",
        "日本",
        "{a}",
    ),
    *("*", "'q'", '"d"', "$HOME", "~", "a:b", "\udcff\udcfe", "x" * 120, "..a", "a.b.q", "[red]", "\x1b[31m", "%s{0}"),
)
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    **{"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress},
    **{".GZ": gzip.compress, ".Zst": zstandard.compress},
}
SUFFIXES = {
    "txt": (".txt", ".TXT"),
    "jsonl": (".jsonl", ".ndjson", ".JsonL"),
    "code": (".py", ".H"),
    "parquet": (".parquet",),
}
OTHERS = (".md", ".csv", "", ".json.lock", ".txt.bak", ".tmp", ".jpg", ".jsonl_")
IGNORED = ("node_modules", "build")


@dataclass
class Content:
    """What a file of the source should give. texts: of its documents; None: not known, it is damaged."""

    texts: list[str] | None
    odd: int = 0
    """Rows, or files of `code`, that are no documents."""
    whole: bool = False
    """The file as a whole is a fault, seen before it is read."""


class Tree:
    """A folder to prepare, and what is in it. contents: real path -> what the file holds, of those of the source."""

    def __init__(self, rng: random.Random, folder: Path) -> None:
        self.rng, self.folder = rng, folder
        self.source = rng.choice(("txt", "jsonl", "jsonl", "parquet", "code", "datasets"))
        self.on_error = rng.choice(("fail", "skip", "skip", "skip"))
        self.document = rng.choice(("file", "paragraph", "line"))
        self.contents: dict[str, Content] = {}
        self.locked: list[Path] = []
        self.sockets: list[socket.socket] = []
        self.top, self.beside = folder / "tree", folder / "beside"
        if self.source == "datasets":
            texts = self._save_dataset()
            self.contents[os.path.realpath(self.top)] = texts
            return
        self._folder(self.top, 0)
        self._folder(self.beside, 1)
        self._file(self.top / f"good{SUFFIXES[self.source][0]}", good=True)
        if rng.random() < 0.4:
            for _ in range(rng.randrange(1, 4)):
                self._link()
        if rng.random() < 0.12:
            self._lock()

    def unlock(self) -> None:
        for path in self.locked:
            path.chmod(0o755)
        for each in self.sockets:
            each.close()

    def entries(self) -> tuple[list[str], int]:
        """All that lies in the tree, links followed, each folder once; and how many folders that is."""
        folders, todo, entries = set[str](), [str(self.top)], []
        while todo:
            real = os.path.realpath(todo.pop())
            if real in folders:
                continue
            folders.add(real)
            for name in os.listdir(real):  # noqa: PTH208
                path = os.path.join(real, name)  # noqa: PTH118
                entries.append(path)
                ignored = name.startswith(".") or (self.source == "code" and name in IGNORED)
                if os.path.isdir(path) and not ignored:  # noqa: PTH112
                    todo.append(path)
        return entries, len(folders)

    def read_files(self) -> dict[str, Content]:
        """What prepare should read."""
        if self.source == "datasets":
            return self.contents
        visible = {os.path.realpath(path) for path in self.entries()[0] if not os.path.basename(path).startswith(".")}  # noqa: PTH119
        return {path: content for path, content in self.contents.items() if path in visible}

    # What trees are made of.

    def _folder(self, path: Path, depth: int) -> None:
        path.mkdir()
        rng = self.rng
        for _ in range(rng.randrange(0, 5)):
            with contextlib.suppress(FileExistsError, OSError):
                self._file(path / rng.choice(NAMES))
        for _ in range(rng.randrange(0, 3) if depth < 3 else 0):
            name = rng.choice((*NAMES, *NAMES, ".hidden", *IGNORED))
            with contextlib.suppress(FileExistsError):
                self._folder(path / name, depth + 1)
        if rng.random() < 0.1:
            os.mkfifo(path / f"fifo{rng.choice(SUFFIXES[self.source])}")
        if rng.random() < 0.05 and len(bytes(path)) < 80:
            self.sockets.append(socket.socket(socket.AF_UNIX))
            self.sockets[-1].bind(bytes(path / "s.txt"))

    def _link(self) -> None:
        rng = self.rng
        folders = [
            path for path in (self.top, self.beside, *self.top.rglob("*"), *self.beside.rglob("*")) if path.is_dir()
        ]
        files = [path for path in self.beside.rglob("*") if path.is_file()]
        place = rng.choice([path for path in folders if self.top in (path, *path.parents)])
        suffix = rng.choice(SUFFIXES[self.source])
        kind = rng.random()
        with contextlib.suppress(FileExistsError):
            if kind < 0.5:
                (place / rng.choice(("link", "disk2", ".hid"))).symlink_to(rng.choice(folders))
            elif kind < 0.75 and files:
                target = rng.choice(files)
                (place / f"link{rng.randrange(9)}-{target.name[-80:]}").symlink_to(target)
            elif kind < 0.85:
                (place / f"self{suffix}").symlink_to(f"self{suffix}")
            else:
                (place / rng.choice((f"gone{suffix}", "gone", "gone.csv"))).symlink_to("nowhere")

    def _lock(self) -> None:
        paths = [path for path in self.top.rglob("*") if not path.is_symlink() and (path.is_dir() or path.is_file())]
        paths = [path for path in paths if os.path.realpath(path) in self.contents or path.is_dir()]
        paths = [path for path in paths if not any(part.startswith(".") or part in IGNORED for part in path.parts)]
        for path in self.rng.sample(paths, min(1, len(paths))):
            path.chmod(0)
            self.locked.append(path)

    def _file(self, path: Path, good: bool = False) -> None:
        rng = self.rng
        if not good and rng.random() < 0.25:
            # the source `code` takes .md
            others = [ending for ending in OTHERS if (self.source, ending) != ("code", ".md")]
            path.with_name(path.name + rng.choice(others)).write_bytes(rng.randbytes(rng.randrange(50)))
            return
        suffix = "" if good else rng.choice(SUFFIXES[self.source])
        data, content = MAKERS[self.source](rng, self, good)
        if good or self.source in ("parquet", "code"):
            ending = ""
        else:
            ending = rng.choice(tuple(COMPRESS))
            data = COMPRESS[ending](data) if data else data
        chance = 1.0 if good else rng.random()
        if chance < 0.04 and data:  # cut off
            data = data[: rng.randrange(1, len(data) + 1)]
            content = Content(None)
        elif chance < 0.07 and data:
            data = data + rng.randbytes(9)
            content = Content(None)
        elif chance < 0.10 and self.source in ("jsonl", "txt"):
            data, ending = rng.choice(
                ((b"plain", ".gz"), (gzip.compress(b"{}"), ""), (b"x", ".lz4"), (b"PK\x03\x04", ".xz"))
            )
            content = Content([], whole=True)
        elif chance < 0.12:
            data = b""
        elif chance < 0.13 and self.source in ("jsonl", "txt"):
            data, ending, content = b"\xff\xfe" + "text\n".encode("utf-16-le"), "", Content(None)
        if not data:
            content = Content([], whole=self.source == "parquet")
        name = path.with_name(path.name + suffix + ending)
        with name.open("xb") as file:
            file.write(data)
        self.contents[os.path.realpath(name)] = content

    def _save_dataset(self) -> Content:
        import datasets
        import pyarrow as pa

        array, content = _column(self.rng)
        table = pa.table({"text": array, "other": pa.array(range(len(array)))})
        datasets.disable_progress_bars()
        datasets.Dataset(table).save_to_disk(str(self.top))
        if self.rng.random() < 0.2:
            file = self.rng.choice([path for path in self.top.iterdir() if path.suffix in (".arrow", ".json")])
            file.write_bytes(file.read_bytes()[: self.rng.randrange(file.stat().st_size)])
            return Content(None)
        return content


def _text(rng: random.Random) -> str:
    words = ("lamp", "chair", "é", "日本", "[MASK]", "\U0001f600", "a\u2028b", "", "0", "=", "\x85")
    return f"{rng.randrange(10**6)} " + " ".join(rng.choice(words) for _ in range(rng.choice((1, 5, 40))))


def _jsonl(rng: random.Random, tree: Tree, good: bool) -> tuple[bytes, Content]:
    lines, content = [], Content([])
    assert content.texts is not None
    for _ in range(100 if good else rng.randrange(12)):
        text = _text(rng)
        rows: list[tuple[bytes, str | None]] = [(json.dumps({"text": text}).encode(), text)] * 20
        if not good and rng.random() < 0.3:
            rows = [
                (b'{"text": null}', ""),
                (b'{"text": ""}', ""),
                (b'{"text": "half \\ud83d."}', "half \ufffd."),
                (b'{"text": "raw \xed\xa0\xbd."}', "raw \ufffd."),
                (b'{"text": "nan", "score": NaN, "s": -Infinity}', "nan"),
                (b'{"text": "first", "text": "last"}', "last"),
                (b'\xef\xbb\xbf{"text": "bom"}\r', "bom"),
                (b'{"text": "big", "n": ' + b"9" * 400 + b"}", "big"),
                (json.dumps({"text": "long " * 60_000}).encode(), "long " * 60_000),
                (json.dumps({"text": "nul \0"}).encode(), "nul \0"),
                (b"", "blank"),
                (b'{"text": [1]}', None),
                (b'{"text": 3.5}', None),
                (b'{"text": {"a": 1}}', None),
                (b'{"text": true}', None),
                (b'{"txt": "x"}', None),
                (b'{"text": "cut', None),
                (b'{"text": "caf\xe9"}', None),
                (b"[", None),
                (b'["text"]', None),
                (b'"text"', None),
                (b"null", None),
                (b"\0\0\0\0", None),
                (b"[" * 100_000, None),
                (b"{'text': 'python'}", None),
            ]
        line, text = rng.choice(rows)
        lines.append(line)
        if text != "blank":
            content.odd += text is None
            content.texts += [] if text is None else [text]
    ends = b"" if rng.random() < 0.3 else b"\n"
    return b"\n".join(lines) + (ends if lines else b""), content


def _txt(rng: random.Random, tree: Tree, good: bool) -> tuple[bytes, Content]:
    if good:
        lines = [f"{number} {' '.join(_text(rng).split())}" for number in range(100)]
        return "\n\n".join(lines).encode(), Content(_split("\n\n".join(lines), tree.document))
    kind = rng.random()
    text = "\n".join(rng.choice(("", "  ", " ".join(_text(rng).split()))) for _ in range(rng.randrange(9))).strip(" \n")
    if kind < 0.1:
        return text.encode() + b"caf\xe9", Content([] if tree.document == "file" else None, 1)
    if kind < 0.2:
        return text.encode() + b"\0", Content([] if tree.document == "file" else None, 1)
    if kind < 0.3:
        return text.encode() + b"\xed\xa0\xbd", Content(_split(text + "\ufffd", tree.document))
    if kind < 0.4:
        return b"\xef\xbb\xbf" + text.encode() + b"x", Content(_split(text + "x", tree.document))
    return text.encode(), Content(_split(text, tree.document))


def _split(text: str, document: str) -> list[str]:
    """The documents of a text with plain line ends, found line by line."""
    if document == "file":
        return [text]
    lines = text.split("\n")
    if document == "line":
        return lines if lines[-1] else lines[:-1]
    found, paragraph = [], list[str]()
    for line in [*lines, ""]:
        if line.strip(" "):
            paragraph.append(line)
        elif paragraph:
            found.append("\n".join(paragraph))
            paragraph = []
    return found


def _code(rng: random.Random, tree: Tree, good: bool) -> tuple[bytes, Content]:
    text = _text(rng)
    if good:
        return text.encode(), Content([text])
    return rng.choice(
        (
            (text.encode(), Content([text])),
            (text.encode(), Content([text])),
            (b"\xff\xfe", Content([], 1)),
            (b"nul \0", Content([], 1)),
            (b"\xed\xa0\x80", Content(["\ufffd"])),
            (b"#" * (10**6 + 1), Content([])),
        )
    )


def _column(rng: random.Random) -> tuple[Any, Content]:
    """An Arrow array of texts in some type, and what it holds."""
    import pyarrow as pa

    texts = [rng.choice((_text(rng), _text(rng), _text(rng), "", None)) for _ in range(rng.choice((0, 3, 80, 300)))]
    wanted = Content([text or "" for text in texts])
    kind = rng.randrange(9)
    if kind == 0:
        return pa.nulls(len(texts)), Content([""] * len(texts))
    if kind == 1:
        raw = [b"caf\xe9" if rng.random() < 0.1 else (text or "").encode() for text in texts]
        array = pa.array(raw, pa.binary())
        odd = raw.count(b"caf\xe9")
        return pa.Array.from_buffers(pa.string(), len(array), array.buffers()), Content(
            [each.decode() for each in raw if each != b"caf\xe9"], odd
        )
    if kind == 2:
        return pa.array(texts, pa.string()).dictionary_encode(), wanted
    if kind == 3:
        return pa.array(range(len(texts))), Content([], whole=True)
    if kind == 4:
        return pa.array([[text] for text in texts]), Content([], whole=True)
    types = (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary())
    values = [None if text is None else text.encode() for text in texts]
    chosen = types[kind - 5] if kind < 8 else pa.binary()
    return pa.array(values if chosen == pa.binary() else texts, chosen), wanted


def _parquet(rng: random.Random, tree: Tree, good: bool) -> tuple[bytes, Content]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = io.BytesIO()
    if good:
        texts = [_text(rng) for _ in range(100)]
        array, content = pa.array(texts), Content(list(texts))
    else:
        array, content = _column(rng)
    name = "text" if good or rng.random() < 0.95 else "txet"
    pq.write_table(pa.table({name: array, "n": pa.array(range(len(array)))}), file, row_group_size=50)
    return file.getvalue(), content if name == "text" else Content([], whole=True)


MAKERS: dict[str, Callable[[random.Random, Tree, bool], tuple[bytes, Content]]] = {
    **{"jsonl": _jsonl, "txt": _txt, "code": _code, "parquet": _parquet}
}
