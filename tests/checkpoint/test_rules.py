"""Every rule of the format, one case each, against the reference implementation and against ours."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

import pytest

from streamload.checkpoint import MAX_HEADER_BYTES, HeaderReader, ShardFile
from streamload.errors import HeaderError
from tests.checkpoint.files import EIGHT, KEY, file_of, judge, reasons_to_be_stricter, reference


class Verdict(Enum):
    """What the reference says, and what we say."""

    REFUSED = (False, False)
    STRICT = (True, False)
    ACCEPTED = (True, True)


class Rule(NamedTuple):
    """One rule: what it is about, the verdict, and a file."""

    name: str
    verdict: Verdict
    content: bytes


R, S, A = Verdict.REFUSED, Verdict.STRICT, Verdict.ACCEPTED
NO_SIZES = ("2.0", "2e0", "8.0", "8e0", "-1", "-8", "true", '"2"', '"8"', "null", "[]", "{}")
FIELDS = '"dtype":"F32","shape":[2],"data_offsets":[0,8]'


def one(entry: str, body: bytes = EIGHT) -> bytes:
    """A file of one tensor whose entry is this text."""
    return file_of(f'{{"t":{entry}}}', body)


def tensor(dtype: str = "F32", shape: str = "[2]", offsets: str = "[0,8]", body: bytes = EIGHT) -> bytes:
    return one(f'{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}', body)


def u8(*offsets: tuple[int, int], size: int | None = None) -> bytes:
    """A file of byte tensors a, b, c, ... at these offsets, in that order in the header."""
    entries = [
        f'"{name}":{{"dtype":"U8","shape":[{max(0, end - start)}],"data_offsets":[{start},{end}]}}'
        for name, (start, end) in zip("abcdef", offsets, strict=False)
    ]
    length = max(end for _, end in offsets) if size is None else size
    return file_of(f"{{{','.join(entries)}}}", bytes(range(length)))


def metadata(value: str) -> bytes:
    return file_of(f'{{"__metadata__":{value}}}')


def extra(value: str) -> bytes:
    """A tensor with one field more, which the format does not know."""
    return one(f'{{{FIELDS},"extra":{value}}}')


def nested(depth: int) -> bytes:
    """Arrays in an unknown field; two objects are around them."""
    return extra("[" * depth + "]" * depth)


RULES = [
    # Framing
    Rule("an empty file", R, b""),
    Rule("seven bytes", R, bytes(7)),
    Rule("a header of no bytes", R, bytes(8)),
    Rule("a header longer than the file", R, file_of("{}", length=3)),
    Rule("a header length of 2^63", R, file_of("{}", length=2**63)),
    Rule("a header length of 2^64-1", R, file_of("{}", length=2**64 - 1)),
    Rule("a header length that is no multiple of eight", A, one(f"{{{FIELDS}}} ")),
    Rule("a header that is not UTF-8", R, file_of(b'{"t\xff":{%s}}' % FIELDS.encode(), EIGHT)),
    Rule("an overlong encoding", R, file_of(b'{"t\xc0\x80":{%s}}' % FIELDS.encode(), EIGHT)),
    Rule("a surrogate encoded as UTF-8", R, file_of(b'{"t\xed\xa0\x80":{%s}}' % FIELDS.encode(), EIGHT)),
    Rule("a header in UTF-16", R, file_of("{}".encode("utf-16-le"))),
    Rule("a byte order mark", R, file_of("\ufeff{}")),
    Rule("whitespace behind the header", A, file_of("{} \t\n\r")),
    Rule("whitespace before the header", A, file_of(" \t\n\r{}")),
    Rule("whitespace that is not JSON's", R, file_of("{}\v")),
    Rule("whitespace only", R, file_of("    ")),
    # JSON
    Rule("an array at the top", R, file_of("[]")),
    Rule("a string at the top", R, file_of('"{}"')),
    Rule("null at the top", R, file_of("null")),
    Rule("two documents", R, file_of("{}{}")),
    Rule("a NUL behind the header", R, file_of("{}\0")),
    Rule("an unfinished object", R, file_of("{")),
    Rule("a trailing comma", R, one(f"{{{FIELDS},}}")),
    Rule("a trailing comma in an array", R, extra("[1,]")),
    Rule("a comment", R, file_of("{}//")),
    Rule("single quotes", R, file_of("{'a':1}")),
    Rule("NaN", R, extra("NaN")),
    Rule("Infinity", R, extra("Infinity")),
    Rule("minus Infinity", R, extra("-Infinity")),
    Rule("a number beyond a double", R, extra("1e400")),
    Rule("an integer beyond a double", R, extra("1" + "0" * 309)),
    Rule("an integer of 10,000 digits", R, extra("1" * 10_000)),
    Rule("a number of many digits", A, extra("0." + "1" * 10_000)),
    Rule("a number with a leading zero", R, extra("01")),
    Rule("a number with a leading plus", R, extra("+1")),
    Rule("a number that ends in a point", R, extra("1.")),
    Rule("a raw control character", R, file_of(f'{{"t\n":{{{FIELDS}}}}}', EIGHT)),
    Rule("a raw DEL", A, file_of(f'{{"t\x7f":{{{FIELDS}}}}}', EIGHT)),
    Rule("an unknown escape", R, file_of(f'{{"\\x":{{{FIELDS}}}}}', EIGHT)),
    Rule("a half escape", R, file_of(f'{{"\\u12":{{{FIELDS}}}}}', EIGHT)),
    Rule("a lone high surrogate in a name", R, file_of(f'{{"\\ud800":{{{FIELDS}}}}}', EIGHT)),
    Rule("a lone low surrogate in a name", R, file_of(f'{{"\\uDC00":{{{FIELDS}}}}}', EIGHT)),
    Rule("two high surrogates", R, file_of(f'{{"\\ud800\\ud800\\udc00":{{{FIELDS}}}}}', EIGHT)),
    Rule("a high surrogate and a letter", R, file_of(f'{{"\\ud800\\u0041":{{{FIELDS}}}}}', EIGHT)),
    Rule("a lone surrogate in an unknown field", R, extra('"\\ud800"')),
    Rule("a lone surrogate as an unknown field's name", R, one(f'{{{FIELDS},"\\ud800":1}}')),
    Rule("a pair of surrogates", A, file_of(f'{{"\\ud83d\\uDE00":{{{FIELDS}}}}}', EIGHT)),
    Rule("an escaped backslash before what looks like one", A, file_of(f'{{"\\\\ud800":{{{FIELDS}}}}}', EIGHT)),
    Rule("arrays 100 deep", A, nested(100)),
    Rule("127 levels", A, nested(125)),
    Rule("128 levels", R, nested(126)),
    Rule("arrays 200 deep", R, nested(200)),
    Rule("objects 200 deep", R, extra('{"a":' * 200 + "0" + "}" * 200)),
    Rule("300 brackets in a string", A, extra('"' + "[" * 300 + '"')),
    Rule("300 brackets behind an escaped quote", A, extra('"\\"' + "[" * 300 + '\\\\"')),
    Rule("deep behind an escaped backslash", R, extra('{"\\\\":' + "[" * 200 + "]" * 200 + "}")),
    Rule("no tensors", A, file_of("{}")),
    Rule("no tensors and a byte", R, file_of("{}", b"\0")),
    Rule("an escape in a field's name", A, one('{"\\u0064type":"F32","sh\\u0061pe":[2],"data_offsets":[0,8]}')),
    # Names
    Rule("a tensor twice", S, file_of(f'{{"t":{{{FIELDS}}},"t":{{{FIELDS}}}}}', EIGHT)),
    Rule("a tensor twice, once in escapes", S, file_of(f'{{"t":{{{FIELDS}}},"\\u0074":{{{FIELDS}}}}}', EIGHT)),
    Rule("an empty name", A, file_of(f'{{"":{{{FIELDS}}}}}', EIGHT)),
    Rule("a NUL in a name", A, file_of(f'{{"\\u0000":{{{FIELDS}}}}}', EIGHT)),
    Rule("a name like a field's", A, file_of(f'{{"dtype":{{{FIELDS}}}}}', EIGHT)),
    Rule("an entry at the top", R, file_of(f"{{{FIELDS}}}", EIGHT)),
    # __metadata__
    Rule("metadata null", A, metadata("null")),
    Rule("metadata empty", A, metadata("{}")),
    Rule("metadata of strings", A, metadata('{"format":"pt","":""}')),
    Rule("metadata like an entry, of strings", A, metadata('{"dtype":"F32","shape":"[]","data_offsets":"[0,4]"}')),
    Rule("metadata like an entry", R, metadata('{"dtype":"F32","shape":[],"data_offsets":[0,4]}')),
    Rule("metadata a list", R, metadata("[]")),
    Rule("metadata a string", R, metadata('"pt"')),
    Rule("metadata false", R, metadata("false")),
    Rule("metadata with a number", R, metadata('{"version":1}')),
    Rule("metadata with null", R, metadata('{"version":null}')),
    Rule("metadata with an object", R, metadata('{"a":{}}')),
    Rule("metadata twice", R, file_of('{"__metadata__":{},"__metadata__":{}}')),
    Rule("metadata null and again", R, file_of('{"__metadata__":null,"__metadata__":{}}')),
    Rule("a metadata name twice", S, metadata('{"a":"b","a":"b"}')),
    Rule("a tensor's entry as metadata", R, file_of(f'{{"__metadata__":{{{FIELDS}}}}}', EIGHT)),
    # Entries
    Rule("no dtype", R, one('{"shape":[2],"data_offsets":[0,8]}')),
    Rule("no shape", R, one('{"dtype":"F32","data_offsets":[0,8]}')),
    Rule("no data_offsets", R, one('{"dtype":"F32","shape":[2]}')),
    Rule("dtype twice", R, one(f'{{{FIELDS},"dtype":"F32"}}')),
    Rule("shape twice", R, one(f'{{{FIELDS},"shape":[2]}}')),
    Rule("data_offsets twice", R, one(f'{{{FIELDS},"data_offsets":[0,8]}}')),
    Rule("shape twice and no offsets", R, one('{"dtype":"F32","shape":[2],"shape":[2]}')),
    Rule("fields in another order", A, one('{"data_offsets":[0,8],"shape":[2],"dtype":"F32"}')),
    Rule("an unknown field", A, extra('{"a":[1,-1,1.5,null,true,-0,1e3,123456789012345678901]}')),
    Rule("an unknown field like an entry", A, extra(f"{{{FIELDS}}}")),
    Rule("an unknown field twice", A, one(f'{{{FIELDS},"x":1,"x":2}}')),
    Rule("a name twice in an unknown field", A, extra('{"a":1,"a":2}')),
    Rule("a field in other letters beside it", A, one(f'{{{FIELDS},"DTYPE":"F64"}}')),
    Rule("an entry that is an array", S, one('["F32",[2],[0,8]]')),
    Rule("an entry that is an array of four", R, one('["F32",[2],[0,8],0]')),
    Rule("an entry that is null", R, one("null")),
    Rule("an entry that is a number", R, one("8")),
    Rule("an entry that is empty", R, one("{}")),
    # Numbers
    *(Rule(f"a dimension {text}", R, tensor(shape=f"[{text}]")) for text in NO_SIZES),
    *(Rule(f"an end {text}", R, tensor(offsets=f"[0,{text}]")) for text in NO_SIZES),
    Rule("a dimension true of the right size", R, tensor(shape="[true]", offsets="[0,4]", body=bytes(4))),
    Rule("a dimension false of the right size", R, tensor(shape="[false]", offsets="[0,0]", body=b"")),
    Rule("a start false of the right value", R, tensor(offsets="[false,8]")),
    Rule("a dimension -0", R, tensor(shape="[-0]", offsets="[0,0]", body=b"")),
    Rule("an offset -0", R, tensor(offsets="[-0,8]")),
    Rule("a dimension 2^64", R, tensor(shape="[0,18446744073709551616]", offsets="[0,0]", body=b"")),
    Rule("a dimension 2^64-1", A, tensor(shape="[0,18446744073709551615]", offsets="[0,0]", body=b"")),
    Rule("offsets 2^64", R, tensor(offsets="[18446744073709551616,18446744073709551624]")),
    Rule("a dimension of 10,000 digits", R, tensor(shape=f"[0,{'1' * 10_000}]", offsets="[0,0]", body=b"")),
    Rule("a dimension that is an array", R, tensor(shape="[[2]]")),
    Rule("a shape that is a number", R, tensor(shape="2")),
    Rule("a shape that is null", R, tensor(shape="null")),
    Rule("a shape that is an object", R, tensor(shape="{}")),
    Rule("no offsets", R, tensor(offsets="[]")),
    Rule("one offset", R, tensor(offsets="[8]")),
    Rule("three offsets", R, tensor(offsets="[0,8,8]")),
    Rule("offsets that are an object", R, tensor(offsets='{"0":0,"1":8}')),
    Rule("offsets that are a string", R, tensor(offsets='"08"')),
    # Dtypes
    Rule("an unknown dtype", R, tensor("F128", "[]")),
    Rule("a dtype in small letters", R, tensor("f32")),
    Rule("a dtype with a space", R, tensor("F32 ")),
    Rule("an empty dtype", R, tensor("")),
    Rule("a dtype that is null", R, one('{"dtype":null,"shape":[2],"data_offsets":[0,8]}')),
    Rule("a dtype that is a number", R, one('{"dtype":32,"shape":[2],"data_offsets":[0,8]}')),
    Rule("a dtype that is a list", R, one('{"dtype":["F32"],"shape":[2],"data_offsets":[0,8]}')),
    Rule("a dtype that is an object", S, one('{"dtype":{"F32":null},"shape":[2],"data_offsets":[0,8]}')),
    Rule("a dtype that is an empty object", R, one('{"dtype":{},"shape":[2],"data_offsets":[0,8]}')),
    # Shapes
    Rule("a scalar", A, tensor(shape="[]", offsets="[0,4]", body=bytes(4))),
    Rule("a dimension of zero", A, tensor(shape="[3,0,5]", offsets="[0,0]", body=b"")),
    Rule("a product beyond 64 bits before a zero", R, tensor("U8", "[9223372036854775808,4,0]", "[0,0]", b"")),
    Rule("a zero before a product beyond 64 bits", A, tensor("U8", "[0,9223372036854775808,4]", "[0,0]", b"")),
    Rule("a product beyond 64 bits", R, tensor("U8", "[4294967296,4294967296]", "[0,0]", b"")),
    Rule("bits beyond 64 bits", R, tensor("U8", "[2305843009213693952]", "[0,0]", b"")),
    Rule("an odd number of F4", R, tensor("F4", "[3]", "[0,2]", bytes(2))),
    Rule("an odd number of F4, rounded down", R, tensor("F4", "[3]", "[0,1]", bytes(1))),
    Rule("an even number of F4", A, tensor("F4", "[2,3]", "[0,3]", bytes(3))),
    Rule("two F6", R, tensor("F6_E2M3", "[2]", "[0,2]", bytes(2))),
    Rule("four F6", A, tensor("F6_E3M2", "[4]", "[0,3]", bytes(3))),
    Rule("too few bytes for the shape", R, tensor(offsets="[0,4]", body=bytes(4))),
    Rule("too many bytes for the shape", R, tensor(offsets="[0,12]", body=bytes(12))),
    # Layout
    Rule("two tensors", A, u8((0, 3), (3, 7))),
    Rule("two tensors in another order", A, u8((4, 7), (0, 4))),
    Rule("tensors at odd addresses", A, file_of(f'{{"a":{{{FIELDS}}}}}   ', EIGHT)),
    Rule("a first tensor that does not begin at zero", R, u8((1, 3))),
    Rule("a hole", R, u8((0, 3), (4, 6))),
    Rule("an overlap", R, u8((0, 3), (2, 5))),
    Rule("the same bytes twice", R, u8((0, 4), (0, 4))),
    Rule("an end before its start", R, u8((0, 4), (4, 2), size=4)),
    Rule("no bytes in another tensor's middle", R, u8((0, 4), (2, 2))),
    Rule("no bytes behind the tensor that begins there", A, u8((2, 5), (0, 2), (2, 2))),
    Rule("many tensors of no bytes", A, u8((0, 0), (3, 3), (0, 3), (0, 0), (3, 3))),
    Rule("a byte missing", R, u8((0, 3), (3, 7), size=6)),
    Rule("a byte too many", R, u8((0, 3), (3, 7), size=8)),
    Rule("nothing but the header", R, u8((0, 3), size=0)),
    Rule("offsets far outside", R, tensor("U8", "[1]", "[1152921504606846976,1152921504606846977]", b"\0")),
]


@pytest.mark.parametrize("rule", RULES, ids=[rule.name for rule in RULES])
def test_rule(rule: Rule) -> None:
    assert (reference(rule.content) is not None, isinstance(judge(rule.content), ShardFile)) == rule.verdict.value
    if rule.verdict is S:
        assert reasons_to_be_stricter(rule.content) == [rule.name.partition(",")[0]]


def test_header_limit_is_inclusive() -> None:
    largest = HeaderReader(2**40, key=KEY)
    largest.feed(MAX_HEADER_BYTES.to_bytes(8, "little"))
    assert largest.needed == 8 + MAX_HEADER_BYTES
    with pytest.raises(HeaderError, match="100000001 bytes; the limit is 100000000"):
        HeaderReader(2**40, key=KEY).feed((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
