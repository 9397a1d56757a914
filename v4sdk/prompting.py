"""From what a caller says to a request the scheduler can run: token ids, resolved parameters, a reader for the answer."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from collections.abc import Sequence as Many
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypedDict

import torch

from v4sdk.decode import Constraint
from v4sdk.engine import Engine, common_prefix
from v4sdk.errors import CheckpointError, ContextOverflow, PromptError, SamplingError, StateError
from v4sdk.loading import Loaded
from v4sdk.numerics import KV_FORMATS
from v4sdk.output import ChatReader, RawReader, Reader, Transcript, Usage
from v4sdk.prompts import CompletionParser, Dialect, completion_start, encode_chat
from v4sdk.prompts.encode import Normalise
from v4sdk.sampling import SamplingParams, draw_seed
from v4sdk.scheduler import Request
from v4sdk.sequence import SequenceState
from v4sdk.state import VERSION, StateHeader, read_header, read_state
from v4sdk.tokenizer import Tokenizer

# where neither the caller nor generation_config.json says: the hosted API's defaults
_MAX_TOKENS, _MAX_TOKENS_THINKING = 8192, 65536


class ChatOptions(TypedDict, total=False):
    """What a chat request may say beside its messages; see `v4sdk.prompts.encode_chat`.

    Attributes:
        thinking: None: as the model's folder says.
        tool_choice: `auto`, `none`, `required`, or a named function. drop_thinking: leave out old reasoning.
        normalise: `reference` renders as the shipped encoder, `hosted` orders the request as the API does.
    """

    tools: Many[Mapping[str, Any]] | None
    tool_choice: str | Mapping[str, Any]
    thinking: bool | None
    effort: str | None
    response_format: Mapping[str, Any] | None
    drop_thinking: bool
    normalise: Normalise


@dataclass(frozen=True)
class Ready:
    """A prompt with everything that does not need a sequence.

    Attributes:
        max_tokens: what was asked for, or a default that gives way to the context (`is_default`).
    """

    ids: list[int]
    params: SamplingParams
    reader: Reader
    max_tokens: int
    is_default: bool
    hidden_ids: frozenset[int]
    constraint: Constraint | None = None


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse options that do not exist.

    Raises:
        PromptError: naming the closest known one.
    """
    known = list(ChatOptions.__annotations__)
    for name in options:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            raise PromptError(
                f"chat option `{name}` is unknown, expected one of {', '.join(known)}",
                hint=f"did you mean `{close[0]}`?" if close else None,
            )


def tokenizer_of(loaded: Loaded) -> Tokenizer:
    """The tokenizer, or an error that says what still works."""
    if loaded.tokenizer is None:
        raise CheckpointError(
            f"folder `{loaded.folder}` has no `tokenizer.json`, so text cannot be read or written",
            hint="copy tokenizer.json into the folder, or give prompts as token ids",
        )
    return loaded.tokenizer


def dialect_of(loaded: Loaded) -> Dialect:
    """The dialect, or an error that names both ways to say it."""
    if loaded.dialect is None:
        raise PromptError(
            f"folder `{loaded.folder}` does not say how conversations are spelled: it has no `encoding` file",
            hint="say --dialect v4-april or --dialect v4-0731, or use --raw",
        )
    return loaded.dialect


def checked_ids(loaded: Loaded, ids: Many[int], limit: int) -> list[int]:
    """Token ids of one prompt, validated.

    Raises:
        StateError: if there are none. PromptError: if one is no token. ContextOverflow: if there are too many.
    """
    tokens = _known_ids(loaded, ids)
    if not tokens:
        raise StateError("the prompt is empty, expected at least one token", hint="give it some text")
    if len(tokens) > limit:
        raise ContextOverflow(f"the prompt has {len(tokens):,} tokens, expected at most {limit:,}")
    return tokens


def _known_ids(loaded: Loaded, ids: Many[int]) -> list[int]:
    vocab = loaded.config.vocab_size
    found = []
    for at, given in enumerate(ids):
        try:
            # integers of other libraries are welcome, True is not
            index = -1 if isinstance(given, bool) else operator.index(given)
        except TypeError:
            index = -1
        if not 0 <= index < vocab:
            raise PromptError(
                f"token {at} of the prompt is {given!r}, expected an integer from 0 to {vocab - 1}"
            )
        found.append(index)
    return found


