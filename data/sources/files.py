"""Finding and opening the files of a source: local paths, or URLs of S3 and whatever else fsspec knows.

S3 goes through pyarrow's client, wrapped by fsspec. s3fs cannot be installed beside this stack: its aiobotocore 3.10.0
wants botocore < 1.43.118, mosaicml-streaming's boto3 is pinned with 1.44.5.
"""

import functools
import io
import os
import re
from collections.abc import Iterator, Sequence
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple

from schema import ConfigError

_BUFFER_BYTES = 4 * 2**20
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "S3_ENDPOINT_URL")
# Packages of the protocols that people use most. None is in our requirements.
_PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs", "oci": "ocifs"}
_NO_CREDENTIALS = "no AWS credentials are set (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE)"


class File(NamedTuple):
    """A file, and its size as it lies there."""

    path: str
    bytes: int


def is_remote(path: str) -> bool:
    """Whether a path is a URL such as s3://bucket/key."""
    return "://" in path


def find_files(patterns: Sequence[str], suffixes: Sequence[str], ignore_dirs: Sequence[str] = ()) -> list[File]:
    """Files that the globs match (local ones relative to the working directory), sorted by path, each once.

    A match that is a folder stands for all files below it with one of `suffixes`, less hidden files and `ignore_dirs`.
    Raises ConfigError `paths: ...` when a pattern matches nothing, or its storage refuses or cannot be reached.
    """
    found: dict[str, int] = {}
    for pattern in patterns:
        files = (_find_remote if is_remote(pattern) else _find_local)(pattern, suffixes, ignore_dirs)
        if not files:
            where = "" if is_remote(pattern) else f" (looked from {Path.cwd()})"
            raise ConfigError(f"paths: nothing matches {pattern!r}{where}")
        found.update(files)
    return [File(path, found[path]) for path in sorted(found)]


def open_raw(path: str) -> Any:
    """The bytes of a file as it lies there, seekable. Raises OSError and, for a URL, what its client raises."""
    if not is_remote(path):
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
        return "access denied" + ("" if _credentials() else f": {_NO_CREDENTIALS}")
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return text.splitlines()[0]


def _find_local(pattern: str, suffixes: Sequence[str], ignore_dirs: Sequence[str]) -> dict[str, int]:
    files: list[str] = []
    for match in glob(os.path.expanduser(pattern), recursive=True):  # noqa: PTH111, PTH207 (strings, as given)
        if Path(match).is_file():
            files.append(match)
        else:
            files += _files_below(match, suffixes, ignore_dirs)
    return {file: Path(file).stat().st_size for file in files}


def _files_below(folder: str, suffixes: Sequence[str], ignore_dirs: Sequence[str]) -> Iterator[str]:
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in ignore_dirs and not name.startswith(".")]
        for name in names:
            if name.endswith(tuple(suffixes)) and not name.startswith("."):
                yield os.path.join(where, name)  # noqa: PTH118 (strings as the glob gave them)


def _find_remote(pattern: str, suffixes: Sequence[str], ignore_dirs: Sequence[str]) -> dict[str, int]:
    system, place = _filesystem(pattern)
    protocol = pattern.partition("://")[0]
    found: dict[str, Any] = {}
    try:
        wildcards = "*[" if protocol in ("http", "https") else "*?["  # there a "?" begins the query
        if any(character in place for character in wildcards):
            matches = system.glob(place, detail=True)
        else:
            matches = {place: system.info(place)}
        for name, facts in matches.items():
            if facts["type"] == "file":
                found[name] = facts["size"]
            elif facts["type"] == "directory":
                below = system.find(name, detail=True)
                found |= {
                    file: entry["size"]
                    for file, entry in below.items()
                    if _is_wanted(file[len(name) :], suffixes, ignore_dirs)
                }
        # The listing of a web page says no sizes.
        found |= {name: system.info(name)["size"] for name, size in found.items() if size is None}
        if not found and protocol == "s3":
            system.ls(place.split("/")[0])  # a bucket that is not there looks like an empty one to glob
    except FileNotFoundError as error:
        if protocol == "s3":
            _check_bucket(system, pattern, place)
        raise ConfigError(f"paths: nothing matches {pattern!r}: {reason(pattern, error)}") from None
    except Exception as error:  # each protocol's client has its own
        raise ConfigError(f"paths: {pattern}: {reason(pattern, error)}") from None
    if None in found.values():
        raise ConfigError(f"paths: {pattern}: the server does not say how large the file is: download it first")
    return {name if is_remote(name) else f"{protocol}://{name}": size for name, size in found.items()}


def _check_bucket(system: Any, pattern: str, place: str) -> None:
    try:
        system.ls(place.split("/")[0])
    except OSError as error:
        raise ConfigError(f"paths: {pattern}: {reason(pattern, error)}") from None


def _is_wanted(path: str, suffixes: Sequence[str], ignore_dirs: Sequence[str]) -> bool:
    *folders, name = path.strip("/").split("/")
    hidden = name.startswith(".") or any(folder.startswith(".") or folder in ignore_dirs for folder in folders)
    return not hidden and name.endswith(tuple(suffixes))


def _filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it. Raises ConfigError when a package for it is missing."""
    protocol, _, place = url.partition("://")
    if protocol == "s3":
        return _s3(place.split("/")[0], os.getpid()), place
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(url)
    except ImportError as error:
        package = _PACKAGES.get(protocol)
        fix = f"pip install {package}" if package else str(error).splitlines()[0]
        raise ConfigError(f"paths: {url}: a package for {protocol}:// is not installed: {fix}") from None
    except ValueError as error:
        raise ConfigError(f"paths: {url}: {error}") from None


@functools.lru_cache(maxsize=64)
def _s3(bucket: str, process: int) -> Any:
    """A bucket's file system; clients do not outlive a fork, so there is one per process."""
    from fsspec.implementations.arrow import ArrowFSWrapper
    from pyarrow.fs import S3FileSystem, resolve_s3_region

    options: dict[str, Any] = {}
    endpoint = next((os.environ[name] for name in _ENDPOINTS if os.environ.get(name)), None)
    if endpoint:
        options["endpoint_override"] = endpoint
        options["region"] = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    else:
        try:
            options["region"] = resolve_s3_region(bucket)
        except OSError as error:
            raise ConfigError(f"paths: s3://{bucket}: {reason(f's3://{bucket}/', error)}") from None
    credentials = _credentials()
    if credentials is None:
        options["anonymous"] = True  # a public bucket
    elif credentials.method not in ("iam-role", "container-role"):  # those pyarrow finds, and renews
        key = credentials.get_frozen_credentials()
        options |= {"access_key": key.access_key, "secret_key": key.secret_key, "session_token": key.token}
    return ArrowFSWrapper(S3FileSystem(**options))


def _credentials() -> Any:
    """What boto3's chain finds (environment, profiles, roles), or None. Raises ConfigError for a wrong profile."""
    import boto3
    from botocore.exceptions import BotoCoreError

    try:
        return boto3.Session().get_credentials()
    except BotoCoreError as error:
        raise ConfigError(f"paths: AWS credentials: {error}") from None
