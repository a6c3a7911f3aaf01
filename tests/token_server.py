"""A real server with vLLM's API for tokens around a model of ours, with faults that a test can order.

It answers `/v1/completions` by the native sampler in float32, with vLLM's quirk that log-probabilities are those of
temperature 1 unless it is started otherwise, and loads weights from a folder, as vLLM's `/collective_rpc` does, or by
`/reload`. A fault is an answer that the next request gets instead of a proper one.
"""

import json
import math
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from safetensors.torch import load_file

from characterflywheel.llm import Sampling
from characterflywheel.llm.native import NativeModel, load_model


class TokenServer:
    """The model, what it was asked, and the faults to come: `faults[path]` are answers, first to last."""

    def __init__(self, folder: Path, *, processed: bool = True, says_version: bool = False) -> None:
        model, tokenizer = load_model(folder, torch.float32)
        self.model = NativeModel(model, tokenizer, "served", max_prompt_tokens=256, threads=1)
        self.processed, self.says_version, self.version = processed, says_version, -1
        self.asked: list[tuple[str, Any]] = []
        self.faults: dict[str, list[Response]] = {}
        self.change = lambda answer: answer
        self.lives: float = math.inf  # replies after which it only says that it is away
        self.lock = threading.Lock()
        self.app = FastAPI()
        self.app.add_api_route("/{path:path}", self.answer, methods=["GET", "POST"])

    async def answer(self, request: Request) -> Response:
        path, text = "/" + request.path_params["path"], await request.body()
        body = json.loads(text) if text else None
        with self.lock:
            self.asked.append((path, body))
            if self.faults.get(path):
                return self.faults[path].pop(0)
            if self.lives <= 0:
                return Response("gone", status_code=503)
            if path == "/v1/models":
                return Response(json.dumps({"object": "list", "data": [{"id": "tiny", "object": "model"}]}))
            if path == "/v1/completions":
                self.lives -= 1
                return Response(json.dumps(self.change(self.complete(body))))
            if path == "/collective_rpc":
                assert body["method"] == "reload_weights"
                self.load(Path(body["kwargs"]["weights_path"]), self.version + 1)
            elif path == "/reload":
                self.load(Path(body["path"]), body["version"])
            elif path != "/reset_prefix_cache":
                return Response("not found", status_code=404)
            return Response("{}")

    def load(self, folder: Path, version: int) -> None:
        self.model.model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
        self.version = version

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt, temperature = tuple(body["prompt"]), body["temperature"]
        sampling = Sampling(temperature, body["top_p"], body["max_tokens"])
        (drawn,) = self.model.sample([((), prompt)], n=body["n"], sampling=sampling, seeds=[body["seed"]])
        choices = []
        for index, (ids, logs) in enumerate(drawn):
            told = logs if self.processed else exact(self.model.model, prompt, ids, 1.0)
            choices.append(
                {
                    "index": index, "text": self.model.format.decode(ids), "token_ids": ids,
                    "finish_reason": "stop" if ids[-1] in self.model.ends else "length",
                    "logprobs": {"tokens": [f"token_id:{i}" for i in ids], "token_logprobs": told},
                }
            )  # fmt: skip
        version = {"weight_version": self.version} if self.says_version else {}
        return {"id": "x", "choices": choices, "usage": {"prompt_tokens": len(prompt)}} | version


def exact(model: Any, prompt: tuple[int, ...], ids: list[int], temperature: float) -> list[float]:
    """Log-probabilities of a reply by one ordinary pass over prompt and reply, in float32."""
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].float() / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(ids).unsqueeze(1)).squeeze(1).tolist()


@contextmanager
def listening(server: TokenServer, port: int = 0) -> Iterator[str]:
    """The server on a free port, in a thread of its own; gives its address."""
    running = uvicorn.Server(uvicorn.Config(server.app, port=port, log_level="error", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=running.run)
    thread.start()
    while not running.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
    finally:
        running.should_exit = True
        thread.join()


def nowhere() -> str:
    """An address at which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"
