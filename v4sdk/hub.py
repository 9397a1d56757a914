"""From what a user names to a folder: a local path as it is, an `owner/name` id through the hub's cache."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from v4sdk.errors import CheckpointError
from v4sdk.progress import OnProgress, Progress, silent

# what v4sdk reads; `encoding/` is read as text and never run
SMALL_FILES = ("*.json", "encoding/*")
WEIGHT_FILES = ("*.safetensors",)
# repositories may carry other programs' copies of the weights in folders of their own
_IGNORED = ("*/*.safetensors", ".*")
_REPORT_EVERY_S = 0.2


def resolve(
    model: str | Path, revision: str | None = None, on_progress: OnProgress = silent, *, weights: bool = True
) -> Path:
    """Give the local folder of `model`.

    A path that exists is taken as it is, and so is whatever can only be a path: a `Path`, or text that starts with
    `.`, `/` or `~` or has not exactly one `/`. The rest is fetched from the hub.

    Raises:
        CheckpointError: if a path does not exist, or the hub cannot provide the repository.
    """
    path = Path(model).expanduser()
    if path.exists():
        return path
    named = str(model)
    if isinstance(model, Path) or named.startswith((".", "/", "~")) or named.strip("/").count("/") != 1:
        raise CheckpointError(
            f"folder `{named}` does not exist",
            hint="name a checkpoint folder, or a hub id of the form owner/name",
        )
    return fetch(named, revision, on_progress, weights=weights)


def fetch(
    repo_id: str, revision: str | None = None, on_progress: OnProgress = silent, *, weights: bool = True
) -> Path:
    """Download a repository into the hub's cache, or find it there, and give its folder.

    Complete files are never fetched twice, and a cut connection is taken up where it broke. `HF_ENDPOINT`, `HF_HOME`,
    `HF_TOKEN` and `HF_HUB_OFFLINE` mean what they mean to every user of the hub. `on_progress` may be called from
    other threads, one at a time.

    Args:
        revision: branch, tag or commit. weights: False leaves out the shards, enough for `info`.

    Raises:
        CheckpointError: if the id is malformed, unknown, needs a login, or the hub cannot be reached.
    """
    # imported only here: a local folder needs no hub client
    import huggingface_hub

    bar = _progress_class(_Counter(on_progress))
    patterns = [*SMALL_FILES, *(WEIGHT_FILES if weights else ())]
    try:
        folder = huggingface_hub.snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=list(_IGNORED),
            endpoint=os.environ.get("HF_ENDPOINT"),
            tqdm_class=bar,
        )
    except Exception as exc:
        raise _in_words(repo_id, revision, exc) from exc
    return Path(folder)


class _Counter:
    """Sums what the hub's workers report and passes it on now and then."""

    def __init__(self, on_progress: OnProgress, clock: Callable[[], float] = time.monotonic) -> None:
        self._on_progress, self._clock = on_progress, clock
        self._lock = threading.Lock()
        self._last = -_REPORT_EVERY_S

    def report(self, done: int, total: int, unit: str) -> None:
        with self._lock:
            now = self._clock()
            if done >= total or now - self._last >= _REPORT_EVERY_S:
                self._last = now
                self._on_progress(Progress("load", done, total, unit))


def _progress_class(counter: _Counter) -> type[Any]:
    """Give a bar that draws nothing and counts bytes into `counter`."""
    from huggingface_hub.utils.tqdm import tqdm

    hub_bar: Any = tqdm

    class Bar(hub_bar):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # of the two byte bars only this one also counts what an earlier attempt left in the cache
            named = kwargs.get("name") == "huggingface_hub.snapshot_download"
            self._counts = named and kwargs.get("unit") == "B"
            super().__init__(*args, **(kwargs | {"disable": True}))

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            if self._counts and self.total:
                counter.report(int(self.n), int(self.total), "bytes")

    return Bar


def _in_words(repo_id: str, revision: str | None, exc: Exception) -> CheckpointError:
    from huggingface_hub import errors

    log = logging.getLogger("v4sdk")
    log.debug("hub: %s", exc)
    at = f"`{repo_id}`" + (f" at revision `{revision}`" if revision else "")
    if isinstance(exc, errors.HFValidationError):
        return CheckpointError(f"`{repo_id}` is neither a folder here nor a hub id of the form owner/name")
    if isinstance(exc, errors.GatedRepoError):
        return CheckpointError(
            f"repository {at} is gated", hint="accept its terms in a browser, then run `hf auth login`"
        )
    if isinstance(exc, errors.RepositoryNotFoundError):
        return CheckpointError(
            f"{at} is neither a folder here nor a repository on the hub",
            hint="check the spelling; for a private repository run `hf auth login`",
        )
    if isinstance(exc, errors.RevisionNotFoundError):
        return CheckpointError(f"repository `{repo_id}` has no revision `{revision}`")
    if isinstance(exc, errors.LocalEntryNotFoundError):
        return CheckpointError(
            f"{at} is not completely in the local cache, and the hub cannot be reached",
            hint="check the network, HF_HUB_OFFLINE and HF_ENDPOINT, or name a local folder",
        )
    reason = str(exc).strip().splitlines()
    return CheckpointError(
        f"{at} could not be downloaded: {type(exc).__name__}" + (f": {reason[0]}" if reason else ""),
        hint="run the same command again; files that are complete are not fetched twice",
    )
