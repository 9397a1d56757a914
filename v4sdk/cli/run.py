"""`v4sdk run`: one prompt, a file of prompts, a saved state, or a conversation."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from v4sdk.cli import inputs, ranks
from v4sdk.cli.chat import chat
from v4sdk.cli.serve import answer, answer_requests, go_on, open_session
from v4sdk.cli.settings import Settings
from v4sdk.expert_parallel.team import SCHEDULES, TIMEOUT_S

if TYPE_CHECKING:
    from v4sdk.expert_parallel import Team

_FILE = click.Path(path_type=Path, allow_dash=True)


@dataclass(frozen=True)
class _Source:
    """Where the prompt comes from; at most one of these is given."""

    prompt: str | None
    file: Path | None
    prompts: Path | None

    def check(self) -> None:
        """Refuse two sources at once."""
        given = {"PROMPT": self.prompt, "--file": self.file, "--prompts": self.prompts}
        named = [name for name, value in given.items() if value is not None]
        if len(named) > 1:
            raise click.UsageError(f"{' and '.join(named)} both give a prompt, expected one")

    def read(self, replace_invalid: bool) -> str | None:
        """The prompt text, or None where nothing gives one."""
        if self.prompt == "-":
            return inputs.read_stdin(replace_invalid)
        if self.prompt is not None:
            return inputs.check_argument(self.prompt, replace_invalid)
        if self.file is not None:
            return inputs.read_file(self.file, replace_invalid)
        return None


@click.command()
@click.argument("prompt", required=False)
@click.option("--file", "-f", type=_FILE, help="Read the prompt from a file; - is standard input.")
@click.option(
    "--prompts",
    type=_FILE,
    metavar="FILE.jsonl",
    help="Answer one JSON request per line (prompt, or messages and tools), each from a fresh state; "
    "one JSON result per line comes out.",
)
@click.option(
    "--model", metavar="PATH|ID", help="Checkpoint folder or hub id (default: the demonstration model)."
)
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub id.")
@click.option(
    "--backend", metavar="NAME", help="Backend to run on (default: $V4SDK_BACKEND, else the best here)."
)
@click.option("--numerics", metavar="NAME", help="exact, reference or fast (default).")
@click.option("--kv-format", metavar="NAME", help="float32, bf16 or native (default: as the numerics need).")
@click.option("--dialect", metavar="NAME", help="Prompt dialect, where the folder does not say.")
@click.option("--strict", is_flag=True, help="Refuse to run ops for which the backend has no kernel.")
@click.option(
    "--ep",
    type=int,
    metavar="N",
    help="Share the routed experts among N processes: torchrun --nproc-per-node N --no-python v4sdk run --ep N ...",
)
@click.option(
    "--ep-schedule",
    type=click.Choice(SCHEDULES),
    default="waves",
    show_default=True,
    help="Overlap exchange and computing of experts in waves, or do one after the other; the answer is the same.",
)
@click.option(
    "--ep-timeout",
    type=float,
    default=TIMEOUT_S,
    show_default=True,
    metavar="SECONDS",
    help="Longest wait for the other processes in one layer.",
)
@click.option(
    "--memory-limit",
    metavar="SIZE",
    help="Most main memory to use, e.g. 8GB; routed experts that do not fit are read from disk as they are chosen "
    "(default: $V4SDK_MEMORY_LIMIT, and always what the system allows).",
)
@click.option("--system", metavar="TEXT", help="System message.")
@click.option(
    "--thinking/--no-thinking", default=None, help="Reason before answering (default: as the model says)."
)
@click.option("--effort", metavar="NAME", help="Reasoning effort, by the words of the dialect.")
@click.option("--raw", is_flag=True, help="Continue the text as it is, without chat format.")
@click.option("--temperature", type=float, help="0 is greedy.")
@click.option("--top-p", type=float, help="Keep the likeliest tokens up to this probability.")
@click.option("--top-k", type=int, help="Keep this many tokens; 0 keeps all.")
@click.option("--min-p", type=float, help="Drop tokens less likely than this share of the likeliest.")
@click.option("--seed", type=int, help="Same seed, same answer.")
@click.option("--max-tokens", "-n", type=int, help="Most tokens to generate.")
@click.option("--stop", multiple=True, metavar="TEXT", help="Stop at this text; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="Events as JSON lines on stdout.")
@click.option("--save", type=click.Path(path_type=Path), help="Write the state here when the answer ends.")
@click.option(
    "--resume",
    type=click.Path(path_type=Path),
    help="Start from a saved state: without a prompt the answer goes on; --raw appends the prompt; "
    "a chat prompt reuses the tokens it has in common with the state.",
)
@click.option("--replace-invalid", is_flag=True, help="Read invalid UTF-8 as replacement characters.")
def run(
    prompt: str | None,
    file: Path | None,
    prompts: Path | None,
    replace_invalid: bool,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    min_p: float | None,
    seed: int | None,
    max_tokens: int | None,
    stop: tuple[str, ...],
    **options: Any,
) -> int:
    """Answer PROMPT, a file, standard input, a file of requests; or chat, on a terminal without any of them.

    Content goes to stdout, reasoning and everything else to stderr.
    """
    source = _Source(prompt, file, prompts)
    source.check()
    sampling = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "seed": seed,
        "max_tokens": max_tokens,
        "stop": stop or None,
    }
    settings = Settings(sampling={k: v for k, v in sampling.items() if v is not None}, **options)
    settings.check()
    if prompts is not None and (settings.save or settings.resume):
        raise click.UsageError(
            "--prompts starts every request afresh, so --save and --resume do not go with it"
        )
    with ranks.joined(settings) as team:
        if team is not None and not team.is_driver:
            return ranks.serve(team, settings)
        return _drive(source, replace_invalid, settings, team)


def _drive(source: _Source, replace_invalid: bool, settings: Settings, team: Team | None) -> int:
    if source.prompts is not None:
        requests = inputs.read_requests(source.prompts, replace_invalid, settings.raw, settings.system)
        with open_session(settings, team) as session:
            return answer_requests(session, requests, settings)
    text = source.read(replace_invalid)
    if text is None and settings.resume is None:
        if sys.stdin is not None and sys.stdin.isatty():
            with open_session(settings, team) as session:
                return chat(session, settings)
        text = inputs.read_stdin(replace_invalid)
    with open_session(settings, team) as session:
        return go_on(session, settings) if text is None else answer(session, text, settings)
