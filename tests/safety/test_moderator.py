"""Safety on every turn: all are asked, failures refuse and are counted, and a stream shows nothing unchecked."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Literal, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from characterflywheel.config import SafetyConfig
from characterflywheel.errors import FlywheelError
from characterflywheel.records import Finish
from characterflywheel.safety.moderator import Inline, Moderator, Piece, make_moderator, screened
from characterflywheel.safety.policy import Classifier, Subject


class Chunk(NamedTuple):
    """A piece of a model's stream."""

    text: str
    finish: Finish | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class Hangs:
    """A classifier that never answers once the text has a word."""

    name = "hangs"

    def __init__(self, word: str) -> None:
        self.word = word
        self.closed = False

    async def judge(self, text: str, context: str, subject: str) -> tuple[str, ...]:
        if self.word in text:
            await asyncio.sleep(3600)
        return ()

    async def close(self) -> None:
        self.closed = True


class Waits(Inline):
    """A classifier that computes elsewhere."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__("waits", classifier)

    async def judge(self, text: str, context: str, subject: Subject) -> tuple[str, ...]:
        await asyncio.sleep(0)
        return await super().judge(text, context, subject)


class Source:
    """A model's stream that knows how far it was read and whether it was closed."""

    def __init__(self, parts: Sequence[str]) -> None:
        self.parts, self.read, self.closed = parts, 0, False

    async def __call__(self) -> AsyncIterator[Chunk]:
        try:
            for part in self.parts:
                self.read += 1
                yield Chunk(part)
            yield Chunk("", "stop")
            yield Chunk("", None, 7, 9)
        finally:
            self.closed = True


def poison(text: str, context: str) -> tuple[str, ...]:
    """Refuses one word."""
    return ("harm",) if "poison" in text else ()


async def read(chunks: AsyncIterator[Chunk], moderator: Moderator, **more: object) -> list[Piece]:
    return [piece async for piece in screened(chunks, moderator, **more)]  # type: ignore[arg-type]


def test_the_default_is_rules_and_they_refuse_outright_harm() -> None:
    moderator = make_moderator(SafetyConfig())
    assert asyncio.run(moderator.check("Good morning!")) == (True, ())
    assert asyncio.run(moderator.check("I will kill you")) == (False, ("violence",))
    answer = asyncio.run(moderator.check("Yes, good idea!", context="I want to kill my boss"))
    assert answer.categories == ("agrees_with_harm",)
    assert moderator.refused == {("rules", "violence"): 1, ("rules", "agrees_with_harm"): 1}
    assert moderator.checks == 3
    asyncio.run(moderator.ready())


def test_a_failure_refuses_and_is_counted_and_logged_without_the_text(caplog: pytest.LogCaptureFixture) -> None:
    def broken(text: str, context: str) -> tuple[str, ...]:
        raise RuntimeError(f"cannot judge {text}")

    moderator = Moderator([Inline("broken", broken), Inline("poison", poison)], 1)
    with caplog.at_level(logging.ERROR):
        verdicts = [asyncio.run(moderator.check(f"my secret {i}")) for i in range(50)]
    assert set(verdicts) == {(False, ("unchecked",))}
    assert moderator.caught.counts == {("broken", "RuntimeError"): 50}
    assert moderator.refused == {("broken", "unchecked"): 50}
    assert len(caplog.records) == 1
    assert "secret" not in caplog.text
    assert "RuntimeError at test_moderator.py:" in caplog.text
    with pytest.raises(FlywheelError, match=r"'broken' finds .*unchecked"):
        asyncio.run(moderator.ready())


def test_an_answer_that_is_none_is_a_failure() -> None:
    moderator = Moderator([Inline("vague", lambda text, context: None)], 1)  # type: ignore[arg-type, return-value]
    assert asyncio.run(moderator.check("hello")) == (False, ("unchecked",))
    assert moderator.caught.counts == {("vague", "TypeError"): 1}


def test_a_classifier_that_hangs_is_a_failure() -> None:
    moderator = Moderator([Hangs("a"), Inline("poison", poison)], 0.02)
    assert asyncio.run(moderator.check("a poison")) == (False, ("harm", "unchecked"))
    assert moderator.caught.counts == {("hangs", "TimeoutError"): 1}


def test_being_cancelled_is_no_verdict() -> None:
    async def leave() -> None:
        task = asyncio.create_task(Moderator([Hangs("a")], 60).check("a"))
        await asyncio.sleep(0.01)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(leave())


def test_no_classifier_is_no_moderator() -> None:
    with pytest.raises(FlywheelError, match="name at least one"):
        make_moderator(SafetyConfig(classifiers=()))


TEXT = st.lists(
    st.sampled_from(["Hi", "you", "poison", ".", "!", "?", "…", "。", '"', ")", " ", " ", "\n", "x" * 500]), max_size=40
).map("".join)


