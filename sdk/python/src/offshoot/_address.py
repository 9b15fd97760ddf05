"""Where the daemon is."""

from __future__ import annotations

import ipaddress
import os
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ._secret import Secret


@dataclass(frozen=True)
class Address:
    """A daemon: its URL, its unix socket if it is reached by one, and how it is trusted."""

    url: str
    socket: str | None = None
    token: Secret | None = field(default=None, repr=False)
    tls: ssl.SSLContext | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return f"unix://{self.socket}" if self.socket else self.url

    @property
    def headers(self) -> dict[str, str]:
        """What every request says of its sender."""
        return {"Authorization": f"Bearer {self.token.reveal()}"} if self.token else {}

    @property
    def trust(self) -> ssl.SSLContext:
        """Whom TLS trusts; without TLS nobody."""
        return self.tls or ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

    @property
    def websocket_url(self) -> str:
        """The same with the scheme of WebSockets."""
        return "ws" + self.url.removeprefix("http")


def find(host: str | None, token: str | Secret | None, tls: ssl.SSLContext | str | os.PathLike[str] | None) -> Address:
    """From arguments; else from OFFSHOOT_HOST and OFFSHOOT_TOKEN; else the unix socket of this user's daemon."""
    host = host or os.environ.get("OFFSHOOT_HOST") or None
    token = token or os.environ.get("OFFSHOOT_TOKEN") or None
    secret = token if isinstance(token, Secret) or token is None else Secret(token)
    if secret is not None and not (
        secret.reveal().isascii() and secret.reveal().isprintable() and " " not in secret.reveal()
    ):
        raise ValueError("the token has characters that no token has; is it the file's name?")
    if host is None:
        return Address("http://offshoot", default_socket(), secret)
    parts = urlsplit(host)
    if parts.scheme == "unix":
        if parts.netloc or not parts.path.startswith("/"):
            raise ValueError("a unix socket is given as unix:///absolute/path")
        return Address("http://offshoot", unquote(parts.path), secret)
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or parts.path not in ("", "/")
        or parts.query
        or parts.fragment
    ):
        raise ValueError("OFFSHOOT_HOST is unix:///path, https://host:port or http://127.0.0.1:port")
    if parts.username is not None or parts.password is not None:
        raise ValueError("a token is given as token, or in OFFSHOOT_TOKEN, and not in the address")
    url = f"{parts.scheme}://{parts.netloc}"
    if parts.scheme == "http":
        if secret is not None and not _is_loopback(parts.hostname):
            raise ValueError("a token goes to another machine only over https")
        return Address(url, None, secret)
    context = (
        tls if isinstance(tls, ssl.SSLContext) else ssl.create_default_context(cafile=os.fspath(tls) if tls else None)
    )
    return Address(url, None, secret, context)


def default_socket() -> str:
    """Where `offshoot serve` listens if nobody says otherwise."""
    state = os.environ.get("OFFSHOOT_STATE_DIR")
    if not state:
        if os.geteuid() == 0:
            state = "/run/offshoot"
        else:
            state = str(Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "offshoot")
    return str(Path(state) / "api" / "offshoot.sock")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
