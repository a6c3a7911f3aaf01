"""Feedback that comes before the reply it is about is in the store (DESIGN section 8: out-of-order events)."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import requests
from live_service import Live


def test_feedback_on_a_reply_that_is_still_written_waits_for_it(
    start: Callable[..., Live], upstream: Callable[..., Any], tmp_path: Path
) -> None:
    model = upstream("--piece", "0.02", "--words", "72")
    live = start(f'[server]\nendpoint = "{model.url}"\nendpoint_model = "mock"\n', "--backend", "endpoint")
    headers = {"Authorization": f"Bearer {live.key}"}
    body = {"model": "pirate", "user": "hasty", "stream": True, "messages": [{"role": "user", "content": "Go on!"}]}
    answers: list[requests.Response] = []

    def love(id: str) -> None:
        sent = {"message_id": id, "kind": "love"}
        answers.append(requests.post(f"{live.url}/feedback", json=sent, headers=headers, timeout=20))

    with requests.post(f"{live.url}/chat/completions", json=body, headers=headers, stream=True, timeout=20) as stream:
        lines = stream.iter_lines()
        first = json.loads(next(line for line in lines if line.startswith(b"data: "))[6:])
        assert live.rows("SELECT COUNT(*) FROM messages WHERE role = 'assistant'") == [(0,)]
        hasty = threading.Thread(target=love, args=(first["id"],))
        hasty.start()
        assert list(lines)[-2:] == [b"data: [DONE]", b""]
    hasty.join()
    assert [answer.status_code for answer in answers] == [200]
    assert live.rows("SELECT kind, message_id FROM signals") == [("love", first["id"])]
