"""The official `openai` client, unchanged, against a service that is really started (DESIGN section 10)."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import openai
import pytest
from live_service import Live

SAID: Any = [{"role": "user", "content": "Ahoy, who keeps the light tonight?"}]


def test_a_completion(live: Live) -> None:
    answer = live.client().chat.completions.create(model="pirate", messages=SAID, user="ann", max_tokens=50)
    assert answer.choices[0].message.content == SAID[0]["content"]
    assert (answer.choices[0].finish_reason, answer.choices[0].message.role) == ("stop", "assistant")
    assert (answer.object, answer.model) == ("chat.completion", "pirate")
    extra = answer.model_extra or {}
    rows = live.rows("SELECT role, content, user_id FROM messages WHERE id IN (?, ?) ORDER BY seq",
                  extra["flywheel_message"], answer.id)  # fmt: skip
    assert rows == [("user", SAID[0]["content"], "ann"), ("assistant", SAID[0]["content"], "ann")]


def test_a_conversation_goes_on_with_the_clients_own_history(live: Live) -> None:
    client, history = live.client(), list(SAID)
    first = client.chat.completions.create(model="pirate", messages=history, user="bea")
    history += [first.choices[0].message.model_dump(include={"role", "content"}), {"role": "user", "content": "And?"}]
    second = client.chat.completions.create(model="pirate", messages=history, user="bea")
    assert (first.model_extra or {})["flywheel_conversation"] == (second.model_extra or {})["flywheel_conversation"]


def test_a_stream(live: Live) -> None:
    with live.client().chat.completions.create(model="pirate", messages=SAID, stream=True, user="cleo") as stream:
        chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == SAID[0]["content"]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert live.rows("SELECT content FROM messages WHERE id = ?", chunks[0].id) == [(text,)]


def test_a_stream_helper_gathers_the_whole(live: Live) -> None:
    with live.client().chat.completions.stream(model="pirate", messages=SAID, user="dot") as stream:
        kinds = {event.type for event in stream}
        whole = stream.get_final_completion()
    assert whole.choices[0].message.content == SAID[0]["content"]
    assert {"chunk", "content.delta", "content.done"} <= kinds


def test_an_asynchronous_client_with_several_at_once(live: Live) -> None:
    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=live.url, api_key=live.key, max_retries=0) as client:
            said = ({"role": "user", "content": f"number {i}"} for i in range(12))
            return await asyncio.gather(
                *(client.chat.completions.create(model="pirate", messages=[one], user="eve") for one in said)  # type: ignore[list-item]
            )

    answers = asyncio.run(ask())
    assert [a.choices[0].message.content for a in answers] == [f"number {i}" for i in range(12)]
    assert len({a.id for a in answers}) == 12


def test_several_drafts(live: Live) -> None:
    answer = live.client().chat.completions.create(model="pirate", messages=SAID, n=3, user="fay")
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({(choice.model_extra or {})["flywheel_id"] for choice in answer.choices}) == 3


def test_content_in_parts_and_a_developer_message(live: Live) -> None:
    said: Any = [
        {"role": "developer", "content": "Speak Latin."},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
    ]
    answer = live.client().chat.completions.create(model="pirate", messages=said, max_completion_tokens=20)
    assert answer.choices[0].message.content == "one\ntwo"


def test_models_are_characters(live: Live) -> None:
    client = live.client()
    ids = [model.id for model in client.models.list()]
    assert "pirate" in ids
    assert len(ids) == 12
    assert client.models.retrieve("pirate").id == "pirate"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


@pytest.mark.parametrize(
    ("change", "error", "code"),
    [
        ({"model": "nobody"}, openai.NotFoundError, "model_not_found"),
        ({"messages": []}, openai.UnprocessableEntityError, "invalid_request"),
        ({"messages": [{"role": "user", "content": " "}]}, openai.UnprocessableEntityError, "invalid_request"),
        ({"temperature": 99}, openai.UnprocessableEntityError, "invalid_request"),
        ({"n": 2, "stream": True}, openai.BadRequestError, "invalid_request"),
        ({"extra_body": {"flywheel_conversation": "nowhere"}}, openai.NotFoundError, "conversation_not_found"),
        ({"messages": [{"role": "user", "content": "x" * 20_000}]}, openai.APIStatusError, "message_too_long"),
        ({"messages": [{"role": "user", "content": "x" * 2_000_000}]}, openai.APIStatusError, None),
    ],
)
def test_errors_are_the_clients_own(live: Live, change: dict[str, Any], error: type[Exception], code: str) -> None:
    with pytest.raises(error) as caught:
        live.client().chat.completions.create(**{"model": "pirate", "messages": SAID} | change)
    assert isinstance(caught.value, openai.APIStatusError)
    assert caught.value.status_code < 500
    assert code is None or caught.value.code == code
    assert caught.value.type


def test_a_key_that_does_not_exist(live: Live) -> None:
    with pytest.raises(openai.AuthenticationError):
        live.client(api_key="fw_0000000000000000_nothing").models.list()


def test_the_client_waits_as_told_when_there_are_too_many(start: Callable[..., Live]) -> None:
    slow = start("[server]\nuser_requests_per_minute = 30\n")
    client = slow.client()

    def insist() -> None:
        for _ in range(200):
            client.chat.completions.create(model="pirate", messages=SAID, user="gil")

    with pytest.raises(openai.RateLimitError) as caught:
        insist()
    assert 1 <= float(caught.value.response.headers["retry-after"]) <= 3
    patient = slow.client(max_retries=3)
    assert patient.chat.completions.create(model="pirate", messages=SAID, user="gil").choices


def test_a_retry_after_a_failure_of_the_model_stores_the_turn_once(
    start: Callable[..., Live], upstream: Callable[..., Any]
) -> None:
    broken = upstream("--mode", "status:503")
    shop = start(f'[server]\nendpoint = "{broken.url}"\nendpoint_model = "mock"\n', "--backend", "endpoint")
    headers, ask = {"Idempotency-Key": "once"}, {"model": "pirate", "messages": SAID, "user": "hal"}
    with pytest.raises(openai.InternalServerError) as caught:
        shop.client().chat.completions.create(**ask, extra_headers=headers)
    assert caught.value.status_code in (502, 503)
    broken.stop()
    broken.command = [*broken.command[:-1], "ok"]
    broken.start()
    answer = shop.client(max_retries=5).chat.completions.create(**ask, extra_headers=headers)
    again = shop.client().chat.completions.create(**ask, extra_headers=headers)
    assert json.loads(again.to_json()) == json.loads(answer.to_json())
    assert shop.rows("SELECT role FROM messages ORDER BY seq") == [("user",), ("assistant",)]
