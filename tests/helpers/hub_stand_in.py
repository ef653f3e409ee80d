"""A stand-in for the Hugging Face hub's API on loopback: creates repositories, takes commits, and gives files out."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest
from huggingface_hub import ModelCard

TOKEN = "hf_test"


class HubStandIn:
    """Repositories in memory.

    Attributes:
        repos: by "user/name" of a model, or "datasets/user/name", the files of each commit, by commit.
        private: repositories that only a request with `TOKEN` sees.
        requests: methods and paths so far.
        address: of the API.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.requests: list[str] = []
        self.address = ""

    def commit(self, repo: str, files: dict[str, bytes]) -> str:
        """Add files to the newest commit of a repository; returns the new commit."""
        commits = self.repos.setdefault(repo, {})
        files = (list(commits.values())[-1] if commits else {}) | files
        number = hashlib.sha1(repr((len(commits), sorted(files))).encode()).hexdigest()
        commits[number] = files
        return number

    def add_folder(self, repo: str, folder: Path) -> str:
        """Commit a folder."""
        names = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
        return self.commit(repo, {name.as_posix(): (folder / name).read_bytes() for name in names})


@contextmanager
def running_hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[HubStandIn]:
    """Run a stand-in, to which `huggingface_hub` turns, with an empty cache."""
    hub = HubStandIn()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    use_hub(monkeypatch, hub.address, cache)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def use_hub(monkeypatch: pytest.MonkeyPatch, address: str, cache: Path) -> None:
    """What HF_ENDPOINT and HF_HUB_CACHE set when the library is imported."""
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {
        "ENDPOINT": address,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
    }.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", address)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)


def entries(files: dict[str, bytes]) -> list[dict[str, Any]]:
    """What the API says of files."""
    return [
        {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        for name, data in files.items()
    ]


def tree(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict[str, Any]]:
    """What the API says of a folder, the root if it is empty; `recursive` adds what is in its folders."""
    below = [entry for entry in entries(files) if not folder or entry["path"].startswith(f"{folder}/")]
    parents = {parent.as_posix() for entry in below for parent in PurePosixPath(entry["path"]).parents}
    inner = sorted(path for path in parents if path.startswith(folder and f"{folder}/") and path != ".")
    below += [{"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest()} for path in inner]
    depth = len(PurePosixPath(folder).parts) + 1
    return [entry for entry in below if recursive or len(PurePosixPath(entry["path"]).parts) == depth]


def _handler(hub: HubStandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def answer(self, value: object, status: int = 200, **headers: str) -> None:
            content = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            for name, text in ({"Content-Length": str(len(content))} | headers).items():
                self.send_header(name.replace("_", "-"), text)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def refuse(self, status: int, code: str) -> None:
            self.answer({"error": code}, status, X_Error_Code=code, X_Error_Message=code)

        def body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def allowed(self, repo: str) -> bool:
            return repo in hub.repos and (repo not in hub.private or TOKEN in self.headers.get("Authorization", ""))

        def found(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
            """The commit and its files; answers with an error if there is none."""
            if not self.allowed(repo):
                return self.refuse(401, "RepoNotFound")
            commits = hub.repos[repo]
            if revision == "main":
                revision = list(commits)[-1]
            if revision not in commits:
                return self.refuse(404, "RevisionNotFound")
            return revision, commits[revision]

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            parts = path.strip("/").split("/")
            if path == "/api/whoami-v2":
                self.answer({"type": "user", "name": "user", "auth": {"accessToken": {"role": "write"}}})
            elif parts[:2] in (["api", "models"], ["api", "datasets"]):
                kind = "" if parts[1] == "models" else "datasets/"
                repo, rest = "/".join(parts[2:4]), parts[4:]
                if rest[:1] not in ([], ["revision"], ["tree"]):
                    return self.refuse(404, "NotFound")
                revision = rest[1] if len(rest) > 1 else "main"
                if (commit := self.found(kind + repo, revision)) is None:
                    return
                number, files = commit
                if rest[:1] == ["tree"]:
                    recursive = "recursive=true" in self.path.lower()
                    self.answer(tree(files, "/".join(rest[2:]), recursive))
                else:
                    self.answer({"id": repo, "sha": number, "siblings": [{"rfilename": name} for name in files]})
            elif "resolve" in parts[2:4]:
                place = parts.index("resolve")
                if (commit := self.found("/".join(parts[:place]), parts[place + 1])) is None:
                    return
                number, files = commit
                name = "/".join(parts[place + 2 :])
                if name not in files:
                    self.refuse(404, "EntryNotFound")
                else:
                    self.give(files[name], number)
            else:
                self.refuse(404, "NotFound")

        def give(self, content: bytes, commit: str) -> None:
            """A file, or the range of it that is asked for."""
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if asked is None:
                return self.answer(content, ETag=etag, X_Repo_Commit=commit)
            begin, end = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
            place = f"bytes {begin}-{end}/{len(content)}"
            self.answer(content[begin : end + 1], 206, ETag=etag, X_Repo_Commit=commit, Content_Range=place)

        def do_POST(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"POST {path}")
            body = self.body()
            parts = path.strip("/").split("/")
            if path == "/api/validate-yaml":  # raises what huggingface_hub finds wrong
                ModelCard(json.loads(body)["content"])
                self.answer({"errors": [], "warnings": []})
            elif TOKEN not in self.headers.get("Authorization", ""):
                self.refuse(401, "Unauthorized")
            elif path == "/api/repos/create":
                wanted = json.loads(body)
                repo = f"{wanted['organization']}/{wanted['name']}"
                hub.repos.setdefault(repo, {})
                if wanted.get("visibility") == "private":
                    hub.private.add(repo)
                self.answer({"url": f"{hub.address}/{repo}", "id": repo})
            elif parts[4] == "preupload":
                files = json.loads(body)["files"]
                modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
                self.answer({"files": modes})
            elif parts[4] == "commit":
                lines = [json.loads(line)["value"] for line in body.splitlines() if b'"file"' in line]
                number = hub.commit(
                    "/".join(parts[2:4]), {line["path"]: base64.b64decode(line["content"]) for line in lines}
                )
                url = f"{hub.address}/{'/'.join(parts[2:4])}/commit/{number}"
                self.answer({"success": True, "commitOid": number, "commitUrl": url, "hookOutput": ""})
            else:
                self.refuse(404, "NotFound")

    return Handler
