"""A Hub on this machine: the part of the Hub's HTTP API that huggingface_hub needs, with faults to order.

    with LoopbackHub(tmp_path) as hub:
        hub.add_repo("me/model", {"config.json": b"{}"})
        subprocess.run(command, env=hub.environment(token=TOKEN))   # a process of its own, or
        hub.connect(monkeypatch)                                    # this one

Repositories live in memory, blobs in a folder. Every account's namespace is its name; tokens are in `hub.tokens`.
"""

import base64
import hashlib
import json
import os
import re
import struct
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_owner"
READ_TOKEN = "hf_reader"
OTHER_TOKEN = "hf_other"
CHUNK = 1 << 20


@dataclass
class Account:
    """Whom a token stands for."""

    name: str
    can_write: bool = True


@dataclass
class StoredFile:
    """A file of a commit; `sha256` is set where it is a large file (LFS or Xet)."""

    size: int
    oid: str
    path: Path | None
    sha256: str | None = None


@dataclass
class Commit:
    """A commit and the whole tree behind it."""

    oid: str
    title: str
    date: str
    parent: str | None
    files: dict[str, StoredFile]


@dataclass
class Repo:
    """A repository: commits, and the branches and tags that name them."""

    id: str
    type: str
    private: bool = False
    sdk: str | None = None
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    lock: Any = field(default_factory=threading.RLock)

    @property
    def namespace(self) -> str:
        return self.id.split("/")[0]

    def find(self, revision: str) -> Commit | None:
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        return self.commits.get(oid)

    def add_commit(self, branch: str, title: str, files: dict[str, StoredFile]) -> Commit:
        parent = self.branches.get(branch)
        oid = hashlib.sha1(f"{self.type} {self.id} {branch} {len(self.commits)} {title}".encode()).hexdigest()
        date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        self.commits[oid] = Commit(oid, title, date, parent, files)
        self.branches[branch] = oid
        return self.commits[oid]


@dataclass
class Request:
    """One line of the log; `status` 0 = the connection was cut."""

    method: str
    path: str
    status: int = 0
    num_bytes_received: int = 0
    authorization: str | None = None


@dataclass
class Fault:
    """What happens to the next `times` requests whose `METHOD path` matches `pattern`."""

    pattern: str
    times: float
    status: int | None = None
    cut_after_bytes: int | None = None
    delay_seconds: float = 0.0


