"""A hub on 127.0.0.1 that the real huggingface_hub and datasets clients can talk to: the tests' only "network".

It speaks what those clients ask for when they read (info, revisions, trees, files with HEAD, ETag and ranges) and
refuses as the hub does (401, 403, 404 with X-Error-Code). It knows nothing of uploads, LFS redirects or Xet.
"""

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Files = Mapping[str, bytes]
DATE = "2026-01-01T00:00:00.000Z"
MESSAGES = {
    "GatedRepo": "Access to this repository is restricted. You must have access to it and be authenticated.",
    "RepoNotFound": "Repository not found",
    "RevisionNotFound": "Invalid rev id",
    "EntryNotFound": "Entry not found",
}


@dataclass
class Repository:
    kind: str  # "models" or "datasets"
    id: str
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # in order; main is the last one
    gated: bool = False
    private: bool = False

    @property
    def main(self) -> str:
        return next(reversed(self.commits))


class Refusal(Exception):
    def __init__(self, status: int, code: str = "") -> None:
        super().__init__(status, code)
        self.status, self.code = status, code


class LoopbackHub:
    """`with LoopbackHub() as hub:` serves what `publish` put in until the block ends."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.tokens: set[str] = set()  # those that may read gated and private repositories
        self.requests: list[str] = []  # "GET /api/..." in order
        hub = self

        class Bound(Handler):
            pass

        Bound.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def publish(self, kind: str, repo_id: str, files: Files, gated: bool = False, private: bool = False) -> str:
        """Add a commit to the repository `repo_id` ("models" or "datasets") and return its id."""
        repository = self.repositories.setdefault((kind, repo_id), Repository(kind, repo_id))
        repository.gated, repository.private = gated, private
        content = json.dumps([repo_id, len(repository.commits), {n: blob_id(b) for n, b in sorted(files.items())}])
        commit = hashlib.sha1(content.encode()).hexdigest()
        repository.commits[commit] = dict(files)
        return commit

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """This process's environment with the hub clients turned to this server and an own cache below `home`."""
        env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE"))}
        env |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        env["OPENSLOTH_CACHE"] = str(home / "opensloth")
        return env | ({"HF_TOKEN": token} if token else {})


def files_of(folder: Path) -> dict[str, bytes]:
    """The files below `folder`, as `publish` takes them."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the tests' output clean."""

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def answer(self) -> None:
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        self.hub.requests.append(f"{self.command} {url.path}")
        try:
            parts = [unquote(part) for part in url.path.strip("/").split("/")]
            if parts[0] == "api":
                self.api(parts[1:], parse_qs(url.query), body)
            elif "resolve" in parts:
                self.resolve(parts)
            else:
                raise Refusal(404)
        except Refusal as refusal:
            message = MESSAGES.get(refusal.code, "Not found")
            headers = {"X-Error-Message": message} | ({"X-Error-Code": refusal.code} if refusal.code else {})
            self.reply(refusal.status, json.dumps({"error": message}).encode(), headers)

    def api(self, parts: list[str], query: dict[str, list[str]], body: str) -> None:
        """/api/KIND/OWNER/NAME [/revision/REV | /tree/REV/PATH | /paths-info/REV | /refs]"""
        if len(parts) < 3 or parts[0] not in ("models", "datasets"):
            raise Refusal(404)
        kind, repo_id, rest = parts[0], "/".join(parts[1:3]), parts[3:]
        repository = self.repository(kind, repo_id, reads_files=bool(rest) and rest[0] in ("tree", "paths-info"))
        what, revision, *path_parts = [*rest, "", ""]
        path = "/".join(path_parts).strip("/")
        commit, files = self.commit(repository, revision or "main")
        if what in ("", "revision"):
            self.reply_json(info(repository, commit))
        elif what == "tree":
            recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
            entries = tree(files, path, recursive)
            if path and not entries:
                raise Refusal(404, "EntryNotFound")
            self.reply_json(entries)
        elif what == "paths-info":
            asked = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", [])
            everything = {entry["path"]: entry for entry in walk(files)}
            self.reply_json([everything[p] for p in asked if p in everything])
        elif what == "refs":
            branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": repository.main}
            self.reply_json({"branches": [branch], "tags": [], "converts": []})
        else:
            raise Refusal(404)

    def resolve(self, parts: list[str]) -> None:
        """[/datasets]/OWNER/NAME/resolve/REV/PATH"""
        kind = "datasets" if parts[0] == "datasets" else "models"
        at = parts.index("resolve")
        repo_id = "/".join(parts[1:at] if kind == "datasets" else parts[:at])
        commit, files = self.commit(self.repository(kind, repo_id, reads_files=True), parts[at + 1])
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        name = "/".join(parts[at + 2 :])
        if name not in files:
            raise Refusal(404, "EntryNotFound")
        content = files[name]
        headers |= {"ETag": f'"{blob_id(content)}"', "X-Linked-Size": str(len(content))}
        wanted = self.headers.get("Range", "")
        if wanted.startswith("bytes=") and self.command == "GET":
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last) + 1 if last else len(content), len(content))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            self.reply(206, content[start:stop], headers)
        else:
            self.reply(200, content, headers)

    def repository(self, kind: str, repo_id: str, reads_files: bool) -> Repository:
        """The repository, if the caller may see it. As on the hub, a gated one shows its info to everybody."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        repository = self.hub.repositories.get((kind, repo_id))
        allowed = token in self.hub.tokens
        if repository is None or (repository.private and not allowed):
            raise Refusal(404 if token else 401, "RepoNotFound")
        if repository.gated and reads_files and not allowed:
            raise Refusal(403 if token else 401, "GatedRepo")
        return repository

    def commit(self, repository: Repository, revision: str) -> tuple[str, dict[str, bytes]]:
        commit = repository.main if revision in ("main", "refs/heads/main") else revision
        if commit not in repository.commits:
            raise Refusal(404, "RevisionNotFound")
        return commit, repository.commits[commit]

    def reply_json(self, value: Any) -> None:
        self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def reply(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def info(repository: Repository, commit: str) -> dict[str, Any]:
    return {
        "_id": blob_id(repository.id.encode())[:24],
        "id": repository.id,
        "sha": commit,
        "private": repository.private,
        "gated": "manual" if repository.gated else False,
        "disabled": False,
        "tags": [],
        "downloads": 0,
        "likes": 0,
        "createdAt": DATE,
        "lastModified": DATE,
        "siblings": [{"rfilename": name} for name in sorted(repository.commits[commit])],
    }


def walk(files: Files) -> list[dict[str, Any]]:
    """Every file and folder of a commit, as the hub's tree lists them."""
    folders = {str(parent) for name in files for parent in Path(name).parents if str(parent) != "."}
    entries = [{"type": "directory", "oid": blob_id(f.encode()), "size": 0, "path": f} for f in folders]
    entries += [{"type": "file", "oid": blob_id(c), "size": len(c), "path": name} for name, c in files.items()]
    return sorted(entries, key=lambda entry: str(entry["path"]))


def tree(files: Files, path: str, recursive: bool) -> list[dict[str, Any]]:
    prefix = f"{path}/" if path else ""
    below = [entry for entry in walk(files) if entry["path"].startswith(prefix)]
    return below if recursive else [entry for entry in below if "/" not in entry["path"][len(prefix) :]]
