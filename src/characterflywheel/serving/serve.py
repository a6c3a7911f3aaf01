"""`flywheel serve`: run the chat service until it is told to stop."""

import gc
import logging
import socket

import uvicorn

from ..config import FlywheelConfig
from ..errors import FlywheelError
from ..workspace import Workspace
from .app import make_app
from .hub import Hub
from .security import guard_logs

_GRACE_SECONDS = 20


def serve(workspace: Workspace, config: FlywheelConfig) -> None:
    """Serve a workspace on `config.server.host` and `port` (0: any free one) until SIGINT or SIGTERM.

    Running requests are finished first, within 20 seconds, and everything that was accepted is committed.

    Raises:
        FlywheelError: the address is in use, or a part of the service cannot be opened.
    """
    bounds = config.server
    app = make_app(workspace, config, _settle)
    listening = _listen(bounds.host, bounds.port)
    where = f"http://{bounds.host}:{listening.getsockname()[1]}"
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    guard_logs()
    settings = uvicorn.Config(
        app, log_config=None, access_log=False, proxy_headers=False, server_header=False, lifespan="on",
        timeout_graceful_shutdown=_GRACE_SECONDS, backlog=2048, h11_max_incomplete_event_size=65_536,
    )  # fmt: skip
    server = uvicorn.Server(settings)
    print(f"serving {workspace.root} on {where} with backend {bounds.backend}; stop with Ctrl-C", flush=True)
    server.run(sockets=[listening])
    if not server.started:
        raise FlywheelError("the chat service could not start; the lines above say why.")


def _settle(hub: Hub) -> None:
    """What start-up made stays: a full garbage collection that walked it again would stop all replies for 0.1 s."""
    gc.collect()
    gc.freeze()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise FlywheelError(f"cannot listen on {host}:{port} ({error.strerror}); name another: --port.") from error
    listening.set_inheritable(True)
    return listening
