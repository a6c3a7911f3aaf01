"""The scanner against `bytes.find`, and files read in pieces."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from characterflywheel import scan
from characterflywheel.scan import Hit, Scanner, spellings

NEEDLES = st.lists(st.text("ab", min_size=8, max_size=12).map(str.encode), max_size=6, unique=True)


@given(needles=NEEDLES, data=st.text("ab", max_size=80).map(str.encode))
def test_every_occurrence_is_found_and_nothing_else(needles: list[bytes], data: bytes) -> None:
    expected = [
        Hit(number, start)
        for start in range(len(data))
        for number, needle in enumerate(needles)
        if data.startswith(needle, start)
    ]
    assert Scanner(needles).hits(data) == expected


def test_a_match_across_two_pieces_of_a_file_is_found_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "_AT_ONCE", 16)
    file = tmp_path / "f"
    file.write_bytes(b"." * 10 + b"needle-one" + b"." * 30 + b"needle-one" + b"another needle")
    scanner = Scanner([b"needle-one", b"another needle"])
    assert list(scanner.in_file(file)) == [Hit(0, 10), Hit(0, 50), Hit(1, 60)]


def test_a_text_is_known_in_plain_in_json_and_in_html() -> None:
    assert spellings('é "<') == {'é "<'.encode(), b'\\u00e9 \\"<', 'é \\"<'.encode(), "é &#34;&lt;".encode()}


def test_a_needle_that_is_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match="shorter than 8 bytes"):
        Scanner([b"short"])
