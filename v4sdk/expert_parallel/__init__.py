"""Routed experts spread over processes: rank 0 drives and runs everything else, the others hold experts and serve them.

    torchrun --nproc-per-node 2 --no-python v4sdk run --ep 2 "What is 347 + 285?"

In a program, every process runs the same lines:

    with Team.join(2) as team:
        if team.is_driver:
            with Session.load(model, ep=team) as session:
                print(session.chat([{"role": "user", "content": "What is 347 + 285?"}]).content)
        else:
            Session.serve(model, ep=team)  # returns when the driver closes

torch is imported by `Team.join`, not before: a wrong number of processes is refused without it.
"""

from __future__ import annotations

from v4sdk.expert_parallel.team import SCHEDULES, Schedule, Team, launch

__all__ = ["SCHEDULES", "Schedule", "Team", "launch"]
