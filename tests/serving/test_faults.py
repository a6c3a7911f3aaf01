"""When something around the service breaks: it says so, in bounded time, loses nothing, and goes on when it is mended.

The classifier down, the database locked, the disk full, the model gone, slow or crashing, the client leaving in the
middle of a stream, the clock going backwards (PAPER sections 7 and 9).
"""

import json
import resource
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
from http_service import Service, service
from live_service import Live, servers

SAID: Any = [{"role": "user", "content": "Tell me about the sea."}]


def until(true: Callable[[], bool], seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while not (found := true()) and time.monotonic() < end:
        time.sleep(0.02)
    return found


def get(url: str) -> requests.Response:
    return requests.get(url, timeout=20)


def metric(page: str, name: str) -> float:
    """The sum of a metric over its labels."""
    return sum(float(line.rpartition(" ")[2]) for line in page.splitlines() if line.split("{")[0].split(" ")[0] == name)


def said(one: Service) -> list[tuple[Any, ...]]:
    """Role, content and finish of every message."""
    with one.store.read() as connection:
        rows = connection.exec_driver_sql("SELECT role, content, finish FROM messages ORDER BY seq").fetchall()
    return [tuple(row) for row in rows]


def readiness(one: Service) -> tuple[int, dict[str, str]]:
    answer = one.client.get("/readyz")
    return answer.status_code, answer.json()["checks"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_classifier_that_is_down_lets_nothing_through(tmp_path: Path, stream: bool) -> None:
    nowhere = f"http://127.0.0.1:{servers.free_port()}/v1"
    safety = {"classifiers": ("rules", "endpoint"), "endpoint": nowhere, "endpoint_model": "guard", "timeout_s": 1}
    with service(tmp_path / "ws"):
        pass  # the characters are published while safety can be asked
    with service(tmp_path / "ws", safety=safety) as one:
        answer = one.chat("hello there", stream=stream)
        assert answer.status_code == 200
        assert "hello there" not in answer.text
        assert '"flywheel_fallback":true' in answer.text.replace(" ", "")
        with one.store.read() as connection:
            found = connection.exec_driver_sql("SELECT subject, allowed, categories FROM moderations").fetchall()
            said = connection.exec_driver_sql("SELECT role, fallback FROM messages ORDER BY seq").fetchall()
        assert [(row[0], bool(row[1])) for row in found] == [("prompt", False)]
        assert "unchecked" in found[0][2]
        assert [(role, bool(fallback)) for role, fallback in said] == [("user", False), ("assistant", True)]
        status, checks = readiness(one)
        assert (status, checks["store"], checks["model"]) == (503, "ok", "ok")
        assert "endpoint" in checks["safety"]


def test_a_locked_database_is_waited_for_then_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("characterflywheel.serving.app._STORE_PATIENCE_SECONDS", 0.7)
    with service(tmp_path / "ws") as one, closing(sqlite3.connect(tmp_path / "ws" / "flywheel.db")) as other:
        first = one.chat("before").json()
        other.execute("BEGIN IMMEDIATE")
        begun = time.monotonic()
        refused = one.chat("during")
        assert time.monotonic() - begun < 5
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_unavailable")
        assert int(refused.headers["retry-after"]) >= 1
        assert one.client.get(f"/v1/conversations/{first['flywheel_conversation']}?user=ann").status_code == 200
        assert one.client.get("/healthz").status_code == 200
        status, checks = readiness(one)
        assert (status, checks["model"], checks["safety"]) == (503, "ok", "ok")
        assert "locked" in checks["store"]
        other.rollback()
        assert one.chat("after").status_code == 200
        assert readiness(one)[0] == 200
        with one.store.read() as connection:
            said = connection.exec_driver_sql("SELECT content FROM messages WHERE role = 'user'").scalars().all()
        assert {"before", "after"} <= set(said)


def test_a_full_disk_is_said_and_nothing_acknowledged_is_lost(start: Callable[..., Live]) -> None:
    """`RLIMIT_FSIZE` of the running service is the disk: no file may grow further, until there is room again."""
    live = start("[server]\nuser_requests_per_minute = 100000\n")
    client, base = live.client(), live.url.removesuffix("/v1")
    answers = [client.chat.completions.create(model="pirate", messages=SAID)]
    assert live.server.process
    pid, hard = live.server.process.pid, resource.RLIM_INFINITY
    sizes = [file.stat().st_size for file in live.folder.glob("flywheel.db*")]
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (max(sizes) + 200_000, hard))

    def fill() -> None:
        for _ in range(500):
            answers.append(client.chat.completions.create(model="pirate", messages=SAID))

    with pytest.raises(openai.InternalServerError) as caught:
        fill()
    assert (caught.value.status_code, caught.value.code) == (503, "store_unavailable")
    assert get(f"{base}/healthz").status_code == 200
    ready = get(f"{base}/readyz")
    assert ready.status_code == 503
    assert ready.json()["checks"]["store"] != "ok"
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))
    answers.append(client.chat.completions.create(model="pirate", messages=SAID))
    assert get(f"{base}/readyz").status_code == 200
    kept = {id for (id,) in live.rows("SELECT id FROM messages WHERE role = 'assistant'")}
    assert {answer.id for answer in answers} <= kept
    assert len(answers) > 5
    assert live.rows("PRAGMA integrity_check") == [("ok",)]


