"""Our verdict is the reference implementation's, on files that nobody thought of."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checkpoint.files import agree, entry, file_of, judge, reasons_to_be_stricter, reference
from tests.checkpoint.generators import damaged_files, mutant, valid_files

_EXAMPLES = 300


@settings(max_examples=_EXAMPLES, deadline=None)
@given(valid_files())
def test_valid_files_are_read_as_the_reference_reads_them(content: bytes) -> None:
    assert agree(content)


@settings(max_examples=_EXAMPLES, deadline=None)
@given(damaged_files())
def test_damaged_files_get_the_verdict_of_the_reference(content: bytes) -> None:
    agree(content)


@settings(max_examples=_EXAMPLES, deadline=None)
@given(st.binary(max_size=40))
def test_anything_gets_the_verdict_of_the_reference(content: bytes) -> None:
    agree(content)


@settings(max_examples=_EXAMPLES, deadline=None)
@given(st.text('{}[]:,"\\ud8a0-+.eE tfn', max_size=12))
def test_any_short_json_gets_the_verdict_of_the_reference(text: str) -> None:
    agree(file_of(text))
    agree(file_of(f'{{"t":{{"dtype":"U8","shape":[0],"data_offsets":[0,0],"x":{text}}}}}'))


@pytest.mark.parametrize("seed", range(8))
def test_mutants_get_the_verdict_of_the_reference(seed: int) -> None:
    source = random.Random(seed)
    verdicts = [agree(content) for content in (mutant(source, SEEDS) for _ in range(2500))]
    # A fuzzer whose files are all valid, or all broken, would prove nothing.
    assert 150 < sum(verdicts) < 2350


def test_mutants_meet_every_reason_to_be_stricter() -> None:
    source = random.Random(8)
    met: set[str] = set()
    for content in (mutant(source, SEEDS) for _ in range(2500)):
        if reference(content) is not None:
            met.update(reasons_to_be_stricter(content))
    assert len(met) == len(DOUBTFUL)


def _valid_seeds() -> list[bytes]:
    plain = {
        "__metadata__": {"format": "pt", "note": "[]"},
        "t": entry("F32", [2], 0, 8),
        "model.layer-0.weight": entry("BF16", [2, 3], 8, 20),
        "é": entry("F4", [2], 20, 21),
        "none": entry("I64", [0, 4], 21, 21),
        "scalar": entry("U8", [], 21, 22),
    }
    unusual = {
        "b": entry("F6_E2M3", [4], 1, 4) | {"x": {"a": [1.5, None, '\\"[', -3]}},
        "a": entry("BOOL", [1], 0, 1),
        "empty": entry("U8", [0], 4, 4),
        "__metadata__": None,
    }
    reordered = {"t": {"shape": [0], "data_offsets": [0, 0], "dtype": "U8"}}
    compact = (",", ":")
    return [
        file_of(json.dumps(plain, separators=compact), bytes(range(22))),
        file_of(json.dumps(plain, separators=compact, ensure_ascii=False) + "  ", bytes(range(22))),
        file_of(json.dumps(unusual), bytes(range(4))),
        file_of(json.dumps(reordered, separators=compact)),
        file_of('{"__metadata__":{}}'),
        file_of("{}"),
    ]


def _doubtful_seeds() -> list[bytes]:
    """Files that the reference accepts and we do not, one for each reason."""
    none = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    strange = none.replace('"U8"', '{"U8":null}')
    return [
        file_of(f'{{"t":{none},"t":{none}}}'),
        file_of('{"__metadata__":{"a":"b","a":"b"}}'),
        file_of('{"t":["U8",[0],[0,0]]}'),
        file_of(f'{{"t":{strange}}}'),
    ]


VALID, DOUBTFUL = _valid_seeds(), _doubtful_seeds()
SEEDS = 2 * VALID + DOUBTFUL


def test_the_seeds_are_what_they_seem() -> None:
    assert all(agree(content) for content in VALID)
    assert len({repr(judge(content)) for content in VALID}) == len(VALID)
    assert all(reference(content) is not None and not agree(content) for content in DOUBTFUL)
