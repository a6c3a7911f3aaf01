"""The doors between the pipeline and people, real or simulated.

The pipeline asks `People` to talk, to judge and to live through an experiment, and never knows who they are. Real
people come through the chat service and the annotation page, so `RealPeople` waits, and their experiments are started
and stopped in the chat service's store; the embedded world's crowd (`simulation`) uses the same event store, chat
service and tasks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple, Protocol

from . import desk
from .errors import FlywheelError, Waiting
from .experiment import running
from .records import Candidate, Character, ChatMessage, Judgement, Message, Prompt, Source, Task
from .store import EventStore


class Utterance(NamedTuple):
    """What a user says in a conversation, and everything said before it."""

    conversation_id: str
    user_id: str
    character: Character
    history: tuple[ChatMessage, ...]
    text: str
    at: datetime


class Service(Protocol):
    """The chat service as its callers see it."""

    def open_conversation(self, user_id: str, character: Character, source: Source, at: datetime) -> str:
        """Start a conversation; returns its id. The user must be registered in the store."""
        ...

    def reply(self, utterances: Sequence[Utterance]) -> list[Message]:
        """Answer each utterance; exposure, utterance and reply are in the store when it returns."""
        ...

    def signal(self, message_id: str, user_id: str, kind: str, at: datetime, value: float = 1.0) -> None:
        """Record what the user did after a reply."""
        ...


@dataclass(frozen=True)
class Bank:
    """Contexts with the replies of each arm that were really generated for them: `replies[arm][context]`."""

    experiment: str
    contexts: tuple[Prompt, ...]
    replies: Mapping[str, tuple[tuple[Candidate, ...], ...]]
    models: Mapping[str, str]
    characters: Mapping[str, Character]
    starts: datetime
    days: int
    arm_share: float


class People(Protocol):
    """Those who talk, those who judge."""

    def talk(self, service: Service, characters: Sequence[Character], generation: int, starts: datetime) -> None:
        """Have the conversations of one traffic window, of both populations."""
        ...

    def judge(self, tasks: Sequence[Task]) -> list[Judgement]:
        """Answer annotation tasks."""
        ...

    def live(self, bank: Bank) -> datetime | None:
        """Spend the experiment's days with the arms' replies; what happens goes into the event store.

        Returns when the experiment ended; None where everything in the store belongs to it.
        """
        ...


class RealPeople:
    """People who come when they come. The pipeline waits for them.

    Args:
        annotation: the folder of their desk.
        store: the chat service's store, which its experiments are started and stopped in.
        now: the time.
    """

    def __init__(
        self, annotation: Path, store: EventStore, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self.annotation, self.store, self.now = annotation, store, now

    def talk(self, service: Service, characters: Sequence[Character], generation: int, starts: datetime) -> None:
        """Nothing to do: their conversations are in the store already, through `flywheel serve` or an import."""

    def judge(self, tasks: Sequence[Task]) -> list[Judgement]:
        """The judgements of these tasks, once all are in (DESIGN section 10: `flywheel annotate export|import`)."""
        desk.post(self.annotation, tasks)
        judged = desk.judgements_of(self.annotation)
        missing = sum(task.id not in judged for task in tasks)
        if missing:
            raise Waiting(
                f"{missing} of {len(tasks)} annotation tasks await judgement: `flywheel annotate export`, `import`."
            )
        return [judged[task.id] for task in tasks]

    def live(self, bank: Bank) -> datetime:
        """Start the experiment in the chat service, wait until its days are over, stop it; returns when it ended.

        Raises:
            FlywheelError: an experiment of this name compares other models.
            Waiting: its days are not over, or nobody has met it.
        """
        now = self.now()
        found = self.store.experiments().get(bank.experiment)
        if found is None:
            arms = {arm: running.Arm(model, bank.arm_share) for arm, model in bank.models.items()}
            found = running.start(self.store, bank.experiment, arms, now)
        if found.models != dict(bank.models):
            raise FlywheelError(
                f"experiment {bank.experiment!r} was started by hand and compares {found.models}, which is not what "
                f"this generation compares, {dict(bank.models)}: give the generation a workspace of its own."
            )
        ends, met = found.started_at + timedelta(days=bank.days), running.exposed(self.store, found.name)
        if found.state == "running" and (now < ends or met == 0):
            raise Waiting(
                f"experiment {found.name} began {found.started_at:%Y-%m-%d %H:%M} UTC and lasts until "
                f"{ends:%Y-%m-%d %H:%M} UTC; {met} users have met it: keep `flywheel serve` running, run again then."
            )
        return running.stop(self.store, found.name, now).created_at
