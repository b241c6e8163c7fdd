"""Finding and opening the files of a source: local paths, or URLs of S3 and whatever else fsspec knows.

S3 goes through pyarrow's client, wrapped by fsspec. s3fs cannot be installed beside this stack: its aiobotocore 3.10.0
wants botocore < 1.43.118, mosaicml-streaming's boto3 is pinned with 1.44.5.
"""

import functools
import io
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data.preparation.sources.kinds import COMPRESSED, Kinds, suffix_of
from data.preparation.sources.local import LocalFinder, sample, wrong_content
from data.preparation.sources.text import shown
from data.store.transfer import PACKAGES, is_url, s3_endpoint, s3_session
from flexbert_core.schema import ConfigError

_BUFFER_BYTES = 4 * 2**20
_MARKS = ("ETag", "etag", "md5Hash", "Content-MD5", "checksum", "mtime", "Last-Modified", "last_modified")
_NO_CREDENTIALS = "no AWS credentials are set (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE)"


class File(NamedTuple):
    """A file, its size as it lies there, and what tells it from another of that size: a hash of samples, an ETag."""

    path: str
    bytes: int
    mark: str


class Fault(NamedTuple):
    """Something that cannot be read: a file, or what should have been a document."""

    reason: str
    """A few words, the same for all of its kind: what stream.json counts."""
    error: Callable[[], Exception] | None = None
    """Makes the ConfigError or RunError that ends prepare, unless the stream's on_error is `skip`. None: it is left
    out by a rule of its source, and no error."""


class Found(NamedTuple):
    """What find_files gives."""

    files: list[File]
    """Sorted by path, each once."""
    left_out: Counter[str]
    """Files, and folders not looked into, by reason."""
    faults: list[Fault]
    """Of files that are among `files` no more."""


def find_files(
    patterns: Sequence[str],
    suffixes: Sequence[str],
    ignore_dirs: Sequence[str] = (),
    *,
    otherwise: Sequence[str] = (),
    compressed: Sequence[str] | None = COMPRESSED,
) -> Found:
    """The files that the patterns name (local ones relative to the working directory).

    A pattern is a path, or, where none is there of that name, a glob. A match that is a folder stands for all files
    below it with one of the suffixes, also behind links, less hidden ones and `ignore_dirs`.

    Args:
        suffixes: in any letter case.
        otherwise: suffixes that count in a folder that has none of the others.
        compressed: what may follow a suffix; a file whose name goes on with another compression is a fault. None: it
            is just another file.
    Raises:
        ConfigError: `paths: ...`: a pattern gives no file, or something can be neither read nor passed over.
    """
    groups = [[suffix.lower() for suffix in group] for group in (suffixes, otherwise) if group]
    kinds = Kinds(groups, compressed, ignore_dirs)
    local, files, left_out = LocalFinder(kinds), dict[str, tuple[int, str]](), Counter[str]()
    for pattern in patterns:
        if is_url(pattern):
            found, others = _find_remote(pattern, kinds)
            files.update(found)
            there, left_out = bool(found), left_out + others
        else:
            before = len(local.left_out)
            there = local.add(pattern)
            others = Counter(list(local.left_out.values())[before:])
        if not there:
            raise ConfigError(f"paths: {_nothing(pattern, kinds, others)}")
    left_out += Counter(reason for path, reason in local.left_out.items() if path not in local.files)
    faults = []
    for path in sorted([*files, *local.files]):
        packed = kinds.refused(path)
        if packed is not None:
            files.pop(path, None)
            fix = f"unpack it, or pack it as {', '.join(kinds.compressed)}" if kinds.compressed else "unpack it"
            faults.append(_fault(f"packed as {packed}", f"{shown(path)}: {packed} files are not read here: {fix}"))
        elif path in local.files:
            size, mark, head = sample(path)
            wrong = wrong_content(path, head) if kinds.compressed else None
            if wrong is None:
                files[path] = (size, mark)
            else:
                faults.append(_fault("content is not of its suffix", f"{shown(path)}: {wrong}"))
    return Found([File(path, *files[path]) for path in sorted(files)], left_out, faults)


def _fault(reason: str, message: str) -> Fault:
    return Fault(reason, lambda: ConfigError(f"paths: {message}"))


def _nothing(pattern: str, kinds: Kinds, others: Counter[str]) -> str:
    """Why a pattern gives no file."""
    if others:
        there = ", ".join(f"{count:,} {reason}" for reason, count in others.most_common(5))
        return f"{pattern!r} holds no {kinds}, but {there}"
    if not is_url(pattern) and Path(pattern).is_dir() and not any(Path(pattern).iterdir()):
        return f"{pattern!r} is empty"
    where = "" if is_url(pattern) else f" (looked from {Path.cwd()})"
    return f"nothing matches {pattern!r}{where}"


def open_raw(path: str) -> Any:
    """The bytes of a file as it lies there, seekable. Raises OSError and, for a URL, what its client raises."""
    if not is_url(path):
        return open(path, "rb", buffering=2**20)  # noqa: PTH123 (the path is a string)
    system, place = _filesystem(path)
    if path.startswith("s3://"):
        # fsspec's own wrapper asks the server once for each small read.
        return io.BufferedReader(system.fs.open_input_file(place), _BUFFER_BYTES)
    return system.open(place, "rb", block_size=_BUFFER_BYTES)


