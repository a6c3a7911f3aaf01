"""Keys and sessions: who gets in, for whom they speak, and that nothing secret is shown (DESIGN section 10)."""

import os
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from characterflywheel.errors import FlywheelError
from characterflywheel.service_records import ApiKey
from characterflywheel.serving.auth import (
    COOKIE,
    Authenticator,
    Forbidden,
    Principal,
    Unauthorized,
    load_secret,
    refuse_other_sites,
)
from characterflywheel.serving.errors import ApiError
from characterflywheel.serving.keys import create_key, revoke_key
from characterflywheel.serving.reloaded import Reloaded

SECRET = b"0123456789abcdef0123456789abcdef"
SAME_SITE = {"sec-fetch-site": "same-origin"}


class Drawer:
    """Keys in memory, as the store would keep them; `broken` makes reading fail."""

    def __init__(self) -> None:
        self.held: dict[str, ApiKey] = {}
        self.broken = False

    def keys(self) -> list[ApiKey]:
        if self.broken:
            raise OSError("the disk is gone")
        return list(self.held.values())

    def add_key(self, key: ApiKey) -> None:
        self.held[key.id] = key

    def revoke_key(self, id: str, at: datetime) -> None:
        self.held[id] = self.held[id].model_copy(update={"revoked_at": at})


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self, at: float) -> None:
        self.at = at

    def __call__(self) -> float:
        return self.at


def bearer(text: str) -> dict[str, str]:
    return {"authorization": f"Bearer {text}"}


def value_of(set_cookie: str) -> dict[str, str]:
    name, _, value = set_cookie.partition(";")[0].partition("=")
    return {name: value}


def test_a_key_opens_what_it_was_made_for() -> None:
    drawer = Drawer()
    key, text = create_key(drawer, "app", ["characters", "chat"])
    principal = Authenticator(drawer, SECRET).authenticate(bearer(text), {})
    assert principal == Principal(key.id, frozenset({"chat", "characters"}), None, False)
    principal.require("chat")
    with pytest.raises(Forbidden, match="'review'"):
        principal.require("review")
    _, admin = create_key(drawer, "boss", ["admin"])
    Authenticator(drawer, SECRET).authenticate(bearer(admin), {}).require("review")


def test_the_store_never_holds_the_secret_and_no_text_shows_it(caplog: pytest.LogCaptureFixture) -> None:
    drawer = Drawer()
    key, text = create_key(drawer, "app", ["chat"])
    secret = text.split("_", 2)[2]
    assert len(secret) == 43  # 256 bits in base64
    authenticator = Authenticator(drawer, SECRET)
    shown = [repr(drawer.held), repr(authenticator), repr(authenticator.authenticate(bearer(text), {})), str(key)]
    for wrong in (text[:-1], text + "x", f"fw_{'0' * 16}_{secret}"):
        with pytest.raises(Unauthorized) as refused:
            authenticator.authenticate(bearer(wrong), {})
        shown += [str(refused.value), refused.value.body().model_dump_json()]
    assert not any(secret[:20] in one for one in [*shown, caplog.text])


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, "no_api_key"),
        ({"authorization": "Basic dXNlcg=="}, "invalid_api_key"),
        ({"authorization": "Bearer"}, "invalid_api_key"),
        ({"authorization": "Bearer sk-abc"}, "invalid_api_key"),
        ({"authorization": "Bearer fw_0123456789abcdef_" + "a" * 43}, "invalid_api_key"),
    ],
)
def test_nobody_known_is_401(headers: dict[str, str], code: str) -> None:
    with pytest.raises(Unauthorized) as refused:
        Authenticator(Drawer(), SECRET).authenticate(headers, {})
    assert (refused.value.status, refused.value.code) == (401, code)
    assert refused.value.headers == {"WWW-Authenticate": "Bearer"}


def test_the_secret_of_one_key_does_not_open_another() -> None:
    drawer = Drawer()
    one, text = create_key(drawer, "one", ["chat"])
    two, other = create_key(drawer, "two", ["admin"])
    with pytest.raises(Unauthorized):
        Authenticator(drawer, SECRET).authenticate(bearer(text.replace(one.id, two.id)), {})
    assert text != other


def test_a_key_expires() -> None:
    drawer, now = Drawer(), Clock(datetime.now(UTC).timestamp())
    _, text = create_key(drawer, "trial", ["chat"], days=2)
    authenticator = Authenticator(drawer, SECRET, now=now)
    assert authenticator.authenticate(bearer(text), {}).scopes == {"chat"}
    now.at += 2 * 86_400 + 1
    with pytest.raises(Unauthorized, match="expired"):
        authenticator.authenticate(bearer(text), {})


