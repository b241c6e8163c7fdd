"""Sources behind URLs: a real S3 server (moto) and a real HTTP server, over the network stack of this machine."""

import functools
import gzip
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from data.preparation.sources import base as sources_base
from data.preparation.sources import files as sources_files
from flexbert_core.schema import ConfigError, RunError
from tests.data.preparation.reading import COMPRESS, ROWS, TEXTS, build, jsonl, read_all


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """An S3 bucket `corpus`, and an environment in which nothing but that server is S3."""
    for name, value in {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
    }.items():
        monkeypatch.setenv(name, value)
    sources_files.s3_filesystem.cache_clear()
    client = boto3.client("s3")
    client.create_bucket(Bucket="corpus")
    yield client
    for entry in client.list_objects_v2(Bucket="corpus").get("Contents", []):
        client.delete_object(Bucket="corpus", Key=entry["Key"])
    client.delete_bucket(Bucket="corpus")
    sources_files.s3_filesystem.cache_clear()


@pytest.mark.parametrize("suffix", COMPRESS)
def test_s3_jsonl(bucket: Any, suffix: str) -> None:
    for part in range(3):
        bucket.put_object(
            Bucket="corpus",
            Key=f"dir/{part}.jsonl{suffix}",
            Body=COMPRESS[suffix](jsonl(ROWS[20 * part : 20 * part + 20])),
        )
    bucket.put_object(Bucket="corpus", Key="dir/readme.md", Body=b"no rows")
    for paths in (f"s3://corpus/dir/*.jsonl{suffix}", "s3://corpus/dir", "s3://corpus/*/?.jsonl*"):
        assert read_all({"name": "jsonl", "paths": [paths]}) == TEXTS
    assert read_all({"name": "jsonl", "paths": [f"s3://corpus/dir/1.jsonl{suffix}"]}) == TEXTS[20:40]


@pytest.mark.parametrize("range_bytes", [100, 1000])
def test_s3_byte_ranges(bucket: Any, range_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources_base, "RANGE_BYTES", range_bytes)
    bucket.put_object(Bucket="corpus", Key="a.jsonl", Body=jsonl())
    source = build({"name": "jsonl", "paths": ["s3://corpus/a.jsonl"]})
    assert len(source.find().units) > 5
    assert read_all({"name": "jsonl", "paths": ["s3://corpus/a.jsonl"]}) == TEXTS


