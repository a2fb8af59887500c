"""What a sidecar stages is a source like any other."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from streamload.errors import NotFoundError
from streamload.loan import Loan
from streamload.sources import Source, open_source
from streamload.testing import SourceConformance
from tests.service.sidecars import LocalSidecar


class TestSidecar(SourceConformance):
    """Another version is staged by another sidecar, on the same socket."""

    @pytest.fixture(autouse=True)
    def _store(self, tmp_path: Path) -> Iterator[None]:
        self.folder = tmp_path / "source"
        self.folder.mkdir()
        with LocalSidecar(self.folder, tmp_path / "volume") as self.sidecar:
            self.stale = True
            yield

    def open(self) -> Source:
        self._renew()
        return open_source(self.sidecar.uri)

    def put(self, key: str, content: bytes) -> None:
        (self.folder / "other.txt").unlink(missing_ok=True)
        path = self.folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.folder.parent / "beside"
        beside.write_bytes(content)
        beside.replace(path)
        # What was opened is asked again at once; before that, many are put.
        self.stale = True
        if self.opened:
            self._renew()

    def remove(self, key: str) -> None:
        (self.folder / key).unlink()
        # A copy stays as long as nothing else is staged in its place.
        (self.folder / "other.txt").touch()
        self.stale = True
        self._renew()

    def run(self, body: Callable[[], Coroutine[Any, Any, None]]) -> None:
        async def settled() -> None:
            await body()
            # It has tried again when it was asked what there is; its threads are not those of what was tested.
            self.sidecar.settle()

        super().run(settled)

    def test_stat_finds_what_list_found_and_what_lies_deeper(self) -> None:
        """Of what lies deeper, that is staged which the index names."""
        self.put("folder/deeper/weights.safetensors", b"y" * 20)
        self.put("folder/other.bin", b"z" * 20)
        self.put("model.safetensors.index.json", b'{"weight_map": {"weights": "folder/deeper/weights.safetensors"}}')

        async def body() -> None:
            async with self.open() as source:
                (listed,) = await source.list()
                assert await source.stat(listed.key) == listed
                deeper = await source.stat("folder/deeper/weights.safetensors")
                content = memoryview(bytearray(10))
                await source.read(deeper, 5, 15, Loan([content]))
                assert content == b"y" * 10
                with pytest.raises(NotFoundError):
                    await source.stat("folder/other.bin")

        self.run(body)

    opened = False

    def _renew(self) -> None:
        self.opened = True
        if self.stale:
            self.sidecar.restart()
            self.stale = False
