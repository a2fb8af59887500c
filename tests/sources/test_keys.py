"""Keys come out of files that anybody can write."""

from __future__ import annotations

import pytest

from streamload.errors import NotFoundError
from streamload.sources.keys import check_key


@pytest.mark.parametrize("key", ["", ".", "..", "../x", "a/../x", "a/./x", "/etc/passwd", "a//b", "a/", "a\0b"])
def test_keys_that_lead_elsewhere(key: str) -> None:
    with pytest.raises(NotFoundError) as caught:
        check_key(key, uri="file:///models")
    assert caught.value.object == key


@pytest.mark.parametrize("key", ["a", "a/b/c", "..a", "a..", "...", "a b", "a\\b"])
def test_keys_that_do_not(key: str) -> None:
    check_key(key, uri="file:///models")
