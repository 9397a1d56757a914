"""Every exception v4sdk raises on purpose: what is wrong, the value, what was expected, and a way out."""

from __future__ import annotations

from typing import ClassVar


class V4Error(Exception):
    """Base of all deliberate errors.

    Args:
        message: one sentence: subject, what is wrong, the value, what was expected. No full stop.
        hint: the way out, a command or an edit where it can be one; None for the one all errors of the class share.
    """

    way_out: ClassVar[str | None] = None

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint or self.way_out


class ConfigError(V4Error):
    """A configuration value is missing, of the wrong type, or contradicts another."""

    way_out = "correct the value named, or fetch the original file of the checkpoint again"


class CheckpointError(V4Error):
    """A checkpoint folder or file cannot be used as it is."""

    way_out = "download the checkpoint again; files that are complete are not fetched twice"


class ShapeError(V4Error):
    """An op was called with shapes or dtypes outside its contract."""

    way_out = "the op's docstring states its shapes and dtypes"


class UnknownBackend(V4Error):
    """No installed backend has the requested name."""

    way_out = "v4sdk backends lists them"


class BackendUnavailable(V4Error):
    """The backend is installed but cannot run on this machine."""

    way_out = "v4sdk doctor shows what is missing"


class KernelMismatch(V4Error):
    """A backend's kernel table contradicts the op vocabulary."""

    way_out = 'CONTRIBUTING.md, "Add a kernel", has the rules'


class ContextOverflow(V4Error):
    """A prompt and its answer do not fit into the model's context."""

    way_out = "shorten the prompt, or ask for fewer tokens with --max-tokens"


class MemoryRefused(V4Error):
    """Loading or growing would need more memory than the device has free."""


class PromptError(V4Error):
    """A conversation cannot be rendered, or a request contradicts itself."""

    way_out = "correct the prompt, or the field of the request that is named"


class SamplingError(V4Error):
    """A sampling parameter is outside its range."""

    way_out = "v4sdk run --help describes the sampling options"


class StateError(V4Error):
    """A saved or live sequence state cannot be used for the requested operation."""

    way_out = "start without the state, or from another one"


class Cancelled(V4Error):
    """Generation was cancelled; the sequence stands at its last completed chunk."""


class RankLost(V4Error):
    """One of several processes that work together has ended, or no longer answers."""

    way_out = "start all processes again with the same torchrun line; --resume goes on from a saved state"
