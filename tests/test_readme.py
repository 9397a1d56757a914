"""The README against the program: its commands exist, its flags exist, its links lead somewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click

from v4sdk.cli import cli

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands(group: click.Group, name: str = "v4sdk") -> Iterator[tuple[str, click.Command]]:
    """Every command by the words one types, groups included."""
    context = click.Context(group)
    for word in group.list_commands(context):
        command = group.get_command(context, word)
        assert command is not None
        yield f"{name} {word}", command
        if isinstance(command, click.Group):
            yield from commands(command, f"{name} {word}")


def test_every_command_and_flag_in_the_readme_exists() -> None:
    known = dict(commands(cli))
    flags = {
        option
        for command in known.values()
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    said = re.findall(r"(?:^    |`|&& |\| |--no-python )(v4sdk [a-z-]+(?: [a-z]+)?)", README, re.MULTILINE)
    assert len(said) > 15
    for words in said:
        command = known.get(words) or known.get(words.rpartition(" ")[0])
        assert command is not None, words
        assert not isinstance(command, click.Group) or words in known, words
    # a word with two dashes that is none of ours belongs to another program
    others = {
        "--help",
        "--pyargs",
        "--nproc-per-node",
        "--no-python",
        "--processes",
        "--no-binary",
        "--no-deps",
        "--index-url",
        "--soc",
    }
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) <= flags | others


def test_the_lines_that_ci_runs_are_the_readme_s() -> None:
    assert re.search(r"^    pip install .*'\.\[test\]' && pytest$", README, re.MULTILINE)
    assert re.search(r"^    pip install .* && pip install \. && v4sdk run \"", README, re.MULTILINE)


def test_links_and_paths_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README) + re.findall(
        r"`((?:examples|tests|v4sdk|\.ci)/[\w/.]*)`", README
    ):
        assert (ROOT / target).exists(), target
