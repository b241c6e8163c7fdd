"""Finding local files: globs and folders, links followed, each file once, and a reason for every one left out."""

import errno
import os
import re
import stat
from collections.abc import Iterator
from fnmatch import translate

import xxhash

from data.preparation.sources.kinds import COMPRESSED, FORMATS, Kinds, compression_of, suffix_of
from data.preparation.sources.text import shown
from flexbert_core.schema import ConfigError

_SAMPLES, _SAMPLE_BYTES = 16, 4096
OTHER_NAME = "link to what is read by another name"


class LocalFinder:
    """What the patterns of one source match.

    files: path -> real path, of what is to be read. left_out: path -> reason.
    """

    def __init__(self, kinds: Kinds) -> None:
        self.kinds = kinds
        self.files: dict[str, str] = {}
        self.left_out: dict[str, str] = {}
        self._read: dict[str, str] = {}  # real path of a file -> path
        self._folders: set[str] = set()  # real paths

    def add(self, pattern: str) -> bool:
        """Whether a pattern matches a file that is read, or one that is found before. Raises ConfigError."""
        found = False
        for path in _expand(pattern):
            status = _status(path)
            if stat.S_ISDIR(status.st_mode):
                found |= self._add_folder(path)
            elif stat.S_ISREG(status.st_mode):
                self._add_file(path, os.path.realpath(path))
                found = True
            elif path == pattern:
                raise ConfigError(f"paths: {shown(path)}: is neither a file nor a folder")
            else:
                self.left_out[path] = "not a regular file"
        return found

    def _add_file(self, path: str, real: str) -> None:
        if self._read.setdefault(real, path) == path:
            self.files[path] = real
        elif os.path.abspath(self._read[real]) != os.path.abspath(path):  # noqa: PTH100 (not resolved)
            self.left_out[path] = OTHER_NAME

    def _add_folder(self, top: str) -> bool:
        """Take the files below a folder; gives whether there are any. What lies behind links comes after the rest."""
        real = os.path.realpath(top)
        if real in self._folders:
            return True
        candidates: dict[int, list[tuple[str, str]]] = {}
        folders, links = [(top, real)], []
        while folders or links:
            if not folders:
                path = links.pop(0)
                folders.append((path, os.path.realpath(path)))
            folder, real = folders.pop()
            if real in self._folders:
                self.left_out[folder] = OTHER_NAME
                continue
            self._folders.add(real)
            below, linked = self._scan(folder, real, candidates)
            folders += reversed(below)
            links += linked
        if not candidates:
            return False
        first = min(candidates)
        for kind, files in candidates.items():
            for path, real in files:
                if kind == first:
                    self._add_file(path, real)
                else:
                    self.left_out[path] = suffix_of(path)
        return True

    def _scan(
        self, folder: str, real: str, candidates: dict[int, list[tuple[str, str]]]
    ) -> tuple[list[tuple[str, str]], list[str]]:
        """Sort what one folder holds; gives the folders in it, with their real paths, and the links to folders."""
        below, links = [], []
        entries = _entries(folder)
        if {"prepare.json", ".work"} <= {entry.name for entry in entries}:
            self.left_out[folder] = "dataset made by prepare"
            return [], []
        for entry in entries:
            path = os.path.join(folder, entry.name)  # noqa: PTH118 (strings as the pattern gave them)
            link = entry.is_symlink()
            if entry.name.startswith("."):
                self.left_out[path] = "hidden folder" if entry.is_dir(follow_symlinks=False) else "hidden file"
                continue
            group = self.kinds.group(entry.name)
            if group is None and not _is_folder(path):
                self.left_out[path] = suffix_of(entry.name)
                continue
            mode = _status(path).st_mode
            if stat.S_ISDIR(mode):
                if entry.name in self.kinds.ignore_dirs:
                    self.left_out[path] = "ignored folder"
                elif link:
                    links.append(path)
                else:
                    below.append((path, os.path.join(real, entry.name)))  # noqa: PTH118
            elif not stat.S_ISREG(mode):
                self.left_out[path] = "not a regular file"
            elif group is not None:
                there = os.path.realpath(path) if link else os.path.join(real, entry.name)  # noqa: PTH118
                candidates.setdefault(group, []).append((path, there))
        return below, links