def raw_prompt(loaded: Loaded, prompt: str | Many[int], params: SamplingParams | None, fresh: bool) -> Ready:
    """Prepare a prompt without format."""
    resolved, ends = _resolved(loaded, params)
    if isinstance(prompt, str):
        tokenizer = tokenizer_of(loaded)
        ids = tokenizer.encode(prompt)
        if not ids and fresh:
            raise StateError("the prompt is empty, expected at least one token", hint="give it some text")
        ids = [tokenizer.bos_id, *ids] if fresh else ids
    else:
        ids = _known_ids(loaded, prompt)
    if resolved.stop_strings:
        tokenizer_of(loaded)
    reader = RawReader(loaded.tokenizer, resolved.stop_strings)
    return Ready(ids, resolved, reader, resolved.max_tokens or _MAX_TOKENS, _is_default(params), ends)


def chat_prompt(
    loaded: Loaded,
    messages: Many[Mapping[str, Any]],
    options: Mapping[str, Any],
    params: SamplingParams | None,
) -> Ready:
    """Prepare a conversation: render, encode, and set up parser and grammar for what comes back."""
    check_options(options)
    tokenizer, dialect = tokenizer_of(loaded), dialect_of(loaded)
    resolved, ends = _resolved(loaded, params)
    thinking = options.get("thinking")
    thinking = loaded.settings.thinking if thinking is None else thinking
    tools, choice, form = (
        options.get("tools"),
        options.get("tool_choice", "auto"),
        options.get("response_format"),
    )
    spans = encode_chat(
        messages, dialect, thinking=thinking, effort=options.get("effort"), tools=tools, tool_choice=choice,
        response_format=form, drop_thinking=options.get("drop_thinking", True),
        normalise=options.get("normalise", "reference"),
    )  # fmt: skip
    parser = CompletionParser.for_prompt(
        spans, dialect, tokenizer, tools=tools, tool_choice=choice, stop=resolved.stop_strings
    )
    constraint: Constraint | None = None
    if _needs_grammar(tools, choice, form):
        # imported only here: the extra may be absent
        from v4sdk.prompts.grammar import AnswerGrammar

        constraint = AnswerGrammar(
            dialect, tokenizer, response_format=form, tools=tools, tool_choice=choice,
            start=completion_start(spans, dialect), vocab_size=loaded.config.vocab_size,
        )  # fmt: skip
    default = _MAX_TOKENS_THINKING if thinking else _MAX_TOKENS
    # the parser wants to see the end token; one that is ignored is not text either
    hidden = ends if resolved.ignore_eos else ends - {tokenizer.eos_id}
    return Ready(
        tokenizer.encode_spans(spans), resolved, ChatReader(parser), resolved.max_tokens or default, _is_default(params),
        hidden, constraint,
    )  # fmt: skip


def _needs_grammar(
    tools: Many[Mapping[str, Any]] | None, choice: str | Mapping[str, Any], form: Mapping[str, Any] | None
) -> bool:
    """A format, a forced call or a strict tool is enforced; plain tools are parsed, and refused when malformed."""
    formatted = form is not None and form.get("type") != "text"
    strict = choice != "none" and any(tool["function"].get("strict") is True for tool in tools or ())
    return formatted or strict or choice not in ("auto", "none")


def _is_default(params: SamplingParams | None) -> bool:
    return params is None or params.max_tokens is None


def _resolved(loaded: Loaded, params: SamplingParams | None) -> tuple[SamplingParams, frozenset[int]]:
    """Parameters with the model's defaults, and every id that is an end token rather than text."""
    given: object = params
    if given is not None and not isinstance(given, SamplingParams):
        raise SamplingError(
            f"`params` is {type(given).__name__}, expected SamplingParams",
            hint="SamplingParams(temperature=0)",
        )
    resolved = (params or SamplingParams()).over(loaded.settings.sampling)
    vocab = loaded.config.vocab_size
    for name, ids in (("logit_bias", resolved.logit_bias), ("stop_token_ids", resolved.stop_token_ids)):
        for index in ids:
            if index >= vocab:
                raise SamplingError(f"`{name}` names token {index}, expected ids from 0 to {vocab - 1}")
    return resolved, loaded.settings.end_ids | frozenset(resolved.stop_token_ids)


