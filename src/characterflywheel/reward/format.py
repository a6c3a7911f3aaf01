"""From conversations to the token segments that a reward network reads (PAPER section 3).

A policy's tokenizer brings its chat template: system prompt and history, then the reply with its end token, where the
head reads. An encoder's has none and reads `[CLS] context [SEP] reply [SEP]`. Long histories lose their oldest turns,
never the system prompt; replies are read up to a limit.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import FlywheelError
from ..llm.chat_format import ChatFormat
from ..llm.shared_prefix import Segment
from ..records import ChatMessage

FEWEST = 16  # tokens that must be left for the history
KEPT_PROMPTS = 2048


class ChatForm:
    """Reads with the backbone's own chat template. `opening`: the tokens that open a reply (none in some templates)."""

    def __init__(self, tokenizer: Any, max_prompt_tokens: int, max_reply_tokens: int) -> None:
        self.tokenizer, self.max_prompt_tokens, self.max_reply_tokens = tokenizer, max_prompt_tokens, max_reply_tokens
        if tokenizer.eos_token_id is None:
            raise FlywheelError("the backbone's tokenizer has no end token, which the head reads: set `eos_token`.")
        self.chat = ChatFormat(tokenizer, max_prompt_tokens)
        self.prompt = lru_cache(KEPT_PROMPTS)(self._prompt)
        asked = [{"role": "user", "content": "a"}]
        long, short = (
            tokenizer.apply_chat_template(asked, add_generation_prompt=opens, return_dict=False)
            for opens in (True, False)
        )
        self.opening: Segment = tuple(long[len(short) :])

    def _prompt(self, messages: tuple[ChatMessage, ...]) -> tuple[Segment, ...]:
        """System prompt, then history up to where the reply begins. Raises FlywheelError if the first is too long."""
        return tuple(segment for segment in self.chat.prompt(messages) if segment)

    def reply(self, text: str) -> Segment:
        """A reply's tokens, cut at `max_reply_tokens`, with its end token."""
        return _shortened(self.chat.reply(text), self.max_reply_tokens)


class EncoderForm:
    """Reads with an encoder's tokenizer: the context as one segment, a line for each message, then each reply.

    Capitals and emoji are lost where the encoder's vocabulary lacks them.
    """

    opening: Segment = ()

    def __init__(self, tokenizer: Any, max_prompt_tokens: int, max_reply_tokens: int) -> None:
        if tokenizer.sep_token_id is None:
            raise FlywheelError(
                "the backbone's tokenizer has neither a chat template nor a separator: add `chat_template` (a model "
                "that chats) or `sep_token` (an encoder) to its folder."
            )
        self.tokenizer, self.max_prompt_tokens, self.max_reply_tokens = tokenizer, max_prompt_tokens, max_reply_tokens
        self.prompt = lru_cache(KEPT_PROMPTS)(self._prompt)

    def _prompt(self, messages: tuple[ChatMessage, ...]) -> tuple[Segment, ...]:
        """The context between its special tokens. Raises FlywheelError if the system prompt leaves it no room."""
        system = messages[:1] if messages and messages[0].role == "system" else ()
        start = () if self.tokenizer.cls_token_id is None else (self.tokenizer.cls_token_id,)
        head = [*start, *(token for message in system for token in self._ids(message.content))]
        room = self.max_prompt_tokens - len(head) - 1
        if room < FEWEST:
            raise FlywheelError(
                f"the system prompt has {len(head)} tokens, the limit for prompts is {self.max_prompt_tokens}: "
                "shorten the character or raise max_prompt_tokens."
            )
        turns = [self._ids(f"{message.role}: {message.content}") for message in messages[len(system) :]]
        while len(turns) > 1 and sum(map(len, turns)) > room:
            turns = turns[1:]
        history = [token for turn in turns for token in turn][-room:]
        return ((*head, *history, self.tokenizer.sep_token_id),)

    def reply(self, text: str) -> Segment:
        """A reply's tokens, cut at `max_reply_tokens`, with its separator."""
        return _shortened((*self._ids(text), self.tokenizer.sep_token_id), self.max_reply_tokens)

    def _ids(self, text: str) -> list[int]:
        """Text cannot speak for the format: special tokens written out by a person stay text."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids


Form = ChatForm | EncoderForm


def make(folder: Path, max_prompt_tokens: int, max_reply_tokens: int) -> Form:
    """The format of a backbone's folder; prompts are cut further where its window could not hold two replies beside.

    Raises FlywheelError where the tokenizer has neither a chat template nor a separator, or the window is too small.
    """
    from transformers import AutoConfig, AutoTokenizer  # noqa: PLC0415 - takes seconds, which a plan can do without

    from ..llm import reading  # noqa: PLC0415 - likewise

    tokenizer = AutoTokenizer.from_pretrained(folder)
    form = ChatForm if tokenizer.chat_template else EncoderForm
    positions = reading.window(AutoConfig.from_pretrained(folder))
    window = min(positions or tokenizer.model_max_length, tokenizer.model_max_length)
    probe = form(tokenizer, max_prompt_tokens, max_reply_tokens)
    room = window - 2 * max_reply_tokens - len(probe.opening)
    if room < 2 * FEWEST:
        raise FlywheelError(
            f"the backbone reads {window} tokens; two replies of reward.max_reply_tokens = {max_reply_tokens} leave "
            f"{max(room, 0)} for the prompt, at least {2 * FEWEST} are needed: lower it."
        )
    return probe if room >= max_prompt_tokens else form(tokenizer, room, max_reply_tokens)


def _shortened(ids: Sequence[int], limit: int) -> Segment:
    """At most `limit` tokens; the last one, where the head reads, stays."""
    return tuple(ids) if len(ids) <= limit else (*ids[: limit - 1], ids[-1])
