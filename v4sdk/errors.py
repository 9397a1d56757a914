"""Every exception v4sdk raises on purpose: what is wrong, the value, what was expected, and a way out."""

from __future__ import annotations


class V4Error(Exception):
    """Base of all deliberate errors.

    Args:
        message: one sentence: subject, what is wrong, the value, what was expected. No full stop.
        hint: the way out, a command or an edit where it can be one.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ConfigError(V4Error):
    """A configuration value is missing, of the wrong type, or contradicts another."""


class CheckpointError(V4Error):
    """A checkpoint folder or file cannot be used as it is."""


class ShapeError(V4Error):
    """An op was called with shapes or dtypes outside its contract."""


class UnknownBackend(V4Error):
    """No installed backend has the requested name."""


class BackendUnavailable(V4Error):
    """The backend is installed but cannot run on this machine."""


class KernelMismatch(V4Error):
    """A backend's kernel table contradicts the op vocabulary."""


class ContextOverflow(V4Error):
    """A prompt and its answer do not fit into the model's context."""


class MemoryRefused(V4Error):
    """Loading or growing would need more memory than the device has free."""


class PromptError(V4Error):
    """A conversation cannot be rendered, or a request contradicts itself."""


class SamplingError(V4Error):
    """A sampling parameter is outside its range."""


class StateError(V4Error):
    """A saved or live sequence state cannot be used for the requested operation."""


class Cancelled(V4Error):
    """Generation was cancelled; the sequence stands at its last completed chunk."""
