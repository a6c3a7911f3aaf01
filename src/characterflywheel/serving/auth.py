"""Who speaks: API keys and the web page's signed sessions (DESIGN section 10; PAPER section 9: failing closed).

A key speaks for an application, or, bound, for one user. A session is one anonymous visitor of the web page, known by a
cookie that scripts cannot read, that other sites' requests do not carry, and that only this service can sign. Neither
keys nor the signing secret appear in any text that this module makes.
"""

import base64
import hashlib
import hmac
import os
import re
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, Self
from urllib.parse import urlsplit

from ..errors import FlywheelError
from ..ids import uuid7
from ..service_records import ApiKey
from .errors import ApiError
from .keys import KEY_PATTERN, SCOPES, KeyStore, create_key, is_secret_of
from .reloaded import Reloaded

__all__ = [
    "COOKIE", "SCOPES", "Authenticator", "Forbidden", "Principal", "Unauthorized", "create_key", "load_secret",
    "refuse_other_sites",
]  # fmt: skip

COOKIE = "flywheel_session"
SECURE_COOKIE = f"__Host-{COOKIE}"
_SESSION = re.compile(r"([0-9a-f-]{36})\.([0-9]{1,12})\.([A-Za-z0-9_-]{43})")
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_STALE_SECONDS = 60.0
_LOOK_AGAIN_SECONDS = 0.25
_DAY = 86_400


class Unauthorized(ApiError):  # noqa: N818 - the name that HTTP gives it
    """Nobody known asks: 401."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(401, code, message, headers={"WWW-Authenticate": "Bearer"})


class Forbidden(ApiError):  # noqa: N818
    """Somebody known asks for what is not theirs to ask: 403."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(403, code, message, param)


class Principal(NamedTuple):
    """Who a request comes from. `user_id` is the one user it may speak for; None is an application."""

    id: str
    scopes: frozenset[str]
    user_id: str | None
    session: bool

    def require(self, scope: str) -> None:
        """Raise Forbidden unless this principal has the scope; `admin` has all."""
        if scope not in self.scopes and "admin" not in self.scopes:
            held = ", ".join(sorted(self.scopes))
            raise Forbidden("missing_scope", f"This needs the scope {scope!r}; what was sent has {held}.")

    def speaks_for(self, named: str | None) -> str:
        """The user whom a request is about: the one it names, else the principal's own.

        Raises Forbidden where another is named than the one it is bound to, or, by an application, one of the names
        that belong to sessions (`web-...`) and to keys (`key-...`).
        """
        if self.user_id is not None:
            if named is not None and named != self.user_id:
                raise Forbidden("not_your_user", f"This key or session cannot speak for user {named!r}.", "user")
            return self.user_id
        own = f"key-{self.id}"
        if named is None or named == own:
            return own
        if named.startswith(("web-", "key-")):
            raise Forbidden("not_your_user", f"User {named!r} belongs to a session or to another key.", "user")
        return named

    def whose(self, user_id: str) -> str | None:
        """`user_id` where this principal may speak for that user, else None."""
        try:
            return self.speaks_for(user_id)
        except Forbidden:
            return None


class _Entry(NamedTuple):
    key: ApiKey
    expires: float
    principal: Principal


