"""The options of a run, and what can be refused before a model is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from v4sdk import numerics
from v4sdk.errors import StateError
from v4sdk.expert_parallel.team import TIMEOUT_S, Schedule, launch

if TYPE_CHECKING:
    from v4sdk.sampling import SamplingParams


@dataclass(frozen=True)
class Settings:
    """The options of one run that are not its prompt."""

    model: str | None
    revision: str | None
    backend: str | None
    numerics: str | None
    kv_format: str | None
    dialect: str | None
    strict: bool
    system: str | None
    thinking: bool | None
    effort: str | None
    raw: bool
    as_json: bool
    save: Path | None
    resume: Path | None
    sampling: dict[str, Any] = field(default_factory=dict)
    ep: int | None = None
    ep_schedule: Schedule = "waves"
    ep_timeout: float = TIMEOUT_S
    memory_limit: str | None = None

    def check(self) -> None:
        """Refuse what can be refused before a model is loaded.

        Raises:
            SamplingError, ConfigError, StateError: see their texts. click.UsageError: for options that contradict.
        """
        if self.raw and (self.system is not None or self.effort is not None or self.thinking is not None):
            raise click.UsageError(
                "--raw uses no chat format, so --system, --thinking and --effort do not go with it"
            )
        self.params()
        if self.save is not None and (self.save.is_dir() or not self.save.parent.is_dir()):
            raise StateError(
                f"state file `{self.save}` cannot be written: "
                + ("it is a folder" if self.save.is_dir() else f"folder `{self.save.parent}` does not exist"),
                hint="name a file in a folder that exists",
            )
        chosen = numerics.numerics(self.numerics) if self.numerics else numerics.FAST
        numerics.kv_format(self.kv_format, chosen)
        if self.memory_limit is not None:
            # torch comes with it
            from v4sdk.memory import parse_bytes

            parse_bytes(self.memory_limit)
        if self.ep is not None:
            launch(self.ep)

    def params(self, given: dict[str, Any] | None = None) -> SamplingParams:
        """Sampling parameters, those of one request over those of the command."""
        from v4sdk.sampling import SamplingParams

        return SamplingParams(**{**self.sampling, **(given or {})})

    @property
    def chat_options(self) -> dict[str, Any]:
        """Options of `Session.chat` that were given."""
        named = {"thinking": self.thinking, "effort": self.effort}
        return {name: value for name, value in named.items() if value is not None}
