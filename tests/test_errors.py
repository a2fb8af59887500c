"""The tree of errors: what each is, what it says, and that it crosses processes."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Iterator

import pytest

import streamload
from streamload import errors
from streamload.errors import HeaderError, NotFoundError, SourceError, StreamloadError, TransientError

_ALL = [getattr(errors, name) for name in errors.__all__]

# What a caller who knows nothing of this package would catch.
_STANDARD: dict[str, type[Exception]] = {
    "OptionError": ValueError,
    "MissingDependencyError": ImportError,
    "CheckpointError": ValueError,
    "SourceError": OSError,
    "NotFoundError": FileNotFoundError,
    "AccessError": PermissionError,
    "DeviceError": RuntimeError,
    "MemoryLimitError": MemoryError,
    "DeadlineError": TimeoutError,
    "ClosedError": RuntimeError,
}


def _subclasses(kind: type[StreamloadError]) -> Iterator[type[StreamloadError]]:
    yield kind
    for each in kind.__subclasses__():
        yield from _subclasses(each)


def test_all_are_public_and_in_one_tree() -> None:
    assert set(_ALL) == {kind for kind in _subclasses(StreamloadError) if kind.__module__ == errors.__name__}
    assert set(errors.__all__) <= set(streamload.__all__)


def test_the_tree_is_drawn_in_the_docstring() -> None:
    drawn = inspect.getdoc(errors)
    assert drawn is not None
    for name in errors.__all__:
        assert f"{name} " in drawn or f"{name}\n" in drawn, name


@pytest.mark.parametrize(("name", "standard"), _STANDARD.items())
def test_each_is_a_standard_error_too(name: str, standard: type[Exception]) -> None:
    with pytest.raises(standard, match="went wrong"):
        raise getattr(errors, name)("it went wrong")


@pytest.mark.parametrize("kind", _ALL)
def test_only_transient_ones_are_worth_another_try(kind: type[StreamloadError]) -> None:
    assert kind.retryable is issubclass(kind, TransientError)


@pytest.mark.parametrize("kind", _ALL)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_survives_pickling(kind: type[StreamloadError], protocol: int) -> None:
    error = kind("cause", uri="s3://bucket", object="key", start=3, end=9, attempts=4, valid_bytes=2)
    for twin in (pickle.loads(pickle.dumps(error, protocol)), copy.copy(error), copy.deepcopy(error)):
        assert type(twin) is kind
        assert str(twin) == str(error)
        assert twin.args == error.args
        assert vars(twin) == vars(error)


def test_bare_one_survives_pickling() -> None:
    twin = pickle.loads(pickle.dumps(StreamloadError("cause")))
    assert str(twin) == "cause"
    assert (twin.uri, twin.object, twin.start, twin.end, twin.attempts, twin.valid_bytes) == (None,) * 5 + (0,)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (StreamloadError("cause"), "cause"),
        (StreamloadError("cause", uri="s3://b/p"), "s3://b/p: cause"),
        (StreamloadError("cause", object="key"), "key: cause"),
        (StreamloadError("cause", uri="s3://b/p", object="key"), "s3://b/p, key: cause"),
        (StreamloadError("cause", uri="s3://b", start=0, end=8), "s3://b, bytes 0-8: cause"),
        (StreamloadError("cause", start=0), "cause"),
        (StreamloadError("cause", attempts=1), "cause"),
        (StreamloadError("cause", attempts=3), "cause (after 3 attempts)"),
        (StreamloadError("two\nlines\t and\r\nspace "), "two lines and space"),
        (StreamloadError("cause", uri="https://user:secret@host/p?token=secret"), "https://host/p?token=***: cause"),
        (StreamloadError("no proxy http://user:secret@host"), "no proxy http://***@host"),
    ],
)
def test_text(error: StreamloadError, text: str) -> None:
    assert str(error) == text


def test_credentials_show_nowhere() -> None:
    error = SourceError(
        "GET https://AKIAIOSFODNN7EXAMPLE:hunter2@host/?X-Amz-Signature=hunter2 failed",
        uri="s3://AKIAIOSFODNN7EXAMPLE:hunter2@bucket/prefix",
    )
    error.locate(uri="s3://AKIAIOSFODNN7EXAMPLE:hunter2@bucket/prefix")
    for shown in (str(error), repr(error), repr(vars(error)), repr(error.args), repr(pickle.dumps(error))):
        assert "hunter2" not in shown
        assert "AKIAIOSFODNN7EXAMPLE" not in shown


class TestLocate:
    def test_fills_in_what_is_missing(self) -> None:
        error = HeaderError("cause")
        assert error.locate(uri="s3://u:p@b", object="key", start=1, end=2, attempts=3) is error
        assert str(error) == "s3://b, key, bytes 1-2: cause (after 3 attempts)"

    def test_leaves_what_is_known(self) -> None:
        error = NotFoundError("cause", uri="s3://a", object="key", start=0, end=1, attempts=2)
        error.locate(uri="s3://b", object="other", start=5, end=6, attempts=7)
        assert str(error) == "s3://a, key, bytes 0-1: cause (after 2 attempts)"

    def test_never_mixes_two_ranges(self) -> None:
        error = NotFoundError("cause", start=4)
        error.locate(start=5, end=6)
        assert (error.start, error.end) == (4, None)