class Authenticator:
    """Tells principals by keys and sessions; keys are read again every `reload_seconds`.

    `secret` signs sessions (`load_secret`); a session lives `session_days` from its last renewal. Use `start()` and
    `close()`, or as a context manager, to read keys in a thread of their own.
    """

    def __init__(
        self, store: KeyStore, secret: bytes, session_days: int = 30, reload_seconds: float = 2.0,
        now: Callable[[], float] = time.time, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._signing = hmac.new(secret, b"flywheel session", hashlib.sha256)
        self._seconds, self._now = session_days * _DAY, now
        self._keys = Reloaded(lambda: _entries(store.keys()), reload_seconds, clock)

    def start(self) -> None:
        """Read keys in a thread of its own from now on."""
        self._keys.start()

    def close(self) -> None:
        """Stop that thread."""
        self._keys.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def reload(self) -> None:
        """Read the keys now."""
        self._keys.reload()

    @property
    def may_look_again(self) -> bool:
        """Whether keys were not read just now, so that one that is not known may have been made since."""
        return self._keys.since_tried > _LOOK_AGAIN_SECONDS

    def authenticate(self, headers: Mapping[str, str], cookies: Mapping[str, str], method: str = "POST") -> Principal:
        """Who sends a request with these headers (names in lower case, or a mapping that does not care) and cookies.

        Raises:
            Unauthorized: neither a valid key nor a valid session.
            Forbidden: a session's request that comes from another site (see `refuse_other_sites`).
        """
        authorization = headers.get("authorization")
        if authorization is not None:
            scheme, _, text = authorization.partition(" ")
            if scheme.lower() != "bearer":
                raise Unauthorized("invalid_api_key", "Authorization must read `Bearer fw_...`, an API key.")
            return self._of_key(text.strip())
        cookie = cookies.get(SECURE_COOKIE) or cookies.get(COOKIE)
        if cookie is None:
            raise Unauthorized("no_api_key", "Send an API key: `Authorization: Bearer fw_...`; see `flywheel keys`.")
        principal = self._of_session(cookie)
        refuse_other_sites(method, headers)
        return principal

    def new_session(self, secure: bool = False) -> tuple[Principal, str]:
        """A new anonymous visitor and the value of the `Set-Cookie` header. `secure`: the page came over https."""
        user = uuid7(rng=secrets.SystemRandom())  # ordinary ids can be predicted by whoever has seen many
        return _visitor(user), self._set_cookie(user, secure)

    def renewal(self, cookies: Mapping[str, str], secure: bool = False) -> str | None:
        """A `Set-Cookie` value for a valid session older than a day, so that it lives on while it is used."""
        cookie = cookies.get(SECURE_COOKIE) or cookies.get(COOKIE)
        if cookie is None:
            return None
        user, issued = self._session(cookie)
        return self._set_cookie(user, secure) if self._now() - issued > min(_DAY, self._seconds / 2) else None

    def _of_key(self, text: str) -> Principal:
        keys = self._keys.get()
        if self._keys.age > _STALE_SECONDS:  # a key may have been revoked since
            raise ApiError(503, "keys_unreadable", "Keys cannot be checked at the moment; try again.")
        found = KEY_PATTERN.fullmatch(text)
        entry = keys.get(found.group(1)) if found else None
        if found is None or entry is None or not is_secret_of(found.group(2), entry.key):
            raise Unauthorized("invalid_api_key", "This API key is not known.")
        if entry.key.revoked_at is not None:
            raise Unauthorized("revoked_api_key", f"API key {entry.key.id} was revoked.")
        if self._now() >= entry.expires:
            raise Unauthorized("expired_api_key", f"API key {entry.key.id} expired at {entry.key.expires_at}.")
        return entry.principal

    def _of_session(self, cookie: str) -> Principal:
        return _visitor(self._session(cookie)[0])

    def _session(self, cookie: str) -> tuple[str, int]:
        """The visitor and when the cookie was issued. A cookie from the future is fine: the clock went backwards."""
        found = _SESSION.fullmatch(cookie)
        if found is None or not hmac.compare_digest(self._signature(*found.group(1, 2)), found.group(3)):
            raise Unauthorized("invalid_session", "This session is not ours: load the page again for a new one.")
        user, issued = found.group(1), int(found.group(2))
        if self._now() - issued > self._seconds:
            raise Unauthorized("expired_session", "This session has expired: load the page again for a new one.")
        return user, issued

    def _set_cookie(self, user: str, secure: bool) -> str:
        issued = str(int(self._now()))
        name, more = (SECURE_COOKIE, "; Secure") if secure else (COOKIE, "")
        value = f"{user}.{issued}.{self._signature(user, issued)}"
        return f"{name}={value}; Path=/; Max-Age={self._seconds}; HttpOnly; SameSite=Strict{more}"

    def _signature(self, user: str, issued: str) -> str:
        signing = self._signing.copy()
        signing.update(f"{user}.{issued}".encode())
        return base64.urlsafe_b64encode(signing.digest()).decode().rstrip("=")


def refuse_other_sites(method: str, headers: Mapping[str, str]) -> None:
    """Refuse a request that changes something and was made by another site's page.

    Browsers say where a request comes from in `Sec-Fetch-Site`, older ones in `Origin`; who says neither is refused.

    Raises:
        Forbidden: the request does not come from a page of this service.
    """
    if method in _SAFE_METHODS:
        return
    site = headers.get("sec-fetch-site")
    if site is not None:
        if site in ("same-origin", "none"):
            return
    elif (origin := headers.get("origin")) is not None:
        if (host := headers.get("host")) and urlsplit(origin).netloc.lower() == host.lower():
            return
    else:
        raise Forbidden("origin_unknown", "A session's request needs Sec-Fetch-Site or Origin; programs use API keys.")
    raise Forbidden("other_origin", "This request was made by a page of another site.")


def load_secret(folder: Path) -> bytes:
    """The secret that signs sessions: `FLYWHEEL_SECRET`, else the workspace's `.secret`, made where there is none.

    Raises:
        FlywheelError: it is too short to be one, or others on this machine may read the file.
    """
    if "FLYWHEEL_SECRET" in os.environ:
        secret = os.environ["FLYWHEEL_SECRET"].encode()
        if len(secret) < 32:
            raise FlywheelError(
                f"FLYWHEEL_SECRET has {len(secret)} bytes, must have at least 32: `openssl rand -hex 32` makes 64."
            )
        return secret
    path = folder / ".secret"
    if not path.exists():
        _make_secret(path)
    if path.stat().st_mode & 0o077:
        raise FlywheelError(f"{path} may be read by others: `chmod 600 {path}`, or delete it to end all sessions.")
    secret = path.read_bytes().strip()
    if len(secret) < 32:
        raise FlywheelError(f"{path} holds {len(secret)} bytes, must hold at least 32: delete it, a new one is made.")
    return secret


def _make_secret(path: Path) -> None:
    """Write a new secret, whole or not at all; where another process was faster, its secret stays."""
    draft = path.with_name(f".secret-{secrets.token_hex(8)}")
    try:
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32) + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, path)
        except FileExistsError:
            return
    finally:
        draft.unlink(missing_ok=True)


def _entries(keys: list[ApiKey]) -> dict[str, _Entry]:
    return {
        key.id: _Entry(
            key, key.expires_at.timestamp() if key.expires_at else float("inf"),
            Principal(key.id, frozenset(key.scopes), key.user_id, session=False),
        )
        for key in keys
    }  # fmt: skip


def _visitor(user: str) -> Principal:
    name = f"web-{user}"
    return Principal(name, frozenset({"chat"}), name, session=True)
