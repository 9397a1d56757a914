"""The ways to compute a model that are put beside each other: a backend, a numerics option and a KV format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from v4sdk import Session
from v4sdk.backend import Backend
from v4sdk.numerics import KV_FORMATS, NUMERICS
from v4sdk_bench.stage import BenchError

_EXAMPLE = (
    "for example --a auto:reference:native --b auto:fast:bf16; `references` is the backend without kernels"
)


class References(Backend):
    """A backend without kernels: every op runs its reference, in main memory, on weights as they are stored."""

    name = "references"

    def unavailable(self) -> str | None:
        """Never."""
        return None

    @property
    def device(self) -> torch.device:
        """Main memory."""
        return torch.device("cpu")


@dataclass(frozen=True)
class Side:
    """One way to compute the model: a backend (or its name), a numerics option, a KV format (None for its default)."""

    backend: str | Backend
    numerics: str = "fast"
    kv_format: str | None = None

    @classmethod
    def parse(cls, text: str) -> Side:
        """Read `backend[:numerics[:kv_format]]`; `references` is the backend without kernels.

        Raises:
            BenchError: if there are more parts, an empty one, or one that has no such name.
        """
        parts = text.split(":")
        if len(parts) > 3 or not all(parts):
            raise BenchError(
                f"side `{text}` is not understood, expected backend[:numerics[:kv_format]]",
                hint=_EXAMPLE,
            )
        for part, known, what in zip(
            parts[1:], (tuple(NUMERICS), KV_FORMATS), ("numerics", "KV format"), strict=False
        ):
            if part not in known:
                raise BenchError(
                    f"side `{text}` asks for {what} `{part}`, expected one of {', '.join(known)}",
                    hint=_EXAMPLE,
                )
        backend: str | Backend = References() if parts[0] == References.name else parts[0]
        return cls(backend, parts[1] if len(parts) > 1 else "fast", parts[2] if len(parts) > 2 else None)

    def load(self, model: str | Path | None) -> Session:
        """Open the model this way; close the session, or use it in a `with` block."""
        return Session.load(model, backend=self.backend, numerics=self.numerics, kv_format=self.kv_format)


def label(session: Session) -> str:
    """`backend:numerics:kv_format` of a session."""
    return f"{session.loaded.backend.name}:{session.numerics.name}:{session.kv_format}"
