"""One server that draws tokens: asked again while it is away, and gone when patience is over (DESIGN section 6)."""

import itertools
import math
import random
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, TypeVar

import httpx2
from pydantic import BaseModel, ValidationError

from ..addresses import refuse_password
from ..errors import FlywheelError, SamplerGone

CONCURRENT = 32
"""Requests at once; a server batches them itself."""
_AWAY = frozenset({429, 502, 503, 504})
_LOSSES = 3
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0
A = TypeVar("A", bound=BaseModel)


class Endpoint:
    """One server: asks, asks again, and reads the answers. Threads may share it."""

    def __init__(
        self, address: str, *, key: str = "", patience_s: float = 60.0, timeout_s: float = 600.0,
        clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep,
    ) -> None:  # fmt: skip
        """Raises FlywheelError where `address` is no http address, or holds a password."""
        refuse_password(address, "rl.sampler.address", "that rl.sampler.key_env names")
        if not address.startswith(("http://", "https://")):
            raise FlywheelError(f"the sampler's address {address!r} is no address such as http://HOST:8000.")
        self.address = address.rstrip("/").removesuffix("/v1")
        self._patience_s, self._clock, self._sleep = patience_s, clock, sleep
        self._http = httpx2.Client(
            base_url=self.address, timeout=httpx2.Timeout(timeout_s, connect=5.0),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx2.Limits(max_connections=CONCURRENT),
        )  # fmt: skip

    def close(self) -> None:
        """Close the kept connections."""
        self._http.close()

    def ask(self, method: str, path: str, body: Any, answer: type[A]) -> A:
        """Send `body` as JSON and read the answer.

        Raises:
            SamplerGone: nobody answers for `patience_s`, or the request is taken and lost three times.
            FlywheelError: it is refused, fails twice, or the answer is none.
        """
        response = self.tried(method, path, body)
        try:
            return answer.model_validate_json(response.content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise FlywheelError(
                f"{self.address}{path} does not answer like vLLM's server ({where}: {first['msg']}): it has to give "
                "token ids and log-probabilities."
            ) from None

    def tried(self, method: str, path: str, body: Any) -> httpx2.Response:
        """The first answer of status 200; see `ask`."""
        lost, failed, away = 0, 0, math.nan  # since when nobody is there
        for attempt in itertools.count():
            pause = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**attempt) * random.uniform(0.5, 1.0)
            asked = self._clock()
            try:
                response = self._http.request(method, path, json=body)
            except httpx2.TransportError as error:
                said = f"{type(error).__name__}: {error}"
                there = not isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout)
                lost += there
            else:
                if response.status_code == HTTPStatus.OK:
                    return response
                said, there = f"{response.status_code}: {response.text[:200]!r}", False
                if response.status_code not in _AWAY:
                    failed += 1
                    if response.status_code != HTTPStatus.INTERNAL_SERVER_ERROR or failed > 1:
                        raise FlywheelError(f"{self.address}{path} refuses: {said}")
            if lost == _LOSSES:
                raise SamplerGone(
                    f"the sampler {self.address} took a request {lost} times and never answered ({said}): its log "
                    "says why; run again when it is back."
                )
            away = math.nan if there else (asked if math.isnan(away) else away)
            if self._clock() + pause - away > self._patience_s:
                raise SamplerGone(
                    f"the sampler {self.address} did not answer in {attempt + 1} tries over "
                    f"{self._clock() - away:.0f} s ({said}): start it and run again, or choose another rl.sampler."
                )
            self._sleep(pause)
        raise AssertionError("counting has no end")
