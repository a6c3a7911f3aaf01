"""Addresses of other servers, as configuration gives them."""

from urllib.parse import urlsplit

from .errors import FlywheelError


def refuse_password(address: str, setting: str, variable: str) -> None:
    """Messages name addresses and logs keep messages, so `http://USER:PASSWORD@HOST` is refused, and not repeated here.

    `variable`: the environment variable that a key belongs into, or the setting that names it.

    Raises:
        FlywheelError: something stands before an `@` in front of the host.
    """
    web = address.startswith(("http://", "https://"))
    if "@" in (urlsplit(address).netloc if web else address):
        raise FlywheelError(
            f"{setting} has a user or password before its host, which messages would repeat: leave out all up to the "
            f"@, and put the key into the environment variable {variable}."
        )