def check_length(ready: Ready, before: int, limit: int) -> None:
    """Refuse a prompt and answer that do not fit.

    Raises:
        ContextOverflow: naming all three numbers.
    """
    prompt = before + len(ready.ids)
    needed = prompt + (1 if ready.is_default else ready.max_tokens)
    if needed > limit:
        answer = "an answer" if ready.is_default else f"`max_tokens` {ready.max_tokens:,}"
        raise ContextOverflow(
            f"the prompt of {prompt:,} tokens with {answer} does not fit into the context of {limit:,} tokens",
            hint="shorten the prompt, lower max_tokens, or raise the context limit",
        )


def request(
    loaded: Loaded,
    engine: Engine,
    ready: Ready,
    held: SequenceState | None,
    stream: int,
    limit: int,
    reuse: bool,
) -> Request:
    """Make a request of a prompt: for a fresh state, for the end of `held`, or over its longest common prefix."""
    params, seed = ready.params, ready.params.seed
    usage = Usage(len(ready.ids))
    if held is not None:
        # an answer that goes on keeps the draws it would have had
        seed = held.seed if seed is None and not ready.ids else seed
        usage, stream = _placed(engine, ready.ids, held, reuse), held.stream
    if seed is None and not params.is_greedy:
        seed = draw_seed()
    if held is not None:
        held.seed = seed
    ends = loaded.settings.end_ids if not params.ignore_eos else frozenset()
    return Request(
        ready.ids, params, Transcript(ready.reader, usage, params.logprobs, seed),
        min(ready.max_tokens, limit - usage.prompt_tokens), ends | frozenset(params.stop_token_ids), ready.hidden_ids, seed,
        stream, held, ready.constraint,
    )  # fmt: skip


def _placed(engine: Engine, ids: list[int], held: SequenceState, reuse: bool) -> Usage:
    """Make a prompt the pending tokens of a sequence, going back as far as it must."""
    read = held.num_cached
    if reuse:
        prefix = min(common_prefix(held.ids, ids), len(ids) - 1)
        engine.restore(held, prefix)
        held.ids = list(ids)
        # the next turn differs from here at the earliest: the header's last token says whether it thinks
        held.marks = {len(ids) - 1}
        return Usage(len(ids), held.num_cached, min(read, prefix) - held.num_cached)
    held.ids += ids
    if not held.pending:
        # nothing to read: read the last token again for its logits
        engine.restore(held, len(held.ids) - 1)
    return Usage(len(held.ids), held.num_cached, read - held.num_cached)


def state_header(loaded: Loaded, held: SequenceState) -> StateHeader:
    """What a state file of this session says."""
    return StateHeader(
        VERSION, loaded.fingerprint, asdict(loaded.numerics), loaded.kv_format, loaded.backend.name, held.num_cached,
        held.seed, held.stream, sorted(held.snapshots), list(held.turns),
    )  # fmt: skip


def read_sequence(loaded: Loaded, path: str | Path) -> tuple[SequenceState, list[str]]:
    """Read a state file that fits this session, with what the user should know about it.

    Raises:
        StateError: if it is damaged, or of another model or other numerics.
    """
    header = read_header(path)
    if header.model != loaded.fingerprint:
        raise StateError(
            f"state file `{path}` belongs to another model: {header.model[:12]}, loaded is {loaded.fingerprint[:12]}",
            hint="load the checkpoint it was saved with",
        )
    if header.numerics != asdict(loaded.numerics):
        raise StateError(
            f"state file `{path}` was computed in numerics `{header.numerics.get('name')}`, expected `{loaded.numerics.name}`",
            hint=f"load the session with --numerics {header.numerics.get('name')}",
        )
    notes = []
    if KV_FORMATS.index(header.kv_format) < KV_FORMATS.index(loaded.kv_format):
        notes.append(
            f"rows of `{path}` were re-quantised from KV format `{header.kv_format}` to `{loaded.kv_format}`"
        )
    if header.backend != loaded.backend.name:
        notes.append(
            f"`{path}` was computed on backend `{header.backend}`: on `{loaded.backend.name}` it goes on with small differences"
        )
    with torch.inference_mode():
        return read_state(path, header, loaded.cache), notes
