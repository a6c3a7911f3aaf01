"""Cards inside pictures: PNG text chunks `ccv3` and `chara` that hold a card's JSON in base64 (DESIGN section 5).

The picture is not decoded. Its chunks are walked with every length and checksum verified, text is inflated up to a
bound, and writing replaces the card's chunks and leaves all others as they are, animation and trailing bytes included.
"""

import base64
import binascii
import json
import struct
import zlib
from collections.abc import Mapping
from typing import NamedTuple

from ..errors import FlywheelError
from ..records import Character
from .card import MAX_JSON_BYTES, read_json
from .convert import backfill, card_of
from .picture import initials_picture

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_PNG_BYTES = 32 * 1024 * 1024
_MAX_TEXT = MAX_JSON_BYTES // 3 * 4 + 4  # base64 of the largest card
_KEYWORDS = (b"ccv3", b"chara")
_TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt")


class Chunk(NamedTuple):
    """A chunk of a PNG: its four-letter kind and its data."""

    kind: bytes
    data: bytes


class Parts(NamedTuple):
    """A PNG taken apart: its chunks, IHDR to IEND, and what follows them in the file."""

    chunks: tuple[Chunk, ...]
    trailing: bytes


def is_png(raw: bytes) -> bool:
    """Whether `raw` begins as a PNG does."""
    return raw.startswith(SIGNATURE)


def read_png(raw: bytes) -> dict[str, object]:
    """The card in a PNG: that of `ccv3` before that of `chara`.

    Raises FlywheelError for a file that is no whole PNG, has no card, or whose card is broken or over the bounds.
    """
    chunks = take_apart(raw).chunks
    for keyword in _KEYWORDS:
        for chunk in chunks:
            if _keyword(chunk) == keyword:
                return read_json(_decode(_text(chunk), keyword.decode()))
    raise FlywheelError("the picture holds no character card (no `ccv3` or `chara` chunk); was it saved as a copy?")


def read_card(raw: bytes) -> dict[str, object]:
    """The card in a file's bytes, PNG or JSON. Raises FlywheelError where there is none or it is broken."""
    return read_png(raw) if is_png(raw) else read_json(raw)


def write_png(character: Character, picture: bytes | None = None) -> bytes:
    """The character's card in a PNG: V3 in `ccv3`, and V2 in `chara` for programs that read no V3.

    `picture` is any PNG, kept but for a card in it; without one, a picture with the character's initials is made.
    """
    parts = take_apart(initials_picture(character.name, character.id) if picture is None else picture)
    kept = [chunk for chunk in parts.chunks if _keyword(chunk) is None]
    cards = [_chunk(b"chara", backfill(character)), _chunk(b"ccv3", card_of(character, "v3"))]
    return _put_together([*kept[:-1], *cards, kept[-1]], parts.trailing)


def picture_of(raw: bytes) -> bytes:
    """A PNG without the card in it, otherwise the same bytes."""
    parts = take_apart(raw)
    return _put_together([chunk for chunk in parts.chunks if _keyword(chunk) is None], parts.trailing)


def take_apart(raw: bytes) -> Parts:
    """The chunks of a PNG from IHDR to IEND. Raises FlywheelError where a length or a checksum is wrong."""
    if not is_png(raw):
        raise FlywheelError("the picture is not a PNG; cards live in PNG pictures or in JSON.")
    if len(raw) > MAX_PNG_BYTES:
        raise FlywheelError(f"the picture has {len(raw)} bytes, at most {MAX_PNG_BYTES} are read.")
    chunks: list[Chunk] = []
    at = len(SIGNATURE)
    while not chunks or chunks[-1].kind != b"IEND":
        if at + 12 > len(raw):
            raise FlywheelError(f"the PNG is cut off at byte {at}, before its end; transfer it again.")
        length, kind = _HEAD.unpack_from(raw, at)
        end = at + 8 + length
        if end + 4 > len(raw):
            raise FlywheelError(f"the PNG is cut off: its chunk {kind!r} at byte {at} says it has {length} bytes.")
        if _CRC.unpack_from(raw, end)[0] != zlib.crc32(raw[at + 4 : end]):
            raise FlywheelError(f"the PNG is damaged: the checksum of its chunk {kind!r} at byte {at} is wrong.")
        if not chunks and kind != b"IHDR":
            raise FlywheelError(f"the PNG begins with a chunk {kind!r}, must begin with IHDR.")
        chunks.append(Chunk(kind, raw[at + 8 : end]))
        at = end + 4
    return Parts(tuple(chunks), raw[at:])


_HEAD = struct.Struct(">I4s")
_CRC = struct.Struct(">I")


def _put_together(chunks: list[Chunk], trailing: bytes) -> bytes:
    pieces = [SIGNATURE]
    for kind, data in chunks:
        pieces += [_HEAD.pack(len(data), kind), data, _CRC.pack(zlib.crc32(data, zlib.crc32(kind)))]
    return b"".join([*pieces, trailing])


def _keyword(chunk: Chunk) -> bytes | None:
    """`ccv3` or `chara` if the chunk is a text of that name, in any case; None for every other chunk."""
    if chunk.kind not in _TEXT_CHUNKS:
        return None
    word = chunk.data[:80].split(b"\0", 1)[0].lower()
    return word if word in _KEYWORDS else None


def _text(chunk: Chunk) -> bytes:
    """The text of a text chunk, inflated where it is compressed."""
    _, _, rest = chunk.data.partition(b"\0")
    if chunk.kind == b"tEXt":
        return rest
    if chunk.kind == b"zTXt":
        return _inflate(rest[:1], rest[1:])
    compressed, method, rest = rest[:1], rest[1:2], rest[2:]
    _language, _, rest = rest.partition(b"\0")
    _translated, _, text = rest.partition(b"\0")
    return _inflate(method, text) if compressed == b"\1" else text


def _inflate(method: bytes, data: bytes) -> bytes:
    if method != b"\0":
        raise FlywheelError(f"the card's text is compressed by method {method!r}; PNG knows method 0 alone.")
    inflater = zlib.decompressobj()
    try:
        text = inflater.decompress(data, _MAX_TEXT + 1)
    except zlib.error as error:
        raise FlywheelError(f"the card's compressed text is damaged ({error}); export the card again.") from None
    if len(text) > _MAX_TEXT:
        raise FlywheelError(f"the card's text inflates to more than {_MAX_TEXT} bytes; it is no card.")
    if not inflater.eof:
        raise FlywheelError("the card's compressed text is cut off; export the card again.")
    return text


def _decode(text: bytes, keyword: str) -> bytes:
    """The JSON in a chunk's text: base64 by the specifications, though some programs leave it plain."""
    if len(text) > _MAX_TEXT:
        raise FlywheelError(f"the card in chunk {keyword} has {len(text)} bytes, at most {_MAX_TEXT} are read.")
    if text.lstrip().startswith(b"{"):
        return text
    try:
        return base64.b64decode(b"".join(text.split()), validate=True)
    except binascii.Error as error:
        raise FlywheelError(f"the card in chunk {keyword} is not base64 ({error}); export the card again.") from None


def _chunk(keyword: bytes, card: Mapping[str, object]) -> Chunk:
    text = json.dumps(card, ensure_ascii=False).encode()
    return Chunk(b"tEXt", keyword + b"\0" + base64.b64encode(text))
