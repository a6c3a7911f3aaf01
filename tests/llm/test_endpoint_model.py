"""A server that draws tokens: what it says is what is used, what it may not say is an error, and how long it may be
away. The server is real and runs the tiny model."""

import math
import re
import socketserver
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import Response

from characterflywheel.errors import FlywheelError, SamplerGone
from characterflywheel.llm import Sampling
from characterflywheel.llm.connection import Endpoint
from characterflywheel.llm.endpoint import EndpointModel
from tiny_model import asks, tiny_tokenizer
from token_server import TokenServer, exact, listening, nowhere

CONVERSATIONS = (asks("what do you like best?"), asks("hi"), asks("the stars"))
SEEDS = (3, 1, 4)
SAMPLING = Sampling(temperature=0.7, max_tokens=8)


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self) -> None:
        self.now, self.slept = 0.0, list[float]()

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept.append(seconds)


@pytest.fixture(scope="module")
def server(tiny_folder: Path) -> Iterator[tuple[TokenServer, str]]:
    one = TokenServer(tiny_folder)
    with listening(one) as address:
        yield one, address


@pytest.fixture
def served(server: tuple[TokenServer, str]) -> Iterator[tuple[TokenServer, EndpointModel]]:
    one, address = server
    one.faults, one.asked = {}, []
    one.change = lambda answer: answer
    endpoint = Endpoint(address + "/v1/", patience_s=5, sleep=lambda seconds: None)
    yield one, EndpointModel(endpoint, tiny_tokenizer(), "far", max_prompt_tokens=128)
    endpoint.close()


def test_replies_are_the_server_s(served: tuple[TokenServer, EndpointModel]) -> None:
    """The same call gives the same, with log-probabilities at the sampling temperature; prompts arrive as ids."""
    server, model = served
    told: list[tuple[int, int]] = []
    replies = model.complete(
        CONVERSATIONS, n=3, sampling=SAMPLING, seeds=SEEDS, on_progress=lambda *done: told.append(done)
    )
    assert model.complete(CONVERSATIONS, n=3, sampling=SAMPLING, seeds=SEEDS) == replies
    assert told[-1] == (3, 3)
    assert model.model == "tiny", "the server's first model"
    assert model.versions == [[None] * 3] * 3, "it does not say which weights it has"
    for conversation, drawn in zip(CONVERSATIONS, replies, strict=True):
        head, rest = model.format.prompt(conversation)
        assert any(path == "/v1/completions" and body["prompt"] == [*head, *rest] for path, body in server.asked)
        for reply in drawn:
            own = exact(server.model.model, (*head, *rest), list(reply.token_ids), 0.7)
            assert reply.logprobs == pytest.approx(own, abs=1e-4)
            assert reply.finish_reason == ("stop" if reply.token_ids[-1] in model.ends else "length")
    plain = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    assert all(body.items() >= plain.items() for path, body in server.asked if path == "/v1/completions")
    assert model.sample([], n=2, sampling=SAMPLING, seeds=[]) == []
    with pytest.raises(ValueError, match="as many seeds"):
        model.sample([((), (1,))], n=2, sampling=SAMPLING, seeds=[])


def test_ids_may_come_as_token_names(served: tuple[TokenServer, EndpointModel]) -> None:
    server, model = served
    whole = model.complete(CONVERSATIONS, n=2, sampling=SAMPLING, seeds=SEEDS)

    def forget(answer: Any) -> Any:
        for choice in answer["choices"]:
            del choice["token_ids"]
        answer["choices"].reverse()
        return answer

    server.change = forget
    assert model.complete(CONVERSATIONS, n=2, sampling=SAMPLING, seeds=SEEDS) == whole


def test_a_log_probability_that_is_none_is_kept_as_such(served: tuple[TokenServer, EndpointModel]) -> None:
    """NaN or null: the reply is kept, and importance correction masks the token."""
    server, model = served

    def spoil(answer: Any) -> Any:
        answer["choices"][0]["logprobs"]["token_logprobs"][0] = math.nan
        answer["choices"][1]["logprobs"]["token_logprobs"][0] = None
        return answer

    server.change = spoil
    ((first, second),) = model.sample([((), (5, 6))], n=2, sampling=SAMPLING, seeds=[1])
    assert math.isnan(first[1][0])
    assert math.isnan(second[1][0])
    assert all(value <= 0 for value in first[1][1:] + second[1][1:])


def set_logprob(value: float) -> Callable[[Any], None]:
    return lambda choice: choice["logprobs"].update(token_logprobs=[value] * len(choice["token_ids"]))


def only_texts(answer: Any) -> None:
    answer["choices"][0]["logprobs"]["tokens"] = ["tea"] * len(answer["choices"][0].pop("token_ids"))


def stopped(answer: Any) -> None:
    logprobs = {"tokens": [""], "token_logprobs": [-1.0]}
    answer["choices"][0].update(token_ids=[7], finish_reason="abort", logprobs=logprobs)


SPOILT: list[tuple[Callable[[Any], object], str]] = [
    (lambda answer: answer["choices"].pop(), r"gave 1 replies numbered \[0\], not the 2 asked for"),
    (lambda answer: answer["choices"].append(answer["choices"][0]), r"gave 3 replies numbered \[0, 0, 1\]"),
    (lambda answer: answer["usage"].update(prompt_tokens=1), r"read a prompt of 1 tokens, it was sent 2"),
    (lambda answer: answer["choices"][0]["token_ids"].append(4), r"reply of \d+ tokens with \d+ log-prob"),
    (lambda answer: answer["choices"][0].update(token_ids=[]), r"reply of 0 tokens with \d+ log-prob"),
    (lambda answer: answer["choices"][0]["token_ids"].insert(0, 320), r"drew token 320, the model has 320"),
    (lambda answer: set_logprob(0.5)(answer["choices"][0]), r"log-probability of 0.5, must be <= 0"),
    (lambda answer: answer["choices"][0].pop("logprobs"), r"does not answer like vLLM's server \(choices.0.logprobs"),
    (stopped, r"ended a reply with 'abort' after token 7, which is no end token"),
    (only_texts, r"gave the text of tokens, not their ids"),
]


