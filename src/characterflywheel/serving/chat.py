"""Answer people as a character: assignment to an arm, safety, the model, and everything into the event store.

The service fails closed (PAPER section 9): where the utterance or the reply is unsafe, or cannot be checked, the
character declines kindly, by its own rules, and the message is marked as a fallback. An exposure is durable before
the reply is made (PAPER section 7); utterance and reply follow in one transaction. Every id is a function of the
conversation and the turn, so a repeated call changes nothing.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple, Protocol, cast, get_args

from ..characters import system_prompt
from ..errors import FlywheelError
from ..ids import derive_id, derive_seed
from ..instructions import repair_all
from ..llm.base import ChatModel, Sampling
from ..people import Utterance
from ..records import Character, ChatMessage, Conversation, Message, Signal, SignalKind, Source
from ..safety.caught import Caught
from ..store import EventStore
from .assignment import Assigned, Running, exposure_of, first_arm

_DECLINES = "That is a road best left alone. Let's talk of something kinder. What else is on your mind?"
LOST = "Words fail for a moment. Could you say that again?"


class Verdict(Protocol):
    """What a safety policy says of a text."""

    @property
    def allowed(self) -> bool: ...

    @property
    def categories(self) -> tuple[str, ...]: ...


class Safety(Protocol):
    """A safety policy, such as `safety.SafetyPolicy`."""

    def check(self, text: str, *, context: str = "") -> Verdict:
        """Judge `text`; `context` is what it answers."""
        ...


class _Text(NamedTuple):
    content: str
    fallback: bool = False


class ChatService:
    """The chat service in one process; implements `people.Service`.

    Users must be registered in the store. Production users are assigned to `experiments`, tried in the order of their
    names; the first that takes a user serves them (`assignment.first_arm`, as the service over HTTP).
    """

    def __init__(
        self,
        store: EventStore,
        models: Mapping[str, ChatModel],
        default_model: str,
        safety: Safety,
        sampling: Sampling = Sampling(),
        seed: int = 0,
        experiments: Iterable[Running] = (),
    ) -> None:
        self.experiments = sorted(experiments, key=lambda one: one.name)
        wanted = {default_model, *(name for one in self.experiments for name in one.models.values())}
        if missing := sorted(wanted - set(models)):
            raise FlywheelError(f"models {missing} are not in service; there are {sorted(models)}.")
        self.store = store
        self.models = models
        self.default_model = default_model
        self.safety = safety
        self.caught = Caught()
        self.sampling = sampling
        self.seed = seed

    def open_conversation(self, user_id: str, character: Character, source: Source, at: datetime) -> str:
        """Start a conversation; returns its id. A character that is not approved is not served."""
        if character.safety != "approved":
            raise FlywheelError(
                f"character {character.id!r} is {character.safety!r}, not approved; it cannot be served."
            )
        conversation = Conversation(
            id=derive_id("conversation", user_id, character.id, character.version, source, at.isoformat(), at=at),
            user_id=user_id, character_id=character.id, character_version=character.version, source=source,
            created_at=at,
        )  # fmt: skip
        self.store.add_characters([character])
        self.store.add_conversations([conversation])
        return conversation.id

    def reply(self, utterances: Sequence[Utterance]) -> list[Message]:
        """Answer each utterance, in order; exposure, utterance and reply are in the store when it returns."""
        arms = self._arms(utterances)
        self.store.append(
            exposures=[
                exposure_of(said.user_id, arm, said.at) for said, arm in zip(utterances, arms, strict=True) if arm
            ]
        )
        texts = self._texts(utterances, arms)
        messages: list[Message] = []
        for said, arm, text in zip(utterances, arms, texts, strict=True):
            asked = Message(
                id=_id(said, "user"), conversation_id=said.conversation_id, user_id=said.user_id, role="user",
                content=said.text, created_at=said.at,
            )  # fmt: skip
            answer = asked.model_copy(
                update={
                    "id": _id(said, "assistant"), "role": "assistant", "content": text.content,
                    "model": self._model(arm), "experiment": arm and arm.experiment, "arm": arm and arm.arm,
                    "fallback": text.fallback,
                    "created_at": said.at + timedelta(seconds=1),
                }
            )  # fmt: skip
            messages += [asked, answer]
        self.store.append(messages=messages)
        return messages[1::2]

    def signal(self, message_id: str, user_id: str, kind: str, at: datetime, value: float = 1.0) -> None:
        """Record what the user did after a reply. The same act at the same time is one signal."""
        if kind not in get_args(SignalKind):
            raise FlywheelError(f"signal {kind!r} does not exist; there are {', '.join(get_args(SignalKind))}.")
        signal = Signal(
            id=derive_id("signal", message_id, user_id, kind, at.isoformat(), at=at), message_id=message_id,
            user_id=user_id, kind=cast(SignalKind, kind), value=value, created_at=at,
        )  # fmt: skip
        self.store.append(signals=[signal])

    def _arms(self, utterances: Sequence[Utterance]) -> list[Assigned | None]:
        """Who is served by which arm; testers and unknown users are in no experiment."""
        people = self.store.populations({said.user_id for said in utterances}) if self.experiments else {}
        return [
            first_arm(said.user_id, self.experiments) if people.get(said.user_id) == "user" else None
            for said in utterances
        ]

    def _model(self, arm: Assigned | None) -> str:
        return arm.model if arm else self.default_model

    def _texts(self, utterances: Sequence[Utterance], arms: Sequence[Assigned | None]) -> list[_Text]:
        """A reply to each utterance: one batch for each model, over the utterances that safety lets pass."""
        texts = {
            i: _Text(decline(said.character), fallback=True)
            for i, said in enumerate(utterances)
            if not self._allowed(said.text)
        }
        for name in sorted(set(map(self._model, arms))):
            batch = [i for i, arm in enumerate(arms) if self._model(arm) == name and i not in texts]
            if not batch:
                continue
            completions = self.models[name].complete(
                [_conversation(utterances[i]) for i in batch],
                sampling=self.sampling,
                seeds=[derive_seed(self.seed, "reply", _id(utterances[i], "assistant")) for i in batch],
            )
            for i, (completion, *_) in zip(batch, completions, strict=True):
                texts[i] = self._checked(utterances[i], completion.text.strip())
        return [texts[i] for i in range(len(utterances))]

    def _checked(self, said: Utterance, reply: str) -> _Text:
        if not reply:
            return _Text(repair_all(said.character, LOST), fallback=True)
        if not self._allowed(reply, context=said.text):
            return _Text(decline(said.character), fallback=True)
        return _Text(reply)

    def _allowed(self, text: str, context: str = "") -> bool:
        """Whether safety lets a text pass. A boundary: what cannot be checked does not pass."""
        try:
            return self.safety.check(text, context=context).allowed
        except Exception as error:
            self.caught.note("policy", error)
            return False


def decline(character: Character) -> str:
    """A kind refusal that follows the character's own rules."""
    return repair_all(character, _DECLINES)


def _id(said: Utterance, role: str) -> str:
    """The id of a turn's message: the same words at the same time in the same place are one message."""
    turn = (said.conversation_id, len(said.history), said.at.isoformat(), said.text)
    return derive_id("message", *turn, role, at=said.at)


def _conversation(said: Utterance) -> list[ChatMessage]:
    """What the model is given: the character, everything said before, and the utterance."""
    system = ChatMessage(role="system", content=system_prompt(said.character))
    return [system, *said.history, ChatMessage(role="user", content=said.text)]
