"""How the worker thread writes replies: token by token with our own sampler, or a batch at a time with any model.

The native sampler's caches are laid out for a stretch of work: slots for as many replies as fit into `CACHE_BYTES`
(taken only as they fill), one temperature and top-p, a longest prompt and reply. Requests join a stretch at any step
where they fit; the first that does not fit waits until the stretch has run out, and so do all behind it.
"""

from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass
from itertools import count

import torch

from ..errors import FlywheelError
from ..llm.base import ChatModel, Completion, Sampling
from ..llm.native import Decoder, NativeModel
from ..llm.shared_prefix import Segment
from .local import Job
from .replies import BackendError, Chunk

CACHE_BYTES = 2**31
LEAST_PROMPT, LEAST_REPLY = 512, 128  # tokens that a stretch has room for, so that most of what follows fits
PREFILL_TOKENS = 2048  # of prompts that join in one step: those who are being answered wait for them
TOGETHER = 32  # replies in one batch of a model that writes whole batches only


class Writer(ABC):
    """Writes the jobs of its `inbox`. The worker thread's own, but for the inbox, to which others append."""

    def __init__(self, model: ChatModel) -> None:
        self.model, self.closing = model, False
        self.inbox: deque[Job] = deque()

    @property
    @abstractmethod
    def busy(self) -> bool:
        """Whether there is something to write."""

    @abstractmethod
    def turn(self) -> None:
        """Write a little of whatever is to be written, and deliver it."""

    @abstractmethod
    def abandon(self) -> list[Job]:
        """Stop what is being written; whose replies these were."""

    def fail(self, error: BackendError, *, everything: bool = False) -> None:
        """End what is being written with an error; with `everything`, also what waits."""
        jobs = self.abandon()
        while everything and self.inbox:
            jobs.append(self.inbox.popleft())
        for job in jobs:
            job.deliver(error)


def writer_of(model: ChatModel) -> Writer:
    """The writer that suits a model."""
    return Steps(model) if isinstance(model, NativeModel) else Batches(model)


class Batches(Writer):
    """Any chat model: what waits with the same sampling is written together and delivered whole."""

    def __init__(self, model: ChatModel) -> None:
        super().__init__(model)
        self._writing: list[Job] = []

    @property
    def busy(self) -> bool:
        return bool(self.inbox)

    def turn(self) -> None:
        waiting = [job for job in [self.inbox.popleft() for _ in range(len(self.inbox))] if not job.cancelled]
        jobs = [job for job in waiting if job.sampling == waiting[0].sampling][:TOGETHER]
        self.inbox.extendleft(job for job in reversed(waiting) if job not in jobs)
        self._writing = jobs
        try:
            self._write(jobs)
        except FlywheelError:  # one conversation cannot be completed; which one shows when they are asked singly
            for job in jobs:
                try:
                    self._write([job])
                except FlywheelError as error:
                    job.deliver(_refused(error))
        self._writing = []

    def abandon(self) -> list[Job]:
        jobs, self._writing = self._writing, []
        return jobs

    def _write(self, jobs: list[Job]) -> None:
        if jobs:
            replies = self.model.complete(
                [job.messages for job in jobs], sampling=jobs[0].sampling, seeds=[job.seed for job in jobs]
            )
            for job, (reply,) in zip(jobs, replies, strict=True):
                job.deliver(Chunk(reply.text, reply.finish_reason, None, len(reply.token_ids)))


@dataclass
class _Part:
    """A job on its way: its prompt in tokens, and how much of its reply has been told."""

    job: Job
    prompt: tuple[Segment, Segment]
    told: str = ""

    @property
    def tokens(self) -> int:
        return len(self.prompt[0]) + len(self.prompt[1])