class HubError(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers
        if code:
            self.headers["X-Error-Code"] = code


class LoopbackHub:
    """A Hub at `url`, started on construction and stopped by `close` or the `with` block.

    Args:
        root: Folder for blobs, for the Xet store and for the `HF_HOME` of clients.
        upload_mode: `lfs`: binary files go by LFS; `xet`: by Xet (needs hf_xet, which keeps its store in
            `root`); `regular`: every file is part of the commit's request.
    """

    def __init__(self, root: Path | str, upload_mode: Literal["lfs", "xet", "regular"] = "lfs") -> None:
        self.root = Path(root)
        self.upload_mode = upload_mode
        self.blobs = self.root / "blobs"
        self.xet_store = self.root / "xet"
        self.blobs.mkdir(parents=True, exist_ok=True)
        self.xet_store.mkdir(exist_ok=True)
        self.tokens = {TOKEN: Account("me"), READ_TOKEN: Account("me", can_write=False), OTHER_TOKEN: Account("other")}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[Request] = []
        self.large_files: dict[str, Path] = {}
        self.is_down = False
        self._faults: list[Fault] = []
        self._lock = threading.RLock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def __enter__(self) -> "LoopbackHub":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    # Clients

    def environment(self, token: str | None = TOKEN, home: Path | str | None = None) -> dict[str, str]:
        """The environment for a process that talks to this Hub; `token=None` = nobody is logged in."""
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGGING_FACE", "TRANSFORMERS_"))
        }
        environment |= {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home or self.root / "home"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "0" if self.upload_mode == "xet" else "1",
            "NO_PROXY": "127.0.0.1",
        }
        return environment | ({"HF_TOKEN": token} if token else {})

    def connect(
        self, monkeypatch: Any, token: str | None = TOKEN, home: Path | str | None = None, fast_retries: bool = True
    ) -> None:
        """Turn this process to this Hub until the test ends, though huggingface_hub is imported already.

        Args:
            monkeypatch: The pytest fixture, which restores everything.
            token: Who is logged in; none = nobody.
            home: `HF_HOME`; one in `root` by default.
            fast_retries: Do not sleep between huggingface_hub's own retries of a request.
        """
        import huggingface_hub
        from huggingface_hub.utils import _http

        for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING_FACE"))]:
            monkeypatch.delenv(name)
        for name, value in self.environment(token, home).items():
            if name.startswith(("HF_", "NO_PROXY")):
                monkeypatch.setenv(name, value)
        home = Path(home or self.root / "home")
        for name, value in {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": self.upload_mode != "xet",
            "HF_HUB_DISABLE_TELEMETRY": True,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_XET_CACHE": str(home / "xet"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        }.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", self.url)
        if transformers_hub := sys.modules.get("transformers.utils.hub"):  # keeps a client of its own
            monkeypatch.setattr(transformers_hub, "_hf_api", None, raising=False)
        if fast_retries:
            clock = {name: getattr(time, name) for name in ("time", "monotonic", "perf_counter")}
            monkeypatch.setattr(_http, "time", SimpleNamespace(**clock, sleep=lambda seconds: time.sleep(0.01)))

    # What is on the Hub

    def add_repo(
        self,
        repo_id: str,
        files: Mapping[str, bytes | Path] | None = None,
        private: bool = False,
        repo_type: str = "model",
        branch: str = "main",
    ) -> Repo:
        """Make a repository with one commit of `files`. A `Path` is served from where it lies."""
        repo = self._create(repo_id, repo_type, private)
        if files:
            stored = {path: self._store(content) for path, content in files.items()}
            repo.add_commit(branch, "Upload files", stored)
        return repo

    def repo(self, repo_id: str, repo_type: str = "model") -> Repo:
        return self.repos[repo_type, repo_id]

    def list_files(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> list[str]:
        return sorted(self.repo(repo_id, repo_type).find(revision).files)

    def read_file(self, repo_id: str, path: str, revision: str = "main", repo_type: str = "model") -> bytes:
        return self.repo(repo_id, repo_type).find(revision).files[path].path.read_bytes()

    # Faults

    def fail(self, pattern: str = "", status: int = 503, times: float = 1) -> None:
        """Answer the next `times` requests whose `METHOD path` matches `pattern` with `status`."""
        self._faults.append(Fault(pattern, times, status=status))

    def cut(self, pattern: str = "", after_bytes: int = 0, times: float = 1) -> None:
        """Drop the connection after `after_bytes` of the request's body."""
        self._faults.append(Fault(pattern, times, cut_after_bytes=after_bytes))

    def delay(self, seconds: float, pattern: str = "", times: float = float("inf")) -> None:
        """Answer late."""
        self._faults.append(Fault(pattern, times, delay_seconds=seconds))

    def heal(self) -> None:
        """Undo all faults."""
        self.is_down = False
        with self._lock:
            self._faults.clear()

    def down(self) -> None:
        """Drop every connection, until `heal`."""
        self.is_down = True

    def take_fault(self, request: str) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.times > 0 and re.search(fault.pattern, request):
                    fault.times -= 1
                    return fault
        return None

    def count_requests(self, pattern: str) -> int:
        """How many requests came whose `METHOD path` matches `pattern`."""
        return sum(bool(re.search(pattern, f"{request.method} {request.path}")) for request in self.requests)

    # Storage

    def _create(self, repo_id: str, repo_type: str, private: bool, sdk: str | None = None) -> Repo:
        repo = Repo(repo_id, repo_type, private, sdk)
        repo.add_commit("main", "initial commit", {".gitattributes": self._store(b"*.safetensors filter=lfs\n")})
        self.repos[repo_type, repo_id] = repo
        return repo

    def _store(self, content: bytes | Path) -> StoredFile:
        if isinstance(content, Path):
            digest = hashlib.sha256()
            with content.open("rb") as file:
                sample = file.read(512)
                file.seek(0)
                while part := file.read(CHUNK):
                    digest.update(part)
            sha256, path, size = digest.hexdigest(), content, content.stat().st_size
        else:
            sha256 = hashlib.sha256(content).hexdigest()
            path, size, sample = self.blobs / sha256, len(content), content[:512]
            path.write_bytes(content)
        if self.is_large(sample, size):
            self.large_files[sha256] = path
            return StoredFile(size, sha256, path, sha256)
        return StoredFile(size, git_blob_oid(path.read_bytes()), path)

    def is_large(self, sample: bytes, size: int) -> bool:
        return self.upload_mode != "regular" and size > 0 and (b"\0" in sample or size > 10_000_000)

    def find_xet_hash(self, sha256: str) -> str | None:
        """The Xet hash of a large file, from the shards that hf_xet wrote."""
        for shard in self.xet_store.rglob("*.mdb"):
            hashes = read_xet_shard(shard.read_bytes())
            if sha256 in hashes:
                return hashes[sha256]
        return None


def git_blob_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def read_xet_shard(shard: bytes) -> dict[str, str]:
    """SHA-256 -> Xet hash of the files that a shard lists.

    A header of 48 bytes, then for each file records of 48 bytes: hash, flags and number of segments; the segments;
    if flagged, a verification a segment; if flagged, the SHA-256. A hash of ones ends the list.
    """
    hashes, at = {}, 48
    while at + 48 <= len(shard) and shard[at : at + 32] != b"\xff" * 32:
        file_hash = shard[at : at + 32]
        flags, num_segments = struct.unpack_from("<II", shard, at + 32)
        at += 48 * (1 + num_segments * (2 if flags & 1 << 31 else 1))
        if flags & 1 << 30:
            hashes[_xet_hex(shard[at : at + 32])] = _xet_hex(file_hash)
            at += 48
    return hashes


def _xet_hex(digest: bytes) -> str:
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", digest))


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: LoopbackHub

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news; the tests end clients on purpose."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms for the acknowledgement of its header
    server: _Server

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def log_message(self, *arguments: object) -> None:
        """Nothing on the terminal; `LoopbackHub.requests` is the log."""

    # One request

    def _answer(self) -> None:
        hub = self.hub = self.server.hub
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        request = Request(self.command, unquote(url.path), authorization=self.headers.get("Authorization"))
        self.request_log = request
        hub.requests.append(request)
        fault = hub.take_fault(f"{request.method} {request.path}")
        if hub.is_down:
            return self._hang_up()
        if fault and fault.delay_seconds:
            time.sleep(fault.delay_seconds)
        if fault and fault.cut_after_bytes is not None:
            request.num_bytes_received = len(self.rfile.read(min(fault.cut_after_bytes, self._content_length())))
            return self._hang_up()
        self.body = self._read_body()
        request.num_bytes_received = len(self.body)
        try:
            if fault and fault.status:
                raise HubError(fault.status, "Fault on order.")
            account = self._authenticate()
            self._route([unquote(part) for part in url.path.strip("/").split("/")], account)
        except HubError as error:
            self._send_json(
                {"error": error.message}, error.status, **{"X-Error-Message": error.message} | error.headers
            )
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(2)

    def _content_length(self) -> int:
        return int(self.headers.get("Content-Length") or 0)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(self._content_length())
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.request_log.status = status
        self.send_response(status)
        headers.setdefault("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _send_json(self, content: Any, status: int = 200, **headers: str) -> None:
        self._send(json.dumps(content).encode(), status, **{"Content-Type": "application/json"} | headers)

    # Who may do what

    def _authenticate(self) -> Account | None:
        header = self.headers.get("Authorization", "")
        if not header or self.path.startswith("/lfs/"):
            return None
        account = self.hub.tokens.get(header.removeprefix("Bearer "))
        if account is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return account

    def _find_repo(self, repo_type: str, repo_id: str, account: Account | None, to_write: bool = False) -> Repo:
        repo = self.hub.repos.get((repo_type, repo_id))
        hidden = repo is None or (repo.private and (account is None or account.name != repo.namespace))
        if hidden and account is None:
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        if hidden:
            raise HubError(404, "Repository not found", "RepoNotFound")
        if to_write:
            self._check_may_write(account, repo.namespace)
        return repo

    def _check_may_write(self, account: Account | None, namespace: str) -> None:
        if account is None:
            raise HubError(401, "Invalid username or password.")
        if not account.can_write or account.name != namespace:
            raise HubError(403, f"Forbidden: you don't have the rights to write to {namespace!r} with this token.")

    def _find_commit(self, repo: Repo, revision: str) -> Commit:
        commit = repo.find(revision)
        if commit is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # Routes

    def _route(self, parts: list[str], account: Account | None) -> None:
        match [self.command, *parts]:
            case ["GET", "api", "whoami-v2"]:
                self._whoami(account)
            case ["POST", "api", "repos", "create"]:
                self._create_repo(account)
            case ["DELETE", "api", "repos", "delete"]:
                body = json.loads(self.body)
                repo_type, repo_id = body.get("type") or "model", f"{body.get('organization')}/{body['name']}"
                self._find_repo(repo_type, repo_id, account, to_write=True)
                del self.hub.repos[repo_type, repo_id]
                self._send_json({})
            case ["POST", "api", "validate-yaml"]:
                self._validate_yaml()
            case [_, "api", ("models" | "datasets" | "spaces") as plural, namespace, name, *rest]:
                self._route_repo(plural.removesuffix("s"), f"{namespace}/{name}", rest, account)
            case [("PUT" | "POST") as method, "lfs", sha256] | [("PUT" | "POST") as method, "lfs", sha256, "verify"]:
                self._lfs_object(sha256, is_verify=method == "POST")
            case [_, *rest]:
                repo_type = {"datasets": "dataset", "spaces": "space"}.get(rest[0], "model")
                self._route_git(repo_type, rest if repo_type == "model" else rest[1:], account)

    def _route_repo(self, repo_type: str, repo_id: str, rest: list[str], account: Account | None) -> None:
        write = {"preupload", "commit", "branch", "tag", "xet-write-token"}
        repo = self._find_repo(repo_type, repo_id, account, to_write=bool(rest) and rest[0] in write)
        match [self.command, *rest]:
            case ["GET"]:
                self._info(repo, self._find_commit(repo, "main"))
            case ["GET", "revision", revision]:
                self._info(repo, self._find_commit(repo, revision))
            case ["GET", "tree", revision, *path]:
                self._tree(self._find_commit(repo, revision), "/".join(path))
            case ["POST", "paths-info", revision]:
                commit = self._find_commit(repo, revision)
                paths = parse_qs(self.body.decode()).get("paths", [])
                self._send_json([entry for entry in list_entries(commit) if entry["path"] in paths])
            case ["GET", "refs"]:
                self._send_json(
                    {
                        "branches": [_ref("heads", *item) for item in repo.branches.items()],
                        "tags": [_ref("tags", *item) for item in repo.tags.items()],
                        "converts": [],
                    }
                )
            case ["GET", "commits", revision]:
                self._commits(repo, self._find_commit(repo, revision))
            case ["POST", "preupload", revision]:
                self._preupload(self._find_commit(repo, revision))
            case ["POST", "commit", revision]:
                with repo.lock:
                    self._commit(repo, revision)
            case ["POST" | "DELETE", ("branch" | "tag") as kind, name]:
                self._change_ref(repo, kind, name)
            case ["GET", "xet-write-token" | "xet-read-token", _]:
                self._xet_token()
            case _:
                raise HubError(404, f"No such route: {self.command} {self.path}")

    def _route_git(self, repo_type: str, parts: list[str], account: Account | None) -> None:
        match [self.command, *parts]:
            case ["POST", namespace, name, "info", "lfs", "objects", "batch"]:
                repo_id = f"{namespace}/{name.removesuffix('.git')}"
                self._find_repo(repo_type, repo_id, account, to_write=True)
                self._lfs_batch()
            case ["GET" | "HEAD", namespace, name, "resolve", revision, *path]:
                repo = self._find_repo(repo_type, f"{namespace}/{name}", account)
                self._resolve(repo, self._find_commit(repo, revision), "/".join(path))
            case _:
                raise HubError(404, f"No such route: {self.command} {self.path}")

    def _whoami(self, account: Account | None) -> None:
        if account is None:
            raise HubError(401, "Invalid username or password.")
        role = "write" if account.can_write else "read"
        access = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
        self._send_json({"type": "user", "name": account.name, "fullname": account.name, "orgs": [], "auth": access})

    def _create_repo(self, account: Account | None) -> None:
        body = json.loads(self.body)
        if account is None:
            raise HubError(401, "Invalid username or password.")
        repo_type, namespace = body.get("type") or "model", body.get("organization") or account.name
        repo_id = f"{namespace}/{body['name']}"
        prefix = "" if repo_type == "model" else f"{repo_type}s/"
        reply = {"url": f"{self.hub.url}/{prefix}{repo_id}", "name": repo_id, "id": repo_id}
        self._check_may_write(account, namespace)
        if (repo_type, repo_id) in self.hub.repos:
            return self._send_json({"error": "You already created this repo", **reply}, 409)
        is_private = body.get("visibility") == "private" or bool(body.get("private"))  # newer and older clients
        self.hub._create(repo_id, repo_type, is_private, body.get("sdk"))
        self._send_json(reply)

    def _validate_yaml(self) -> None:
        try:
            read_card_data(json.loads(self.body)["content"])
        except yaml.YAMLError as error:
            return self._send_json({"errors": [{"message": str(error)}], "warnings": []}, 400)
        self._send_json({"errors": [], "warnings": []})

    def _info(self, repo: Repo, commit: Commit) -> None:
        siblings = []
        for path, file in sorted(commit.files.items()):
            entry = {"rfilename": path}
            if "blobs" in self.query:
                entry |= {"size": file.size, "blobId": file.oid}
                if file.sha256:
                    entry["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": 134}
            siblings.append(entry)
        readme = commit.files.get("README.md")
        card = read_card_data(readme.path.read_text()) if readme and readme.path else None
        info = {
            "_id": "0" * 24,
            "id": repo.id,
            "author": repo.namespace,
            "sha": commit.oid,
            "lastModified": commit.date,
            "createdAt": commit.date,
            "private": repo.private,
            "disabled": False,
            "gated": False,
            "tags": (card or {}).get("tags") or [],
            "downloads": 0,
            "likes": 0,
            "siblings": siblings,
        }
        if card:
            info["cardData"] = card
        if repo.type == "model":
            info["modelId"] = repo.id
        if repo.type == "space":
            info["sdk"] = repo.sdk
        self._send_json(info)

    def _tree(self, commit: Commit, folder: str) -> None:
        prefix = f"{folder}/" if folder else ""
        entries = [entry for entry in list_entries(commit) if entry["path"].startswith(prefix)]
        if folder and not entries:
            raise HubError(404, f"{folder} does not exist", "EntryNotFound")
        if self.query.get("recursive", ["false"])[0].lower() != "true":
            entries = [entry for entry in entries if "/" not in entry["path"][len(prefix) :]]
        self._send_json(entries)

    def _commits(self, repo: Repo, commit: Commit | None) -> None:
        history = []
        while commit:
            history.append(
                {"id": commit.oid, "title": commit.title, "message": "", "date": commit.date, "authors": []}
            )
            commit = repo.commits.get(commit.parent or "")
        self._send_json(history)

    def _preupload(self, commit: Commit) -> None:
        files = []
        for file in json.loads(self.body)["files"]:
            is_large = self.hub.is_large(base64.b64decode(file["sample"]), file["size"])
            entry = {"path": file["path"], "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
            if file["path"] in commit.files:
                entry["oid"] = commit.files[file["path"]].oid
            files.append(entry)
        self._send_json({"files": files})

    def _commit(self, repo: Repo, branch: str) -> None:
        if branch not in repo.branches:
            raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        files = dict(repo.commits[repo.branches[branch]].files)
        title = ""
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            match operation["key"]:
                case "header":
                    title = value["summary"]
                    if value.get("parentCommit", repo.branches[branch]) != repo.branches[branch]:
                        raise HubError(412, "A commit has happened since. Please refresh and try again.")
                case "file":
                    content = base64.b64decode(value["content"])
                    path = self.hub.blobs / hashlib.sha256(content).hexdigest()
                    path.write_bytes(content)
                    files[value["path"]] = StoredFile(len(content), git_blob_oid(content), path)
                case "lfsFile":
                    files[value["path"]] = self._large_file(value["oid"], value.get("size"))
                case "deletedFile":
                    files.pop(value["path"], None)
                case "deletedFolder":
                    folder = value["path"].rstrip("/") + "/"
                    files = {path: file for path, file in files.items() if not path.startswith(folder)}
        commit = repo.add_commit(branch, title, files)
        prefix = "" if repo.type == "model" else f"{repo.type}s/"
        url = f"{self.hub.url}/{prefix}{repo.id}/commit/{commit.oid}"
        self._send_json({"success": True, "commitOid": commit.oid, "commitUrl": url, "hookOutput": ""})

    def _large_file(self, sha256: str, size: int | None) -> StoredFile:
        path = self.hub.large_files.get(sha256)
        if path is None and (self.hub.upload_mode != "xet" or self.hub.find_xet_hash(sha256) is None):
            raise HubError(400, f"LFS pointer to a file that was not uploaded: {sha256}")
        return StoredFile(path.stat().st_size if path else int(size or 0), sha256, path, sha256)

    def _change_ref(self, repo: Repo, kind: str, name: str) -> None:
        body = json.loads(self.body or b"{}")
        if self.command == "DELETE":
            if (repo.branches if kind == "branch" else repo.tags).pop(name, None) is None:
                raise HubError(404, f"No such {kind}: {name}", "RevisionNotFound")
            return self._send_json({})
        refs, name, start = (
            (repo.branches, name, body.get("startingPoint") or "main")
            if kind == "branch"
            else (repo.tags, body["tag"], name)
        )
        if name in refs:
            raise HubError(409, f"Reference already exists: {name}")
        refs[name] = self._find_commit(repo, start).oid
        self._send_json({})

    def _lfs_batch(self) -> None:
        objects, body = [], json.loads(self.body)
        is_xet = self.hub.upload_mode == "xet" and "xet" in body["transfers"]  # older clients ask here
        for item in body["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.large_files:
                href = f"{self.hub.url}/lfs/{item['oid']}"
                entry["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            objects.append(entry)
        self._send_json({"transfer": "xet" if is_xet else "basic", "objects": objects})

    def _lfs_object(self, sha256: str, is_verify: bool) -> None:
        if is_verify:
            if sha256 not in self.hub.large_files:
                raise HubError(404, f"Not uploaded: {sha256}")
        else:
            if hashlib.sha256(self.body).hexdigest() != sha256:
                raise HubError(400, "The content does not match its SHA-256.")
            path = self.hub.blobs / sha256
            path.write_bytes(self.body)
            self.hub.large_files[sha256] = path
        self._send_json({})

    def _xet_token(self) -> None:
        if self.hub.upload_mode != "xet":
            raise HubError(404, "This Hub has no Xet store.")
        url, expiry = f"local://{self.hub.xet_store}", int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(expiry)}
        self._send_json({"casUrl": url, "accessToken": "xet", "exp": expiry}, **headers)

    def _resolve(self, repo: Repo, commit: Commit, path: str) -> None:
        file = commit.files.get(path)
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if file is None:
            raise HubError(404, "Entry not found", "EntryNotFound", **headers)
        headers["ETag"] = f'"{file.oid}"'
        if file.sha256:
            headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
        if file.path is None:  # only in the Xet store
            route = f"{self.hub.url}/api/{repo.type}s/{repo.id}/xet-read-token/{commit.oid}"
            headers |= {"X-Xet-Hash": self.hub.find_xet_hash(file.sha256), "Link": f'<{route}>; rel="xet-auth"'}
            if self.command == "GET":
                raise HubError(501, "This file is in the Xet store; install hf_xet to download it.")
            return self._send(b"", 200, **headers | {"Content-Length": str(file.size)})
        start, end, status = 0, file.size - 1, 200
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end, status = int(found[1]), min(int(found[2] or end), end), 206
            if start > end:
                raise HubError(416, "Range not satisfiable", **{"Content-Range": f"bytes */{file.size}"})
            headers["Content-Range"] = f"bytes {start}-{end}/{file.size}"
        headers |= {"Content-Length": str(end - start + 1), "Content-Type": "application/octet-stream"}
        self.request_log.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            with file.path.open("rb") as stored:
                stored.seek(start)
                left = end - start + 1
                while left > 0 and (part := stored.read(min(CHUNK, left))):
                    self.wfile.write(part)
                    left -= len(part)


def list_entries(commit: Commit) -> list[dict[str, Any]]:
    """Files and folders of a commit, as the tree and paths-info routes list them."""
    entries: dict[str, dict[str, Any]] = {}
    for path, file in sorted(commit.files.items()):
        for parent in list(Path(path).parents)[:-1]:
            entries[parent.as_posix()] = {"type": "directory", "path": parent.as_posix(), "oid": "0" * 40, "size": 0}
        entries[path] = {"type": "file", "path": path, "oid": file.oid, "size": file.size}
        if file.sha256:
            entries[path]["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 134}
    return list(entries.values())


def read_card_data(text: str) -> dict[str, Any] | None:
    """The YAML at the head of a README.md."""
    found = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    return yaml.safe_load(found[1]) if found else None


def _ref(kind: str, name: str, oid: str) -> dict[str, str]:
    return {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid}
