"""Who went on and who left, read off real conversations: the `continue` signal (PAPER sections 3 and 7).

Nobody presses a button to go on. A reply was continued (1) when the user wrote again after it within some hours, and
was not (0) when they did not. What is too recent to tell has no row, and neither has a canned reply, a greeting, a
reply that a client brought, or a conversation that carries `continue` rows of its own.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta
from itertools import pairwise

from ..ids import derive_id
from ..records import GIVEN, Conversation, Message, Signal


def continued(
    conversations: Sequence[Conversation], signals: Sequence[Signal], until: datetime, within: timedelta
) -> list[Signal]:
    """`continue` signals of replies whose outcome is known at `until`, in the order of the conversations.

    Messages are those on the way to a conversation's end (`export.conversations_from_export`). A row's id follows from
    the reply's, its time is when the outcome was known: the next message's, or `within` after the reply.
    """
    told = {signal.message_id for signal in signals if signal.kind == "continue"}
    rows = []
    for conversation in conversations:
        if any(message.id in told for message in conversation.messages):
            continue
        talk = [message for message in conversation.messages if message.role != "system"]
        for (asked, reply), after in zip(pairwise(talk), [*talk[2:], None], strict=False):
            if (asked.role, reply.role) != ("user", "assistant") or reply.fallback or reply.model == GIVEN:
                continue
            if after is not None and after.role != "user":  # said in two pieces: what follows is about the second
                continue
            deadline = reply.created_at + within
            if after is not None and after.created_at <= deadline:
                rows.append(_row(conversation.user_id, reply, 1.0, after.created_at))
            elif deadline < until:
                rows.append(_row(conversation.user_id, reply, 0.0, deadline))
    return rows


def _row(user_id: str, reply: Message, value: float, at: datetime) -> Signal:
    return Signal(
        id=derive_id("continue", reply.id, at=reply.created_at), message_id=reply.id, user_id=user_id, kind="continue",
        value=value, created_at=at,
    )  # fmt: skip
