"""Pieces of a stream into views."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from streamload.sources.writer import ViewWriter


@given(
    views=st.lists(st.integers(1, 20), max_size=10),
    pieces=st.lists(st.binary(max_size=30), max_size=15),
)
def test_views_hold_the_stream_as_far_as_there_is_room(views: list[int], pieces: list[bytes]) -> None:
    memory = [bytearray(size) for size in views]
    writer = ViewWriter([memoryview(each) for each in memory])
    stream = b"".join(pieces)
    room = sum(views)
    written = 0
    for piece in pieces:
        rest = writer.write(piece)
        written += len(piece)
        assert rest == min(len(piece), max(0, written - room))
        assert writer.filled == min(written, room)
    joined = b"".join(memory)
    assert joined[: writer.filled] == stream[:room]
    assert not any(joined[writer.filled :])