@given(st.data(), TEXT, st.sampled_from(["sentence", "reply"]), st.booleans())
def test_what_is_released_has_passed(
    data: st.DataObject, text: str, hold: Literal["sentence", "reply"], waits: bool
) -> None:
    """For any chunking: what is shown is a prefix, each release ends a text that passed, and nothing is lost."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    passed: set[str] = set()

    def remembers(text: str, context: str) -> tuple[str, ...]:
        assert context == "asked"
        found = poison(text, context)
        if not found:
            passed.add(text)
        return found

    source, judge = Source(parts), Waits(remembers) if waits else Inline("remembers", remembers)
    pieces = asyncio.run(read(source(), Moderator([judge], 1), context="asked", hold=hold))
    shown = ""
    for piece in pieces:
        shown += piece.text
        assert text.startswith(shown)
        assert not piece.text or shown in passed
    *before, last = pieces
    assert all(piece.verdict is None and piece.finish is None for piece in before)
    assert "poison" not in shown
    assert source.closed
    if "poison" not in text:
        assert shown == text
        assert last == Piece(last.text, "stop", 7, 9)
    else:
        assert last.verdict == (False, ("harm",))
        assert not last.text
        assert text.startswith(shown + last.withheld)
        assert "poison" in shown + last.withheld


def test_sentences_are_released_as_they_end_and_a_violation_stops_the_model() -> None:
    source = Source(["Good ", "day. I ", "have tea", "! Or", " poison. And", " more. ", "Never read."])
    pieces = asyncio.run(read(source(), Moderator([Inline("poison", poison)], 1)))
    assert [piece.text for piece in pieces] == ["Good day.", " I have tea!", ""]
    assert pieces[-1].verdict == (False, ("harm",))
    assert pieces[-1].withheld == " Or poison. And"
    assert (source.read, source.closed) == (5, True)


def test_a_whole_reply_is_held_where_that_is_wanted() -> None:
    pieces = asyncio.run(
        read(Source(["One. ", "Two. ", "Three."])(), Moderator([Inline("p", poison)], 1), hold="reply")
    )
    assert pieces == [Piece("One. Two. Three.", "stop", 7, 9)]


def test_a_sentence_without_end_is_cut_at_a_word() -> None:
    pieces = asyncio.run(read(Source(["word "] * 300)(), Moderator([Inline("p", poison)], 1)))
    assert len(pieces) > 3
    assert all(len(piece.text) < 420 and not piece.text.endswith("wor") for piece in pieces)


def test_a_classifier_that_hangs_midway_stops_the_stream() -> None:
    source = Source(["Fine. ", "Now a b. ", "More."])
    moderator = Moderator([Hangs("b")], 0.02)
    pieces = asyncio.run(read(source(), moderator))
    assert [piece.text for piece in pieces] == ["Fine.", ""]
    assert pieces[-1].verdict == (False, ("unchecked",))
    assert source.closed


def test_slow_checks_take_several_sentences_of_a_fast_model_together() -> None:
    class Slow(Hangs):
        async def judge(self, text: str, context: str, subject: str) -> tuple[str, ...]:
            asked.append(text)
            await asyncio.sleep(0.05)
            return poison(text, context)

    asked: list[str] = []
    sentences = [f"This is number {n}. " for n in range(30)]
    pieces = asyncio.run(read(Source(sentences)(), Moderator([Slow("")], 1)))
    assert "".join(piece.text for piece in pieces) == "".join(sentences)
    assert asked[0] == sentences[0][:-1]
    assert asked[-1] == "".join(sentences)
    assert len(asked) <= 4

    stopped = asyncio.run(read(Source([*sentences, "poison"])(), Moderator([Slow("")], 1)))[-1]
    assert stopped.verdict == (False, ("harm",))
    assert stopped.withheld.endswith("poison")


def test_an_error_of_the_model_passes_through_and_drops_what_was_not_released() -> None:
    async def dies() -> AsyncIterator[Chunk]:
        yield Chunk("All good. Not yet")
        raise ConnectionError("gone")

    shown: list[str] = []

    async def follow() -> None:
        async for piece in screened(dies(), Moderator([Inline("p", poison)], 1)):
            shown.append(piece.text)

    with pytest.raises(ConnectionError):
        asyncio.run(follow())
    assert shown == ["All good."]


def test_a_reader_who_leaves_closes_the_model() -> None:
    source = Source(["One. ", "Two. ", "Three."])

    async def leave() -> None:
        stream = screened(source(), Moderator([Inline("p", poison)], 1))
        assert (await anext(stream)).text == "One."
        await stream.aclose()  # type: ignore[attr-defined]

    asyncio.run(leave())
    assert (source.read, source.closed) == (1, True)


def test_an_empty_reply_ends_empty() -> None:
    moderator = Moderator([Inline("p", poison)], 1)
    assert asyncio.run(read(Source([])(), moderator)) == [Piece("", "stop", 7, 9)]
    assert moderator.checks == 0
