"""Safety on every turn: classifiers behind one question, and streams that show nothing unchecked (PAPER section 9).

`Moderator` asks every classifier that the configuration names, each with a time limit, and fails closed: what one of
them could not judge is `unchecked`, and so not allowed. `screened` holds a streamed reply back until the text up to
there has passed.
"""

import asyncio
import re
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack
from typing import Literal, NamedTuple, Protocol

from ..config import SafetyConfig
from ..errors import FlywheelError
from ..records import Finish
from .caught import Caught
from .policy import UNCHECKED, Classifier, SafetyPolicy, SafetyVerdict, Subject

READY_SECONDS = 10.0
HELD_CHARS = 400
_SENTENCE = re.compile(r"[.!?…。！？\n]+[\"'”’»)\]*_~]*(?:(?=\s)|(?<=[。！？\n]))")
_WORD = re.compile(r"\S(?=\s)")


class Judge(Protocol):
    """A classifier that may have to wait for its answer."""

    name: str

    async def judge(self, text: str, context: str, subject: Subject) -> tuple[str, ...]:
        """The categories of harm in `text`, none if harmless; raises if it cannot tell."""
        ...

    async def close(self) -> None:
        """Let go of connections."""
        ...


class Inline:
    """A classifier that answers at once, on the CPU, as a `Judge`."""

    def __init__(self, name: str, classifier: Classifier) -> None:
        self.name, self.classifier = name, classifier

    async def judge(self, text: str, context: str, subject: Subject) -> tuple[str, ...]:
        """What the classifier finds; it cannot be interrupted, so it must be fast (microseconds a message)."""
        return self.classifier(text, context)

    async def close(self) -> None:
        """Nothing to let go of."""


class Moderator:
    """Asks every classifier, cheapest first; any one may refuse, and one that fails or takes too long refuses.

    For metrics: `caught.counts[classifier, reason]` are failures, `refused[classifier, category]` refusals, `checks`
    the number of texts judged. `waits` says whether any of them does more than compute.
    """

    def __init__(self, judges: Sequence[Judge], timeout_s: float, caught: Caught | None = None) -> None:
        if not judges:
            raise FlywheelError("safety.classifiers is empty; name at least one, e.g. rules.")
        self.judges = tuple(judges)
        self.waits = any(type(judge) is not Inline for judge in judges)
        self.timeout_s = timeout_s
        self.caught = caught or Caught()
        self.refused: Counter[tuple[str, str]] = Counter()
        self.checks = 0
        self._ready_until = 0.0

    async def check(self, text: str, *, context: str = "", subject: Subject = "reply") -> SafetyVerdict:
        """Judge `text`, which answers `context` (the message before it, empty if there is none). Never raises.

        `subject` tells a guard model whether the user or the character says it.
        """
        self.checks += 1
        categories: set[str] = set()
        for judge in self.judges:
            found = await self._ask(judge, text, context, subject)
            self.refused.update((judge.name, category) for category in found)
            categories.update(found)
        return SafetyVerdict(not categories, tuple(sorted(categories)))

    async def ready(self) -> None:
        """Ask every classifier about a greeting; a good answer holds for ten seconds.

        Raises `FlywheelError` if one of them fails or refuses it.
        """
        if time.monotonic() < self._ready_until:
            return
        for judge in self.judges:
            if found := await self._ask(judge, "Hello! How are you?", "", "prompt"):
                raise FlywheelError(f"safety classifier {judge.name!r} finds {found} in a greeting; is it running?")
        self._ready_until = time.monotonic() + READY_SECONDS

    async def close(self) -> None:
        """Let go of connections."""
        for judge in self.judges:
            await judge.close()

    async def _ask(self, judge: Judge, text: str, context: str, subject: Subject) -> tuple[str, ...]:
        try:
            async with asyncio.timeout(self.timeout_s):
                return tuple(await judge.judge(text, context, subject))
        except Exception as error:  # the boundary of fail-closed: whatever went wrong, the text was not checked
            self.caught.note(judge.name, error)
            return (UNCHECKED,)