def test_s3_txt_parquet_and_code(bucket: Any, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    bucket.put_object(Bucket="corpus", Key="t/a.txt.gz", Body=gzip.compress("caf\u00e9\n\nsecond".encode()))
    node = {"name": "txt", "paths": ["s3://corpus/t/*.txt.gz"], "document": "paragraph"}
    assert read_all(node) == ["caf\u00e9", "second"]
    pq.write_table(pa.table({"text": TEXTS, "number": range(len(TEXTS))}), tmp_path / "a.parquet", row_group_size=7)
    bucket.upload_file(str(tmp_path / "a.parquet"), "corpus", "p/a.parquet")
    source = build({"name": "parquet", "paths": ["s3://corpus/p"]})
    rows = [row for unit in source.find().units for row in source.read_columns(unit, ["number"])]
    assert rows == [(text, {"number": number}) for number, text in enumerate(TEXTS)]
    for name in ("src/a.py", "src/node_modules/b.js", "src/.git/c.py", "src/lib/d.go", "src/data.csv"):
        bucket.put_object(Bucket="corpus", Key=name, Body=name.encode())
    assert read_all({"name": "code", "paths": ["s3://corpus/src"]}) == ["src/a.py", "src/lib/d.go"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("s3://nowhere/a/*.jsonl", r"^paths: s3://nowhere/a/\*\.jsonl: there is no bucket 'nowhere'$"),
        ("s3://nowhere/a.jsonl", r"^paths: s3://nowhere/a\.jsonl: there is no bucket 'nowhere'$"),
        ("s3://corpus/a/*.jsonl", r"^paths: nothing matches 's3://corpus/a/\*\.jsonl'$"),
        ("s3://corpus/a.jsonl", r"^paths: nothing matches 's3://corpus/a\.jsonl': no such file$"),
        ("gs://bucket/*.jsonl", r"^paths: gs://bucket/\*\.jsonl: a package for gs:// is not installed: pip install gcsfs$"),
        ("sss://bucket/*.jsonl", r"^paths: sss://bucket/\*\.jsonl: Protocol not known: sss$"),
        ("http://127.0.0.1:1/a.jsonl", r"^paths: (nothing matches 'http://127.0.0.1:1/a.jsonl': no such file|http://127.0.0.1:1/a.jsonl: .*127.0.0.1.*)$"),
    ],
)  # fmt: skip
def test_faults_of_urls(bucket: Any, path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build({"name": "jsonl", "paths": [path]}).find()


def test_no_credentials_is_said(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without credentials a bucket is read as a public one; where that is refused, the line says what is missing."""
    bucket.put_object(Bucket="corpus", Key="a.jsonl", Body=jsonl())
    bucket.put_object(Bucket="corpus", Key="public.jsonl", Body=jsonl(), ACL="public-read")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    sources_files.s3_filesystem.cache_clear()
    assert read_all({"name": "jsonl", "paths": ["s3://corpus/public.jsonl"]}) == TEXTS
    with pytest.raises(
        (ConfigError, RunError), match=r"a\.jsonl: .*access denied: no AWS credentials are set \(AWS_ACC"
    ):
        read_all({"name": "jsonl", "paths": ["s3://corpus/a.jsonl"]})
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    sources_files.s3_filesystem.cache_clear()
    with pytest.raises(ConfigError, match=r"^paths: AWS credentials: .*\(nobody\)"):
        build({"name": "jsonl", "paths": ["s3://corpus/a.jsonl"]}).find()


def test_file_that_is_cut_off_on_s3(bucket: Any) -> None:
    bucket.put_object(Bucket="corpus", Key="a.jsonl.gz", Body=gzip.compress(jsonl())[:-40])
    with pytest.raises(RunError, match=r"^s3://corpus/a\.jsonl\.gz: cannot be read: "):
        read_all({"name": "jsonl", "paths": ["s3://corpus/*.gz"]})


def test_file_that_went_away_between_listing_and_reading(bucket: Any) -> None:
    bucket.put_object(Bucket="corpus", Key="a.jsonl", Body=jsonl())
    source = build({"name": "jsonl", "paths": ["s3://corpus/a.jsonl"]})
    (unit,) = source.find().units
    bucket.delete_object(Bucket="corpus", Key="a.jsonl")
    with pytest.raises(RunError, match=r"^s3://corpus/a\.jsonl: cannot be read: "):
        list(source.read(unit))


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None: ...


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # fsspec's own session and loop
def test_http_and_memory(tmp_path: Path) -> None:
    import fsspec

    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl()))
    (tmp_path / "b.jsonl").write_bytes(jsonl())
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=tmp_path)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            base = f"http://127.0.0.1:{server.server_address[1]}"
            for name in ("a.jsonl.gz", "b.jsonl"):
                assert read_all({"name": "jsonl", "paths": [f"{base}/{name}"]}) == TEXTS
            assert read_all({"name": "jsonl", "paths": [f"{base}/*.gz"]}) == TEXTS
            with pytest.raises(ConfigError, match=r"nothing matches 'http://.*/c\.jsonl': no such file"):
                build({"name": "jsonl", "paths": [f"{base}/c.jsonl"]}).find()
        finally:
            server.shutdown()
            thread.join()
    with fsspec.open("memory://corpus/a.jsonl.gz", "wb") as file:
        file.write(gzip.compress(jsonl()))  # pyright: ignore[reportAttributeAccessIssue]
    assert read_all({"name": "jsonl", "paths": ["memory://corpus/*.gz"]}) == TEXTS
