"""A stand-in for the Hub: the endpoints that huggingface_hub documents, and the store that files are fetched from."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from urllib.parse import unquote

from aiohttp import web

from tests.httpserver import FileServer, answer_range, run_server

__all__ = ["Hub", "Repository", "git_sha1", "run_hub", "sha256"]


@cache
def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@cache
def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass
class Repository:
    """One model.

    Attributes:
        commits: The files of each, by path.
        refs: The commit of each branch and tag.
        private: Whether only those with a token see it.
        gated: Whether only those who were let in may read it.
        members: The tokens that were let in.
        disabled: Whether nobody may read it.
    """

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False
    members: set[str] = field(default_factory=set)
    disabled: bool = False

    def commit(self, changes: dict[str, bytes | None], revision: str = "main") -> str:
        """Put files onto a branch, or take them from it; the commit's name."""
        files = dict(self.commits.get(self.refs.get(revision, ""), {}))
        for path, content in changes.items():
            if content is None:
                del files[path]
            else:
                files[path] = content
        name = hashlib.sha1(f"{len(self.commits)} {revision}".encode(), usedforsecurity=False).hexdigest()
        self.commits[name] = files
        self.refs[revision] = name
        return name

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision)


@dataclass
class Hub:
    """The Hub and its store, on two ports; see `run_hub`.

    Attributes:
        repositories: By ``org/model``.
        tokens: Those that are good for anything.
        signature: What an address of the store has to be signed with at the moment.
        refused: Status and headers with which every request to the Hub is refused.
    """

    hub: FileServer = field(default_factory=FileServer)
    store: FileServer = field(default_factory=FileServer)
    repositories: dict[str, Repository] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)
    signature: str = "first"
    refused: tuple[int, dict[str, str]] | None = None

    @property
    def endpoint(self) -> str:
        return self.hub.origin

    async def answer_hub(self, request: web.Request) -> web.StreamResponse:
        if self.refused is not None:
            return web.Response(status=self.refused[0], headers=self.refused[1])
        # As it came: an escaped slash belongs to a revision.
        parts = [unquote(part) for part in request.raw_path.partition("?")[0].removeprefix("/").split("/")]
        api = parts[:2] == ["api", "models"]
        parts = parts[2:] if api else parts
        repository_name, rest = "/".join(parts[:2]), parts[2:]
        token = request.headers.get("Authorization", "").removeprefix("Bearer ") or None
        if token is not None and token not in self.tokens:
            return _refuse(401, "", "Invalid credentials in Authorization header")
        repository = self.repositories.get(repository_name)
        if repository is None or (repository.private and token not in repository.members):
            return _refuse(401 if token is None else 404, "RepoNotFound", "Repository not found")
        if repository.disabled:
            return _refuse(403, "", "Access to this resource is disabled.")
        if not api and repository.gated and token not in repository.members:
            return _refuse(
                401 if token is None else 403, "GatedRepo", f"Access to model {repository_name} is restricted."
            )
        revision = rest[1] if len(rest) > 1 else "main"
        commit = repository.resolve(revision)
        if commit is None:
            return _refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = repository.commits[commit]
        if not api:
            return self._resolve(request, files, "/".join(rest[2:]), commit)
        if rest[:1] == ["tree"]:
            return web.json_response([_tree_entry(path, content) for path, content in sorted(files.items())])
        return web.json_response(
            {
                "id": repository_name,
                "modelId": repository_name,
                "sha": commit,
                "private": repository.private,
                "siblings": [_sibling(path, content, "blobs" in request.query) for path, content in files.items()],
            }
        )

    def _resolve(self, request: web.Request, files: dict[str, bytes], path: str, commit: str) -> web.StreamResponse:
        content = files.get(path)
        if content is None:
            return _refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        headers = {"X-Repo-Commit": commit}
        if not _in_lfs(path):
            return answer_range(request, content, {**headers, "ETag": f'"{git_sha1(content)}"'})
        headers |= {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{sha256(content)}"'}
        location = f"{self.store.origin}/{sha256(content)}?Signature={self.signature}"
        return web.Response(status=302, headers={**headers, "Location": location})

    async def answer_store(self, request: web.Request) -> web.StreamResponse:
        """Knows nothing of the Hub: contents by their hash, for whoever has an address that is signed."""
        if request.query.get("Signature") != self.signature:
            return web.Response(status=403, text="<Code>AccessDenied</Code><Message>Request has expired</Message>")
        contents = itertools.chain.from_iterable(
            files.values() for repository in self.repositories.values() for files in repository.commits.values()
        )
        for content in contents:
            if sha256(content) == request.path[1:]:
                # Its own idea of a version: that of an upload in parts.
                return answer_range(request, content, {"ETag": '"0123456789abcdef-1"'})
        return web.Response(status=404)


def _refuse(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> web.Response:
    told = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
    return web.json_response({"error": message}, status=status, headers={**told, **(headers or {})})


def _in_lfs(path: str) -> bool:
    return not path.endswith((".json", ".md", ".txt"))


def _sibling(path: str, content: bytes, with_blobs: bool) -> dict[str, object]:
    if not with_blobs:
        return {"rfilename": path}
    entry: dict[str, object] = {"rfilename": path, "size": len(content), "blobId": git_sha1(content)}
    if _in_lfs(path):
        entry["lfs"] = {"size": len(content), "sha256": sha256(content), "pointerSize": 134}
    return entry


def _tree_entry(path: str, content: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": path, "size": len(content), "oid": git_sha1(content)}
    if _in_lfs(path):
        entry["lfs"] = {"size": len(content), "oid": sha256(content), "pointerSize": 134}
    return entry


@contextmanager
def run_hub() -> Iterator[Hub]:
    """Run a Hub and its store."""
    hub = Hub()
    hub.hub.instead, hub.store.instead = hub.answer_hub, hub.answer_store
    with run_server(hub.hub), run_server(hub.store):
        yield hub
