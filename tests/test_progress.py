"""How a checkpoint's name is shown beside the bar."""

from __future__ import annotations

from streamload.progress import _shown


def test_a_long_name_loses_its_middle() -> None:
    uri = "s3://models/meta-llama/Llama-3.1-70B-Instruct/revisions/main"
    shown = _shown(uri, 26)
    assert len(shown) == 26
    head, tail = shown.split("…")
    assert uri.startswith(head)
    assert uri.endswith(tail)
    assert _shown("s3://models/llama", 26) == "s3://models/llama"


def test_what_a_terminal_would_act_on_is_spelled_out() -> None:
    assert _shown("bad/ctl\x1b[31m") == "bad/ctl\\x1b[31m"
