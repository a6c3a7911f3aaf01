"""Identifiers: examples of every kind, what is none, and recall on labelled sentences."""

import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from characterflywheel.safety.privacy import find_identifiers, iban_valid, luhn

DATA = Path(__file__).parents[2].parent / "shared" / "data"

FOUND = [
    ("write me at jane.doe@example.org ok?", "email", "jane.doe@example.org"),
    ("jane (at) example dot com", "email", "jane (at) example dot com"),
    ("call +44 20 7946 0958 tonight", "phone", "+44 20 7946 0958"),
    ("it's 541-714-1388", "phone", "541-714-1388"),
    ("4111 1111 1111 1111", "credit_card", "4111 1111 1111 1111"),
    ("GB82 WEST 1234 5698 7654 32", "iban", "GB82 WEST 1234 5698 7654 32"),
    ("ping 192.168.10.7 now", "ip", "192.168.10.7"),
    ("2001:db8::ff00:42:8329", "ip", "2001:db8::ff00:42:8329"),
    ("my ssn: 853-37-1694", "social_security", "853-37-1694"),
    ("see instagram.com/jane.doe", "url_user", "instagram.com/jane.doe"),
    ("I live at 221b Baker Street", "street_address", None),
    ("follow @jane_doe", "handle", "@jane_doe"),
    ("my snap is janedoe99", "handle", "janedoe99"),
    ("hi, my name is anna", "name", "anna"),
    ("I'm Jane Doe", "name", "Jane Doe"),
]
NOT_FOUND = [
    "I have 2 cats and 1000000 ideas",
    "meet at 12:30 on 2024-05-06",
    "My name is not important",
    "it's 3.14159265358979",
    "we won 3-2 in 2018!",
    "I'm happy, I'm really Tired",
    "call me when you can",
    "1234567890123",
]


@pytest.mark.parametrize(("text", "kind", "value"), FOUND)
def test_finds(text: str, kind: str, value: str | None) -> None:
    findings = find_identifiers(text)
    assert [f.kind for f in findings] == [kind]
    if value is not None:
        assert text[findings[0].start : findings[0].end] == value


@pytest.mark.parametrize("text", NOT_FOUND)
def test_leaves_alone(text: str) -> None:
    assert find_identifiers(text) == ()


def test_check_digits() -> None:
    assert luhn("79927398713")  # the example of ISO/IEC 7812
    assert not luhn("79927398710")
    assert iban_valid("DE89370400440532013000")
    assert not iban_valid("DE88370400440532013000")


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=80))
def test_findings_are_spans_in_order_that_do_not_overlap(text: str) -> None:
    findings = find_identifiers(text)
    ends = [0, *(f.end for f in findings)]
    assert all(end <= f.start < f.end <= len(text) for end, f in zip(ends, findings, strict=False))


@settings(max_examples=30, deadline=None)
@given(st.integers(10**14, 10**15 - 1), st.sampled_from(["", "so ", "number "]))
def test_every_valid_card_number_is_found(start: int, before: str) -> None:
    card = next(f"{start}{digit}" for digit in range(10) if luhn(f"{start}{digit}"))
    assert [f.kind for f in find_identifiers(before + card)] == ["credit_card"]


@pytest.mark.skipif(not DATA.exists(), reason="real data (../shared/data) is not on this machine")
def test_recall_on_labelled_sentences() -> None:
    rows = pq.read_table(DATA / "pii_presidio.parquet", columns=["text", "spans"]).to_pylist()
    total, found = Counter[str](), Counter[str]()
    for row in rows:
        findings = find_identifiers(row["text"])
        for span in json.loads(row["spans"]):
            total[span["entity_type"]] += 1
            hit = any(f.start < span["end_position"] and span["start_position"] < f.end for f in findings)
            found[span["entity_type"]] += hit
    floors = {
        "EMAIL_ADDRESS": 1, "CREDIT_CARD": 1, "IP_ADDRESS": 1, "IBAN_CODE": 1, "US_SSN": 1, "DOMAIN_NAME": 1,
        "PHONE_NUMBER": 0.9, "STREET_ADDRESS": 0.5,
    }  # fmt: skip
    assert {kind: found[kind] / total[kind] >= floor for kind, floor in floors.items()} == dict.fromkeys(floors, True)
