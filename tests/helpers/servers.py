"""Real servers for the tests: moto's S3 in a process of its own, and a proxy that misbehaves on demand."""

import contextlib
import functools
import http.server
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3

BUCKET = "data"
PAGE = 7  # entries of a listing; S3's are of a thousand


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def s3_environment(endpoint: str) -> dict[str, str]:
    """In which nothing but that server is S3."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_CONFIG_FILE": os.devnull,
    }


@contextlib.contextmanager
def run_moto() -> Iterator[str]:
    """A moto server; gives its endpoint."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "MOTO_S3_DEFAULT_MAX_KEYS": str(PAGE)},
    )
    try:
        start = time.monotonic()
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            assert process.poll() is None
            assert time.monotonic() - start < 60, "moto does not start"
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


class _Files(http.server.SimpleHTTPRequestHandler):
    """Also as a proxy: then a request names a host, which is not looked at."""

    disable_nagle_algorithm = True

    def translate_path(self, path: str) -> str:
        return super().translate_path(urlsplit(path).path)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def run_web(folder: Path) -> Iterator[str]:
    """A plain web server of a folder's files, without ranges; gives its URL."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Files, directory=str(folder)))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


class Bucket:
    """A bucket of the moto server, from the test's own client."""

    def __init__(self, endpoint: str) -> None:
        self.client: Any = boto3.client(
            "s3",
            endpoint_url=endpoint,
            aws_access_key_id="key",
            aws_secret_access_key="secret",
            region_name="us-east-1",
        )
        self.client.create_bucket(Bucket=BUCKET)

    def upload(self, folder: Path, prefix: str) -> str:
        """All files below a folder; returns the URL that stands for it."""
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            self.put(f"{prefix}/{file.relative_to(folder)}", file.read_bytes())
        return f"s3://{BUCKET}/{prefix}"

    def put(self, key: str, content: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=key, Body=content)

    def get(self, key: str) -> bytes:
        return self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()

    def delete(self, key: str) -> None:
        self.client.delete_object(Bucket=BUCKET, Key=key)


class Proxy:
    """Passes HTTP requests on to a server, one connection for each. `misbehave` sees the request line of each request
    and says what happens to it: None (it is passed on), "refuse" (the connection is reset), "cut" (the answer ends in
    the middle of its body), "stall" (it stops there), or a status such as "503 Slow Down"."""

    def __init__(self, target: str) -> None:
        self.target = ("127.0.0.1", int(target.rsplit(":", 1)[1]))
        self.port = free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.requests: list[str] = []
        self.misbehave: Callable[[str], str | None] = lambda request: None
        self._listener: socket.socket | None = None
        self._open: set[socket.socket] = set()
        self.start()

    def start(self) -> None:
        """Listen (again, on the same port)."""
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def stop(self) -> None:
        """As a killed server: no new connections, the old ones are reset."""
        if self._listener is not None:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        for connection in list(self._open):
            _reset(connection)

    def gets(self, suffix: str = "") -> list[str]:
        """Paths of the GET requests for objects."""
        paths = [request.split()[1] for request in self.requests if request.startswith("GET ")]
        return [path for path in paths if "?" not in path and path.endswith(suffix)]

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        self._open.add(connection)
        try:
            head = b""
            while b"\r\n\r\n" not in head:
                if not (received := connection.recv(65536)):
                    return
                head += received
            request = head.split(b"\r\n", 1)[0].decode()
            self.requests.append(request)
            fault = self.misbehave(request)
            if fault == "refuse":
                _reset(connection)
            elif fault and fault[0].isdigit():
                code = fault.split(" ", 1)[1].replace(" ", "")
                body = f"<Error><Code>{code}</Code><Message>{fault}</Message></Error>"
                connection.sendall(
                    f"HTTP/1.1 {fault}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode()
                )
            else:
                self._pass_on(connection, head, fault)
        except OSError:
            pass
        finally:
            self._open.discard(connection)
            connection.close()

    def _pass_on(self, connection: socket.socket, head: bytes, fault: str | None) -> None:
        head = head.replace(b"\r\n", b"\r\nConnection: close\r\n", 1).replace(b"Connection: Keep-Alive\r\n", b"")
        with socket.create_connection(self.target) as server:
            server.sendall(head)
            if head.startswith(b"PUT "):  # of others nothing more comes, and a thread that waits for it delays a reset
                threading.Thread(target=_copy, args=(connection, server), daemon=True).start()
            answer = b""
            while received := server.recv(1 << 20):
                if fault is None:
                    connection.sendall(received)
                else:
                    answer += received
        if fault is not None:
            begin = answer.index(b"\r\n\r\n") + 4
            connection.sendall(answer[: begin + (len(answer) - begin) // 2])
            if fault == "stall":
                with contextlib.suppress(OSError):
                    connection.recv(1)  # until the client has had enough
            _reset(connection)


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while received := source.recv(1 << 20):
            target.sendall(received)


def _reset(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.close()
