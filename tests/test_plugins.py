"""Discovery and choice of backends: what is loaded, what is said, and that nobody breaks anybody else."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from v4sdk import plugins
from v4sdk.errors import BackendUnavailable, UnknownBackend

ECHO = Path(__file__).parent / "plugin_echo"
Install = Callable[..., None]

BACKEND = """
    import torch
    from v4sdk import hookimpl
    from v4sdk.backend import API_VERSION, Backend

    class Made(Backend):
        name = {name!r}
        api = {api}
        priority = {priority}

        def unavailable(self):
            return {reason!r}

        @property
        def device(self):
            return torch.device("cpu")

    @hookimpl
    def v4sdk_backend():
        return Made
"""


def made(name: str, api: str = "API_VERSION", priority: int = 0, reason: str | None = None) -> str:
    return BACKEND.format(name=name, api=api, priority=priority, reason=reason)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Make a distribution with one entry point importable for the length of a test."""

    def make(
        name: str, source: str | None, module: str | None = None, distribution: str | None = None
    ) -> None:
        module = module or f"made_{name}_{len(list(tmp_path.iterdir()))}"
        distribution = distribution or f"dist-{module}"
        if source is not None:
            (tmp_path / f"{module}.py").write_text(dedent(source))
        info = tmp_path / f"{distribution.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[v4sdk]\n{name} = {module}\n")
        monkeypatch.syspath_prepend(tmp_path)

    yield make
    for name in [name for name in sys.modules if name.startswith("made_")]:
        del sys.modules[name]


