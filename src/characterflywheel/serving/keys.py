"""API keys: made, stored as digests, revoked (DESIGN section 10, `flywheel keys`).

A key reads `fw_<id>_<secret>`. The secret has 256 random bits and is shown once; the store holds its SHA-256, which for
a secret of that size needs neither salt nor slowness.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple, Protocol

from ..errors import FlywheelError
from ..service_records import ApiKey

SCOPES = ("chat", "characters", "review", "experiments", "admin")
KEY_PATTERN = re.compile(r"fw_([0-9a-f]{16})_([A-Za-z0-9_-]{43})")


class KeyStore(Protocol):
    """What is needed of `store.EventStore`."""

    def keys(self) -> list[ApiKey]: ...

    def add_key(self, key: ApiKey) -> None: ...

    def revoke_key(self, id: str, at: datetime) -> None: ...


class Created(NamedTuple):
    """A new key as it is stored, and its text, which nobody can read again."""

    key: ApiKey
    text: str


def create_key(
    store: KeyStore, name: str, scopes: Sequence[str], user_id: str | None = None, days: float | None = None
) -> Created:
    """Make a key and store it. `user_id` binds it to one user; without `days` it does not expire.

    Raises:
        FlywheelError: no scope, an unknown one, or `days` that are not positive.
    """
    if not scopes:
        raise FlywheelError(f"a key needs a scope: {', '.join(SCOPES)}.")
    for scope in scopes:
        if scope not in SCOPES:
            raise FlywheelError(f"scope {scope!r} does not exist; there are {', '.join(SCOPES)}.")
    if days is not None and not 0 < days < 100_000:
        raise FlywheelError(f"days = {days:g}, must be above 0 and below 100,000.")
    if user_id == "":
        raise FlywheelError("user = '', must name somebody; leave it out for a key that speaks for many users.")
    now = datetime.now(UTC)
    secret = secrets.token_urlsafe(32)
    key = ApiKey(
        id=secrets.token_hex(8), name=name, digest=digest_of(secret), user_id=user_id, created_at=now,
        scopes=tuple(scope for scope in SCOPES if scope in scopes),
        expires_at=None if days is None else now + timedelta(days=days),
    )  # fmt: skip
    store.add_key(key)
    return Created(key, f"fw_{key.id}_{secret}")


def revoke_key(store: KeyStore, id: str) -> ApiKey:
    """Revoke the key with this id; a running service refuses it within seconds.

    Raises:
        FlywheelError: there is no such key. A key revoked before stays as it is.
    """
    stored = store.keys()
    known = {key.id: key for key in stored}
    if (whole := KEY_PATTERN.fullmatch(id)) is not None:
        id = whole.group(1)  # somebody gave the key itself
    if id not in known:
        raise FlywheelError(f"there is no key {id!r}; `flywheel keys list` shows them.")
    if known[id].revoked_at is None:
        store.revoke_key(id, datetime.now(UTC))
    return known[id]


def digest_of(secret: str) -> str:
    """What is stored of a secret."""
    return hashlib.sha256(secret.encode()).hexdigest()


def is_secret_of(secret: str, key: ApiKey) -> bool:
    """Whether the secret is this key's, in the same time for every wrong one."""
    return hmac.compare_digest(digest_of(secret), key.digest)