def make_moderator(config: SafetyConfig) -> Moderator:
    """The classifiers that the configuration names. Raises `FlywheelError` for one that cannot be made."""
    caught = Caught()
    makers = {"rules": _rules, "model": _model, "endpoint": _endpoint}  # the cheapest first
    judges = [make(config, caught) for name, make in makers.items() if name in config.classifiers]
    return Moderator(judges, config.timeout_s, caught)


def _rules(config: SafetyConfig, caught: Caught) -> Judge:
    policy = SafetyPolicy(caught=caught)
    return Inline("rules", lambda text, context: policy.check(text, context=context).categories)


def _model(config: SafetyConfig, caught: Caught) -> Judge:
    from .small_model import SmallModel  # noqa: PLC0415

    return Inline("model", SmallModel(config.model_threshold))


def _endpoint(config: SafetyConfig, caught: Caught) -> Judge:
    from .endpoint import EndpointJudge  # noqa: PLC0415

    return EndpointJudge.from_config(config)


class Streamed(Protocol):
    """What `screened` reads of a model's stream (`serving.backends.Chunk`)."""

    @property
    def text(self) -> str: ...

    @property
    def finish(self) -> Finish | None: ...

    @property
    def prompt_tokens(self) -> int | None: ...

    @property
    def completion_tokens(self) -> int | None: ...


class Piece(NamedTuple):
    """Text that passed its check, or, with a `verdict`, why the stream ends here and the text that was `withheld`.

    The last piece of a stream that was not stopped has the model's `finish` and token counts.
    """

    text: str
    finish: Finish | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    verdict: SafetyVerdict | None = None
    withheld: str = ""


async def screened(
    chunks: AsyncIterator[Streamed],
    moderator: Moderator,
    context: str = "",
    hold: Literal["sentence", "reply"] = "sentence",
) -> AsyncGenerator[Piece, None]:
    """Pass a reply on, sentence by sentence or whole, each part once the reply up to its end has passed its check.

    A sentence that does not end is cut at a word after 400 characters. A part that does not pass ends the stream, and
    the model's: what came before it has been shown, the rest is `withheld`. Errors of the model's stream pass through,
    and text not yet released is dropped. Closing this closes the model's stream. Where a classifier has to be waited
    for, a check is followed by at least as long without one, so that a fast model's sentences are checked together.
    """
    text, shown, next_check = "", 0, 0.0
    last = Piece("")
    async with AsyncExitStack() as stack:
        if aclose := getattr(chunks, "aclose", None):
            stack.push_async_callback(aclose)
        async for chunk in chunks:
            text += chunk.text
            if chunk.finish or chunk.prompt_tokens is not None or chunk.completion_tokens is not None:
                last = Piece(
                    "", chunk.finish or last.finish, _known(chunk.prompt_tokens, last.prompt_tokens),
                    _known(chunk.completion_tokens, last.completion_tokens),
                )  # fmt: skip
            end = _releasable(text, shown) if hold == "sentence" and chunk.text else shown
            if end == shown or (moderator.waits and time.monotonic() < next_check):
                continue
            asked = time.monotonic()
            verdict = await moderator.check(text[:end], context=context)
            next_check = 2 * time.monotonic() - asked
            if not verdict.allowed:
                break
            yield Piece(text[shown:end])
            shown = end
        else:
            verdict = await moderator.check(text, context=context) if shown < len(text) else SafetyVerdict(True, ())
    if verdict.allowed:
        yield last._replace(text=text[shown:])
    else:
        yield Piece("", verdict=verdict, withheld=text[shown:])


def _releasable(text: str, shown: int) -> int:
    """The end of the last whole sentence after `shown`, or of the last word where a sentence is too long to hold."""
    end = shown
    for sentence in _SENTENCE.finditer(text, shown):
        end = sentence.end()
    if len(text) - end > HELD_CHARS:
        end = max((word.end() for word in _WORD.finditer(text, end)), default=end)
    return end


def _known(new: int | None, old: int | None) -> int | None:
    return old if new is None else new