class Steps(Writer):
    """The native sampler, one token of every running reply at a turn."""

    model: NativeModel

    def __init__(self, model: NativeModel) -> None:
        super().__init__(model)
        self._numbers = count()
        self._head: _Part | None = None  # the first in line, once it has been tokenised
        self._writing: dict[int, _Part] = {}
        self._decoder: Decoder | None = None
        self._longest = 0

    @property
    def busy(self) -> bool:
        return bool(self.inbox or self._head or self._writing)

    def turn(self) -> None:
        with torch.inference_mode():
            for number in [number for number, part in self._writing.items() if part.job.cancelled]:
                del self._writing[number]
                self._running.drop(number)
            self._admit()
            if not self._writing:
                self._decoder = None
                return
            for number, [(ids, logprobs)] in self._running.step():
                part = self._writing.pop(number)
                self._finish(part, self.model.format.completion(ids, logprobs, self.model.ends))
            self._tell()

    def abandon(self) -> list[Job]:
        parts = [*self._writing.values(), *([self._head] if self._head else [])]
        self._head, self._decoder = None, None
        self._writing.clear()
        return [part.job for part in parts]

    @property
    def _running(self) -> Decoder:
        assert self._decoder is not None
        return self._decoder

    def _admit(self) -> None:
        """Let those at the head of the line join, as long as they fit."""
        joining: list[_Part] = []
        while part := self._first():
            if not self._writing and not joining:
                self._decoder = self._stretch(part)
            elif not self._fits(part, joining):
                break
            joining.append(part)
            self._head = None
        if joining:
            numbers = [next(self._numbers) for _ in joining]
            self._writing.update(zip(numbers, joining, strict=True))
            self._running.admit(
                numbers, [part.prompt for part in joining], [part.job.seed for part in joining],
                [part.job.sampling.max_tokens for part in joining],
            )  # fmt: skip

    def _first(self) -> _Part | None:
        """The first in line. Those whose client has left, and whose prompt the model refuses, end here."""
        if self._head and self._head.job.cancelled:
            self._head = None
        while self._head is None and self.inbox:
            job = self.inbox.popleft()
            if not job.cancelled:
                try:
                    self._head = _Part(job, self.model.format.prompt(job.messages))
                except FlywheelError as error:
                    job.deliver(_refused(error))
        return self._head

    def _stretch(self, part: _Part) -> Decoder:
        """An empty decoder with room for this job and, mostly, for those that will follow."""
        sampling = part.job.sampling
        self._longest = _power_of_two(max(part.tokens, LEAST_PROMPT))
        reply = _power_of_two(max(sampling.max_tokens, LEAST_REPLY))
        slots = min(self.model.batch_replies, CACHE_BYTES // self.model.cache_bytes(self._longest + reply))
        laid_out = Sampling(sampling.temperature, sampling.top_p, reply)
        return self.model.decoder(max(1, slots), 1, laid_out, self._longest)

    def _fits(self, part: _Part, joining: list[_Part]) -> bool:
        now, asked = self._running.sampling, part.job.sampling
        return (
            len(joining) < self._running.free
            and sum(other.tokens for other in joining) + part.tokens <= PREFILL_TOKENS
            and part.tokens <= self._longest
            and (asked.temperature, asked.top_p) == (now.temperature, now.top_p)
            and asked.max_tokens <= now.max_tokens
        )

    def _tell(self) -> None:
        """Deliver what has been added to the replies that are streamed: whole characters, no white space at an end."""
        for slot in self._running.running:
            part = self._writing[slot.index]
            if part.job.streams:
                text = self.model.format.decode(slot.ids[0]).strip().rstrip("\N{REPLACEMENT CHARACTER}")
                if len(text) > len(part.told) and text.startswith(part.told):
                    part.job.deliver(Chunk(text[len(part.told) :]))
                    part.told = text

    def _finish(self, part: _Part, reply: Completion) -> None:
        rest = reply.text[len(part.told) :]
        part.job.deliver(Chunk(rest, reply.finish_reason, part.tokens, len(reply.token_ids)))


def _refused(error: FlywheelError) -> BackendError:
    """A prompt that the model cannot take, such as one that is too long; the model is not to blame."""
    return BackendError(f"the model refuses the prompt: {error}", status=502, code="prompt", blames_backend=False)


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()