def test_revocation_takes_effect_within_the_reload_time() -> None:
    drawer, clock = Drawer(), Clock(0.0)
    key, text = create_key(drawer, "app", ["chat"])
    authenticator = Authenticator(drawer, SECRET, reload_seconds=2, clock=clock)
    assert revoke_key(drawer, text).id == key.id  # the key itself names it too
    first = drawer.held[key.id].revoked_at
    assert revoke_key(drawer, key.id).id == key.id
    assert drawer.held[key.id].revoked_at == first
    clock.at = 1.9
    authenticator.authenticate(bearer(text), {})
    clock.at = 2.0
    with pytest.raises(Unauthorized, match="revoked"):
        authenticator.authenticate(bearer(text), {})
    with pytest.raises(FlywheelError, match="no key 'nobody'"):
        revoke_key(drawer, "nobody")


def test_keys_that_cannot_be_read_for_long_open_nothing() -> None:
    drawer, clock = Drawer(), Clock(0.0)
    _, text = create_key(drawer, "app", ["chat"])
    authenticator = Authenticator(drawer, SECRET, clock=clock)
    drawer.broken = True
    clock.at = 30
    assert authenticator.authenticate(bearer(text), {}).scopes == {"chat"}
    clock.at = 90
    with pytest.raises(ApiError) as refused:
        authenticator.authenticate(bearer(text), {})
    assert refused.value.status == 503
    drawer.broken, clock.at = False, 95
    assert authenticator.authenticate(bearer(text), {}).scopes == {"chat"}


def test_a_started_authenticator_reads_keys_in_its_own_thread() -> None:
    drawer = Drawer()
    with Authenticator(drawer, SECRET, reload_seconds=0.01) as authenticator:
        _, text = create_key(drawer, "late", ["chat"])
        for _ in range(500):
            try:
                found = authenticator.authenticate(bearer(text), {})
                break
            except Unauthorized:
                time.sleep(0.005)
    assert found.scopes == {"chat"}


def test_a_slow_reading_does_not_undo_a_later_one() -> None:
    seen, time_now = ["old", "new"], Clock(0.0)

    def load() -> str:
        if seen[0] == "old" and time_now.at == 1.0:  # while this reads, another reading begins and ends
            seen.pop(0)
            time_now.at = 2.0
            value.reload()
            return "old"
        return seen[0]

    value: Reloaded[str] = Reloaded(load, 60, time_now)
    time_now.at = 1.0
    value.reload()
    assert value.get() == "new"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scopes": []}, "needs a scope: chat, characters, review, experiments, admin"),
        ({"scopes": ["chat", "root"]}, "scope 'root' does not exist; there are chat, characters"),
        ({"scopes": ["chat"], "days": 0}, "days = 0, must be above 0"),
        ({"scopes": ["chat"], "user_id": ""}, "must name somebody"),
    ],
)
def test_a_key_that_makes_no_sense_is_not_made(arguments: dict[str, object], message: str) -> None:
    drawer = Drawer()
    with pytest.raises(FlywheelError, match=message):
        create_key(drawer, "bad", **arguments)  # type: ignore[arg-type]
    assert drawer.held == {}


def test_whom_a_principal_speaks_for() -> None:
    application = Principal("aa", frozenset({"chat"}), None, False)
    assert application.speaks_for(None) == "key-aa"
    assert application.speaks_for("key-aa") == "key-aa"
    assert application.speaks_for("ada") == "ada"
    for taken in ("web-1", "key-bb"):
        with pytest.raises(Forbidden):
            application.speaks_for(taken)
    bound = Principal("bb", frozenset({"chat"}), "ada", False)
    assert bound.speaks_for(None) == bound.speaks_for("ada") == "ada"
    with pytest.raises(Forbidden):
        bound.speaks_for("bob")


