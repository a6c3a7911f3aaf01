"""Feedback, conversations, consent, sessions, characters, reviews and experiments over the real routes."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from http_service import Service, service

from characterflywheel.serving.keys import create_key


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with service(tmp_path_factory.mktemp("people") / "ws") as one:
        yield one


def signals(served: Service, conversation: str) -> list[tuple[str, float, str | None]]:
    return [(s.kind, s.value, s.text) for s in served.store.signals_of(conversation)]


@pytest.mark.parametrize(
    ("sent", "stored"),
    [
        ({"kind": "thumb_up"}, ("thumb_up", 1.0, None)),
        ({"kind": "love", "value": True}, ("love", 1.0, None)),
        ({"kind": "rating", "value": 4}, ("rating", 4.0, None)),
        ({"kind": "report", "text": "rude"}, ("report", 1.0, "rude")),
        ({"name": "user-feedback", "value": 0, "comment": "meh"}, ("thumb_down", 1.0, "meh")),
        ({"metric_name": "thumbs_up", "value": True}, ("thumb_up", 1.0, None)),
        ({"kind": "reaction", "value": "🎉"}, ("reaction", 1.0, "🎉")),
        ({"kind": "edit", "text": "better words"}, ("edit", 1.0, "better words")),
        ({"comment": "I liked this"}, ("feedback", 1.0, "I liked this")),
    ],
)
@pytest.mark.parametrize("name", ["message_id", "id", "trace_id", "inference_id"])
def test_feedback_in_many_shapes(served: Service, sent: dict[str, Any], stored: Any, name: str) -> None:
    reply = served.chat("hi", user="fb").json()
    answer = served.client.post("/v1/feedback", json={name: reply["id"], **sent})
    assert answer.status_code == 200, answer.text
    assert answer.json()["message_id"] == reply["id"]
    assert signals(served, reply["flywheel_conversation"]) == [stored]
    served.client.post("/v1/feedback", json={name: reply["id"], **sent}).raise_for_status()
    assert signals(served, reply["flywheel_conversation"]) == [stored]


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ({"kind": "rating", "value": 9}, 422), ({"kind": "rating"}, 422), ({"kind": "smell"}, 422),
        ({"kind": "continue"}, 422), ({"kind": "edit"}, 422), ({"kind": "rating", "value": "NaN"}, 422),
        ({"kind": "thumb_up", "at": "2999-01-01T00:00:00Z"}, 422),
    ],
)  # fmt: skip
def test_bad_feedback_is_refused(served: Service, sent: dict[str, Any], status: int) -> None:
    reply = served.chat("hi", user="fb").json()
    answer = served.client.post("/v1/feedback", json={"message_id": reply["id"], **sent})
    assert answer.status_code == status
    assert signals(served, reply["flywheel_conversation"]) == []


def test_late_feedback_keeps_its_time_and_a_key_repeats_its_answer(served: Service) -> None:
    reply = served.chat("hi", user="late").json()
    at = (datetime.now(UTC) - timedelta(minutes=3)).isoformat()
    body, key = {"message_id": reply["id"], "kind": "love", "at": at}, {"Idempotency-Key": "love-1"}
    first = served.client.post("/v1/feedback", json=body, headers=key)
    again = served.client.post("/v1/feedback", json=body, headers=key)
    assert first.json() == again.json()
    assert datetime.fromisoformat(first.json()["created_at"]) == datetime.fromisoformat(at)
    changed = served.client.post("/v1/feedback", json={**body, "kind": "report"}, headers=key)
    assert changed.status_code == 409


def test_nobody_reads_or_rates_what_is_not_theirs(served: Service) -> None:
    reply = served.chat("my secret", user="alice").json()
    conversation = reply["flywheel_conversation"]
    mallory = served.key_for("chat", user="mallory")
    get, post = served.client.get, served.client.post
    assert get(f"/v1/conversations/{conversation}", headers=mallory).status_code == 404
    assert get(f"/v1/conversations/{conversation}", headers=mallory, params={"user": "alice"}).status_code == 403
    assert get(f"/v1/conversations/{conversation}", params={"user": "bob"}).status_code == 404
    assert post("/v1/feedback", headers=mallory, json={"message_id": reply["id"], "kind": "love"}).status_code == 404
    stolen = {"flywheel_conversation": conversation}
    assert served.chat("go on", user="mallory", headers=mallory, **stolen).status_code == 404
    again = {"flywheel_regenerate": reply["id"]}
    assert served.chat("my secret", user="mallory", headers=mallory, **again).status_code == 404
    assert get("/v1/conversations", headers=mallory).json()["data"] == []
    assert get(f"/v1/conversations/{conversation}", params={"user": "alice"}).status_code == 200


def test_conversations_are_paged_newest_first(served: Service) -> None:
    ids = [served.chat(f"talk {i}", user="pages").json()["flywheel_conversation"] for i in range(5)]
    params: dict[str, Any] = {"user": "pages", "limit": 2}
    found: list[str] = []
    while True:
        page = served.client.get("/v1/conversations", params=params).json()
        found += [one["id"] for one in page["data"]]
        if page["next"] is None:
            break
        params["before"] = page["next"]
    assert found == ids[::-1]


def test_scopes_hold(served: Service) -> None:
    chatting = served.key_for("chat")
    for method, path in [
        ("POST", "/v1/characters"), ("GET", "/v1/reviews"), ("GET", "/v1/experiments"),
        ("GET", "/v1/characters/pirate/versions"), ("DELETE", "/v1/characters/pirate"),
    ]:  # fmt: skip
        assert served.client.request(method, path, headers=chatting).status_code == 403, path
    assert served.client.get("/v1/models", headers={"Authorization": "Bearer fw_0_wrong"}).status_code == 401
    for path in ("/healthz", "/readyz", "/metrics"):
        assert served.client.get(path, headers={"Authorization": ""}).status_code == 200, path


def test_consent_is_the_users_word(served: Service) -> None:
    served.chat("hi", user="shy")
    assert served.client.get("/v1/me", params={"user": "shy"}).json() == {"id": "shy", "consent": True}
    changed = served.client.patch("/v1/me", params={"user": "shy"}, json={"consent": False})
    assert changed.json()["consent"] is False
    stored = served.store.user("shy")
    assert stored is not None
    assert not stored.consent
    assert served.client.get("/v1/me", params={"user": "shy"}).json()["consent"] is False


def test_a_character_goes_through_safety_review_and_retirement(served: Service) -> None:
    made = {
        "id": "nurse", "name": "Nurse Joy", "category": "care", "traits": ["kind"], "greeting": "Hello, dear.",
        "instructions": [{"text": "Answer in at most 30 words."}],
    }  # fmt: skip
    post, put = served.client.post, served.client.put
    assert post("/v1/characters", json=made).json()["state"] == "approved"
    assert post("/v1/characters", json=made).status_code == 409
    assert served.chat("hi", model="nurse").status_code == 200
    doubtful = {**made, "greeting": "Let me tell you how to build a bomb."}
    state = put("/v1/characters/nurse", json=doubtful).json()
    assert (state["state"], state["in_service"], state["character"]["version"]) == ("review", 1, 2)
    assert [one["character"]["id"] for one in served.client.get("/v1/reviews").json()["data"]] == ["nurse"]
    stale = {"decision": "approved", "reason": "fine", "version": 1}
    assert post("/v1/reviews/nurse", json=stale).status_code == 409
    assert post("/v1/reviews/nurse", json={"decision": "refused", "reason": "no bombs"}).json()["state"] == "refused"
    assert served.client.get("/v1/reviews").json()["data"] == []
    assert served.chat("hi", model="nurse").status_code == 200
    assert served.client.delete("/v1/characters/nurse").json()["in_service"] is None
    assert served.chat("hi", model="nurse").status_code == 404
    versions = served.client.get("/v1/characters/nurse/versions").json()
    assert [one["version"] for one in versions["data"]] == [1, 2]
    assert [one["state"] for one in versions["decisions"]] == ["approved", "review", "refused", "retired"]


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_a_card_comes_back_as_it_went(served: Service, version: str) -> None:
    card = served.client.get("/v1/characters/pirate/card", params={"version": version}).json()
    assert card["spec"] == f"chara_card_{version}"
    card["data"]["name"] = f"Copy {version}"
    card["data"].setdefault("extensions", {})["somebody/else"] = {"kept": [1, 2]}
    card["data"]["extensions"].pop("characterflywheel", None)
    made = served.client.post("/v1/characters", json=card)
    assert made.status_code == 201, made.text
    id = made.json()["character"]["id"]
    back = served.client.get(f"/v1/characters/{id}/card", params={"version": version}).json()
    assert back["data"]["extensions"]["somebody/else"] == {"kept": [1, 2]}
    picture = served.client.get(f"/v1/characters/{id}/card", params={"version": version, "as": "png"})
    assert picture.content.startswith(b"\x89PNG")
    served.client.delete(f"/v1/characters/{id}")
    again = served.client.put(f"/v1/characters/{id}", content=picture.content, headers={"Content-Type": "image/png"})
    assert again.json()["state"] == "review", again.text  # nobody has seen the picture
    assert served.client.get(f"/v1/characters/{id}/picture").status_code == 404
    (waiting,) = served.client.get("/v1/reviews").json()["data"]
    assert served.client.get(waiting["picture"]).content.startswith(b"\x89PNG")
    assert served.client.get(waiting["picture"], headers=served.key_for("chat")).status_code == 403
    served.client.post(f"/v1/reviews/{id}", json={"decision": "approved", "reason": "seen"}).raise_for_status()
    shown = served.client.get(f"/v1/characters/{id}").json()["picture"]
    assert served.client.get(shown).content.startswith(b"\x89PNG")
    assert served.client.get("/v1/characters/pirate").json()["picture"] is None
    assert served.client.get("/v1/characters/pirate/picture").status_code == 404


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"id": "x"}', b'{"spec": "chara_card_v2"}', b'{"data": 3}'])
def test_what_is_no_character_is_refused(served: Service, body: bytes) -> None:
    answer = served.client.post("/v1/characters", content=body, headers={"Content-Type": "application/json"})
    assert 400 <= answer.status_code < 500
    assert answer.json()["error"]["message"]


def test_an_experiment_assigns_and_exposes_before_the_reply(served: Service) -> None:
    arms = {"control": {"model": "echo", "share": 0.25}, "treatment": {"model": "echo", "share": 0.25}}
    made = served.client.post("/v1/experiments", json={"name": "exp1", "arms": arms})
    assert made.status_code == 201, made.text
    seen: dict[str, str | None] = {}
    for i in range(40):
        for _ in range(2):
            reply = served.store.message(served.chat("hi", user=f"exp-{i}").json()["id"])
            assert reply is not None
            assert seen.setdefault(reply.user_id, reply.arm) == reply.arm
    with served.store.read() as connection:
        exposed = dict(connection.exec_driver_sql("SELECT user_id, arm FROM exposures").all())
    assert exposed == {user: arm for user, arm in seen.items() if arm}
    assert set(exposed.values()) == {"control", "treatment"}
    assert len(exposed) < 40
    change = {"shares": {"control": 0.5, "treatment": 0.5}}
    assert served.client.patch("/v1/experiments/exp1", json=change).json()["shares"]["control"] == 0.5
    for user, arm in exposed.items():
        reply = served.store.message(served.chat("hi", user=user).json()["id"])
        assert reply is not None
        assert reply.arm == arm
    assert served.client.patch("/v1/experiments/exp1", json={"state": "stopped"}).json()["state"] == "stopped"
    reply = served.store.message(served.chat("hi", user=next(iter(exposed))).json()["id"])
    assert reply is not None
    assert reply.arm is None
    assert served.client.post("/v1/experiments", json={"name": "exp1", "arms": arms}).status_code == 400


def test_a_visitor_of_the_page_has_a_session_of_their_own(served: Service) -> None:
    client, nobody = served.client, {"Authorization": "", "Sec-Fetch-Site": "same-origin"}
    made = client.post("/v1/session", headers=nobody)
    assert made.json()["id"].startswith("web-")
    cookie = made.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert client.post("/v1/session", headers=nobody).json()["id"] == made.json()["id"]
    client.cookies.clear()
    assert client.post("/v1/session", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403


def test_rates_are_limited_by_user_with_a_time_to_come_back(tmp_path: Path) -> None:
    with service(tmp_path / "ws", {"user_requests_per_minute": 3}) as served:
        statuses = [served.chat("hi", user="eager") for _ in range(5)]
        assert [one.status_code for one in statuses] == [200, 200, 200, 429, 429]
        assert int(statuses[-1].headers["retry-after"]) >= 1
        assert served.chat("hi", user="calm").status_code == 200
        text = served.client.get("/metrics").text
        assert 'flywheel_limited_total{why="user"} 2.0' in text
        assert 'flywheel_requests_total{route="/v1/chat/completions",status="200"} 4.0' in text


def test_a_retired_character_stays_retired_over_a_restart(tmp_path: Path) -> None:
    with service(tmp_path / "ws") as served:
        served.client.delete("/v1/characters/baker").raise_for_status()
    with service(tmp_path / "ws") as served:
        assert served.client.get("/v1/characters/baker").status_code == 404
        assert served.client.get("/v1/characters/pirate").status_code == 200


def test_a_key_works_as_soon_as_it_is_made(served: Service) -> None:
    time.sleep(0.3)
    _, key = create_key(served.store, "just made", ("chat",))
    assert served.client.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200


def test_a_change_of_mind_is_kept_and_a_second_click_is_not(served: Service) -> None:
    reply = served.chat("hi", user="mind").json()
    for kind in ("thumb_up", "thumb_up", "thumb_down", "thumb_up", "thumb_up"):
        served.client.post("/v1/feedback", json={"message_id": reply["id"], "kind": kind}).raise_for_status()
    for value in (5, 3, 3, 5):
        rating = {"message_id": reply["id"], "kind": "rating", "value": value}
        served.client.post("/v1/feedback", json=rating).raise_for_status()
    stored = [(kind, value) for kind, value, _ in signals(served, reply["flywheel_conversation"])]
    assert stored == [
        ("thumb_up", 1), ("thumb_down", 1), ("thumb_up", 1), ("rating", 5), ("rating", 3), ("rating", 5),
    ]  # fmt: skip


@pytest.mark.parametrize("at", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "1969-01-01T00:00:00Z"])
def test_a_time_that_cannot_be_is_refused(served: Service, at: str) -> None:
    reply = served.chat("hi", user="time").json()
    answer = served.client.post("/v1/feedback", json={"message_id": reply["id"], "kind": "love", "at": at})
    assert answer.status_code == 422
    assert served.chat("more", user="time", flywheel_conversation=reply["flywheel_conversation"]).status_code == 200


@pytest.mark.parametrize(
    "path", ["/v1/conversations/%00", "/v1/conversations?before=%00", "/v1/characters/a%0Ab/card", "/v1/models/%7F%00"]
)
def test_control_characters_in_an_address_are_refused(served: Service, path: str) -> None:
    answer = served.client.get(path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_address")


@pytest.mark.parametrize("field", ["message_id", "text"])
def test_a_nul_in_a_body_is_refused(served: Service, field: str) -> None:
    body = {"message_id": "x", "kind": "feedback", "text": "x", field: "a\0b"}
    assert served.client.post("/v1/feedback", json=body).status_code == 422


def test_one_key_with_many_bodies_at_once_is_one_signal(served: Service) -> None:
    reply = served.chat("hi", user="crowd").json()
    headers = {"Idempotency-Key": "crowd-1"}

    def rate(value: int) -> int:
        body = {"message_id": reply["id"], "kind": "rating", "value": value}
        return int(served.client.post("/v1/feedback", json=body, headers=headers).status_code)

    with ThreadPoolExecutor(5) as pool:
        statuses = sorted(pool.map(rate, range(1, 6)))
    assert statuses == [200, 409, 409, 409, 409]
    assert len(signals(served, reply["flywheel_conversation"])) == 1


def test_feedback_is_on_what_a_character_said_here(served: Service) -> None:
    before = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "forged praise"}]
    reply = served.chat("b", user="forger", before=before).json()
    kept = served.store.conversation(reply["flywheel_conversation"])
    assert kept is not None
    forged = next(one for one in kept.messages if one.content == "forged praise")
    for id in (forged.id, reply["flywheel_message"]):
        answer = served.client.post("/v1/feedback", json={"message_id": id, "kind": "thumb_up"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "not_a_reply")


def test_an_application_may_not_rate_for_another_key(served: Service) -> None:
    mine, other = served.key_for("chat"), served.key_for("chat")
    body = {"model": "pirate", "messages": [{"role": "user", "content": "hi"}]}
    reply = served.client.post("/v1/chat/completions", json=body, headers=mine).json()
    sent = {"message_id": reply["id"], "kind": "love"}
    assert served.client.post("/v1/feedback", json=sent, headers=other).status_code == 404
    assert served.client.post("/v1/feedback", json=sent, headers=mine).status_code == 200


@pytest.mark.parametrize("name", ["kill yourself", "a\nb", "{{char}}", "x" * 40])
def test_a_name_is_a_name(served: Service, name: str) -> None:
    said = served.client.post("/v1/conversations", json={"character": "pirate", "user": "n", "user_name": name})
    assert said.status_code in (201, 422)
    assert name not in said.text
