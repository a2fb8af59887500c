"""The Hub source, with the real client, against a stand-in for the Hub and its store."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest
from aiohttp import web
from huggingface_hub import constants, hf_hub_download, snapshot_download, try_to_load_from_cache

from streamload.errors import (
    AccessError,
    ChecksumError,
    CredentialsError,
    MissingDependencyError,
    NotFoundError,
    ObjectChangedError,
    OptionError,
    SourceError,
    TransientError,
)
from streamload.loan import Loan
from streamload.sources import SourceObject
from streamload.sources.hub import HubSource
from streamload.sources.hub_cache import CacheWriter
from streamload.sources.hub_errors import Asked
from streamload.sources.hub_repository import HubFile, Snapshot
from streamload.testing import run_on_each_loop
from tests.hubserver import Hub, Repository, git_sha1, sha256

CONTENT = bytes(range(256)) * 400
KEY = "model.safetensors"

Body = Callable[[HubSource], Awaitable[None]]


@pytest.fixture
def repository(hub: Hub) -> Repository:
    """Holds one file of weights, and others."""
    repository = hub.repositories["org/model"]
    repository.commit({KEY: CONTENT, "config.json": b"{}", "original/model.safetensors": b"old"})
    return repository


def run(body: Body, uri: str = "hf://org/model", **more: object) -> None:
    async def whole() -> None:
        async with HubSource(uri, **more) as source:  # type: ignore[arg-type]
            await body(source)

    run_on_each_loop(whole)


async def read(source: HubSource, key: str = KEY, start: int = 100, end: int = 300) -> bytes:
    object = await source.stat(key)
    memory = bytearray(end - start)
    await source.read(object, start, end, Loan([memoryview(memory)]))
    return bytes(memory)


def cache_folder() -> Path:
    return Path(constants.HF_HUB_CACHE) / "models--org--model"


class TestRevisions:
    def test_everything_is_of_the_commit_that_it_was_first(self, hub: Hub, repository: Repository) -> None:
        async def body(source: HubSource) -> None:
            repository.commit({KEY: CONTENT})
            repository.commits[repository.refs["main"]].pop("new.safetensors", None)
            assert [object.key for object in await source.list()] == ["config.json", KEY]
            repository.commit({KEY: CONTENT[::-1], "new.safetensors": b"new"})
            assert await read(source) == CONTENT[100:300]
            with pytest.raises(NotFoundError):
                await source.stat("new.safetensors")
            asked = [seen.path for seen in hub.hub.seen if seen.path.startswith("/api/models/")]
            assert len(asked) == 1, "the revision is resolved once"
            hub.hub.seen.clear()

        run(body)

    @pytest.mark.parametrize(
        ("uri", "revision"),
        [
            ("hf://org/model@v1", None),
            ("hf://org/model:v1", None),
            ("hf://org/model", "v1"),
            ("hf://org/model@v1", "v1"),
            ("hf://org/model@feature%2Fx", None),
            ("hf://org/model@refs/pr/7", None),
            ("hf://org/model", "refs/pr/7"),
        ],
    )
    def test_other_revisions(self, repository: Repository, uri: str, revision: str | None) -> None:
        for name in ("v1", "feature/x", "refs/pr/7"):
            repository.commit({KEY: CONTENT[::-1]}, name)

        async def body(source: HubSource) -> None:
            assert await read(source) == CONTENT[::-1][100:300]

        run(body, uri, revision=revision)

    def test_a_commit(self, repository: Repository) -> None:
        commit = repository.commit({KEY: CONTENT[::-1]})
        repository.commit({KEY: CONTENT})

        async def body(source: HubSource) -> None:
            assert await read(source) == CONTENT[::-1][100:300]

        run(body, f"hf://org/model@{commit}")

    @pytest.mark.parametrize(
        "uri",
        [
            "hf://",
            "hf:///model",
            "hf://org/model@",
            "hf://../model",
            "hf://org/..",
            "hf://org/model/../x",
            "hf://org/model//x",
            "hf://org:secret@host/x",
            "hf://datasets/org/model",
        ],
    )
    def test_a_uri_that_names_no_repository(self, uri: str) -> None:
        with pytest.raises(OptionError) as caught:
            HubSource(uri)
        assert "secret" not in str(caught.value)

    def test_two_revisions_contradict_each_other(self) -> None:
        with pytest.raises(OptionError, match="'v1', and revision is 'v2'"):
            HubSource("hf://org/model@v1", revision="v2")


class TestFiles:
    def test_one_file_or_folder(self, repository: Repository) -> None:
        async def one(source: HubSource) -> None:
            assert [object.key for object in await source.list()] == [KEY]
            assert await read(source, start=0, end=3) == b"old"

        run(one, "hf://org/model/original/model.safetensors")
        run(one, "hf://org/model@main/original")

    @pytest.mark.parametrize(
        ("allow", "ignore", "left"),
        [
            (None, None, ["config.json", "model.safetensors", "other.safetensors"]),
            (["*.safetensors"], None, ["model.safetensors", "other.safetensors"]),
            (["*.safetensors"], ["other*"], ["model.safetensors"]),
            (None, ["*.safetensors", "original/**/*"], ["config.json"]),
        ],
    )
    def test_patterns(
        self, repository: Repository, allow: list[str] | None, ignore: list[str] | None, left: list[str]
    ) -> None:
        repository.commit({"other.safetensors": b"other"})

        async def body(source: HubSource) -> None:
            assert [object.key for object in await source.list()] == left
            if "config.json" not in left:
                with pytest.raises(NotFoundError, match="left out by a pattern"):
                    await source.stat("config.json")

        run(body, allow_patterns=allow, ignore_patterns=ignore)

    @pytest.mark.parametrize("path", ["../escape.safetensors", "/etc/x.safetensors", "a//b", "a\0b"])
    def test_a_listing_with_what_is_no_name(self, repository: Repository, path: str) -> None:
        repository.commit({path: b"x"})

        async def body(source: HubSource) -> None:
            with pytest.raises(SourceError, match="which is no name"):
                await source.list()

        run(body, cache=True)
        assert not cache_folder().exists()

    def test_a_file_that_is_another_one_than_was_listed(
        self, repository: Repository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The Hub says so on the way to the store, or where it answers itself."""
        for key in (KEY, "config.json"):

            async def body(source: HubSource, key: str = key) -> None:
                commit = repository.commit({key: b"{ }"})
                await source.stat(key)
                repository.commits[commit][key] = b"{!}"
                with pytest.raises(ObjectChangedError):
                    await read(source, key, 0, 2)

            run(body)