def test_a_session_is_one_visitor_and_lasts_as_long_as_it_is_used() -> None:
    now = Clock(1_800_000_000.0)
    authenticator = Authenticator(Drawer(), SECRET, session_days=30, now=now)
    visitor, cookie = authenticator.new_session()
    assert visitor.user_id is not None
    assert visitor.user_id.startswith("web-")
    assert (visitor.scopes, visitor.session) == ({"chat"}, True)
    assert [part.strip() for part in cookie.split(";")[1:]] == [
        "Path=/", "Max-Age=2592000", "HttpOnly", "SameSite=Strict",
    ]  # fmt: skip
    assert authenticator.authenticate(SAME_SITE, value_of(cookie)) == visitor
    assert authenticator.renewal(value_of(cookie)) is None
    now.at += 2 * 86_400
    renewed = authenticator.renewal(value_of(cookie))
    assert renewed is not None
    now.at += 29 * 86_400
    with pytest.raises(Unauthorized, match="expired"):
        authenticator.authenticate(SAME_SITE, value_of(cookie))
    assert authenticator.authenticate(SAME_SITE, value_of(renewed)) == visitor
    now.at -= 400 * 86_400  # a clock that goes backwards ends no session
    assert authenticator.authenticate(SAME_SITE, value_of(renewed)) == visitor
    assert authenticator.new_session()[0] != visitor


def test_over_https_the_cookie_is_secure_and_bound_to_the_host() -> None:
    authenticator = Authenticator(Drawer(), SECRET)
    visitor, cookie = authenticator.new_session(secure=True)
    assert cookie.startswith("__Host-flywheel_session=")
    assert cookie.endswith("; Secure")
    assert authenticator.authenticate(SAME_SITE, value_of(cookie)) == visitor


@given(st.data())
def test_no_changed_cookie_is_taken(data: st.DataObject) -> None:
    authenticator = Authenticator(Drawer(), SECRET)
    value = value_of(authenticator.new_session()[1])[COOKIE]
    at = data.draw(st.integers(0, len(value) - 1))
    with_other = value[:at] + data.draw(st.characters(codec="latin-1")) + value[at + 1 :]
    for forged in {with_other, value[:at], value + "="} - {value}:
        with pytest.raises(Unauthorized):
            authenticator.authenticate(SAME_SITE, {COOKIE: forged})


def test_another_secret_signs_other_sessions() -> None:
    _, cookie = Authenticator(Drawer(), SECRET).new_session()
    with pytest.raises(Unauthorized, match="not ours"):
        Authenticator(Drawer(), b"another secret that has 32 bytes").authenticate(SAME_SITE, value_of(cookie))


@pytest.mark.parametrize(
    ("method", "headers", "passes"),
    [
        ("GET", {}, True),
        ("POST", {"sec-fetch-site": "same-origin"}, True),
        ("POST", {"sec-fetch-site": "none"}, True),
        ("POST", {"sec-fetch-site": "same-site"}, False),
        ("DELETE", {"sec-fetch-site": "cross-site", "origin": "http://a.org", "host": "a.org"}, False),
        ("POST", {"origin": "https://a.org:8443", "host": "A.org:8443"}, True),
        ("POST", {"origin": "https://evil.org", "host": "a.org"}, False),
        ("POST", {"origin": "null", "host": "a.org"}, False),
        ("POST", {"origin": "https://a.org"}, False),
        ("PATCH", {}, False),
    ],
)
def test_other_sites_cannot_use_a_visitor_s_session(method: str, headers: dict[str, str], passes: bool) -> None:
    authenticator = Authenticator(Drawer(), SECRET)
    visitor, cookie = authenticator.new_session()
    if passes:
        assert authenticator.authenticate(headers, value_of(cookie), method) == visitor
    else:
        with pytest.raises(Forbidden):
            authenticator.authenticate(headers, value_of(cookie), method)
        with pytest.raises(Forbidden):
            refuse_other_sites(method, headers)


def test_the_workspace_s_secret_is_made_once_and_only_its_owner_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FLYWHEEL_SECRET", raising=False)
    with ThreadPoolExecutor(8) as pool:
        secrets = set(pool.map(lambda _: load_secret(tmp_path), range(16)))
    assert len(secrets) == 1
    assert len(secrets.pop()) == 64
    assert [path.name for path in tmp_path.iterdir()] == [".secret"]
    assert stat.S_IMODE((tmp_path / ".secret").stat().st_mode) == 0o600
    os.chmod(tmp_path / ".secret", 0o644)
    with pytest.raises(FlywheelError, match="chmod 600"):
        load_secret(tmp_path)


def test_the_environment_s_secret_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLYWHEEL_SECRET", "x" * 32)
    assert load_secret(tmp_path) == b"x" * 32
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("FLYWHEEL_SECRET", "short")
    with pytest.raises(FlywheelError, match="5 bytes, must have at least 32"):
        load_secret(tmp_path)
