"""A password in an address is refused at every door to another server, and never repeated."""

from collections.abc import Callable
from typing import Any

import pytest

from characterflywheel.addresses import refuse_password
from characterflywheel.errors import FlywheelError
from characterflywheel.llm.connection import Endpoint
from characterflywheel.pool import ServedPolicy
from characterflywheel.reward.remote import Connection
from characterflywheel.safety.endpoint import EndpointJudge
from characterflywheel.serving.upstream import Upstream

DOORS: dict[str, Callable[[str], Any]] = {
    "rl.sampler.address": Endpoint,
    "a policy's source": lambda address: ServedPolicy(address, "big"),
    "reward.server": Connection,
    "safety.endpoint": lambda address: EndpointJudge(address, "guard"),
    "server.endpoint": Upstream,
}


@pytest.mark.parametrize("setting", DOORS)
@pytest.mark.parametrize("who", ["user:SECRET@", "SECRET@"])
def test_a_password_is_refused_and_not_repeated(setting: str, who: str) -> None:
    with pytest.raises(FlywheelError, match="has a user or password before its host") as refused:
        DOORS[setting](f"http://{who}127.0.0.1:1/v1")
    assert str(refused.value).startswith(setting)
    assert "SECRET" not in str(refused.value)


def test_an_at_sign_after_the_host_is_no_password() -> None:
    refuse_password("http://host:8000/v1/@team", "x", "KEY")
    with pytest.raises(FlywheelError):
        refuse_password("me@host:8000", "x", "KEY")