@pytest.mark.parametrize(("spoil", "said"), SPOILT)
def test_an_answer_to_another_question_is_an_error(
    served: tuple[TokenServer, EndpointModel], spoil: Callable[[Any], None], said: str
) -> None:
    server, model = served

    def change(answer: Any) -> Any:
        spoil(answer)
        return answer

    server.change = change
    with pytest.raises(FlywheelError, match=said) as caught:
        model.sample([((), (5, 6))], n=2, sampling=SAMPLING, seeds=[1])
    assert not isinstance(caught.value, SamplerGone)


@pytest.mark.parametrize("status", [429, 502, 503, 504, 500])
def test_a_server_that_is_away_for_a_moment_is_asked_again(
    served: tuple[TokenServer, EndpointModel], status: int
) -> None:
    server, model = served
    whole = model.complete(CONVERSATIONS, sampling=SAMPLING, seeds=SEEDS)
    server.faults["/v1/completions"] = [Response("not now", status_code=status)] * (1 if status == 500 else 3)
    assert model.complete(CONVERSATIONS, sampling=SAMPLING, seeds=SEEDS) == whole


def test_a_refusal_is_an_error_at_once(served: tuple[TokenServer, EndpointModel]) -> None:
    server, model = served
    for answers, said in (([400], "refuses: 400: 'no'"), ([500, 500], "refuses: 500: 'no'")):
        server.faults["/v1/completions"] = [Response("no", status_code=status) for status in answers]
        with pytest.raises(FlywheelError, match=said) as caught:
            model.sample([((), (5,))], n=1, sampling=SAMPLING, seeds=[1])
        assert not isinstance(caught.value, SamplerGone)


def test_a_server_that_is_gone_is_asked_again_with_longer_pauses() -> None:
    clock, address = Clock(), nowhere()
    endpoint = Endpoint(address, patience_s=60, clock=clock, sleep=clock.sleep)
    with pytest.raises(SamplerGone, match=rf"{re.escape(address)} did not answer in \d+ tries over \d+ s .*start it"):
        endpoint.tried("POST", "/v1/completions", {})
    endpoint.close()
    assert 45 < clock.now <= 60, "the patience is used, and no more"
    assert clock.slept[0] <= 0.1
    assert max(clock.slept) > 2.5
    assert len(clock.slept) < 40
    with pytest.raises(FlywheelError, match="'nowhere:1' is no address such as"):
        Endpoint("nowhere:1")


@pytest.mark.parametrize(
    "address", ["http://user:SECRET@127.0.0.1:1", "https://SECRET@host/v1", "user:SECRET@host:1", "ftp://u:SECRET@host"]
)
def test_a_password_in_an_address_is_refused_and_not_repeated(address: str) -> None:
    with pytest.raises(
        FlywheelError, match=r"rl\.sampler\.address has a user or password .*rl\.sampler\.key_env"
    ) as told:
        Endpoint(address)
    assert "SECRET" not in str(told.value)
    Endpoint("http://host/models/@one/v1").close()


def test_a_server_that_loses_requests_is_gone() -> None:
    """It takes the request and closes the connection, three times."""
    taken: list[bytes] = []

    class Lose(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            taken.append(self.request.recv(64))

    with socketserver.TCPServer(("127.0.0.1", 0), Lose) as losing:
        thread = threading.Thread(target=losing.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        endpoint = Endpoint(f"http://127.0.0.1:{losing.server_address[1]}", sleep=lambda seconds: None)
        with pytest.raises(SamplerGone, match=r"took a request 3 times and never answered .*its log says why"):
            endpoint.tried("POST", "/v1/completions", {})
        endpoint.close()
        losing.shutdown()
        thread.join()
    assert [line[:20] for line in taken] == [b"POST /v1/completions"] * 3


def test_a_key_is_sent_and_never_shown(
    served: tuple[TokenServer, EndpointModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUR_KEY", "s3cret")
    model = EndpointModel.at(
        served[1].endpoint.address, tiny_tokenizer(), "far", key_env="OUR_KEY", patience_s=1, timeout_s=5,
        max_prompt_tokens=128,
    )  # fmt: skip
    assert model.endpoint._http.headers["Authorization"] == "Bearer s3cret"
    model.endpoint.close()
    with pytest.raises(SamplerGone) as caught:
        EndpointModel.at(
            nowhere(), tiny_tokenizer(), "far", key_env="OUR_KEY", patience_s=0.2, timeout_s=5, max_prompt_tokens=128
        )  # fmt: skip
    assert "s3cret" not in str(caught.value)


def test_log_probabilities_of_another_temperature_are_found_out(tiny_folder: Path) -> None:
    """vLLM's default gives those of temperature 1, which would be corrected as if the sampler were another policy."""
    for processed in (True, False):
        with listening(TokenServer(tiny_folder, processed=processed)) as address:
            endpoint = Endpoint(address)
            model = EndpointModel(endpoint, tiny_tokenizer(), "far", max_prompt_tokens=128)
            if processed:
                model.check_temperature()
            else:
                with pytest.raises(FlywheelError, match="--logprobs-mode processed_logprobs"):
                    model.check_temperature()
            endpoint.close()
