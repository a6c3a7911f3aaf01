"""The whole service as a stranger meets it: keys, sessions, limits, headers, and experiments that run and stop."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from http_service import Service, service

from characterflywheel import tables
from characterflywheel.experiment.assignment import assign
from characterflywheel.records import Exposure, Message
from characterflywheel.serving.keys import revoke_key
from characterflywheel.store import Position

HERE = {"Origin": "http://testserver"}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with service(tmp_path_factory.mktemp("service") / "w", server={"max_body_bytes": 20_000}) as opened:
        yield opened


def test_without_a_key_there_is_nothing(running: Service) -> None:
    body = {"model": "pirate", "messages": [{"role": "user", "content": "Hello"}]}
    for headers in ({"Authorization": ""}, {"Authorization": "Bearer fw_x"}, {"Authorization": "Basic abc"}):
        answer = running.client.post("/v1/chat/completions", json=body, headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["type"] == "authentication_error"
        assert answer.headers["www-authenticate"] == "Bearer"


def test_scopes_and_bound_keys_hold(running: Service) -> None:
    chat = running.key_for("chat")
    assert running.chat("Hello", headers=chat).status_code == 200
    assert running.client.get("/v1/experiments", headers=chat).status_code == 403
    bound = running.key_for("chat", user="ada")
    assert running.chat("Hello", user="ada", headers=bound).status_code == 200
    assert running.chat("Hello", user="bob", headers=bound).status_code == 403
    assert running.chat("Hello", user="web-1", headers=chat).status_code == 403


def test_a_revoked_key_is_refused(running: Service) -> None:
    headers = running.key_for("chat")
    assert running.chat("Hello", headers=headers).status_code == 200
    revoke_key(running.store, headers["Authorization"].split("_")[1])
    running.hub.authenticator.reload()
    answer = running.chat("Hello", headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "revoked_api_key")


def test_a_visitor_chats_by_cookie_and_only_from_our_pages(running: Service) -> None:
    nobody = {"Authorization": ""}
    client = running.client
    key = client.headers.pop("Authorization")
    try:
        opened = client.post("/v1/session", headers=HERE)
        assert opened.status_code in (200, 201)
        cookie = opened.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=Strict" in cookie
        body = {"model": "pirate", "messages": [{"role": "user", "content": "Hello"}]}
        assert client.post("/v1/chat/completions", json=body, headers=HERE).status_code == 200
        for other in ({"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {}):
            answer = client.post("/v1/chat/completions", json=body, headers=other)
            assert answer.status_code == 403, other
        assert client.get("/v1/experiments").status_code == 403
    finally:
        client.cookies.clear()
        client.headers["Authorization"] = key
    assert running.client.get("/v1/me", headers=nobody).status_code == 401


def test_every_answer_is_careful_errors_too(running: Service) -> None:
    for path in ("/healthz", "/v1/models", "/v1/nothing", "/"):
        headers = running.client.get(path).headers
        assert "frame-ancestors 'none'" in headers["content-security-policy"], path
        assert headers["x-content-type-options"] == "nosniff"
        assert len(headers["x-request-id"]) >= 32


def test_a_body_above_the_limit_is_413(running: Service) -> None:
    answer = running.chat("x" * 30_000)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large"
    assert "frame-ancestors" in answer.headers["content-security-policy"]


def test_an_experiment_takes_its_users_and_stops(running: Service, tmp_path: Path) -> None:
    client = running.client
    arms = {"control": {"model": "echo", "share": 0.3}, "treatment": {"model": "echo", "share": 0.3}}
    assert client.post("/v1/experiments", json={"name": "e1", "arms": arms}).status_code == 201
    assert client.post("/v1/experiments", json={"name": "e1", "arms": arms}).status_code == 400
    users = [f"person-{n}" for n in range(30)]
    shares = {"control": 0.3, "treatment": 0.3}
    for user in users:
        assert running.chat("Hello", user=user).status_code == 200
        assert running.chat("And again", user=user).status_code == 200
    running.store.export(tmp_path / "x", Position(), running.store.position())
    exposures = [one for one in tables.read(tmp_path / "x" / "exposures.parquet", Exposure) if one.user_id in users]
    arm_of = {user: assign(user, "e1", shares) for user in users}
    assert {one.user_id: one.arm for one in exposures} == {user: arm for user, arm in arm_of.items() if arm}
    assert len(exposures) == len({one.user_id for one in exposures})
    messages = [one for one in tables.read(tmp_path / "x" / "messages.parquet", Message) if one.user_id in users]
    for reply in messages:
        if reply.role == "assistant" and reply.model:
            assert (reply.arm, reply.experiment) == (arm_of[reply.user_id], "e1" if arm_of[reply.user_id] else None)
    assert client.patch("/v1/experiments/e1", json={"shares": {"control": 0.1}}).status_code == 400
    assert client.patch("/v1/experiments/e1", json={"state": "stopped"}).json()["state"] == "stopped"
    assert running.hub.assigner.running == ()
    assert client.post("/v1/experiments", json={"name": "e1", "arms": arms}).status_code == 400


def test_the_message_that_exposes_a_user_belongs_to_the_window(running: Service, tmp_path: Path) -> None:
    arms = {"control": {"model": "echo", "share": 0.5}, "treatment": {"model": "echo", "share": 0.5}}
    assert running.client.post("/v1/experiments", json={"name": "e2", "arms": arms}).status_code == 201
    assert running.chat("Hello", user="newcomer").status_code == 200
    running.store.export(tmp_path / "x", Position(), running.store.position())
    (exposure,) = [one for one in tables.read(tmp_path / "x" / "exposures.parquet", Exposure) if one.experiment == "e2"]
    messages = tables.read(tmp_path / "x" / "messages.parquet", Message)
    said = next(one for one in messages if one.user_id == "newcomer" and one.role == "user")
    assert exposure.created_at <= said.created_at  # else `metrics` counts it as said before the experiment