@pytest.mark.parametrize(
    ("mode", "status", "code"),
    [("status:500", 502, None), ("hang", 504, "timeout"), ("reset", 502, None), ("garbage", 502, None)],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_breaks_is_an_error_and_a_metric(
    tmp_path: Path, upstream: Callable[..., Any], mode: str, status: int, code: str | None, stream: bool
) -> None:
    broken = upstream("--mode", mode)
    server = {"backend": "endpoint", "endpoint": broken.url, "endpoint_model": "mock"}
    with service(tmp_path / "ws", server | {"timeout_s": 1.5, "first_token_s": 1}) as one:
        begun = time.monotonic()
        answer = one.chat("hello", stream=stream)
        assert time.monotonic() - begun < 5
        assert answer.status_code in (status, 503)
        assert answer.json()["error"]["type"] == "server_error"
        assert code is None or code in answer.json()["error"]["code"]
        assert metric(one.client.get("/metrics").text, "flywheel_model_failures_total") == 1
        assert until(lambda: said(one) == [("user", "hello", None)])  # what the user said outlives the model


def test_a_model_that_is_gone_and_comes_back(tmp_path: Path, upstream: Callable[..., Any]) -> None:
    model = upstream()
    server = {"backend": "endpoint", "endpoint": model.url, "endpoint_model": "mock"}
    with service(tmp_path / "ws", server) as one:
        assert one.chat("one").status_code == 200
        model.stop()
        statuses = [one.chat("two").status_code for _ in range(8)]
        assert set(statuses) <= {502, 503}
        assert "ok" not in readiness(one)[1]["model"].split()
        model.start()
        assert until(lambda: one.chat("three").status_code == 200)
        assert readiness(one)[1]["model"] == "ok"


def test_a_client_that_leaves_in_the_middle_of_a_stream(
    start: Callable[..., Live], upstream: Callable[..., Any]
) -> None:
    """The model is stopped, what was seen is kept as cancelled, and a retry with the same key is the whole reply."""
    model = upstream("--piece", "0.02", "--words", "96")  # 4 sentences
    live = start(f'[server]\nendpoint = "{model.url}"\nendpoint_model = "mock"\n', "--backend", "endpoint")
    client, base = live.client(), live.url.removesuffix("/v1")
    ask: Any = {"model": "pirate", "messages": SAID, "user": "ida", "extra_headers": {"Idempotency-Key": "leaving"}}
    seen = ""
    with client.chat.completions.create(**ask, stream=True) as stream:
        for chunk in stream:
            seen += chunk.choices[0].delta.content or ""
            if seen:
                break
    assert 0 < len(seen.split()) < 96
    assert until(lambda: get(model.url.removesuffix("/v1") + "/stats").json()["counts"].get("left") == 1)
    assert until(lambda: metric(get(f"{base}/metrics").text, "flywheel_open_streams") == 0)
    cancelled = "SELECT content FROM messages WHERE role = 'assistant' AND finish = 'cancelled'"
    assert until(lambda: len(live.rows(cancelled)) == 1)
    assert live.rows(cancelled)[0][0].startswith(seen.strip())
    with client.chat.completions.create(**ask, stream=True) as stream:
        chunks = list(stream)
    whole = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert len(whole.split()) == 96
    assert live.rows("SELECT content, finish FROM messages WHERE id = ?", chunks[-1].id) == [(whole, "stop")]
    assert live.rows("SELECT COUNT(*) FROM messages WHERE role = 'user'") == [(1,)]
    assert live.rows("SELECT COUNT(*) FROM messages WHERE role = 'assistant' AND finish = 'stop'") == [(1,)]


def test_a_model_that_dies_in_the_middle_of_a_stream(tmp_path: Path, upstream: Callable[..., Any]) -> None:
    broken = upstream("--mode", "crash", "--piece", "0.01", "--words", "72")  # of 3 sentences
    server = {"backend": "endpoint", "endpoint": broken.url, "endpoint_model": "mock"}
    with service(tmp_path / "ws", server) as one:
        answer = one.chat("hello", stream=True)
        events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
        assert answer.status_code == 200
        assert json.loads(events[-1])["error"]["type"] == "server_error"
        assert "[DONE]" not in events
        assert until(lambda: [(row[0], row[2]) for row in said(one)] == [("user", None), ("assistant", "error")])


def test_a_clock_that_goes_backwards(tmp_path: Path) -> None:
    """Order is the order of arrival, and an experiment's or a limit's time does not depend on the wall clock."""
    with service(tmp_path / "ws") as one:
        now = [datetime(2026, 5, 1, 12, tzinfo=UTC)]
        object.__setattr__(one.hub, "clock", lambda: now[0])
        first = one.chat("one").json()
        now[0] -= timedelta(hours=3)
        second = one.chat("two", flywheel_conversation=first["flywheel_conversation"]).json()
        later = one.chat("three").json()
        love = {"message_id": second["id"], "kind": "love", "user": "ann"}
        assert one.client.post("/v1/feedback", json=love).status_code == 200
        seen = one.client.get(f"/v1/conversations/{first['flywheel_conversation']}?user=ann").json()["messages"]
        assert [m["content"] for m in seen] == ["one", "one", "two", "two"]
        assert [m["current"] for m in seen] == [True] * 4
        listed = one.client.get("/v1/conversations?user=ann").json()["data"]
        assert {c["id"] for c in listed} == {first["flywheel_conversation"], later["flywheel_conversation"]}
        assert one.hub.journal.failed == 0
