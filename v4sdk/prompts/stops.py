"""Stop strings: found across pieces, removed with everything behind them."""

from __future__ import annotations

from collections.abc import Sequence

from v4sdk.errors import PromptError


class StopFilter:
    """Passes text on, holding back what may turn out to be the beginning of a stop string.

    The string that is complete first wins, so the result does not depend on how the text was cut.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str) or not all(stops):
            raise PromptError(f"`stop` is {stops!r}, expected a list of non-empty strings")
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def feed(self, text: str) -> str:
        """Return the text that is certain; after a stop string was found, nothing."""
        if self.found is not None:
            return ""
        self._held += text
        hits = [(at + len(stop), at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if hits:
            _, at, self.found = min(hits)
            out, self._held = self._held[:at], ""
            return out
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out

    def flush(self) -> str:
        """Return what is held back: no stop string can reach across this point."""
        out, self._held = self._held, ""
        return out


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
