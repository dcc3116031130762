"""A stand-in for the Hugging Face Hub on the loopback: as much of its protocol as the libraries here speak.

Repositories are directories, `ROOT/models/owner/name` and `ROOT/datasets/owner/name`, and may be written to.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from .hub_files import LARGE, Refused, Repository

USER = "owner"  # who is logged in

Results = dict[str, dict[str, Any]]  # of steps: code, out and err of each


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self._serve(self._get)

    do_GET = do_HEAD

    def do_POST(self) -> None:
        self._serve(self._post)

    def do_PUT(self) -> None:
        self._serve(self._put)

    def log_message(self, *arguments: Any) -> None:
        pass

    def _serve(self, answer: Any) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append(f"{self.command} {url.path}")
        try:
            answer([unquote(part) for part in url.path.strip("/").split("/")])
        except Refused as refused:
            status, code = refused.args
            self._send(b"", status, {"X-Error-Code": code, "X-Error-Message": code})

    def _send(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    def _repository(self, kind: str, parts: list[str], revision: str = "main") -> Repository:
        return Repository(self.server.root, kind, "/".join(parts), revision)

    def _get(self, parts: list[str]) -> None:
        match parts:
            case ["api", kind, owner, name]:
                self._json(self._repository(kind, [owner, name]).info())
            case ["api", kind, owner, name, "revision", revision]:
                self._json(self._repository(kind, [owner, name], revision).info())
            case ["api", kind, owner, name, "tree", revision, *below]:
                repository = self._repository(kind, [owner, name], revision)
                self._json(repository.tree("/".join(below), self.query.get("recursive") == ["true"]))
            case ["large", digest]:
                self._send(self.server.large[digest])
            case ["datasets", owner, name, "resolve", revision, *path]:
                self._resolve(self._repository("datasets", [owner, name], revision), "/".join(path))
            case [owner, name, "resolve", revision, *path]:
                self._resolve(self._repository("models", [owner, name], revision), "/".join(path))
            case _:
                raise Refused(404, "EntryNotFound")

    def _resolve(self, repository: Repository, path: str) -> None:
        try:
            file = repository.file(path)
        except Refused:  # the Hub says at which commit
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repository.commit}
            return self._send(b"", 404, headers)
        known = {"X-Repo-Commit": repository.commit, "ETag": f'"{file.etag}"'}
        if not path.endswith(LARGE):
            return self._send(file.content, headers=known)
        self.server.large[file.etag] = file.content
        linked = {"X-Linked-ETag": known["ETag"], "X-Linked-Size": str(len(file.content))}
        self._send(b"", 302, {**known, **linked, "Location": f"{self.server.elsewhere}/large/{file.etag}"})

    def _post(self, parts: list[str]) -> None:
        match parts:
            case ["api", "repos", "create"]:
                wanted = json.loads(self.body)
                name = f"{wanted['organization'] or USER}/{wanted['name']}"
                (self.server.root / "models" / name).mkdir(parents=True, exist_ok=True)
                self._json({"url": f"{self.server.address}/{name}"})
            case ["api", "validate-yaml"]:
                named = re.search(r"^base_model: *(.*)$", json.loads(self.body)["content"], re.MULTILINE)
                fine = named is None or re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", named[1])
                errors = [] if fine else [{"message": f'"base_model" with value "{named and named[1]}" is not valid'}]
                self._json({"errors": errors, "warnings": []}, 400 if errors else 200)
            case ["api", _, _, _, "preupload", _]:
                paths = [file["path"] for file in json.loads(self.body)["files"]]
                modes = {path: "lfs" if path.endswith(LARGE) else "regular" for path in paths}
                self._json({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]})
            case [_, _, "info", "lfs", "objects", "batch"]:
                objects = json.loads(self.body)["objects"]
                place = {o["oid"]: {"upload": {"href": f"{self.server.address}/large/{o['oid']}"}} for o in objects}
                self._json({"transfer": "basic", "objects": [{**o, "actions": place[o["oid"]]} for o in objects]})
            case ["api", kind, owner, name, "commit", _]:
                repository = self._repository(kind, [owner, name])
                for line in self.body.splitlines():
                    repository.receive(json.loads(line), self.server.large)
                commit = self._repository(kind, [owner, name]).commit
                self._json({"commitUrl": f"{self.server.address}/{owner}/{name}/commit/{commit}", "commitOid": commit})
            case _:
                raise Refused(404, "EntryNotFound")

    def _put(self, parts: list[str]) -> None:
        self.server.large[parts[-1]] = self.body
        self._send(b"")


class Hub(ThreadingHTTPServer):
    """What it was asked is in `asked`, as "GET /path"."""

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.elsewhere = f"http://localhost:{self.server_port}"  # another host to clients: not asked for metadata
        self.asked: list[str] = []
        self.large: dict[str, bytes] = {}


@contextmanager
def serving(root: Path) -> Iterator[Hub]:
    hub = Hub(root)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


def session(place: Path, address: str, steps: dict[str, list[str]], offline: bool) -> Results:
    """What came of the steps, each a name and its words, in one process whose caches lie in `place`."""
    settings = {"HF_ENDPOINT": address, "HF_HOME": str(place / "hf"), "XDG_CACHE_HOME": str(place / "cache")}
    settings |= {"HF_HUB_OFFLINE": str(int(offline)), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    settings |= {"HF_UPDATE_DOWNLOAD_COUNTS": "0", "HF_TOKEN": "hf_of_nobody"}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE_"))}
    command = [sys.executable, "-P", str(Path(__file__).with_name("hub_session.py"))]
    ran = subprocess.run(
        command, input=json.dumps(steps), env=inherited | settings, cwd=place, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)
