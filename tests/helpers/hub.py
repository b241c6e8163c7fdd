"""A hub of one's own: the part of the Hugging Face hub's wire protocol that publishing and loading use, over real HTTP.

Repositories lie on the disk and outlast the server: objects by their sha256, commits as JSON, a file for each branch.
Commits are all or nothing. It misbehaves on demand: `fail` answers a kind of call with a status a few times, `lose`
does what is asked and then drops the connection, `before` runs code of the test between a question and its answer.
"""

import base64
import hashlib
import http.server
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".bin", ".png")  # files that go to the large storage
_ROUTES = [
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<rev>[^/]+)", "branch"),
    ("DELETE", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<rev>[^/]+)", "unbranch"),
    ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<rev>[^/]+)", "preupload"),
    ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<rev>[^/]+)", "commit"),
    ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
    ("PUT", r"/lfs/(?P<repo>[^/]+/[^/]+)/(?P<rev>\w+)", "put"),
    ("POST", r"/lfs/(?P<repo>[^/]+/[^/]+)/verify", "verify"),
    ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/refs", "refs"),
    ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<rev>[^/]+)(/(?P<path>.+))?", "tree"),
    ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<rev>[^/]+))?", "info"),
    ("(GET|HEAD)", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "resolve"),
]


class Refusal(Exception):
    """A status, and what the client reads of it."""

    def __init__(self, status: int, message: str, code: str | None = None, **more: Any) -> None:
        super().__init__(message)
        self.status, self.code, self.more = status, code, more


