"""The processes of one run: how they find each other, and how all of them end when one is lost. Imports torch on joining."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Literal, get_args

from v4sdk.errors import ConfigError, RankLost, V4Error
from v4sdk.expert_parallel.channel import Channel, Closed, Listener, Message, call

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup, Store  # type: ignore[attr-defined]  # public, not re-exported

Schedule = Literal["sequential", "waves"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
TIMEOUT_S = 60.0
_LONGEST_S = 7 * 24 * 3600.0
# every process has to start and import torch
_JOIN_S = 120.0
_PAUSE_S = 0.02
# who is lost shows within milliseconds; this is for a busy machine
_VERDICT_S = 5.0
_SIGNAL_S = 0.5
_ENDINGS = ("stop", "lost")


def launch(processes: int, environ: Mapping[str, str] = os.environ) -> int:
    """This process's rank, from the variables a launcher sets.

    Raises:
        ConfigError: if the launcher did not start `processes` of them; the hint is the line to type.
    """
    line = f"torchrun --nproc-per-node {max(processes, 1)} --no-python v4sdk run --ep {max(processes, 1)} ..."
    if processes < 1:
        raise ConfigError(f"`--ep` is {processes}, expected a positive number of processes", hint=line)
    found = environ.get("WORLD_SIZE")
    if found is None:
        if processes == 1:
            return 0
        raise ConfigError(
            f"`--ep {processes}` needs {processes} processes, but this one was started alone: `WORLD_SIZE` is not set",
            hint=line,
        )
    if found != str(processes):
        raise ConfigError(
            f"`--ep` is {processes}, but the launcher started {found} processes (`WORLD_SIZE`)", hint=line
        )
    rank = environ.get("RANK", "")
    if not rank.isdecimal() or int(rank) >= processes:
        raise ConfigError(f"`RANK` is {rank!r}, expected 0 to {processes - 1}", hint=line)
    return int(rank)


def ranks_here(environ: Mapping[str, str] = os.environ) -> int:
    """How many ranks, this one included, the launcher started on this machine; 1 if it does not say."""
    found = environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(found)) if found.isdecimal() else 1


class Team:
    """This process's place among the ranks. Make one with `Team.join`, close it or use it in a `with` block.

    Attributes:
        rank: 0 is the driver. processes: how many ranks. schedule: see `Exchange`. timeout_s: longest wait for one exchange.
        group: carries rows, once `connect` has made it.
    """

    def __init__(
        self, rank: int, processes: int, schedule: Schedule, timeout_s: float, store: Store | None,
        channels: dict[int, Channel],
    ) -> None:  # fmt: skip
        self.rank, self.processes, self.schedule, self.timeout_s = rank, processes, schedule, timeout_s
        self.group: ProcessGroup | None = None
        self.group_name = ""
        self._store, self._channels = store, channels
        self._error: V4Error | None = None
        self._ending = False
        self._at = "loading"

    @classmethod
    def join(cls, processes: int, schedule: Schedule = "waves", timeout_s: float = TIMEOUT_S) -> Team:
        """Meet the other ranks; returns when all are there.

        Args:
            processes: how many the launcher started. schedule: `sequential` or `waves`.
            timeout_s: longest wait for one exchange of rows. A rank that ends is noticed at once; this is for one that hangs.

        Raises:
            ConfigError: if the launcher started another number. RankLost: if a rank does not come.
        """
        rank = launch(processes)
        if schedule not in SCHEDULES:
            raise ConfigError(
                f"schedule `{schedule}` is unknown, expected one of {', '.join(SCHEDULES)}",
                hint="--ep-schedule waves, or leave it out",
            )
        if not 0 < timeout_s <= _LONGEST_S:
            raise ConfigError(
                f"the exchange timeout is {timeout_s} s, expected more than 0 and at most {_LONGEST_S:.0f}, a week",
                hint="--ep-timeout 600 waits ten minutes",
            )
        if processes == 1:
            return cls(0, 1, schedule, timeout_s, None, {})
        until = time.monotonic() + _JOIN_S
        while True:
            try:
                store = _store(rank, processes, until)
                channels = _gather(store, processes, until) if rank == 0 else {0: _reach(store, rank, until)}
                return cls(rank, processes, schedule, timeout_s, store, channels)
            except (RuntimeError, Closed) as exc:
                # whoever joins again may have met the store that rank 0 was just about to close
                if time.monotonic() > until or rank == 0:
                    raise RankLost(
                        f"rank {rank} of {processes} did not find the others: {_first_line(exc)}",
                        hint="MASTER_ADDR and MASTER_PORT name rank 0; torchrun sets them",
                    ) from exc
                time.sleep(_PAUSE_S)

    @property
    def is_driver(self) -> bool:
        """Whether this process runs the model; the others only serve experts."""
        return self.rank == 0

    def tell(self, message: Message, at: str = "") -> None:
        """Send a message to every other rank.

        Raises:
            RankLost: if one is gone, or was before.
        """
        if self._error is not None:
            raise RankLost(self._error.message, self._error.hint)
        if self._ending:
            raise RankLost("the exchange between ranks was interrupted, so the other ranks no longer follow")
        self._at = at or self._at
        try:
            for channel in self._channels.values():
                channel.send(message)
        except Closed:
            raise self.failed() from None

    def hear(self, rank: int = 0) -> Message:
        """The next message of a rank, however long it takes.

        Raises:
            RankLost: if it is gone, or says that another is. Dismissed: if the driver stops this rank.
        """
        try:
            message = self._channels[rank].receive()
        except Closed:
            raise self.failed() from None
        assert message is not None
        gone = _last_words(message)
        if gone is not None:
            raise self.failed({rank: gone})
        if message.get("do") in _ENDINGS:
            self._ending, self._error = True, _ending(message)
            raise self._error
        return message

    def connect(self, device: torch.device) -> None:
        """Make the group that carries rows, of the kind torch has for this device. Every rank calls it at the same point.

        Raises:
            RankLost: if that fails. ConfigError: if torch has nothing for this device.
        """
        from torch import distributed as dist

        assert self._store is not None
        self.group_name = str(dist.get_default_backend_for_device(device))
        if not dist.is_backend_available(self.group_name):
            raise ConfigError(
                f"torch exchanges tensors of `{device.type}` by `{self.group_name}`, which it was built without",
                hint="install a torch for this device, or choose another backend with --backend",
            )
        limit = timedelta(seconds=self.timeout_s)
        try:
            if dist.is_initialized():
                self.group = dist.new_group(backend=self.group_name, timeout=limit)
            else:
                dist.init_process_group(
                    self.group_name,
                    store=self._store,
                    rank=self.rank,
                    world_size=self.processes,
                    timeout=limit,
                )
                self.group = dist.group.WORLD
        except (RuntimeError, ValueError) as exc:
            raise self.failed(cause=exc) from exc

    def failed(self, known: Mapping[int, str] | None = None, cause: BaseException | None = None) -> V4Error:
        """Find out who is lost, tell the survivors, and give the error that this rank ends with."""
        if self._error is None:
            self._ending = True
            self._error = self._judge(dict(known or {}), cause) if self.is_driver else self._ask(cause)
        return self._error

    def interrupted(self) -> None:
        """Take note that this rank left an exchange half done: nothing can be exchanged any more."""
        self._ending = True

    def terminated(self) -> V4Error | None:
        """What to end with after SIGTERM, which a launcher sends when another rank has ended; None if already ending."""
        if self._ending:
            return None
        cause = InterruptedError("this process was told to end, as a launcher does when another one has")
        return self.failed(cause=cause)

    def _judge(self, ended: dict[int, str], cause: BaseException | None) -> RankLost:
        # a launcher sends its signal after a rank has ended, so that is there to be seen
        patience = _SIGNAL_S if isinstance(cause, InterruptedError) else _VERDICT_S
        until = time.monotonic() + patience
        while not ended and time.monotonic() < until:
            for rank, channel in self._channels.items():
                try:
                    gone = _last_words(channel.receive(0.02) or {})
                    if gone is not None:
                        ended[rank] = gone
                except Closed:
                    ended[rank] = "its process has ended"
        if ended:
            names = ", ".join(f"rank {r} of {self.processes}" for r in sorted(ended))
            why = "; ".join(dict.fromkeys(ended.values()))
            error = RankLost(f"{names} was lost at {self._at}: {why}")
        elif isinstance(cause, InterruptedError):
            error = RankLost(f"the run ended at {self._at}: {cause}")
        else:
            error = RankLost(
                f"the ranks could not exchange at {self._at}: {_first_line(cause)}",
                hint="if a rank is only slow, for instance while it reads experts from disk for the first time, raise "
                "--ep-timeout; else start all of them again",
            )
        for rank, channel in self._channels.items():
            if rank not in ended:
                with suppress(Closed):
                    channel.send({"do": "lost", "message": error.message, "hint": error.hint})
        return error

    def _ask(self, cause: BaseException | None) -> V4Error:
        """Let the driver say who was lost; it sees every connection, this rank only one."""
        until = time.monotonic() + 2 * _VERDICT_S
        try:
            while time.monotonic() < until:
                message = self._channels[0].receive(until - time.monotonic())
                if message and message.get("do") in _ENDINGS:
                    return _ending(message)
        except Closed:
            return RankLost(f"rank 0 of {self.processes}, the driver, was lost: its process has ended")
        return RankLost(f"rank {self.rank} could not exchange with the others: {_first_line(cause)}")

    def close(self, error: str | None = None) -> None:
        """End: the driver tells the others to stop and waits until they have. Closing twice is fine.

        Args:
            error: why this rank cannot go on, for the driver to report.
        """
        channels, self._channels = self._channels, {}
        well = self._error is None or isinstance(self._error, Dismissed)
        if well and self.is_driver:
            _send_all(channels, {"do": "stop"})
        elif well and error is not None:
            _send_all(channels, {"failed": error})
        self._ending = True
        self._disconnect()
        if well and not self.is_driver:
            _send_all(channels, {"do": "bye"})
        until = time.monotonic() + _VERDICT_S
        if well and self.is_driver:
            _await_all(channels, until, lambda message: message.get("do") == "bye")
        # who joins again at once must not find the store of this run
        self._store = None
        if isinstance(self._error, Dismissed):
            _await_all(channels, until, lambda message: False)
        for channel in channels.values():
            channel.close()

    def _disconnect(self) -> None:
        if self.group is not None:
            from torch import distributed as dist

            group, self.group = self.group, None
            if dist.is_initialized():
                dist.destroy_process_group(None if group is dist.group.WORLD else group)

    def __enter__(self) -> Team:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(None if exc is None else _first_line(exc))


class Dismissed(V4Error):
    """The driver has told this rank to stop; nothing is wrong."""


def _last_words(message: Message) -> str | None:
    """Why a rank that serves has gone, if that is what it says."""
    if "failed" in message:
        return str(message["failed"])
    return "it has closed" if message.get("do") == "bye" else None


def _ending(message: Message) -> V4Error:
    if message["do"] == "lost":
        return RankLost(message["message"], message["hint"])
    return Dismissed("the driver has closed")


def _send_all(channels: Mapping[int, Channel], message: Message) -> None:
    for channel in channels.values():
        with suppress(Closed):
            channel.send(message)


def _await_all(channels: Mapping[int, Channel], until: float, last: Callable[[Message], bool]) -> None:
    """Read every channel until its last message or its end, but no longer than that."""
    for channel in channels.values():
        with suppress(Closed):
            while message := channel.receive(max(0.0, until - time.monotonic())):
                if last(message):
                    break


def _first_line(exc: BaseException | None) -> str:
    # some libraries begin with the place in their own source
    return re.sub(r"^\[[^]]*\]\s*", "", (str(exc).splitlines() or [type(exc).__name__])[0])


def _store(rank: int, processes: int, until: float) -> Store:
    from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]  # public, not re-exported

    limit = timedelta(seconds=max(1.0, until - time.monotonic()))
    try:
        store: Store = next(rendezvous("env://", rank, processes, timeout=limit))[0]
    except ValueError as exc:
        raise RuntimeError(str(exc)) from exc
    # a process may join more than once: the n-th time of one rank is the n-th time of all
    nth = store.add(f"v4sdk/joins/{rank}", 1)
    return PrefixStore(f"v4sdk/{nth}", store)


def _gather(store: Store, processes: int, until: float) -> dict[int, Channel]:
    listener = Listener(os.environ.get("MASTER_ADDR", "127.0.0.1"))
    channels: dict[int, Channel] = {}
    try:
        store.set("driver", json.dumps([*listener.address, listener.token]))
        while len(channels) < processes - 1:
            if time.monotonic() > until:
                missing = ", ".join(str(r) for r in range(1, processes) if r not in channels)
                raise Closed(f"rank {missing} did not come within {_JOIN_S:.0f} s")
            found = listener.accept(1.0)
            if found is not None:
                channels[found[0]] = found[1]
    except BaseException:
        for channel in channels.values():
            channel.close()
        raise
    finally:
        listener.close()
    return channels


def _reach(store: Store, rank: int, until: float) -> Channel:
    # asked in turns: a wait inside the store would not notice a signal
    while not store.check(["driver"]):
        if time.monotonic() > until:
            raise Closed(f"rank 0 did not come within {_JOIN_S:.0f} s")
        time.sleep(_PAUSE_S)
    host, port, token = json.loads(store.get("driver"))
    return call(host, port, token, rank, max(1.0, until - time.monotonic()))
