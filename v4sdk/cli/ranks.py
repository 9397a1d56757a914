"""`--ep`: this process joins the others, and ends with them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from v4sdk.cli.settings import Settings

if TYPE_CHECKING:
    from v4sdk.expert_parallel import Team


@contextmanager
def joined(settings: Settings) -> Iterator[Team | None]:
    """Meet the other ranks of this run, before anything is read from stdin; None without `--ep`, or with one process."""
    if settings.ep is None or settings.ep == 1:
        yield None
        return
    from v4sdk.expert_parallel import Team

    # the transport's own log lines would stand between ours
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with Team.join(settings.ep, settings.ep_schedule, settings.ep_timeout) as team:
        _end_with_the_others(team)
        try:
            yield team
        finally:
            # what is left is to say why; a launcher's signal in that moment must not change the exit status
            signal.signal(signal.SIGTERM, signal.SIG_IGN)


def serve(team: Team, settings: Settings) -> int:
    """Serve experts until rank 0 ends. Says nothing: content, notes and Ctrl-C are rank 0's."""
    from v4sdk.cli.serve import quiet_log
    from v4sdk.session import Session

    quiet_log()
    Session.serve(
        settings.model,
        ep=team,
        backend=settings.backend,
        numerics=settings.numerics,
        revision=settings.revision,
    )
    return 0


def _end_with_the_others(team: Team) -> None:
    def terminate(*_: object) -> None:
        error = team.terminated()
        if error is not None:
            raise error

    signal.signal(signal.SIGTERM, terminate)
    if not team.is_driver:
        # a terminal sends Ctrl-C to every process; rank 0 decides what it means
        signal.signal(signal.SIGINT, signal.SIG_IGN)
