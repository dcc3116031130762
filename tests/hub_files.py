"""Repositories of the stand-in for the Hub (`hub.py`): directories, described as the Hub describes them."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

LARGE = (".safetensors", ".parquet")  # what the Hub keeps outside of git: known by its sha256, fetched elsewhere


class Refused(Exception):
    """What the Hub answers where it does not have what is asked for: status and X-Error-Code."""


class File(NamedTuple):
    path: str
    content: bytes

    @property
    def etag(self) -> str:
        if self.path.endswith(LARGE):
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    def described(self) -> dict[str, Any]:
        large = {"oid": self.etag, "size": len(self.content), "pointerSize": 130}
        described = {"type": "file", "path": self.path, "size": len(self.content), "oid": self.etag[:40]}
        return {**described, "lfs": large} if self.path.endswith(LARGE) else described


class Repository:
    def __init__(self, root: Path, kind: str, name: str, revision: str = "main") -> None:
        self.name, self.directory = name, root / kind / name
        if not self.directory.is_dir():
            raise Refused(401, "RepoNotFound")  # so the Hub answers who is not logged in
        found = sorted(path for path in self.directory.rglob("*") if path.is_file())
        self.files = [File(path.relative_to(self.directory).as_posix(), path.read_bytes()) for path in found]
        self.commit = hashlib.sha1(repr([(file.path, file.etag) for file in self.files]).encode()).hexdigest()
        if revision not in ("main", self.commit):
            raise Refused(404, "RevisionNotFound")

    def file(self, path: str) -> File:
        for file in self.files:
            if file.path == path:
                return file
        raise Refused(404, "EntryNotFound")

    def info(self) -> dict[str, Any]:
        siblings = [{"rfilename": file.path, "size": len(file.content)} for file in self.files]
        return {"id": self.name, "sha": self.commit, "private": False, "gated": False, "siblings": siblings, "tags": []}

    def folders(self) -> set[str]:
        return {str(parent) for file in self.files for parent in Path(file.path).parents if str(parent) != "."}

    def tree(self, below: str, recursive: bool) -> list[dict[str, Any]]:
        folders = self.folders()
        if below and below not in folders:
            raise Refused(404, "EntryNotFound")
        entries = [{"type": "directory", "path": folder, "size": 0, "oid": self.commit} for folder in sorted(folders)]
        entries += [file.described() for file in self.files]
        parents = {entry["path"]: Path(entry["path"]).parents for entry in entries}
        top = Path(below or ".")
        return [e for e in entries if (top in parents[e["path"]] if recursive else top == parents[e["path"]][0])]

    def receive(self, line: dict[str, Any], large: dict[str, bytes]) -> None:
        """One line of a commit: a file in it, or named by its digest and uploaded before."""
        value = line["value"]
        if line["key"] in ("file", "lfsFile"):
            content = base64.b64decode(value["content"]) if line["key"] == "file" else large[value["oid"]]
            path = self.directory / value["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