def reason(path: str, error: BaseException) -> str:
    """What went wrong with a file, in one line."""
    text = str(error).strip() or type(error).__name__
    code = re.search(r"AWS Error ([A-Z_]+)", text)
    if code is not None and code[1] == "NO_SUCH_BUCKET":
        return f"there is no bucket {path.split('/')[2]!r}"
    if code is not None and code[1] == "ACCESS_DENIED":
        return "access denied" + ("" if _account()[0] else f": {_NO_CREDENTIALS}")
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, OSError) and error.strerror and not is_url(path):
        return error.strerror
    return text.splitlines()[0]


def _find_remote(pattern: str, kinds: Kinds) -> tuple[dict[str, tuple[int, str]], Counter[str]]:
    """Size and mark of each file behind a URL, and what else is there, by reason."""
    system, place = _filesystem(pattern)
    protocol = pattern.partition("://")[0]
    found: dict[str, Any] = {}
    left_out = Counter[str]()
    try:
        wildcards = "*[" if protocol in ("http", "https") else "*?["  # there a "?" begins the query
        glob = any(character in place for character in wildcards)
        if glob and ("*" in place or not system.exists(place)):
            matches = system.glob(place, detail=True)
        else:
            matches = {place: system.info(place)}
        for name, facts in matches.items():
            if facts["type"] == "file":
                found[name] = facts
            elif facts["type"] == "directory":
                below, others = _wanted(name, system.find(name, detail=True), kinds)
                found |= below
                left_out += others
        # The listing of a web page says no sizes.
        found |= {name: system.info(name) for name, facts in found.items() if facts["size"] is None}
        if not found and protocol == "s3":
            system.ls(place.split("/")[0])  # a bucket that is not there looks like an empty one to glob
    except FileNotFoundError as error:
        if protocol == "s3":
            _check_bucket(system, pattern, place)
        raise ConfigError(f"paths: nothing matches {pattern!r}: {reason(pattern, error)}") from None
    except ConfigError:
        raise
    except Exception as error:  # each protocol's client has its own
        raise ConfigError(f"paths: {pattern}: {reason(pattern, error)}") from None
    if any(facts["size"] is None for facts in found.values()):
        raise ConfigError(f"paths: {pattern}: the server does not say how large the file is: download it first")
    return {
        name if is_url(name) else f"{protocol}://{name}": (facts["size"], _mark(facts)) for name, facts in found.items()
    }, left_out


def _mark(facts: dict[str, Any]) -> str:
    """What a server says about a file that changes with its content, as far as it says anything."""
    return next((str(facts[key]) for key in _MARKS if facts.get(key)), "")


def _wanted(folder: str, below: dict[str, Any], kinds: Kinds) -> tuple[dict[str, Any], Counter[str]]:
    """Of the files below a folder those that are to be read, and why the others are not."""
    groups: dict[int, dict[str, Any]] = {}
    left_out = Counter[str]()
    for file, facts in below.items():
        *folders, name = file[len(folder) :].strip("/").split("/")
        group = kinds.group(name)
        if name.startswith(".") or any(each.startswith(".") for each in folders):
            left_out["hidden file"] += 1
        elif any(each in kinds.ignore_dirs for each in folders):
            left_out["file in an ignored folder"] += 1
        elif group is None:
            left_out[suffix_of(name)] += 1
        else:
            groups.setdefault(group, {})[file] = facts
    chosen = groups.pop(min(groups), {}) if groups else {}
    left_out += Counter(suffix_of(file) for files in groups.values() for file in files)
    return chosen, left_out


def _check_bucket(system: Any, pattern: str, place: str) -> None:
    try:
        system.ls(place.split("/")[0])
    except OSError as error:
        raise ConfigError(f"paths: {pattern}: {reason(pattern, error)}") from None


def _filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it. Raises ConfigError when a package for it is missing."""
    protocol, _, place = url.partition("://")
    if protocol == "s3":
        return s3_filesystem(place.split("/")[0], os.getpid()), place
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(url)
    except ImportError as error:
        package = PACKAGES.get(protocol)
        fix = f"pip install {package}" if package else str(error).splitlines()[0]
        raise ConfigError(f"paths: {url}: a package for {protocol}:// is not installed: {fix}") from None
    except ValueError as error:
        raise ConfigError(f"paths: {url}: {error}") from None


@functools.lru_cache(maxsize=64)
def s3_filesystem(bucket: str, process: int) -> Any:
    """A bucket's file system; clients do not outlive a fork, so there is one per process."""
    from fsspec.implementations.arrow import ArrowFSWrapper
    from pyarrow.fs import S3FileSystem, resolve_s3_region

    options: dict[str, Any] = {}
    (credentials, region), endpoint = _account(), s3_endpoint()
    if endpoint:
        options["endpoint_override"] = endpoint
        options["region"] = region or "us-east-1"
    else:
        try:
            options["region"] = resolve_s3_region(bucket)
        except OSError as error:
            raise ConfigError(f"paths: s3://{bucket}: {reason(f's3://{bucket}/', error)}") from None
    if credentials is None:
        options["anonymous"] = True  # a public bucket
    elif credentials.method not in ("iam-role", "container-role"):  # those pyarrow finds, and renews
        key = credentials.get_frozen_credentials()
        options |= {"access_key": key.access_key, "secret_key": key.secret_key, "session_token": key.token}
    return ArrowFSWrapper(S3FileSystem(**options))


def _account() -> tuple[Any, str | None]:
    """The credentials (environment, profiles, roles) and the region that boto3 finds, or None. Raises ConfigError for a
    wrong profile."""
    from botocore.exceptions import BotoCoreError

    try:
        session = s3_session()
        return session.get_credentials(), session.region_name
    except BotoCoreError as error:
        raise ConfigError(f"paths: AWS credentials: {error}") from None