class Hub:
    """Serves while it is open. token: what calls that write must bring."""

    def __init__(self, folder: Path, token: str | None = None, port: int = 0) -> None:
        self.folder, self.token = folder, token
        self.calls: Counter[str] = Counter()
        self.delay = 0.0  # seconds, of every call
        self.faults: dict[str, list[tuple[int, dict[str, str]]]] = {}
        self._lost: Counter[str] = Counter()
        self.struck_at: tuple[int, bool, Callable[[], None]] = (0, False, lambda: None)
        self.acts: dict[str, Callable[[], None]] = {}
        self._lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fail(self, kind: str, status: int, times: int = 1, **headers: str) -> None:
        """The next so many calls of a kind get this status. headers: `Retry_After` is Retry-After."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.faults.setdefault(kind, []).extend([(status, named)] * times)

    def lose(self, kind: str, times: int = 1) -> None:
        """The next so many calls of a kind are done, and not answered."""
        self._lost[kind] += times

    def before(self, kind: str, act: Callable[[], Any]) -> None:
        """Once, before the next call of a kind is answered."""
        self.acts[kind] = act

    def strike(self, call: int, done: bool, act: Callable[[], None]) -> None:
        """At the call of this number from now on, before it is done or after, and before its answer."""
        self.struck_at = (self.calls.total() + call, done, act)

    def branches(self, repo: str) -> dict[str, str]:
        return {unquote(file.name): file.read_text() for file in (self._repo(repo) / "refs").iterdir()}

    def files(self, repo: str, revision: str) -> dict[str, bytes]:
        """By path, without the hub's own. Raises AssertionError when one of them is not what its hash says."""
        found = {}
        for path, entry in self._commit(repo, revision)["files"].items():
            content = self._object(repo, entry["sha256"]).read_bytes()
            assert hashlib.sha256(content).hexdigest() == entry["sha256"], path
            found[path] = content
        found.pop(".gitattributes", None)
        return found

    def commits(self, repo: str, revision: str) -> list[str]:
        """Messages, newest first."""
        found, oid = [], self._head(repo, revision)
        while oid is not None:
            commit = self._commit(repo, oid)
            found.append(commit["message"])
            oid = commit["parent"]
        return found

    def commit_beside(self, repo: str, branch: str, files: dict[str, bytes]) -> str:
        """As another user of the repository would."""
        with self._lock:
            head = self._head(repo, branch)
            kept = self._commit(repo, branch)["files"]
            return self._write_commit(
                repo, branch, head, {**kept, **{p: self._store(repo, d) for p, d in files.items()}}, "beside"
            )

    # -- storage

    def _repo(self, repo: str) -> Path:
        return self.folder / repo

    def _object(self, repo: str, sha256: str) -> Path:
        return self._repo(repo) / "objects" / sha256

    def _store(self, repo: str, content: bytes, large: bool = False) -> dict[str, Any]:
        sha256 = hashlib.sha256(content).hexdigest()
        if not (file := self._object(repo, sha256)).exists():
            file.write_bytes(content)
        return self._entry(repo, sha256, large)

    def _entry(self, repo: str, sha256: str, large: bool) -> dict[str, Any]:
        content = self._object(repo, sha256).read_bytes()
        blob = f"oid sha256:{sha256}\nsize {len(content)}\n".encode() if large else content
        sha1 = hashlib.sha1(f"blob {len(blob)}\0".encode() + blob).hexdigest()
        return {"sha256": sha256, "size": len(content), "large": large, "blob": sha1}

    def _head(self, repo: str, revision: str) -> str | None:
        if not self._repo(repo).is_dir():
            raise Refusal(404, f"no repository {repo}", "RepoNotFound")
        ref = self._repo(repo) / "refs" / revision
        if ref.is_file():
            return ref.read_text()
        if (self._repo(repo) / "commits" / revision).is_file():
            return revision
        raise Refusal(404, f"no revision {revision}", "RevisionNotFound")

    def _commit(self, repo: str, revision: str) -> dict[str, Any]:
        return json.loads((self._repo(repo) / "commits" / str(self._head(repo, revision))).read_text())

    def _write_commit(self, repo: str, branch: str, parent: str | None, files: dict[str, Any], message: str) -> str:
        text = json.dumps({"parent": parent, "files": files, "message": message}, sort_keys=True)
        oid = hashlib.sha1(f"{text}{time.time_ns()}".encode()).hexdigest()
        (self._repo(repo) / "commits" / oid).write_text(text)
        beside = self._repo(repo) / f"ref-{branch}"
        beside.write_text(oid)
        beside.replace(self._repo(repo) / "refs" / branch)
        return oid

    # -- calls; each gives JSON

    def call(self, kind: str, repo: str, rev: str, path: str, query: dict[str, list[str]], body: bytes) -> Any:
        with self._lock:
            return getattr(self, f"_do_{kind}")(repo, rev, path, query, body)

    def _do_create(self, repo: str, rev: str, path: str, query: Any, body: bytes) -> Any:
        node = json.loads(body)
        repo = f"{node['organization']}/{node['name']}"
        if self._repo(repo).exists():
            raise Refusal(409, "You already created this model repo", url=f"{self.endpoint}/{repo}")
        for name in ("objects", "commits", "refs"):
            (self._repo(repo) / name).mkdir(parents=True)
        (self._repo(repo) / "private").write_text(json.dumps(node.get("private")))
        first = {".gitattributes": self._store(repo, b"*.safetensors filter=lfs\n")}
        self._write_commit(repo, "main", None, first, "initial commit")
        return {"url": f"{self.endpoint}/{repo}", "name": repo, "id": repo}

    def _do_validate(self, repo: str, rev: str, path: str, query: Any, body: bytes) -> Any:
        import yaml

        content = json.loads(body)["content"]
        if not isinstance(yaml.safe_load(content.split("---\n")[1]), dict):
            raise Refusal(400, "invalid metadata")
        return {"errors": [], "warnings": []}

    def _do_branch(self, repo: str, rev: str, path: str, query: Any, body: bytes) -> Any:
        start = self._head(repo, json.loads(body).get("startingPoint", "main"))
        ref = self._repo(repo) / "refs" / rev
        if ref.exists():
            raise Refusal(409, f"Reference already exists: {rev}")
        ref.write_text(str(start))
        return {}

    def _do_unbranch(self, repo: str, rev: str, path: str, query: Any, body: bytes) -> Any:
        self._head(repo, rev)
        (self._repo(repo) / "refs" / rev).unlink()
        return {}

    def _do_preupload(self, repo: str, rev: str, path: str, query: Any, body: bytes) -> Any:
        there = self._commit(repo, rev)["files"]
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                    "oid": there[file["path"]]["blob"] if file["path"] in there else None,
                }
                for file in json.loads(body)["files"]
            ]
        }

    def _do_batch(self, repo: str, rev: str, path: str, query: Any, body: bytes) -> Any:
        objects = []
        for each in json.loads(body)["objects"]:
            entry = {"oid": each["oid"], "size": each["size"]}
            if not self._object(repo, each["oid"]).exists():
                base = f"{self.endpoint}/lfs/{repo}"
                entry["actions"] = {"upload": {"href": f"{base}/{each['oid']}"}, "verify": {"href": f"{base}/verify"}}
            objects.append(entry)
        return {"transfer": "basic", "objects": objects}

    def _do_put(self, repo: str, rev: str, path: str, query: Any, body: bytes) -> Any:
        if hashlib.sha256(body).hexdigest() != rev:
            raise Refusal(400, "not these bytes")
        self._store(repo, body)
        return {}

    def _do_verify(self, repo: str, rev: str, path: str, query: Any, body: bytes) -> Any:
        node = json.loads(body)
        if not (file := self._object(repo, node["oid"])).exists() or file.stat().st_size != node["size"]:
            raise Refusal(404, "not there", "EntryNotFound")
        return {}

    def _do_commit(self, repo: str, rev: str, path: str, query: Any, body: bytes) -> Any:
        head = self._head(repo, rev)
        files, message = self._commit(repo, rev)["files"], ""
        for line in body.splitlines():
            node = json.loads(line)
            value = node["value"]
            if node["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, head):
                    raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            elif node["key"] == "file":
                files[value["path"]] = self._store(repo, base64.b64decode(value["content"]))
            elif node["key"] == "lfsFile":
                if not self._object(repo, value["oid"]).exists():
                    raise Refusal(400, f"{value['path']}: its content was not uploaded")
                files[value["path"]] = self._entry(repo, value["oid"], True)
            elif node["key"] == "deletedFile":
                if value["path"] not in files:
                    raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
                del files[value["path"]]
            else:
                raise Refusal(400, f"no such operation: {node['key']}")
        oid = self._write_commit(repo, rev, head, files, message)
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.endpoint}/{repo}/commit/{oid}"}

    def _do_refs(self, repo: str, rev: str, path: str, query: Any, body: bytes) -> Any:
        self._head(repo, "main")
        return {
            "branches": [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid}
                for name, oid in sorted(self.branches(repo).items())
            ],
            "tags": [],
            "converts": [],
        }

    def _do_tree(self, repo: str, rev: str, path: str, query: dict[str, list[str]], body: bytes) -> Any:
        files = self._commit(repo, rev)["files"]
        inside = {name: entry for name, entry in files.items() if not path or name.startswith(f"{path}/")}
        if path and not inside:
            raise Refusal(404, f"no folder {path}", "EntryNotFound")
        recursive = query.get("recursive", ["false"])[0].lower() == "true"
        found: list[dict[str, Any]] = []
        for name in sorted({name.rpartition("/")[0] for name in inside} - {"", path}):
            found.append({"type": "directory", "oid": "0" * 40, "size": 0, "path": name})
        for name, entry in inside.items():
            if not recursive and name.rpartition("/")[0] != path:
                continue
            node = {"type": "file", "oid": entry["blob"], "size": entry["size"], "path": name}
            if entry["large"]:
                node["lfs"] = {"oid": entry["sha256"], "size": entry["size"], "pointerSize": 134}
            found.append(node)
        return found

    def _do_info(self, repo: str, rev: str, path: str, query: Any, body: bytes) -> Any:
        siblings = [{"rfilename": name} for name in self._commit(repo, rev or "main")["files"]]
        sha = self._head(repo, rev or "main")
        return {"id": repo, "modelId": repo, "sha": sha, "siblings": siblings, "private": False, "tags": []}

    def _do_resolve(self, repo: str, rev: str, path: str, query: Any, body: bytes) -> Any:
        entry = self._commit(repo, rev)["files"].get(path)
        if entry is None:
            raise Refusal(404, f"no file {path}", "EntryNotFound", commit=self._head(repo, rev))
        etag = entry["sha256"] if entry["large"] else entry["blob"]
        return self._object(repo, entry["sha256"]).read_bytes(), str(self._head(repo, rev)), etag


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body go apart: the second waited 40 ms for the first's receipt

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urlsplit(self.path)
        for method, pattern, kind in _ROUTES:
            match = re.fullmatch(pattern, parts.path)
            if match is not None and re.fullmatch(method, self.command):
                found = {name: unquote(value or "") for name, value in match.groupdict().items()}
                self._one(kind, found, parse_qs(parts.query), body)
                return
        self._answer(404, json.dumps({"error": f"no such call: {self.command} {self.path}"}).encode())

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = _serve

    def _one(self, kind: str, found: dict[str, str], query: dict[str, list[str]], body: bytes) -> None:
        hub = self.hub
        hub.calls[kind] += 1
        time.sleep(hub.delay)
        number, done, strike = hub.struck_at
        struck = hub.calls.total() == number
        if struck and not done:
            strike()
        act = hub.acts.pop(kind, None)
        if act is not None:
            act()
        if hub.faults.get(kind):
            status, headers = hub.faults[kind].pop(0)
            self._answer(status, json.dumps({"error": "as asked"}).encode(), headers)
            return
        try:
            writes = kind not in ("refs", "tree", "info", "resolve", "put", "validate")
            if writes and hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
                raise Refusal(401, "Invalid credentials")
            repo, rev, path = (found.get(key, "") for key in ("repo", "rev", "path"))
            answer = hub.call(kind, repo, rev, path, query, body)
        except Refusal as refusal:
            headers = {"X-Error-Code": refusal.code} if refusal.code else {}
            if "commit" in refusal.more:
                headers["X-Repo-Commit"] = refusal.more.pop("commit")
            self._answer(refusal.status, json.dumps({"error": str(refusal), **refusal.more}).encode(), headers)
            return
        if struck and done:
            strike()
        if hub._lost[kind]:
            hub._lost[kind] -= 1
            self.close_connection = True
            self.connection.shutdown(2)
            return
        if isinstance(answer, tuple):
            content, commit, etag = answer
            self._answer(200, content, {"X-Repo-Commit": commit, "ETag": f'"{etag}"'})
        else:
            self._answer(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def run_hub(folder: Path, token: str | None = None) -> Iterator[Hub]:
    hub = Hub(folder, token)
    try:
        yield hub
    finally:
        hub.close()


def hub_environment(hub: Hub, home: Path, token: str | None = None) -> dict[str, str]:
    """In which nothing but that hub is one, and nothing is cached but in `home`."""
    more = {"HF_TOKEN": token} if token else {}
    return {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **more,
    }
