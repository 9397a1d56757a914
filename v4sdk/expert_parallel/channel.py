"""Small messages between rank 0 and each other rank: one JSON object per line over TCP.

Not a group of torch.distributed, for three reasons. Waiting for the next step may last hours and must still notice a signal; a
wait of gloo that runs out of time closes every connection of its group; and a closed socket says at once which rank is gone.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import secrets
import socket
import time
from typing import Any

Message = dict[str, Any]
# whoever calls is a stranger until the token is read: it may take no longer and say no more than this
_HELLO_S = 5.0
_HELLO_BYTES = 4096
# a host that vanishes without a word is noticed after about a minute, however long the wait
_KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}


class Closed(Exception):
    """The other end is gone."""


class Channel:
    """One connection; messages arrive in order or `Closed` is raised."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket, self._unread = connection, b""
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, message: Message) -> None:
        """Send one message.

        Raises:
            Closed: if the other end is gone.
        """
        try:
            self._socket.settimeout(None)
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError as exc:
            raise Closed(str(exc)) from None

    def receive(self, timeout_s: float | None = None, limit_bytes: int | None = None) -> Message | None:
        """Wait for the next message; None if there is none in time. A signal's handler runs while it waits.

        Raises:
            Closed: if the other end is gone and everything it sent has been read, or what it sent is no message, or longer
                than `limit_bytes`.
        """
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while b"\n" not in self._unread:
            if limit_bytes is not None and len(self._unread) > limit_bytes:
                raise Closed(f"a message of more than {limit_bytes} bytes")
            try:
                # not select: it knows no descriptor above 1,023
                self._socket.settimeout(None if end is None else max(1e-3, end - time.monotonic()))
                data = self._socket.recv(1 << 16 if limit_bytes is None else limit_bytes)
            except TimeoutError:
                return None
            except OSError as exc:
                raise Closed(str(exc)) from None
            if not data:
                raise Closed("end of stream")
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as exc:
            raise Closed(f"no message: {exc}") from None
        if not isinstance(message, dict):
            raise Closed("no message: not an object")
        return message

    def close(self) -> None:
        """Say goodbye."""
        self._socket.close()


class Listener:
    """Where rank 0 waits for the others. `address` and `token` reach them by the launcher's store.

    Open only while ranks join. The token keeps strangers out, but not those who can read the launcher's store: like
    torch.distributed itself, it is meant for a network of trusted machines.
    """

    def __init__(self, host: str) -> None:
        self._socket = _bound(host)
        self.address = (host, int(self._socket.getsockname()[1]))
        self.token = secrets.token_hex(16)

    def accept(self, timeout_s: float) -> tuple[int, Channel] | None:
        """The next rank that calls and knows the token; None if nobody does in time."""
        self._socket.settimeout(timeout_s)
        try:
            channel = Channel(self._socket.accept()[0])
        except OSError:
            # nobody, or somebody who has left again
            return None
        with contextlib.suppress(Closed):
            hello = channel.receive(_HELLO_S, _HELLO_BYTES) or {}
            rank, token = hello.get("rank"), str(hello.get("token", ""))
            if isinstance(rank, int) and token.isascii() and hmac.compare_digest(token, self.token):
                return rank, channel
        channel.close()
        return None

    def close(self) -> None:
        """Stop listening; channels stay."""
        self._socket.close()


def _bound(host: str) -> socket.socket:
    with contextlib.suppress(OSError):
        for family, _, _, _, address in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM):
            with contextlib.suppress(OSError):
                return socket.create_server(address, family=family)
    # the name the others know this machine by need not be one of its own addresses
    return socket.create_server(("", 0))


def call(host: str, port: int, token: str, rank: int, timeout_s: float) -> Channel:
    """Connect to rank 0.

    Raises:
        Closed: if nobody listens there.
    """
    try:
        channel = Channel(socket.create_connection((host, port), timeout=timeout_s))
    except OSError as exc:
        raise Closed(str(exc)) from None
    channel.send({"token": token, "rank": rank})
    return channel
