"""The safety policy: every classifier is asked, and what cannot be checked is not allowed (PAPER section 9).

The same policy runs at character creation, in chat (utterance and reply) and on traffic that is sampled for
annotation and training.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from ..records import ChatMessage
from .caught import Caught
from .classifiers import agrees_with_harm, harmful_words

Classifier = Callable[[str, str], tuple[str, ...]]
"""`classifier(text, context)` names the categories of harm that it finds in `text`; none means harmless."""

UNCHECKED = "unchecked"

Subject = Literal["prompt", "reply"]
"""Whose words are judged: the user's, or a reply and whatever else a character says."""


class SafetyVerdict(NamedTuple):
    """Whether a text is allowed; if not, the categories of harm, sorted (`unchecked`: a classifier failed)."""

    allowed: bool
    categories: tuple[str, ...]


@dataclass(frozen=True)
class SafetyPolicy:
    """Classifiers of which any one may refuse a text. `caught` has what they failed with."""

    classifiers: tuple[Classifier, ...] = (harmful_words, agrees_with_harm)
    caught: Caught = field(default_factory=Caught, compare=False)

    def check(self, text: str, *, context: str = "") -> SafetyVerdict:
        """Judge `text`, which answers `context` (the message before it, empty if there is none).

        Fails closed: a classifier that raises makes the verdict `unchecked`, and so not allowed.
        """
        categories: set[str] = set()
        for classifier in self.classifiers:
            try:
                categories.update(classifier(text, context))
            except Exception as error:  # the boundary of fail-closed: whatever went wrong, the text was not checked
                self.caught.note(getattr(classifier, "__name__", type(classifier).__name__), error)
                categories.add(UNCHECKED)
        return SafetyVerdict(not categories, tuple(sorted(categories)))

    def check_answer(self, conversation: Sequence[ChatMessage], reply: str) -> SafetyVerdict:
        """Judge a reply to a conversation as the answer to its last message, if that is the user's.

        Whoever selects, rewards or measures replies asks here, so that none of them allows what another refuses.
        """
        asked = conversation[-1].content if conversation and conversation[-1].role == "user" else ""
        return self.check(reply, context=asked)
