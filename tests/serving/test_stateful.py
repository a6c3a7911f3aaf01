"""Whatever people do in whatever order: nothing acknowledged is lost or changed, nobody sees what is not theirs.

A Hypothesis state machine over the real routes and a real store. It keeps its own account of what was acknowledged.
"""

import itertools
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from http_service import Service, service
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from characterflywheel.erase import forget

_NUMBERS = itertools.count()
WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20).filter(
    lambda text: text.strip() and text.strip() == text
)
KINDS = st.sampled_from(["thumb_up", "thumb_down", "love", "pick", "report"])


class Account:
    """What one person was told: conversations, and the messages in each."""

    def __init__(self) -> None:
        self.name = f"person {next(_NUMBERS)}"
        self.conversations: dict[str, dict[str, str]] = {}
        self.signals: dict[str, set[str]] = {}
        self.consent, self.forgotten = True, False

    def __repr__(self) -> str:
        return self.name


class People(RuleBasedStateMachine):
    """People talk, regenerate, rate, come again, change their minds, and are forgotten."""

    served: ClassVar[Service]
    people = Bundle("people")
    replies = Bundle("replies")

    def __init__(self) -> None:
        super().__init__()
        self.accounts: list[Account] = []

    def ask(self, method: str, path: str, who: Account, body: dict[str, Any] | None = None, **headers: str) -> Any:
        named = {"X-Flywheel-User": who.name} | headers
        response = self.served.client.request(method, path, json=body, headers=named)
        assert response.status_code < 500, response.text
        return response

    def said(self, who: Account, answer: Any, text: str | None) -> tuple[Account, str, str]:
        """Note an acknowledged completion."""
        held = who.conversations.setdefault(answer["flywheel_conversation"], {})
        for choice in answer["choices"]:
            held[choice["flywheel_id"]] = choice["message"]["content"]
        if text is not None:
            held[answer["flywheel_message"]] = text
        return who, answer["flywheel_conversation"], answer["id"]

    @rule(target=people)
    def arrives(self) -> Account:
        self.accounts.append(Account())
        return self.accounts[-1]

    @rule(target=replies, who=people, text=WORDS, drafts=st.integers(1, 2))
    def begins(self, who: Account, text: str, drafts: int) -> tuple[Account, str, str]:
        body = {"model": "pirate", "messages": [{"role": "user", "content": text}], "n": drafts}
        response = self.ask("POST", "/v1/chat/completions", who, body)
        assert response.status_code == 200
        return self.said(who, response.json(), text)

    @rule(target=replies, reply=replies, text=WORDS, by_history=st.booleans(), key=st.booleans())
    def goes_on(self, reply: tuple[Account, str, str], text: str, by_history: bool, key: bool) -> Any:
        who, conversation, _ = reply
        body: dict[str, Any] = {"model": "pirate", "messages": [{"role": "user", "content": text}]}
        if by_history and not who.forgotten:
            seen = self.ask("GET", f"/v1/conversations/{conversation}", who).json()["messages"]
            told = [{"role": m["role"], "content": m["content"]} for m in seen if m["current"]]
            body["messages"] = [*told, *body["messages"]]
        else:
            body["flywheel_conversation"] = conversation
        headers = {"Idempotency-Key": f"key {next(_NUMBERS)}"} if key else {}
        response = self.ask("POST", "/v1/chat/completions", who, body, **headers)
        if who.forgotten:
            assert response.status_code == 404
            return multiple()
        assert response.status_code == 200
        found = response.json()["flywheel_conversation"]  # the same words twice are two conversations of one history
        assert found in who.conversations if by_history else found == conversation
        if key:
            again = self.ask("POST", "/v1/chat/completions", who, body, **headers)
            assert again.json() == response.json()
            changed = self.ask("POST", "/v1/chat/completions", who, body | {"max_tokens": 3}, **headers)
            assert changed.status_code == 409
        return self.said(who, response.json(), text)

    @rule(target=replies, reply=replies)
    def regenerates(self, reply: tuple[Account, str, str]) -> Any:
        who, conversation, id = reply
        body = {"model": "pirate", "messages": [{"role": "user", "content": "again"}], "flywheel_regenerate": id}
        response = self.ask("POST", "/v1/chat/completions", who, body)
        if who.forgotten:
            assert response.status_code == 404
            return multiple()
        assert response.status_code == 200
        assert response.json()["flywheel_conversation"] == conversation
        who.signals.setdefault(id, set()).add("regenerate")
        return self.said(who, response.json(), None)

    @rule(reply=replies, kind=KINDS)
    def rates(self, reply: tuple[Account, str, str], kind: str) -> None:
        who, _, id = reply
        body = {"message_id": id, "kind": kind, "text": "it made no sense"}
        first, second = (self.ask("POST", "/v1/feedback", who, body) for _ in range(2))
        assert first.status_code == second.status_code == (404 if who.forgotten else 200)
        if who.forgotten:
            return
        assert first.json()["id"] == second.json()["id"]
        who.signals.setdefault(id, set()).add(kind)

    @rule(reply=replies, other=people)
    def pries(self, reply: tuple[Account, str, str], other: Account) -> None:
        who, conversation, id = reply
        if who is other:
            return
        go_on = {"model": "pirate", "messages": [{"role": "user", "content": "hm"}]}
        for method, path, body in (
            ("GET", f"/v1/conversations/{conversation}", None),
            ("POST", "/v1/feedback", {"message_id": id, "kind": "love"}),
            ("POST", "/v1/chat/completions", go_on | {"flywheel_conversation": conversation}),
            ("POST", "/v1/chat/completions", go_on | {"flywheel_regenerate": id}),
        ):
            assert self.ask(method, path, other, body).status_code == 404

    @rule(who=people, consent=st.booleans())
    def decides(self, who: Account, consent: bool) -> None:
        assert self.ask("PATCH", "/v1/me", who, {"consent": consent}).json()["consent"] is consent
        who.consent = consent

    @rule(who=consumes(people))
    def is_forgotten(self, who: Account) -> None:
        if who.conversations:
            forget(self.served.hub.workspace, who.name)
        for id in who.conversations:
            assert self.ask("GET", f"/v1/conversations/{id}", who).status_code == 404
        self.accounts.remove(who)
        who.forgotten = True

    @invariant()
    def the_store_says_what_was_acknowledged(self) -> None:
        for who in self.accounts:
            listed = self.ask("GET", "/v1/conversations?limit=100", who).json()["data"]
            assert {one["id"] for one in listed} == set(who.conversations)
            assert self.ask("GET", "/v1/me", who).json()["consent"] is who.consent
            for conversation, told in who.conversations.items():
                messages = self.ask("GET", f"/v1/conversations/{conversation}", who).json()["messages"]
                assert {m["id"]: m["content"] for m in messages} == told
                for message in messages:
                    assert who.signals.get(message["id"], set()) == set(message["signals"])


@pytest.fixture
def served(tmp_path: Any) -> Iterator[Service]:
    with service(tmp_path / "ws", server={"user_requests_per_minute": 100_000}) as one:
        yield one


def test_people_in_any_order(served: Service) -> None:
    People.served = served
    bounds = settings(max_examples=10, stateful_step_count=15, deadline=None, derandomize=True, database=None,
                      suppress_health_check=list(HealthCheck))  # fmt: skip
    run_state_machine_as_test(People, settings=bounds)
    assert served.hub.journal.failed == 0
    assert served.hub.journal.rows > 50  # what hypothesis draws depends on the modules that earlier tests imported
