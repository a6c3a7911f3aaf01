"""What `flywheel keys` and `flywheel experiment` do to a chat service, running or not: through its store."""

import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from .config import FlywheelConfig
from .errors import FlywheelError
from .experiment import running
from .serving.keys import create_key, revoke_key
from .store import EventStore
from .workspace import Workspace

if TYPE_CHECKING:
    from .service_records import ApiKey, Experiment


@contextmanager
def _store(workspace: Workspace) -> Iterator[EventStore]:
    with EventStore.open(workspace.events) as store:
        yield store


def create(workspace: Workspace, name: str, scopes: Sequence[str], user: str | None, days: float | None) -> None:
    """Make an API key; it alone goes to standard output, so that a script can keep it."""
    with _store(workspace) as store:
        key, text = create_key(store, name, scopes, user, days)
    until = f"until {key.expires_at:%Y-%m-%d %H:%M} UTC" if key.expires_at else "without end"
    speaks = f"for user {key.user_id}" if key.user_id else "for whichever user a request names"
    sys.stderr.write(
        f"key {key.id} ({name or 'no name'}): {', '.join(key.scopes)}; {speaks}; {until}.\n"
        "This is the only time it is shown; only its digest is kept.\n"
    )
    print(text)


def list_keys(workspace: Workspace, as_json: bool) -> None:
    """Print the keys, one a line, without anything that opens a door."""
    with _store(workspace) as store:
        keys = store.keys()
    if as_json:
        print(f"[{', '.join(key.model_dump_json(exclude={'digest'}) for key in keys)}]")
        return
    for key in keys:
        print(f"{key.id}  {_state(key):<22} {key.user_id or 'any user':<20} {','.join(key.scopes):<28} {key.name}")


def revoke(workspace: Workspace, id: str) -> None:
    """Revoke a key by its id; a running service refuses it within seconds."""
    with _store(workspace) as store:
        key = revoke_key(store, id)
    print(f"key {key.id} ({key.name or 'no name'}) is revoked")


def start_experiment(workspace: Workspace, name: str, arms: Sequence[str]) -> None:
    """Start an experiment with arms such as `control=base:0.1`."""
    wanted = dict(_arm(text) for text in arms)
    if len(wanted) < len(arms):
        raise FlywheelError(f"experiment {name!r}: an arm is named twice among {', '.join(arms)}.")
    with _store(workspace) as store:
        print(_line(running.start(store, name, wanted, _now(), servable(workspace, workspace.config()))))


def ramp_experiment(workspace: Workspace, name: str, shares: Sequence[str]) -> None:
    """Raise shares, given such as `treatment=0.2`."""
    wanted = {}
    for text in shares:
        arm, _, share = text.partition("=")
        wanted[arm] = _share(share, text, "treatment=0.2")
    with _store(workspace) as store:
        print(_line(running.ramp(store, name, wanted, _now())))


def stop_experiment(workspace: Workspace, name: str) -> None:
    """Stop an experiment."""
    with _store(workspace) as store:
        print(_line(running.stop(store, name, _now())))


def list_experiments(workspace: Workspace, as_json: bool) -> None:
    """Print the experiments, one a line, by name."""
    with _store(workspace) as store:
        found = [one for _, one in sorted(store.experiments().items())]
    print(f"[{', '.join(one.model_dump_json() for one in found)}]" if as_json else "\n".join(map(_line, found)))


def servable(workspace: Workspace, config: FlywheelConfig) -> Collection[str] | None:
    """The models that an arm can be given; None where an endpoint is asked for whatever name an arm gives."""
    if config.server.backend == "endpoint" and config.server.endpoint_model is None:
        return None
    from .serving.backends import make_backends  # noqa: PLC0415

    return make_backends(workspace, config).names


def _arm(text: str) -> tuple[str, running.Arm]:
    label, equals, rest = text.partition("=")
    model, colon, share = rest.rpartition(":")
    if not (label and equals and model and colon):
        raise FlywheelError(f"arm {text!r} must read ARM=MODEL:SHARE, e.g. control=base:0.1.")
    return label, running.Arm(model, _share(share, text, "control=base:0.1"))


def _share(text: str, whole: str, example: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise FlywheelError(f"{whole!r} must end with a share of users from 0 to 1, e.g. {example}.") from None


def _state(key: "ApiKey") -> str:
    if key.revoked_at:
        return f"revoked {key.revoked_at:%Y-%m-%d}"
    if key.expires_at:
        return f"{'expired' if key.expires_at <= _now() else 'until'} {key.expires_at:%Y-%m-%d}"
    return "active"


def _line(one: "Experiment") -> str:
    arms = ", ".join(f"{arm} {one.models[arm]} {share:.1%}" for arm, share in one.shares.items())
    since = f"since {one.started_at:%Y-%m-%d %H:%M} UTC"
    ended = "" if one.state == "running" else f" to {one.created_at:%Y-%m-%d %H:%M} UTC"
    return f"{one.name:<24} {one.state:<8} {arms}; {since}{ended}"


def _now() -> datetime:
    return datetime.now(UTC)
