"""The header of a safetensors file: how much of the file it is, and what it says. No I/O."""

from __future__ import annotations

from operator import itemgetter

from streamload.checkpoint.dtypes import DTYPE_BITS
from streamload.checkpoint.strict_json import InvalidJson, Pairs, RepeatingObject, decode_object, read_object
from streamload.checkpoint.tensors import ShardFile, TensorInfo
from streamload.checkpoint.text import brief
from streamload.errors import HeaderError

__all__ = ["MAX_HEADER_BYTES", "HeaderReader", "parse_header"]

MAX_HEADER_BYTES = 100_000_000
"""The longest header, without the eight bytes of its length: the reference implementation's limit."""

_LENGTH_BYTES = 8
_MAX_U64 = 2**64 - 1
_METADATA = "__metadata__"
_FIELDS = ("dtype", "shape", "data_offsets")
_BY_START = itemgetter(3)
_BY_END = itemgetter(4)

# A tensor's dtype, shape, start and end; whether the numbers are numbers is for `_size` and `_check_offsets` to see.
_Entry = tuple[str, tuple[int, ...], int, int]


class HeaderReader:
    """Takes a file's bytes in order, in pieces of any size, until its header is whole.

    It does no I/O: the caller reads up to `needed` and feeds what came, until `needed` is None. Reading further at the
    first try saves a request; what lies beyond the header is ignored::

        reader = HeaderReader(size_bytes, key=key)
        while (end := reader.needed) is not None:
            reader.feed(read(reader.received, end))
        file = parse_header(reader.header, key=key, size_bytes=size_bytes)

    The length is checked before anything of that length is allocated. A reader that has raised raises again.

    Args:
        size_bytes: The whole file's length.
        key: What errors should call the file.

    Raises:
        HeaderError: The file is too short to hold even the header's length.
    """

    def __init__(self, size_bytes: int, *, key: str) -> None:
        if size_bytes < _LENGTH_BYTES:
            raise HeaderError(
                f"the file has {size_bytes} bytes; the length of a header alone takes {_LENGTH_BYTES}",
                object=key,
                start=0,
                end=_LENGTH_BYTES,
            )
        self._size_bytes = size_bytes
        self._key = key
        self._received = 0
        self._needed = _LENGTH_BYTES
        self._buffer = bytearray()
        self._header: bytes | None = None

    @property
    def received(self) -> int:
        """How many of the file's bytes have been taken; what comes next is the byte at this offset."""
        return self._received

    @property
    def needed(self) -> int | None:
        """Up to which offset of the file more bytes are needed now; None when the header is whole."""
        return self._needed if self._header is None else None

    @property
    def header(self) -> bytes | None:
        """The header's JSON, without the eight bytes before it; None until it is whole."""
        return self._header

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Take the file's next bytes, which begin at `received`.

        Args:
            data: Any number of them; it is copied as far as it is needed.

        Raises:
            HeaderError: The header's length is above the limit or leads past the end of the file.
        """
        rest = memoryview(data).cast("B")
        while rest and self._header is None:
            piece = rest[: self._needed - self._received]
            rest = rest[len(piece) :]
            self._buffer += piece
            self._received += len(piece)
            if self._received == self._needed:
                self._advance()

    def _advance(self) -> None:
        if self._needed == _LENGTH_BYTES:
            length = int.from_bytes(self._buffer, "little")
            try:
                _check_length(length, self._size_bytes)
            except HeaderError as error:
                error.locate(object=self._key, start=0, end=_LENGTH_BYTES)
                raise
            self._buffer.clear()
            self._needed += length
        if self._received == self._needed:
            self._header = bytes(self._buffer)
            self._buffer.clear()


def parse_header(raw: bytes, *, key: str, size_bytes: int) -> ShardFile:
    """Say which tensors a file holds, if its header obeys every rule of the format.

    The verdict is that of the reference implementation (safetensors 0.8.0), whitespace in front of the header
    included, which it accepts on purpose although its README says that a header begins with ``{``. Four things that the
    reference lets pass are refused because their meaning is doubtful: a tensor's name that stands twice, a name that
    stands twice in ``__metadata__``, a tensor described by an array instead of an object, and a dtype that is an
    object (``{"F32": null}``).

    A header of 100,000 tensors takes some tenths of a second: call it where nothing waits for the thread.

    Args:
        raw: The header's JSON, without the eight bytes of its length.
        key: The object's key.
        size_bytes: The whole file's length, as the source has it. A header that describes fewer or more bytes does not
            stand.

    Returns:
        The file's tensors in the order of their bytes, with offsets counted from the file's first byte.

    Raises:
        HeaderError: It is not the header of such a file; the text names the tensor and the numbers.
    """
    try:
        return _parse(raw, key, size_bytes)
    except HeaderError as error:
        error.locate(object=key, start=0, end=_LENGTH_BYTES + len(raw))
        raise


def _check_length(length: int, size_bytes: int) -> None:
    if length > MAX_HEADER_BYTES:
        raise HeaderError(f"the header claims {length} bytes; the limit is {MAX_HEADER_BYTES}{_what_else(length)}")
    if _LENGTH_BYTES + length > size_bytes:
        raise HeaderError(f"the header claims {length} bytes, but {size_bytes - _LENGTH_BYTES} follow its length")


def _what_else(length: int) -> str:
    """What a file may be that begins with these eight bytes in place of a header's length."""
    first = length.to_bytes(_LENGTH_BYTES, "little")
    if first == b"version ":
        return ": this is no safetensors file, but perhaps a pointer of Git LFS, which `git lfs pull` replaces"
    if first.startswith(b"PK\x03\x04"):
        return ": this is no safetensors file, but a ZIP archive, as torch.save writes"
    if first.isascii() and first.decode().isprintable():
        return f": this is no safetensors file, but perhaps text; it begins with {first.decode()!r}"
    return ""


def _parse(raw: bytes, key: str, size_bytes: int) -> ShardFile:
    _check_length(len(raw), size_bytes)
    document = _decode(raw)
    if isinstance(document, RepeatingObject):
        raise HeaderError(f"the name {brief(document.repeated[0])} stands more than once in the header")
    if not isinstance(document, dict):
        raise HeaderError(f"the header is not an object but {brief(document)}")
    metadata = _metadata(document.pop(_METADATA, None))
    header_bytes = _LENGTH_BYTES + len(raw)
    tensors = []
    for name, entry in document.items():
        dtype, shape, start, end = entry if type(entry) is tuple else _entry(name, entry)
        _check_offsets(name, start, end, _size(name, dtype, shape))
        tensors.append(TensorInfo(name, dtype, shape, start + header_bytes, end + header_bytes))
    # Both sorts are stable, so that this is the order of (start, end), without a pair for each tensor.
    tensors.sort(key=_BY_END)
    tensors.sort(key=_BY_START)
    _check_layout(tensors, header_bytes, size_bytes)
    return ShardFile(key, size_bytes, header_bytes, tuple(tensors), metadata)


def _decode(raw: bytes) -> object:
    try:
        return decode_object(raw, make_object=_read_object)
    except InvalidJson as error:
        problem = str(error)
    raise HeaderError(f"the header cannot be read: {problem}")


def _read_object(pairs: Pairs) -> object:
    """Make a tuple of an object that looks like a tensor's entry, as soon as it has been read.

    A header has one for each tensor; as dicts of lists they would keep the garbage collector busy for longer than
    everything else here takes together.
    """
    if len(pairs) == 3:
        (first, dtype), (second, shape), (third, offsets) = pairs
        if (first, second, third) != _FIELDS:
            fields = dict(pairs)
            dtype, shape, offsets = map(fields.get, _FIELDS)
        if type(dtype) is str and type(shape) is list and type(offsets) is list and len(offsets) == 2:
            return dtype, tuple(shape), *offsets
    return read_object(pairs)


def _metadata(value: object) -> dict[str, str]:
    if value is None:
        return {}
    if isinstance(value, RepeatingObject):
        raise HeaderError(f"the name {brief(value.repeated[0])} stands more than once in {_METADATA}")
    if not isinstance(value, dict):
        raise HeaderError(f"{_METADATA} is not an object of strings but {brief(value)}")
    for name, text in value.items():
        if not isinstance(text, str):
            raise HeaderError(f"{_METADATA} has no string under {brief(name)} but {brief(text)}")
    return value


def _entry(name: str, entry: object) -> _Entry:
    """Read an entry that was not made a tuple: one with further fields, or one that is to be refused."""
    if not isinstance(entry, dict):
        raise HeaderError(f"tensor {brief(name)} is not described by an object but by {brief(entry)}")
    for field in _FIELDS:
        if field not in entry:
            raise HeaderError(f"tensor {brief(name)} has no {field}")
        if isinstance(entry, RepeatingObject) and field in entry.repeated:
            raise HeaderError(f"tensor {brief(name)} has more than one {field}")
    dtype, shape, offsets = map(entry.get, _FIELDS)
    if not isinstance(dtype, str):
        raise HeaderError(f"the dtype of tensor {brief(name)} is not a string but {brief(dtype)}")
    if not isinstance(shape, list):
        raise HeaderError(f"the shape of tensor {brief(name)} is not an array but {brief(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2:
        raise HeaderError(f"the data_offsets of tensor {brief(name)} are not two numbers but {brief(offsets)}")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _size(name: str, dtype: str, shape: tuple[int, ...]) -> int:
    """How many bytes a tensor has, once its dtype and its shape are known to make sense.

    The product is taken from left to right and may not leave 64 bits on the way, even where a zero follows.
    """
    bits = DTYPE_BITS.get(dtype)
    if bits is None:
        raise HeaderError(f"tensor {brief(name)} has the dtype {brief(dtype)}, which the format does not have")
    elements = 1
    for dim in shape:
        if type(dim) is not int or dim < 0:
            raise HeaderError(f"tensor {brief(name)} has a dimension that is no size: {brief(dim)}")
        elements *= dim
        if elements > _MAX_U64:
            raise HeaderError(f"tensor {brief(name)} has too many elements: its shape is {brief(shape)}")
    bits *= elements
    if bits > _MAX_U64:
        raise HeaderError(f"tensor {brief(name)} has too many bits: it is {dtype} of shape {brief(shape)}")
    if bits % 8:
        raise HeaderError(f"tensor {brief(name)} ends inside a byte: it is {dtype} of shape {brief(shape)}")
    return bits // 8


def _check_offsets(name: str, start: int, end: int, nbytes: int) -> None:
    for offset in (start, end):
        if type(offset) is not int or offset < 0:
            raise HeaderError(f"tensor {brief(name)} has a data offset that is none: {brief(offset)}")
    if end - start != nbytes:
        raise HeaderError(
            f"tensor {brief(name)} should have {nbytes} bytes by its dtype and shape, but its data_offsets,"
            f" {start} and {end}, are {end - start} apart"
        )


def _check_layout(tensors: list[TensorInfo], header_bytes: int, size_bytes: int) -> None:
    """Every byte after the header belongs to exactly one tensor; nothing is left over and nothing is missing.

    Args:
        tensors: In the order of both their offsets. By the first alone, a tensor of no bytes could come after the one
            that begins where it stands, and seem to overlap it.
        header_bytes: Where the first one has to begin.
        size_bytes: Where the last one has to end.
    """
    position = header_bytes
    for tensor in tensors:
        if tensor.start > position:
            raise HeaderError(
                f"no tensor owns the {tensor.start - position} bytes before tensor {brief(tensor.name)}, whose"
                f" data_offsets begin at {tensor.start - header_bytes} instead of {position - header_bytes}"
            )
        if tensor.start < position:
            raise HeaderError(
                f"tensor {brief(tensor.name)} overlaps the one before it: its data_offsets begin at"
                f" {tensor.start - header_bytes} instead of {position - header_bytes}"
            )
        position = tensor.end
    if position != size_bytes:
        last = f"its last tensor, {brief(tensors[-1].name)}, ends" if tensors else "it holds no tensor and ends"
        raise HeaderError(
            f"the file has {size_bytes} bytes, but {last} at byte {position}:"
            f" it is {'cut short' if position > size_bytes else 'too long'}"
        )
