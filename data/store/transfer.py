"""Reading and writing what lies behind a URL: S3 by boto3, everything else by fsspec. Faults that pass are tried again.

Why not what the libraries bring. s3fs: its aiobotocore wants a botocore older than that of mosaicml-streaming's boto3.
mosaicml-streaming's downloaders: they write a file and are done, so the hash costs a second reading and the cache
cannot hold room for what is on its way; retries do not tell a missing shard from a lost connection; and their import
takes seconds in every loader worker.
"""

import asyncio
import contextlib
import logging
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, BinaryIO, Literal, NamedTuple, Protocol, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")

READ_BYTES = 1 << 20
_QUIET = 3  # attempts that fail without a word in the log
FIRST_DELAY, _LONGEST_DELAY = 0.25, 30.0  # seconds
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "S3_ENDPOINT_URL")
# Packages of the protocols that people use most. None is in our requirements.
PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs", "oci": "ocifs"}
_WEB_THREADS = 16
_MISSING = object()
_PASSING_STATUS = (408, 429, 500, 502, 503, 504)
_PASSING_CODES = ("SlowDown", "RequestTimeout", "RequestTimeTooSkewed", "InternalError", "ServiceUnavailable")


class TransferError(Exception):
    """What is wrong with a URL, in one line. passing: it may be gone at the next attempt."""

    def __init__(self, kind: Literal["missing", "denied", "passing"], message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Patience(NamedTuple):
    """How long to try. timeout: seconds without a byte."""

    retries: int
    timeout: float


def is_url(path: object) -> bool:
    """Whether a path is a URL such as s3://bucket/key."""
    return "://" in str(path)


def s3_endpoint() -> str | None:
    """The server that stands for S3; None: Amazon's."""
    return next((os.environ[name] for name in _ENDPOINTS if os.environ.get(name)), None)


def s3_session() -> Any:
    """boto3's, which knows credentials and region. Raises BotoCoreError for a wrong profile."""
    import boto3

    return boto3.Session(region_name=os.environ.get("AWS_REGION") or None)  # boto3 itself knows AWS_DEFAULT_REGION only


def with_retries(attempt: Callable[[], T], patience: Patience) -> T:
    """What `attempt` returns, tried again after passing faults, with growing, jittered pauses. Raises TransferError."""
    for tried in range(patience.retries + 1):
        try:
            return attempt()
        except TransferError as error:
            if error.kind != "passing":
                raise
            if tried == patience.retries:
                times = f"{tried + 1} attempts" if tried else "one attempt"
                raise TransferError("passing", f"{error} (after {times})") from None
            if tried >= _QUIET:
                log.warning("%s: trying again (%d of %d)", error, tried + 1, patience.retries)
        # Not keyed: many processes that failed together must not come back together.
        time.sleep(min(_LONGEST_DELAY, FIRST_DELAY * 2**tried) * random.SystemRandom().uniform(0.5, 1))
    raise AssertionError


class Store(Protocol):
    """Where the files below a URL are read and written. Raises TransferError."""

    def blocks(self, name: str) -> Iterator[bytes | memoryview]:
        """The content of a file, block by block; a block is good until the next one is asked for. One attempt."""
        ...

    def sizes(self, names: list[str]) -> dict[str, int | None]:
        """Size in bytes of those of the files that are there; None where the server does not say. Each request is
        tried again by itself."""
        ...

    def write(self, name: str, content: BinaryIO) -> None:
        """Put a file there, in place of one of that name. One attempt."""
        ...

    def remove(self, name: str) -> None:
        """Delete a file; one that is not there is no error. One attempt."""
        ...


def open_store(url: str, patience: Patience) -> Store:
    """The store of a URL in this process. Raises TransferError when a package for it is missing."""
    return _S3Store(url, patience) if url.startswith("s3://") else _FsspecStore(url, patience)


class _S3Store:
    def __init__(self, url: str, patience: Patience) -> None:
        self.url, self.patience = url, patience
        self.bucket, _, prefix = url.removeprefix("s3://").partition("/")
        self.prefix = prefix.rstrip("/")
        with self._plain_errors(""):
            self.client, self.anonymous, self.endpoint = _s3_client(os.getpid(), s3_endpoint(), patience.timeout)

    def blocks(self, name: str) -> Iterator[memoryview]:
        block = memoryview(bytearray(READ_BYTES))
        with self._plain_errors(name):
            body = self.client.get_object(Bucket=self.bucket, Key=self._key(name))["Body"]
            with contextlib.closing(body):
                while count := body.readinto(block):
                    yield block[:count]

    def sizes(self, names: list[str]) -> dict[str, int | None]:
        found: dict[str, int | None] = {}
        token: dict[str, str] | None = {}
        while token is not None:
            page = with_retries(partial(self._page, token), self.patience)
            for entry in page.get("Contents", []):
                found[entry["Key"].removeprefix(self._key(""))] = int(entry["Size"])
            token = {"ContinuationToken": page["NextContinuationToken"]} if page["IsTruncated"] else None
        return found

    def write(self, name: str, content: BinaryIO) -> None:
        with self._plain_errors(name):  # in parts, several at a time, when it is large
            self.client.upload_fileobj(content, self.bucket, self._key(name))

    def remove(self, name: str) -> None:
        with self._plain_errors(name):
            self.client.delete_object(Bucket=self.bucket, Key=self._key(name))

    def _page(self, token: dict[str, str]) -> Any:
        with self._plain_errors(""):
            return self.client.list_objects_v2(Bucket=self.bucket, Prefix=self._key(""), **token)

    def _key(self, name: str) -> str:
        """At the root of a bucket nothing stands before the name."""
        return f"{self.prefix}/{name}" if self.prefix else name

    @contextlib.contextmanager
    def _plain_errors(self, name: str) -> Iterator[None]:
        from botocore import exceptions as aws

        url = f"{self.url}/{name}".rstrip("/")
        try:
            yield
        except aws.ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
            if status in _PASSING_STATUS or code in _PASSING_CODES or "Throttl" in code:
                raise TransferError("passing", f"{url}: the server answers {status} {code}") from None
            if code == "NoSuchBucket":
                fix = f"check the URL and the endpoint ({self.endpoint})"
                raise TransferError("denied", f"{url}: there is no bucket {self.bucket!r}: {fix}") from None
            if status == 404:
                raise TransferError("missing", f"{url}: no such file") from None
            what = f"{status} {code}" if code != str(status) else code
            raise TransferError("denied", f"{url}: refused ({what}): {self._advice()}") from None
        except (aws.HTTPClientError, aws.ConnectionError, aws.IncompleteReadError, OSError) as error:
            reason = _first_line(error)
            raise TransferError("passing", f"{url}: {reason}: endpoint {self.endpoint}") from None
        except (aws.BotoCoreError, ValueError) as error:  # ValueError: an endpoint that is no URL
            raise TransferError("denied", f"{url}: {_first_line(error)}: {self._advice()}") from None

    def _advice(self) -> str:
        if getattr(self, "anonymous", False):
            keys = "no credentials are set: give AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        else:
            keys = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        where = getattr(self, "endpoint", "not known")
        return f"{keys}, and the endpoint ({where}; AWS_ENDPOINT_URL or S3_ENDPOINT_URL)"


_clients: dict[tuple[int, str | None, float], tuple[Any, bool, str]] = {}
_clients_lock = threading.Lock()


def _forget_lock() -> None:
    global _clients_lock
    _clients_lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_lock)