class TestAddresses:
    def test_the_token_goes_to_the_hub_only_and_is_never_shown(
        self,
        hub: Hub,
        repository: Repository,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        hub.tokens = repository.members = {"hf_secret"}
        repository.private = True
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        caplog.set_level(logging.DEBUG)
        shown: list[object] = []

        async def body(source: HubSource) -> None:
            assert await read(source) == CONTENT[100:300]
            facts = await source.describe()
            assert facts["token"] == "found"
            shown.extend([source, facts, await source._open(), (await source._open()).snapshot])

        run(body)
        asked = [seen.headers["authorization"] for seen in hub.hub.seen if "org/model" in seen.path]
        assert set(asked) == {"Bearer hf_secret"}
        assert hub.store.seen
        assert not any("authorization" in seen.headers for seen in hub.store.seen)
        assert "secret" not in repr(shown) + caplog.text

    def test_an_address_is_found_once_and_again_when_it_expires(self, hub: Hub, repository: Repository) -> None:
        async def body(source: HubSource) -> None:
            await source.list()
            hub.hub.seen.clear()
            for _ in range(3):
                assert await read(source) == CONTENT[100:300]
            assert len(hub.hub.seen) == 1
            hub.signature += "2"
            for _ in range(3):
                assert await read(source) == CONTENT[100:300]
            assert len(hub.hub.seen) == 2

        run(body)

    def test_a_store_that_refuses_new_addresses_too(self, hub: Hub, repository: Repository) -> None:
        hub.store.instead = _answering(403)

        async def body(source: HubSource) -> None:
            with pytest.raises(AccessError, match="access is refused") as caught:
                await read(source)
            assert "Signature" not in str(caught.value)

        run(body)


def _answering(status: int) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(status=status)

    return answer


class TestRefusals:
    def check(self, kind: type[SourceError], says: str, uri: str = "hf://org/model") -> None:
        async def body(source: HubSource) -> None:
            with pytest.raises(SourceError, match=says) as caught:
                await read(source)
            error = caught.value
            assert type(error) is kind
            assert error.uri == uri
            assert "hf_" not in error.cause.replace("hf_hub", "")
            assert "\n" not in str(error)

        run(body, uri)

    def test_no_such_repository_or_a_private_one(
        self, hub: Hub, repository: Repository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.check(NotFoundError, r"no repository 'org/none', or it is private: set HF_TOKEN", "hf://org/none")
        repository.private = True
        self.check(NotFoundError, r"no repository 'org/model', or it is private: set HF_TOKEN")
        hub.tokens = {"hf_other"}
        monkeypatch.setenv("HF_TOKEN", "hf_other")
        self.check(NotFoundError, r"no repository 'org/model', or the token does not reach it")

    def test_a_gated_repository(self, hub: Hub, repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
        repository.gated = True
        self.check(CredentialsError, r"gated: ask for access at http\S+/org/model, then set HF_TOKEN")
        hub.tokens = {"hf_other"}
        monkeypatch.setenv("HF_TOKEN", "hf_other")
        self.check(AccessError, r"gated: ask for access at http\S+/org/model with this token's account")

    def test_a_token_that_is_not_accepted(self, repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_TOKEN", "hf_expired")
        self.check(CredentialsError, "the token is not accepted")

    def test_no_such_revision(self, repository: Repository) -> None:
        self.check(NotFoundError, "no revision 'v9'", "hf://org/model@v9")

    def test_a_disabled_repository(self, repository: Repository) -> None:
        repository.disabled = True
        self.check(AccessError, "the repository is disabled")

    @pytest.mark.parametrize(
        ("status", "kind", "says"),
        [
            (403, AccessError, "the token may lack the right"),
            (429, TransientError, "answered 429"),
            (503, TransientError, "answered 503"),
        ],
    )
    def test_other_refusals(
        self, hub: Hub, repository: Repository, status: int, kind: type[SourceError], says: str
    ) -> None:
        hub.refused = (status, {"Retry-After": "7"})
        self.check(kind, says)

    def test_nobody_answers(self, repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
        self.check(TransientError, "127.0.0.1:1 cannot be reached")

    def test_without_the_client(self, repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)

        async def body(source: HubSource) -> None:
            with pytest.raises(MissingDependencyError, match=r"streamload\[hub\]"):
                await source.list()

        run(body)


class TestReadingTheCache:
    def test_what_the_client_has_put_there_is_not_fetched(self, hub: Hub, repository: Repository) -> None:
        snapshot_download("org/model", allow_patterns=["*.safetensors"])
        hub.hub.seen.clear()
        hub.store.seen.clear()

        async def body(source: HubSource) -> None:
            assert await read(source) == CONTENT[100:300]
            assert source.paths == {"from the cache": 200}

        run(body)
        assert not any("/resolve/" in seen.path for seen in hub.hub.seen)
        assert hub.store.seen == []

    def test_a_file_of_another_commit_is_the_same_file(self, hub: Hub, repository: Repository) -> None:
        hf_hub_download("org/model", KEY)
        repository.commit({"README.md": b"new"})
        hub.store.seen.clear()

        async def body(source: HubSource) -> None:
            assert await read(source) == CONTENT[100:300]

        run(body)
        assert hub.store.seen == []

    def test_a_cached_file_that_is_cut_short_is_fetched(self, hub: Hub, repository: Repository) -> None:
        path = Path(hf_hub_download("org/model", KEY)).resolve()
        path.write_bytes(CONTENT[:1000])

        async def body(source: HubSource) -> None:
            assert await read(source) == CONTENT[100:300]
            assert "from the cache" not in source.paths

        run(body)

    @pytest.mark.parametrize("named", [True, False])
    def test_offline(
        self, hub: Hub, repository: Repository, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, named: bool
    ) -> None:
        folder = tmp_path / "elsewhere" if named else None
        snapshot_download("org/model", cache_dir=folder, allow_patterns=["*.safetensors"])
        hub.hub.seen.clear()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

        async def body(source: HubSource) -> None:
            assert [object.key for object in await source.list()] == [KEY]
            assert await read(source) == CONTENT[100:300]
            assert "not asked" in (await source.describe())["endpoint"]

        run(body, download_dir=None if folder is None else str(folder))
        assert hub.hub.seen == []

    def test_offline_and_not_there(self, repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

        async def body(source: HubSource) -> None:
            with pytest.raises(NotFoundError, match=r"HF_HUB_OFFLINE is set, and revision 'main' of 'org/model'"):
                await source.list()

        run(body)

    def test_offline_and_not_all_there(self, repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
        repository.commit({"other.safetensors": b"other"})
        snapshot_download("org/model", allow_patterns=[KEY])
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

        async def body(source: HubSource) -> None:
            with pytest.raises(NotFoundError, match="or not all of it"):
                await source.list()

        run(body)


class TestWritingTheCache:
    async def read_all(self, source: HubSource, keys: tuple[str, ...] = (KEY,)) -> None:
        """In pieces that come in any order, some twice."""
        for key in keys:
            object = await source.stat(key)
            bounds = [*range(0, object.size_bytes, 7000), object.size_bytes]
            reads = [*zip(bounds[::2], bounds[1::2], strict=False), *zip(bounds[1::2], bounds[2::2], strict=False)]
            await asyncio.gather(*[self._piece(source, object, *span) for span in [*reads, reads[0]]])
            await self._piece(source, object, 0, object.size_bytes)

    async def _piece(self, source: HubSource, object: SourceObject, start: int, end: int) -> None:
        memory = bytearray(end - start)
        half = memoryview(memory)[: len(memory) // 2], memoryview(memory)[len(memory) // 2 :]
        await source.read(object, start, end, Loan(half))

    def test_the_client_finds_it(self, hub: Hub, repository: Repository) -> None:
        fetched = []

        async def body(source: HubSource) -> None:
            await self.read_all(source, (KEY, "config.json"))
            fetched.append(len(hub.store.seen))

        run(body, cache=True)
        commit = repository.refs["main"]
        for key in (KEY, "config.json"):
            found = try_to_load_from_cache("org/model", key)
            assert isinstance(found, str)
            assert Path(found).read_bytes() == repository.commits[commit][key]
            assert os.path.islink(found)
            assert not os.path.isabs(os.readlink(found))
        folder = str(cache_folder() / "snapshots" / commit)
        assert hf_hub_download("org/model", KEY, local_files_only=True) == f"{folder}/{KEY}"
        assert snapshot_download("org/model", local_files_only=True) == folder
        assert (cache_folder() / "refs/main").read_text() == commit
        assert {path.name for path in (cache_folder() / "blobs").iterdir()} == {sha256(CONTENT), git_sha1(b"{}")}
        assert fetched[0] == fetched[1], "on the second of two event loops there was nothing to fetch"

    def test_a_revision_with_slashes_in_a_folder_of_ones_own(self, repository: Repository, tmp_path: Path) -> None:
        repository.commit({"deep/model.safetensors": CONTENT}, "refs/pr/7")

        async def body(source: HubSource) -> None:
            await self.read_all(source)

        run(body, "hf://org/model@refs/pr/7/deep", cache=True, download_dir=str(tmp_path / "own"), ignore_patterns=[])
        found = hf_hub_download(
            "org/model",
            "deep/model.safetensors",
            revision="refs/pr/7",
            cache_dir=tmp_path / "own",
            local_files_only=True,
        )
        assert Path(found).read_bytes() == CONTENT
        assert not cache_folder().exists()

    def test_half_a_file_leaves_nothing(self, repository: Repository) -> None:
        async def body(source: HubSource) -> None:
            object = await source.stat(KEY)
            await self._piece(source, object, 0, object.size_bytes - 1)
            (partial,) = (cache_folder() / "blobs").iterdir()
            assert partial.name.endswith(".incomplete")

        run(body, cache=True)
        assert list((cache_folder() / "blobs").iterdir()) == []
        assert not (cache_folder() / "refs").exists()
        assert not (cache_folder() / "snapshots").exists()

    def test_half_a_checkpoint_is_no_snapshot(self, repository: Repository) -> None:
        """Its whole files are of use to the next load, but nobody must take them for all there is."""
        repository.commit({"other.safetensors": CONTENT * 2, "original/model.safetensors": None})

        async def half(source: HubSource) -> None:
            await self.read_all(source)

        async def rest(source: HubSource) -> None:
            await self.read_all(source, (KEY, "other.safetensors"))
            assert source.paths["from the cache"] >= len(CONTENT)

        run(half, cache=True)
        assert [path.name for path in (cache_folder() / "blobs").iterdir()] == [sha256(CONTENT)]
        assert not (cache_folder() / "snapshots").exists()
        run(rest, cache=True)
        assert isinstance(try_to_load_from_cache("org/model", KEY), str)
        assert isinstance(try_to_load_from_cache("org/model", "other.safetensors"), str)

    def test_other_content_than_the_hub_says_gets_no_name(self, hub: Hub, repository: Repository) -> None:
        hub.store.instead = None
        hub.store.put(f"/{sha256(CONTENT)}", CONTENT[:-1] + b"!")

        async def body(source: HubSource) -> None:
            with pytest.raises(ChecksumError, match=f"the Hub says {sha256(CONTENT)}") as caught:
                await self.read_all(source)
            assert caught.value.object == KEY

        run(body, cache=True)
        assert list((cache_folder() / "blobs").iterdir()) == []
        assert not (cache_folder() / "snapshots").exists()

    def test_a_cache_that_cannot_be_written(self, repository: Repository, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("in the way")

        async def body(source: HubSource) -> None:
            with pytest.raises(SourceError, match=r"the cache \S+ cannot be written: Not a directory"):
                await self.read_all(source)

        run(body, cache=True, download_dir=str(tmp_path / "file"))

    def test_nothing_is_compared_while_somebody_still_writes(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A read that was asked for twice arrives twice; the second time may be after all is there."""
        file = HubFile(KEY, len(CONTENT), sha256(CONTENT), None)
        asked = Asked("http://hub", "org/model", None, with_token=False)
        snapshot = Snapshot(asked, "0" * 40, {KEY: file}, str(tmp_path / "model"), {}, offline=False)
        writer = CacheWriter(snapshot, {KEY})
        inside, go_on = threading.Event(), threading.Event()
        pwritev = os.pwritev

        def slowly(descriptor: int, views: Sequence[memoryview], start: int) -> int:
            if threading.current_thread().name == "slow":
                inside.set()
                go_on.wait()
            return pwritev(descriptor, views, start)

        monkeypatch.setattr(os, "pwritev", slowly)
        told: list[bool] = []
        slow = threading.Thread(
            target=lambda: told.append(writer.write(file, 100, [memoryview(CONTENT)[100:200]])), name="slow"
        )
        slow.start()
        inside.wait()
        assert not writer.write(file, 0, [memoryview(CONTENT)])
        go_on.set()
        slow.join()
        assert told == [True]
        assert not writer.write(file, 0, [memoryview(bytes(len(CONTENT)))])
        writer.finish(file)
        writer.close()
        assert (tmp_path / "model/blobs" / sha256(CONTENT)).read_bytes() == CONTENT

    def test_gaps_are_no_content(self, repository: Repository) -> None:
        """What a loan has no use for may land anywhere."""

        async def body(source: HubSource) -> None:
            object = await source.stat(KEY)
            memory = memoryview(bytearray(object.size_bytes))
            await source.read(object, 0, object.size_bytes, Loan([memory[:100], memory[100:]], gaps=[False, True]))
            assert memory[:100] == CONTENT[:100]

        run(body, cache=True)
        assert not (cache_folder() / "blobs").exists()


def test_a_look_up_that_is_cancelled_ends_with_the_source(hub: Hub, repository: Repository) -> None:
    """Whoever waits is free at once; the thread that asks is waited for when the source is closed."""

    async def body() -> None:
        loop, asked, answered = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()

        async def slowly(request: web.Request) -> web.StreamResponse:
            servers_loop = asyncio.get_running_loop()
            release = asyncio.Event()

            def go_on() -> None:
                servers_loop.call_soon_threadsafe(release.set)

            loop.call_soon_threadsafe(waiting.append, go_on)
            loop.call_soon_threadsafe(asked.set)
            await release.wait()
            loop.call_soon_threadsafe(answered.set)
            return await hub.answer_hub(request)

        waiting: list[Callable[[], None]] = []
        hub.hub.instead = slowly
        async with HubSource("hf://org/model", grace_s=60) as source:
            listing = asyncio.create_task(source.list())
            await asked.wait()
            listing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await listing
            assert not answered.is_set()
            waiting[0]()

    run_on_each_loop(body)