@pytest.fixture
def echo(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example plugin, as its own pyproject would install it."""
    monkeypatch.syspath_prepend(ECHO)
    install("echo", None, module="v4sdk_echo", distribution="v4sdk-echo")


def states() -> dict[str, plugins.BackendStatus]:
    return {status.name: status for status in plugins.statuses()}


def test_built_in_backends_come_through_the_same_door() -> None:
    assert {"cpu", "cuda", "ascend"} <= set(states())
    assert states()["cpu"].state == "available"
    assert plugins.select("cpu").name == "cpu"


def test_a_plugin_without_a_backend_is_not_listed_as_one() -> None:
    assert "bench" not in states()
    with pytest.raises(UnknownBackend, match="plugin `bench` offers no backend"):
        plugins.select("bench")


def test_an_unavailable_backend_says_why_in_words(install: Install) -> None:
    install("far", made("far", reason="the device is on the moon"))
    assert states()["far"].reason == "the device is on the moon"
    with pytest.raises(
        BackendUnavailable, match="backend `far` cannot be used here: the device is on the moon"
    ) as caught:
        plugins.select("far")
    assert caught.value.hint is not None


def test_an_unknown_name_lists_the_known_ones_and_the_closest() -> None:
    with pytest.raises(UnknownBackend, match="`cpuu` is unknown, installed: .*cpu") as caught:
        plugins.select("cpuu")
    assert caught.value.hint == "did you mean `cpu`?"
    with pytest.raises(UnknownBackend) as caught:
        plugins.select("zzzzzz")
    assert "choose one of" in (caught.value.hint or "")


def test_auto_takes_the_available_backend_of_highest_priority(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("V4SDK_BACKEND", raising=False)
    install("high", made("high", priority=5))
    install("higher", made("higher", priority=9, reason="switched off"))
    assert plugins.select().name == "high"
    assert plugins.select("auto").name == "high"
    monkeypatch.setenv("V4SDK_BACKEND", "cpu")
    assert plugins.select().name == "cpu"


def test_auto_ignores_a_broken_plugin(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("V4SDK_BACKEND", raising=False)
    install("awry", "raise RuntimeError('no such bus')")
    assert plugins.select().name == "cpu"


@pytest.mark.parametrize(
    ("name", "source", "reason"),
    [
        ("awry", "raise RuntimeError('no such bus')", "RuntimeError: no such bus"),
        ("awry", "import module_that_is_not_there", "ModuleNotFoundError: No module named 'module_that_is_not_there'"),
        ("awry", "raise SystemExit('bye')", "SystemExit: bye"),
        ("awry", "def nothing(", "SyntaxError"),
        (
            "awry",
            "from v4sdk import hookimpl\n@hookimpl\ndef v4sdk_backend(wrong): ...",
            "v4sdk_backend",
        ),
        ("awry", "from v4sdk import hookimpl\n@hookimpl\ndef v4sdk_backends(): ...", "v4sdk_backends"),
        ("awry", "from v4sdk import hookimpl\n@hookimpl\ndef v4sdk_backend(): return 3", "returned 3"),
        ("awry", made("other"), "the backend calls itself `other`, its entry point `awry`"),
        ("awry", made("awry", api="0"), "it was written for backend API 0"),
    ],
    ids=["raises", "import", "exits", "syntax", "signature", "no-such-hook", "not-a-class", "name", "old-api"],
)  # fmt: skip
def test_a_broken_plugin_shows_its_reason_and_breaks_nobody(
    install: Install, name: str, source: str, reason: str
) -> None:
    install(name, source)
    found = states()
    assert found["awry"].state == "broken"
    assert reason in (found["awry"].reason or "")
    assert found["cpu"].state == "available"
    with pytest.raises(
        BackendUnavailable, match="backend `awry` of `dist-made_awry_0 1.0` is broken"
    ) as caught:
        plugins.select("awry")
    assert "dist-made_awry_0" in (caught.value.hint or "")


def test_two_distributions_may_not_share_a_name(install: Install) -> None:
    install("cpu", made("cpu"))
    assert states()["cpu"].state == "broken"
    assert "claimed by" in (states()["cpu"].reason or "")


def test_a_named_backend_imports_no_other_plugin(install: Install, tmp_path: Path) -> None:
    install("awry", "import os; os._exit(3)")
    code = "from v4sdk import plugins; print(plugins.select('cpu').name)"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "cpu\n"


def test_plugin_commands_are_added_and_failures_reported(install: Install, echo: None) -> None:
    import click

    install("awry", "from v4sdk import hookimpl\n@hookimpl\ndef v4sdk_commands(cli): raise KeyError('x')")
    group = click.Group("root")
    failed = plugins.add_commands(group)
    assert "echo" in group.commands
    assert [plugin.name for plugin in failed] == ["awry"]


def test_the_example_plugin_is_found(echo: None) -> None:
    status = states()["echo"]
    assert (status.state, status.distribution) == ("available", "v4sdk-echo 1.0")
    assert [row.op.name for row in plugins.select("echo").kernels()] == ["rms_norm", "hc_post"]


OPENS = """
    import torch
    from v4sdk import hookimpl
    from v4sdk.backend import Backend
    from v4sdk.errors import BackendUnavailable

    class Made(Backend):
        name = "made"
        priority = 9

        def unavailable(self):
            return None

        def open(self):
            {body}

        @property
        def device(self):
            return torch.device("cpu")

    @hookimpl
    def v4sdk_backend():
        return Made
"""


def test_a_backend_is_opened_when_it_is_chosen_and_not_when_it_is_listed(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("V4SDK_BACKEND", raising=False)
    body = "raise BackendUnavailable('the library is from last year', hint='install another')"
    install("made", OPENS.format(body=body))
    assert states()["made"].state == "available"
    with pytest.raises(BackendUnavailable) as caught:
        plugins.select("made")
    assert caught.value.message == "backend `made` cannot be used here: the library is from last year"
    assert caught.value.hint == "install another"
    assert plugins.opened("made").reason == "the library is from last year"
    assert plugins.select().name == "cpu", "auto takes the next"


def test_a_backend_that_breaks_when_opened_is_named(install: Install) -> None:
    install("made", OPENS.format(body="raise OSError('no such bus')"))
    with pytest.raises(BackendUnavailable, match="backend `made` of .* is broken: OSError: no such bus"):
        plugins.select("made")