def sample(path: str) -> tuple[int, str, bytes]:
    """Size of a file, a hash of its content and its first bytes. Raises ConfigError when it cannot be read.

    Files of up to 64 KiB are hashed whole, of larger ones 16 blocks of 4 KiB spread evenly, first and last included.
    """
    try:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123 (the path is a string)
            size = os.fstat(file.fileno()).st_size
            if size <= _SAMPLES * _SAMPLE_BYTES:
                blocks = [file.read()]
            else:
                places = (number * (size - _SAMPLE_BYTES) // (_SAMPLES - 1) for number in range(_SAMPLES))
                blocks = [os.pread(file.fileno(), _SAMPLE_BYTES, place) for place in places]
    except OSError as error:
        raise ConfigError(f"paths: {shown(path)}: cannot be read: {error.strerror}") from None
    return size, xxhash.xxh3_64_hexdigest(b"".join(blocks)), blocks[0][:16]


def wrong_content(path: str, head: bytes) -> str | None:
    """What is wrong with the first bytes of a file of text for its name, if anything."""
    wanted, found = compression_of(path), next((name for magic, name in FORMATS if head.startswith(magic)), None)
    if not head or found == wanted:
        return None
    if found is None:
        return f"is no {wanted} file, whatever its name says: rename it, or fetch it again"
    fix = f"give it a name that ends in {found}" if found in COMPRESSED else "convert it"
    return f"holds {found} data, which its name does not say: {fix}"


def _expand(pattern: str) -> list[str]:
    """The paths that a glob matches, sorted. A part that exists as it stands, brackets and all, is no glob.

    Python's own glob leaves out, without a word, folders that cannot be read, and walks in circles through links.
    """
    parts = [part for part in pattern.split("/") if part]
    if "*" not in pattern and parts and _exists(pattern):
        return [pattern]
    found = ["/"] if pattern.startswith("/") else [""] if parts else []
    for number, part in enumerate(parts):
        found = [path for base in found for path in _matches(base, part, number == len(parts) - 1)]
    return sorted(dict.fromkeys(found))


def _matches(base: str, part: str, last: bool) -> Iterator[str]:
    path = os.path.join(base, part)  # noqa: PTH118
    if part == "**":
        yield from _tree(base, last)
    elif not re.search(r"[*?[]", part) or ("*" not in part and _exists(path)):
        if _exists(path):
            yield path
    elif _is_folder(base or "."):
        matches = re.compile(translate(part)).fullmatch
        for entry in _entries(base or "."):
            if matches(entry.name) and (part.startswith(".") or not entry.name.startswith(".")):
                yield os.path.join(base, entry.name)  # noqa: PTH118


def _tree(base: str, with_files: bool) -> Iterator[str]:
    """A folder and all folders below it, each once, what lies behind links last; with_files: the files, too."""
    seen: set[str] = set()
    folders, links = [base] if _is_folder(base or ".") else [], []
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        real = os.path.realpath(folder or ".")
        if real in seen:
            continue
        seen.add(real)
        if folder:
            yield folder
        for entry in _entries(folder or "."):
            path = os.path.join(folder, entry.name)  # noqa: PTH118
            if entry.name.startswith("."):
                continue
            if _is_folder(path):
                (links if entry.is_symlink() else folders).append(path)
            elif with_files:
                yield path


def _exists(path: str) -> bool:
    """Whether there is something of that name, if only a link. Raises ConfigError when that cannot be seen."""
    try:
        os.lstat(path)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EIO, errno.ESTALE):
            raise ConfigError(f"paths: {shown(path)}: cannot be read: {error.strerror}") from None
        return False
    except ValueError:  # a name that no file can have
        return False
    return True


def _is_folder(path: str) -> bool:
    """Raises ConfigError where it cannot be told: for what is locked, or a broken link (to a disk, perhaps)."""
    if os.path.islink(path) and os.path.splitext(path)[1] and not os.path.exists(path):  # noqa: PTH110, PTH114, PTH122
        return False
    return _exists(path) and stat.S_ISDIR(_status(path).st_mode)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise ConfigError(f"paths: {shown(folder)}: cannot be read: {error.strerror}") from None


def _status(path: str) -> os.stat_result:
    try:
        return os.stat(path)  # noqa: PTH116
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP) and os.path.islink(path):  # noqa: PTH114
            where = "itself" if error.errno == errno.ELOOP else "what is not there"
            raise ConfigError(f"paths: {shown(path)}: is a link to {where}: mend or remove it") from None
        raise ConfigError(f"paths: {shown(path)}: cannot be read: {error.strerror}") from None
