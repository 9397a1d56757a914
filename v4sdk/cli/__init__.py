"""The command line: arguments in, text or JSON out, and the only place where an error becomes output.

Commands are modules that are imported when they are asked for, so `v4sdk --help` does not import torch.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import NoReturn

import click

from v4sdk import __version__
from v4sdk.cli.errors import show_error
from v4sdk.errors import V4Error

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130

# command -> (module, one line of help); the line stands here so that listing commands imports none of them
_COMMANDS = {
    "run": ("v4sdk.cli.run", "Answer a prompt, a file of prompts, or chat."),
    "backends": ("v4sdk.cli.report", "List installed backends and whether they can be used here."),
    "info": ("v4sdk.cli.report", "Describe a checkpoint from its headers: sizes, memory, dialect."),
    "convert": ("v4sdk.cli.convert", "Rewrite a checkpoint's weights as a backend's device wants them."),
    "doctor": ("v4sdk.cli.report", "Show what was found on this machine, and what is missing."),
    "conformance": ("v4sdk.cli.report", "Compare every op of a backend with its reference."),
}


class _LazyGroup(click.Group):
    """Imports a command's module on use; plugins are asked only for names that are not built in."""

    _asked_plugins = False

    def list_commands(self, ctx: click.Context) -> list[str]:
        self._ask_plugins()
        return [*_COMMANDS, *sorted(self.commands)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _COMMANDS:
            found = getattr(import_module(_COMMANDS[cmd_name][0]), cmd_name)
            return found if isinstance(found, click.Command) else None
        self._ask_plugins()
        return self.commands.get(cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        self._ask_plugins()
        rows = [(name, line) for name, (_, line) in _COMMANDS.items()]
        rows += [(name, self.commands[name].get_short_help_str(80)) for name in sorted(self.commands)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def _ask_plugins(self) -> None:
        if self._asked_plugins:
            return
        self._asked_plugins = True
        from v4sdk.plugins import add_commands

        for plugin in add_commands(self):
            click.echo(f"note: plugin `{plugin.name}` is broken: {plugin.broken}", err=True)


@click.group(
    cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__, prog_name="v4sdk", message="%(prog)s %(version)s")
def cli() -> None:
    """Run DeepSeek V4 checkpoints. Without --model, a small demonstration model answers."""


def main() -> NoReturn:
    """Entry point: run a command and turn whatever happens into an exit status."""
    _survive_odd_terminals()
    try:
        status = cli.main(prog_name="v4sdk", standalone_mode=False)
        sys.stdout.flush()
        sys.exit(status if isinstance(status, int) else 0)
    except V4Error as exc:
        show_error(exc)
        sys.exit(EXIT_ERROR)
    except click.exceptions.Exit as exc:
        sys.exit(exc.exit_code)
    except click.ClickException as exc:
        exc.show()
        sys.exit(exc.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # whoever read our output has left: nothing to say, and nobody to say it to
        _silence_stdout()
        sys.exit(EXIT_ERROR)


def _silence_stdout() -> None:
    # the interpreter flushes stdout once more at exit; give it somewhere to go
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _survive_odd_terminals() -> None:
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            # a terminal that cannot show a character shows a question mark, not a traceback
            reconfigure(errors="replace")
