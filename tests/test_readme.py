"""The README against the program: its commands exist, its flags exist, its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import click

from v4sdk.cli import cli

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_command_and_flag_in_the_readme_exists() -> None:
    context = click.Context(cli)
    known = set(cli.list_commands(context))
    flags: set[str] = set()
    for name in known:
        command = cli.get_command(context, name)
        assert command is not None
        flags |= {
            option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)
        }
    assert set(re.findall(r"(?:^    |`|&& |\| )v4sdk ([a-z]+)", README, re.MULTILINE)) <= known
    # a word with two dashes that is none of ours belongs to another program
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) <= flags | {"--help"}


def test_the_lines_that_ci_runs_are_the_readme_s() -> None:
    assert re.search(r"^    pip install .*'\.\[test\]' && pytest$", README, re.MULTILINE)
    assert re.search(r"^    pip install .* && pip install \. && v4sdk run \"", README, re.MULTILINE)


def test_links_and_paths_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README) + re.findall(
        r"`((?:examples|tests|v4sdk|\.ci)/[\w/.]*)`", README
    ):
        assert (ROOT / target).exists(), target
