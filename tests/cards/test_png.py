"""Cards in pictures: every length and checksum counts, the picture stays as it is, bombs do not go off."""

import base64
import contextlib
import io
import json
import random
import struct
import zlib

import pytest
from cards_at_hand import FULL
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from characterflywheel.cards import character_of, read_card, read_png, write_png
from characterflywheel.cards.picture import initials, initials_picture
from characterflywheel.cards.png import SIGNATURE, Chunk, picture_of, take_apart
from characterflywheel.errors import FlywheelError

CARD = base64.b64encode(json.dumps(FULL).encode())
SMALL = base64.b64encode(json.dumps({"name": "Old", "description": "V1"}).encode())


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I4s", len(data), kind) + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*between: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0\0"))
    return b"".join([SIGNATURE, header, *between, pixels, chunk(b"IEND", b"")])


def text(value: bytes, keyword: bytes = b"ccv3") -> bytes:
    return chunk(b"tEXt", keyword + b"\0" + value)


@pytest.mark.parametrize(
    "found",
    [
        text(CARD),
        text(CARD, b"Chara"),
        text(CARD[:40] + b"\r\n" + CARD[40:]),
        text(json.dumps(FULL).encode()),
        chunk(b"zTXt", b"ccv3\0\0" + zlib.compress(CARD)),
        chunk(b"iTXt", b"chara\0\0\0en\0\0" + CARD),
        chunk(b"iTXt", b"chara\0\1\0\0titre\0" + zlib.compress(CARD)),
        text(SMALL, b"chara") + text(CARD),
    ],
    ids=["ccv3", "chara", "lines", "plain", "zTXt", "iTXt", "iTXt deflated", "ccv3 before chara"],
)
def test_the_card_is_found_wherever_programs_put_it(found: bytes) -> None:
    assert read_png(png(found)) == FULL
    assert read_card(png(found)) == FULL


BOMB = zlib.compress(b"A" * 60_000_000, 9)


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (png(), "holds no character card"),
        (png(text(b"%%%")), "not base64"),
        (png(text(base64.b64encode(b"[]"))), "JSON list"),
        (png(chunk(b"zTXt", b"ccv3\0\0" + BOMB)), "inflates to more than"),
        (png(chunk(b"zTXt", b"ccv3\0\0" + zlib.compress(CARD)[:-8])), "cut off"),
        (png(chunk(b"zTXt", b"ccv3\0\0nonsense")), "compressed text is damaged"),
        (png(chunk(b"zTXt", b"ccv3\0\7" + zlib.compress(CARD))), "method 0"),
        (png(text(b"A" * 12_000_000)), "at most 11184812 are read"),
        (png(text(CARD))[:-5], "cut off"),
        (png(text(CARD))[:60], "cut off"),
        (SIGNATURE, "cut off at byte 8"),
        (SIGNATURE + chunk(b"IEND", b""), "must begin with IHDR"),
        (b"GIF89a", "not a PNG"),
        (SIGNATURE + bytes(34_000_000), "at most 33554432 are read"),
    ],
)
def test_a_broken_picture_is_one_clear_error(raw: bytes, problem: str) -> None:
    with pytest.raises(FlywheelError, match=problem):
        read_png(raw)


def test_a_flipped_bit_is_found_by_the_checksum() -> None:
    raw = bytearray(png(text(CARD)))
    raw[80] ^= 1
    with pytest.raises(FlywheelError, match="checksum"):
        read_png(bytes(raw))


def test_writing_leaves_everything_else_of_the_picture_alone() -> None:
    other = [chunk(b"acTL", bytes(8)), text(b"Ann", b"Author"), chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"x"))]
    old = [text(SMALL, b"chara"), chunk(b"iTXt", b"ccv3\0\0\0\0\0" + SMALL)]
    raw = png(other[0], old[0], other[1], old[1], other[2]) + b"trailing"
    written = write_png(character_of(FULL), raw)
    assert picture_of(written) == picture_of(raw) == png(*other) + b"trailing"
    assert character_of(read_png(written)) == character_of(FULL)
    kinds = [one.kind for one in take_apart(written).chunks]
    assert kinds[-3:] == [b"tEXt", b"tEXt", b"IEND"]


def test_both_versions_are_written() -> None:
    chunks = take_apart(write_png(character_of(FULL))).chunks
    found = {one.data.split(b"\0")[0]: one.data.split(b"\0")[1] for one in chunks if one.kind == b"tEXt"}
    specs = {keyword: json.loads(base64.b64decode(value))["spec"] for keyword, value in found.items()}
    assert specs == {b"chara": "chara_card_v2", b"ccv3": "chara_card_v3"}


def test_a_picture_that_is_no_png_is_refused() -> None:
    with pytest.raises(FlywheelError, match="not a PNG"):
        write_png(character_of(FULL), b"\xff\xd8\xff\xe0 JFIF")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("Mirabel the Innkeeper", "MI"), ("zoë", "Z"), ("Éloise d'Arc", "ED"), ("Юля", ""), ("7 of 9", "O"), ("", "")],
)
def test_initials(name: str, expected: str) -> None:
    assert initials(name) == expected


@pytest.mark.parametrize("name", ["Mirabel the Innkeeper", "ひかり"])
def test_a_picture_is_made_where_there_is_none(name: str) -> None:
    raw = initials_picture(name, "mira")
    picture = Image.open(io.BytesIO(raw))
    assert picture.size == (400, 600)
    assert len(picture.getcolors(100_000) or ()) > 1, "something stands on the ground"
    assert raw == initials_picture(name, "mira")
    assert raw != initials_picture(name, "another")
    assert len(raw) < 20_000


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([b"tEXt", b"zTXt", b"iTXt", b"IEND", b"IDAT", b"????"]),
            st.sampled_from([b"", b"ccv3\0", b"chara\0\0", b"ccv3\0\1\0\0\0", b"ccv3"]),
            st.binary(max_size=40) | st.sampled_from([CARD, zlib.compress(CARD), b"{", b"bnVsbA=="]),
        ).map(lambda parts: chunk(parts[0], parts[1] + parts[2])),
        max_size=4,
    ),
    st.integers(0, 400),
    st.booleans(),
)
def test_any_chunks_are_a_card_or_refused(chunks: list[bytes], cut: int, whole: bool) -> None:
    raw = png(*chunks)
    with contextlib.suppress(FlywheelError):
        assert isinstance(read_png(raw if whole else raw[:cut]), dict)


def test_noise_in_a_real_picture_is_a_card_or_refused() -> None:
    rng = random.Random(7)
    raw = write_png(character_of(FULL))
    refused = 0
    for _ in range(300):
        noisy = bytearray(raw)
        for _ in range(rng.randint(1, 4)):
            noisy[rng.randrange(len(noisy))] = rng.randrange(256)
        try:
            assert read_png(bytes(noisy))["spec"] == "chara_card_v3"
        except FlywheelError:
            refused += 1
    assert refused > 200


def test_chunks_are_read_as_they_stand() -> None:
    assert take_apart(png(text(b"x"))).chunks[1] == Chunk(b"tEXt", b"ccv3\0x")
