"""Finds, loads and chooses plugins, and says why one cannot be used. Knows no backend by name."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

import pluggy

from v4sdk import hookspecs
from v4sdk.errors import BackendUnavailable, UnknownBackend, V4Error

if TYPE_CHECKING:
    # for annotations only: listing plugins must not import torch
    from v4sdk.backend import Backend
    from v4sdk.encodings import IntegerLayout

log = logging.getLogger("v4sdk")
GROUP = "v4sdk"
AUTO = "auto"
BACKEND_VARIABLE = "V4SDK_BACKEND"


@dataclass(frozen=True)
class Plugin:
    """One entry point of the group `v4sdk`, loaded or not.

    Attributes:
        name: the entry point's name, which is the backend's name.
        distribution: what installed it, `name version`.
        hook: calls this plugin's hooks and nobody else's; None if it is broken.
        broken: why it could not be loaded, or None.
    """

    name: str
    distribution: str
    hook: Any
    broken: str | None = None


@dataclass(frozen=True)
class BackendStatus:
    """What can be said about one installed backend on this machine.

    Attributes:
        state: `available`, `unavailable` or `broken`; reason: in words, None when available.
        hint: the way out, where the backend told one.
        backend: an instance, None when broken.
    """

    name: str
    distribution: str
    state: str
    reason: str | None
    backend: Backend | None
    hint: str | None = None


def load(name: str) -> Plugin:
    """Load only the entry point `name`: no other plugin's module is imported.

    Raises:
        UnknownBackend: listing the installed backends and the closest match.
    """
    points = [point for point in _entry_points() if point.name == name]
    if not points:
        known = [plugin.name for plugin in load_all() if _offers_backend(plugin)]
        raise _unknown(name, known)
    return _load(points)


def load_all() -> list[Plugin]:
    """Load every plugin, one at a time; a broken one carries its reason and disturbs nobody."""
    points = _entry_points()
    return [_load([p for p in points if p.name == name]) for name in sorted(Counter(p.name for p in points))]


def select(name: str | None = None) -> Backend:
    """Give the backend to run on.

    Args:
        name: a backend's name; `auto` for the available one of highest priority; None asks the environment variable
            `V4SDK_BACKEND` and then means `auto`.

    Raises:
        UnknownBackend: no plugin has that name, or the plugin of that name offers no backend.
        BackendUnavailable: it is broken, or cannot run on this machine.
    """
    name = name or os.environ.get(BACKEND_VARIABLE) or AUTO
    if name == AUTO:
        return _best(statuses())
    return _usable(opened(name))


def opened(name: str) -> BackendStatus:
    """Describe one backend as `select` would find it: its own libraries are loaded, and no other plugin is.

    Raises:
        UnknownBackend: no plugin has that name, or the plugin of that name offers no backend.
    """
    status = _status(load(name))
    if status is None:
        known = [plugin.name for plugin in load_all() if _offers_backend(plugin)]
        raise _unknown(name, known, f"plugin `{name}` offers no backend")
    return _opened(status)


def statuses() -> list[BackendStatus]:
    """Describe every installed backend; plugins that offer no backend are left out."""
    found = (_status(plugin) for plugin in load_all())
    return [status for status in found if status is not None]


def convert_targets() -> dict[str, tuple[str, IntegerLayout]]:
    """Give the weight layouts of all installed backends: name to (backend, layout). Looks for no device.

    Raises:
        V4Error: two backends have a layout of the same name.
    """
    found: dict[str, tuple[str, IntegerLayout]] = {}
    for plugin in load_all():
        if plugin.broken is not None or not _offers_backend(plugin):
            continue
        try:
            layouts = _instance(plugin).convert_targets()
        except Exception as exc:  # a plugin's mistake must not hide the layouts of the others
            log.warning("backend `%s` cannot list its layouts: %s", plugin.name, _reason(exc))
            continue
        for name, layout in layouts.items():
            if name in found:
                raise V4Error(
                    f"layout `{name}` is offered by backends `{found[name][0]}` and `{plugin.name}`",
                    hint="remove one of their distributions",
                )
            found[name] = plugin.name, layout
    return found


def add_commands(cli: Any) -> list[Plugin]:
    """Let every plugin add its commands to the root group; give back the plugins that failed."""
    failed = []
    for plugin in load_all():
        if plugin.broken is None:
            try:
                plugin.hook.v4sdk_commands(cli=cli)
            except Exception as exc:
                plugin = Plugin(plugin.name, plugin.distribution, None, _reason(exc))
        if plugin.broken is not None:
            failed.append(plugin)
    return failed


def _entry_points() -> list[EntryPoint]:
    # the same distribution can be seen twice (editable install beside its source): one is enough
    return list(dict.fromkeys(entry_points(group=GROUP)))


def _load(points: list[EntryPoint]) -> Plugin:
    point = points[0]
    owner = _owner(point)
    if len(points) > 1:
        owners = ", ".join(sorted(f"`{_owner(p)}`" for p in points))
        return Plugin(point.name, owner, None, f"the name is claimed by {owners}")
    # one manager per plugin: a hook call can then be answered, or broken, by this plugin alone
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    try:
        manager.register(point.load(), name=point.name)
        manager.check_pending()
    except (Exception, SystemExit) as exc:  # importing a plugin runs its code, whatever that does
        return Plugin(point.name, owner, None, _reason(exc))
    return Plugin(point.name, owner, manager.hook)


def _owner(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "unknown"


def _offers_backend(plugin: Plugin) -> bool:
    return plugin.broken is not None or bool(plugin.hook.v4sdk_backend.get_hookimpls())


def _status(plugin: Plugin) -> BackendStatus | None:
    """Ask a plugin for its backend and the backend whether it can run here; None if it offers none."""
    if not _offers_backend(plugin):
        return None
    broken, backend, reason = plugin.broken, None, None
    if broken is None:
        try:
            backend = _instance(plugin)
            reason = backend.unavailable()
        except Exception as exc:
            broken, backend = _reason(exc), None
    if broken is not None:
        return BackendStatus(plugin.name, plugin.distribution, "broken", broken, None)
    state = "available" if reason is None else "unavailable"
    return BackendStatus(plugin.name, plugin.distribution, state, reason, backend)


def _instance(plugin: Plugin) -> Backend:
    from v4sdk.backend import API_VERSION, Backend

    cls = plugin.hook.v4sdk_backend()[0]
    if not (isinstance(cls, type) and issubclass(cls, Backend)):
        raise TypeError(f"`v4sdk_backend` returned {cls!r}, expected a subclass of `v4sdk.backend.Backend`")
    if cls.api != API_VERSION:
        raise TypeError(f"it was written for backend API {cls.api}, this v4sdk has {API_VERSION}")
    if cls.name != plugin.name:
        raise TypeError(f"the backend calls itself `{cls.name}`, its entry point `{plugin.name}`")
    return cls()


def _best(found: Iterable[BackendStatus]) -> Backend:
    usable = [status for status in found if status.backend is not None and status.state == "available"]
    for status in sorted(usable, key=_priority, reverse=True):
        status = _opened(status)
        if status.backend is not None and status.state == "available":
            return status.backend
    raise BackendUnavailable("no installed backend can be used here", hint="v4sdk backends lists the reasons")


def _priority(status: BackendStatus) -> int:
    return status.backend.priority if status.backend else 0


def _opened(status: BackendStatus) -> BackendStatus:
    if status.backend is None:
        return status
    try:
        status.backend.open()
    except BackendUnavailable as exc:
        return replace(status, state="unavailable", reason=exc.message, hint=exc.hint)
    except Exception as exc:
        return replace(status, state="broken", reason=_reason(exc), backend=None)
    return status


def _usable(status: BackendStatus) -> Backend:
    if status.state == "broken" or status.backend is None:
        raise BackendUnavailable(
            f"backend `{status.name}` of `{status.distribution}` is broken: {status.reason}",
            hint=f"update or remove `{status.distribution.split()[0]}`, or choose another with --backend",
        )
    if status.reason is not None:
        raise BackendUnavailable(
            f"backend `{status.name}` cannot be used here: {status.reason}",
            hint=status.hint
            or f"v4sdk doctor --backend {status.name} shows what was looked for; --backend {AUTO} takes one that works",
        )
    return status.backend


def _unknown(name: str, known: list[str], message: str | None = None) -> UnknownBackend:
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    listed = ", ".join(known) or "none"
    return UnknownBackend(
        message or f"backend `{name}` is unknown, installed: {listed}",
        hint=f"did you mean `{close[0]}`?" if close else f"choose one of {listed}, or `auto`",
    )


def _reason(exc: BaseException) -> str:
    text = " ".join(str(exc).split())
    return f"{type(exc).__name__}: {text}" if text else type(exc).__name__
