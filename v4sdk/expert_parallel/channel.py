"""Small messages between rank 0 and each other rank: one JSON object per line over TCP.

Not a group of torch.distributed, for three reasons. Waiting for the next step may last hours and must still notice a signal; a
wait of gloo that runs out of time closes every connection of its group; and a closed socket says at once which rank is gone.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import secrets
import select
import socket
import time
from typing import Any

Message = dict[str, Any]
_HELLO_S = 5.0
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
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError as exc:
            raise Closed(str(exc)) from None

    def receive(self, timeout_s: float | None = None) -> Message | None:
        """Wait for the next message; None if there is none in time. A signal's handler runs while it waits.

        Raises:
            Closed: if the other end is gone and everything it sent has been read.
        """
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while b"\n" not in self._unread:
            left = None if end is None else max(0.0, end - time.monotonic())
            if not select.select([self._socket], [], [], left)[0]:
                return None
            try:
                data = self._socket.recv(1 << 16)
            except OSError as exc:
                raise Closed(str(exc)) from None
            if not data:
                raise Closed("end of stream")
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        message: Message = json.loads(line)
        return message

    def close(self) -> None:
        """Say goodbye."""
        self._socket.close()


class Listener:
    """Where rank 0 waits for the others. `address` and `token` reach them by the launcher's store."""

    def __init__(self, host: str) -> None:
        try:
            self._socket = socket.create_server((host, 0))
        except OSError:
            # the name the others know this machine by need not be one of its own addresses
            self._socket = socket.create_server(("", 0))
        self.address = (host, int(self._socket.getsockname()[1]))
        self.token = secrets.token_hex(16)

    def accept(self, timeout_s: float) -> tuple[int, Channel] | None:
        """The next rank that calls and knows the token; None if nobody does in time."""
        if not select.select([self._socket], [], [], timeout_s)[0]:
            return None
        channel = Channel(self._socket.accept()[0])
        with contextlib.suppress(Closed, ValueError, AttributeError, KeyError, TypeError):
            hello = channel.receive(_HELLO_S) or {}
            if hmac.compare_digest(str(hello.get("token", "")), self.token):
                return int(hello["rank"]), channel
        channel.close()
        return None

    def close(self) -> None:
        """Stop listening; channels stay."""
        self._socket.close()


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