def _s3_client(process: int, endpoint: str | None, timeout: float) -> tuple[Any, bool, str]:
    """Client of this process (sockets do not survive a fork), whether it is anonymous, its endpoint."""
    with _clients_lock:
        if (process, endpoint, timeout) not in _clients:
            from botocore import UNSIGNED
            from botocore.config import Config

            session = s3_session()
            anonymous = session.get_credentials() is None  # then it may be a public bucket
            options = Config(
                connect_timeout=timeout,
                read_timeout=timeout,
                retries={"total_max_attempts": 1},  # ours
                max_pool_connections=32,
                response_checksum_validation="when_required",  # every shard has a hash
                **({"signature_version": UNSIGNED} if anonymous else {}),
            )
            client = session.client("s3", endpoint_url=endpoint, config=options)
            _clients[process, endpoint, timeout] = (client, anonymous, client.meta.endpoint_url)
        return _clients[process, endpoint, timeout]


class _FsspecStore:
    def __init__(self, url: str, patience: Patience) -> None:
        from fsspec.core import url_to_fs

        self.url, self.patience, protocol, timeout = url, patience, url.partition("://")[0], patience.timeout
        self.web = protocol in ("http", "https")
        options: dict[str, Any] = {}
        if self.web:
            import aiohttp

            waits = aiohttp.ClientTimeout(None, sock_connect=timeout, sock_read=timeout)
            options["client_kwargs"] = {"timeout": waits, "trust_env": True}  # HTTP_PROXY and the like, as boto3 does
        try:
            self.system, self.path = url_to_fs(url, **options)
        except (ImportError, ValueError) as error:
            package = PACKAGES.get(protocol)
            fix = f"pip install {package}" if package else _first_line(error)
            raise TransferError("denied", f"{url}: {protocol}:// cannot be read here: {fix}") from None

    def blocks(self, name: str) -> Iterator[bytes]:
        # Of a web server: one answer, read as it comes; many do not serve ranges.
        options = {"block_size": 0} if self.web else {"block_size": 4 * READ_BYTES, "cache_type": "readahead"}
        with self._plain_errors(name), self.system.open(f"{self.path}/{name}", "rb", **options) as file:
            while block := file.read(READ_BYTES):
                yield block

    def sizes(self, names: list[str]) -> dict[str, int | None]:
        if self.web:  # it may have no listings, and they would say no sizes
            with ThreadPoolExecutor(_WEB_THREADS) as pool:
                found = zip(names, pool.map(self._web_size, names), strict=True)
                return {name: size for name, size in found if size is not _MISSING}
        found = with_retries(self._find, self.patience)
        return {file[len(self.path) :].strip("/"): facts.get("size") for file, facts in found.items()}

    def write(self, name: str, content: BinaryIO) -> None:
        path = f"{self.path}/{name}"
        with self._plain_errors(name):
            self.system.makedirs(path.rpartition("/")[0], exist_ok=True)
            with self.system.open(path, "wb") as file:
                shutil.copyfileobj(content, file, 4 * READ_BYTES)

    def remove(self, name: str) -> None:
        with self._plain_errors(name), contextlib.suppress(FileNotFoundError):
            self.system.rm_file(f"{self.path}/{name}")

    def _find(self) -> dict[str, Any]:
        with self._plain_errors(""):
            self.system.invalidate_cache()
            return self.system.find(self.path, detail=True)

    def _web_size(self, name: str) -> Any:
        try:
            return with_retries(partial(self._info, name), self.patience).get("size")
        except TransferError as error:
            if error.kind == "missing":
                return _MISSING
            raise

    def _info(self, name: str) -> dict[str, Any]:
        with self._plain_errors(name):
            return self.system.info(f"{self.path}/{name}")

    @contextlib.contextmanager
    def _plain_errors(self, name: str) -> Iterator[None]:
        url = f"{self.url}/{name}".rstrip("/")
        try:
            yield
        except TransferError:
            raise
        except Exception as error:  # each protocol's client has its own
            if self.web and isinstance(error, FileNotFoundError) and error.__cause__ is not None:
                error = error.__cause__  # fsspec says "not found" of whatever went wrong with a web server
            codes = (getattr(error, key, None) for key in ("status", "code", "status_code"))
            status = next((code for code in codes if isinstance(code, int)), 0)
            reason = f"{status} {getattr(error, 'message', '')}".strip() if self.web and status else _first_line(error)
            if isinstance(error, FileNotFoundError) or status == 404:
                raise TransferError("missing", f"{url}: no such file") from None
            if isinstance(error, PermissionError) or (400 <= status < 500 and status not in _PASSING_STATUS):
                raise TransferError("denied", f"{url}: refused: {reason}: check your credentials") from None
            if self.web and isinstance(error, ValueError):  # no URL, or a certificate that is none of the host's
                raise TransferError("denied", f"{url}: {reason}: check the URL") from None
            ours = (OSError, asyncio.TimeoutError, EOFError)
            if isinstance(error, ours) or status or type(error).__module__.startswith("aiohttp"):
                what = f"the server answers {reason}" if self.web and status else reason
                raise TransferError("passing", f"{url}: {what}") from None
            raise


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")
