"""What a repository on the Hub holds at one commit, and what of it lies in the Hub's cache.

Everything here blocks, and is called on a thread. huggingface_hub is imported where it is used: it is an extra, and
takes longer to import than a small load takes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from streamload.errors import MissingDependencyError, NotFoundError, SourceError
from streamload.sources.hub_errors import Asked, translate_hub_error

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

__all__ = ["HubFile", "Snapshot", "is_file_name", "look_up"]

_COMMIT = re.compile(r"[0-9a-f]{40}")

# What a file's content is known by: SHA-256 where it is in LFS, else the SHA-1 that git gives it. It becomes a name.
_ETAG = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")

# What a checkpoint is made of; offline, these have to be in the cache.
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file at one commit.

    Attributes:
        path: In the repository.
        size_bytes: Its length.
        etag: What its content is known by.
        cached: Where it lies in the repository's folder in the cache; None where it does not.
    """

    path: str
    size_bytes: int
    etag: str
    cached: str | None

    @property
    def sha256(self) -> bytes | None:
        """Of its content, where the Hub keeps it: for files in LFS."""
        return bytes.fromhex(self.etag) if len(self.etag) == 64 else None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A repository at one commit.

    Attributes:
        asked: Who was asked for what.
        commit: Which one it is.
        files: By their path.
        folder: The repository's folder in the cache, whether or not it is there.
        headers: What the Hub wants to see; the token is among it.
        offline: Whether nothing may be asked.
    """

    asked: Asked
    commit: str
    files: Mapping[str, HubFile]
    folder: str
    headers: Mapping[str, str] = field(repr=False)
    offline: bool

    def url(self, file: HubFile) -> str:
        """Where the Hub has a file, or says who has it."""
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.asked.repository, file.path, revision=self.commit, endpoint=self.asked.endpoint)


def look_up(
    repository: str,
    revision: str | None,
    *,
    allow_patterns: Sequence[str] | None,
    ignore_patterns: Sequence[str] | None,
    download_dir: str | None,
) -> Snapshot:
    """Find the commit that a revision means now, and what is in it.

    Args:
        repository: ``org/model``.
        revision: A branch, a tag or a commit; None for the default branch.
        allow_patterns: Globs; other files are left out.
        ignore_patterns: Globs; these files are left out.
        download_dir: The cache's folder; None for the usual one.

    Raises:
        MissingDependencyError: huggingface_hub is not installed.
        SourceError: The Hub refuses, cannot be reached, or answers nonsense; offline: not all is in the cache.
    """
    try:
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers
    except ImportError as error:
        raise MissingDependencyError(f"hf:// needs huggingface_hub: pip install 'streamload[hub]' ({error})") from None
    asked = Asked(constants.ENDPOINT, repository, revision, with_token=False)
    try:
        headers = build_hf_headers(library_name="streamload")
        asked = Asked(constants.ENDPOINT, repository, revision, with_token="authorization" in headers)
        folder = _repository_folder(download_dir or constants.HF_HUB_CACHE, repository)
        if constants.HF_HUB_OFFLINE:
            commit, found = _from_cache(asked, folder, allow_patterns, ignore_patterns, download_dir)
        else:
            commit, found = _from_hub(asked, folder)
    except (SourceError, MissingDependencyError):
        raise
    except Exception as error:
        translated = translate_hub_error(error, asked)
        if translated is None:
            raise
        # Not chained: its text is long, and repeats addresses.
        raise translated from None
    files = {file.path: file for file in _chosen(found, allow_patterns, ignore_patterns)}
    return Snapshot(asked, commit, files, folder, headers, offline=bool(constants.HF_HUB_OFFLINE))


def is_file_name(path: str) -> bool:
    """Whether a path can be one of a file in a repository, or in a folder: it leads nowhere else."""
    return "\0" not in path and not any(part in {"", ".", ".."} for part in path.split("/"))


def _repository_folder(cache: str, repository: str) -> str:
    # As in huggingface_hub.constants.REPO_ID_SEPARATOR; engines find it under this name.
    return os.path.join(os.path.expanduser(cache), "--".join(["models", *repository.split("/")]))


def _from_hub(asked: Asked, folder: str) -> tuple[str, list[HubFile]]:
    from huggingface_hub import HfApi, constants

    info = HfApi(endpoint=asked.endpoint, library_name="streamload").model_info(
        asked.repository, revision=asked.revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
    )
    commit = info.sha or ""
    if not _COMMIT.fullmatch(commit):
        raise SourceError("the Hub does not tell which commit the revision is")
    return commit, [_file(sibling, folder, commit) for sibling in info.siblings or ()]


def _file(sibling: RepoSibling, folder: str, commit: str) -> HubFile:
    path, lfs = sibling.rfilename, sibling.lfs
    size_bytes, etag = (lfs.size, lfs.sha256) if lfs is not None else (sibling.size, sibling.blob_id)
    if not is_file_name(path):
        raise SourceError(f"the Hub lists a file {path!r}, which is no name", object=path)
    if size_bytes is None or not etag or not _ETAG.fullmatch(etag):
        raise SourceError("the Hub tells no size of this file, or nothing that its content is known by", object=path)
    # A file that was downloaded has a link; a blob may have come by another commit, or another program.
    for place in (f"snapshots/{commit}/{path}", f"blobs/{etag}"):
        try:
            if os.path.getsize(os.path.join(folder, place)) == size_bytes:
                return HubFile(path, size_bytes, etag, place)
        except OSError:
            pass
    return HubFile(path, size_bytes, etag, None)


def _from_cache(
    asked: Asked,
    folder: str,
    allow_patterns: Sequence[str] | None,
    ignore_patterns: Sequence[str] | None,
    download_dir: str | None,
) -> tuple[str, list[HubFile]]:
    from huggingface_hub import snapshot_download

    found = snapshot_download(
        asked.repository,
        revision=asked.revision,
        cache_dir=download_dir,
        local_files_only=True,
        allow_patterns=list(allow_patterns or _WEIGHTS),
        ignore_patterns=list(ignore_patterns or ()),
    )
    commit = os.path.basename(found)
    files: list[HubFile] = []
    for where, _, names in os.walk(found):
        for name in names:
            full = os.path.join(where, name)
            path = os.path.relpath(full, found)
            try:
                size_bytes = os.path.getsize(full)
            except OSError:
                raise NotFoundError("this is a link to a file that is not in the cache", object=path) from None
            blob = os.path.basename(os.path.realpath(full))
            etag = blob if _ETAG.fullmatch(blob) else commit
            files.append(HubFile(path, size_bytes, etag, f"snapshots/{commit}/{path}"))
    return commit, files


def _chosen(
    files: Iterable[HubFile], allow_patterns: Sequence[str] | None, ignore_patterns: Sequence[str] | None
) -> Iterable[HubFile]:
    from huggingface_hub.utils import filter_repo_objects

    return filter_repo_objects(
        files,
        allow_patterns=None if allow_patterns is None else list(allow_patterns),
        ignore_patterns=None if ignore_patterns is None else list(ignore_patterns),
        key=lambda file: file.path,
    )
