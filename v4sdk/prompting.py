"""From what a caller says to a request the scheduler can run: token ids, resolved parameters, a reader for the answer."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Many
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class ChatOptions:
    """What a chat request may say beside its messages; see `v4sdk.prompts.encode_chat`.

    Args:
        thinking: None: as the model's folder says.
        normalise: `reference` renders as the shipped encoder, `hosted` orders the request as the API does.
    """

    tools: Many[Mapping[str, Any]] | None = None
    tool_choice: str | Mapping[str, Any] = "auto"
    thinking: bool | None = None
    effort: str | None = None
    response_format: Mapping[str, Any] | None = None
    drop_thinking: bool = True
    normalise: Normalise = "reference"


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


def options_of(options: Mapping[str, Any]) -> ChatOptions:
    """Read chat options given by keyword.

    Raises:
        PromptError: on an unknown name, with the closest known one.
    """
    known = [f.name for f in fields(ChatOptions)]
    for name in options:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            raise PromptError(
                f"chat option `{name}` is unknown, expected one of {', '.join(known)}",
                hint=f"did you mean `{close[0]}`?" if close else None,
            )
    return ChatOptions(**options)


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
        raise StateError("the prompt is empty, expected at least one token")
    if len(tokens) > limit:
        raise ContextOverflow(f"the prompt has {len(tokens):,} tokens, expected at most {limit:,}")
    return tokens


def _known_ids(loaded: Loaded, ids: Many[int]) -> list[int]:
    vocab = loaded.config.vocab_size
    for at, index in enumerate(ids):
        if type(index) is not int or not 0 <= index < vocab:
            raise PromptError(
                f"token {at} of the prompt is {index!r}, expected an integer from 0 to {vocab - 1}"
            )
    return list(ids)


def raw_prompt(loaded: Loaded, prompt: str | Many[int], params: SamplingParams | None, fresh: bool) -> Ready:
    """Prepare a prompt without format."""
    resolved, ends = _resolved(loaded, params)
    if isinstance(prompt, str):
        tokenizer = tokenizer_of(loaded)
        ids = tokenizer.encode(prompt)
        if not ids and fresh:
            raise StateError("the prompt is empty, expected at least one token")
        ids = [tokenizer.bos_id, *ids] if fresh else ids
    else:
        ids = _known_ids(loaded, prompt)
    if resolved.stop_strings:
        tokenizer_of(loaded)
    reader = RawReader(loaded.tokenizer, resolved.stop_strings)
    return Ready(ids, resolved, reader, resolved.max_tokens or _MAX_TOKENS, _is_default(params), ends)


def chat_prompt(
    loaded: Loaded, messages: Many[Mapping[str, Any]], options: ChatOptions, params: SamplingParams | None
) -> Ready:
    """Prepare a conversation: render, encode, and set up parser and grammar for what comes back."""
    tokenizer, dialect = tokenizer_of(loaded), dialect_of(loaded)
    resolved, ends = _resolved(loaded, params)
    thinking = loaded.settings.thinking if options.thinking is None else options.thinking
    spans = encode_chat(
        messages, dialect, thinking=thinking, effort=options.effort, tools=options.tools, tool_choice=options.tool_choice,
        response_format=options.response_format, drop_thinking=options.drop_thinking, normalise=options.normalise,
    )  # fmt: skip
    parser = CompletionParser.for_prompt(
        spans,
        dialect,
        tokenizer,
        tools=options.tools,
        tool_choice=options.tool_choice,
        stop=resolved.stop_strings,
    )
    constraint: Constraint | None = None
    if _needs_grammar(options):
        # imported only here: the extra may be absent
        from v4sdk.prompts.grammar import AnswerGrammar

        constraint = AnswerGrammar(
            dialect, tokenizer, response_format=options.response_format, tools=options.tools,
            tool_choice=options.tool_choice, start=completion_start(spans, dialect), vocab_size=loaded.config.vocab_size,
        )  # fmt: skip
    default = _MAX_TOKENS_THINKING if thinking else _MAX_TOKENS
    # an end token that is ignored is not text either
    hidden = ends if resolved.ignore_eos else ends - {tokenizer.eos_id}
    return Ready(
        tokenizer.encode_spans(spans), resolved, ChatReader(parser), resolved.max_tokens or default, _is_default(params),
        hidden, constraint,
    )  # fmt: skip


def _needs_grammar(options: ChatOptions) -> bool:
    """A format, a forced call or a strict tool is enforced; plain tools are parsed, and refused when malformed."""
    form = options.response_format
    formatted = isinstance(form, Mapping) and form.get("type") != "text"
    forced = options.tool_choice == "required" or isinstance(options.tool_choice, Mapping)
    strict = any(tool["function"].get("strict") is True for tool in options.tools or ())
    return formatted or forced or (strict and options.tool_choice != "none")


def _is_default(params: SamplingParams | None) -> bool:
    return params is None or params.max_tokens is None


def _resolved(loaded: Loaded, params: SamplingParams | None) -> tuple[SamplingParams, frozenset[int]]:
    """Parameters with the model's defaults, and every id that is an end token rather than text."""
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
    """Put a prompt on a state: a new one, the end of `held`, or over its longest common prefix."""
    state = engine.new_state() if held is None else held
    read = state.num_cached
    if reuse:
        prefix = min(common_prefix(state.ids, ready.ids), len(ready.ids) - 1)
        engine.restore(state, prefix)
        recomputed = min(read, prefix) - state.num_cached
        state.ids = list(ready.ids)
        # the next turn differs from here at the earliest: the header's last token says whether it thinks
        state.marks = set() if held is None else {len(ready.ids) - 1}
    else:
        state.ids += ready.ids
        if not state.pending:
            # nothing to read: read the last token again for its logits
            engine.restore(state, len(state.ids) - 1)
        recomputed = read - state.num_cached
    params = ready.params
    # an answer that goes on keeps the draws it would have had
    seed = params.seed if params.seed is not None else state.seed
    if seed is None and not params.is_greedy:
        seed = draw_seed()
    state.seed, state.stream = seed, stream if held is None else state.stream
    usage = Usage(len(state.ids), state.num_cached, recomputed)
    ends = loaded.settings.end_ids if not params.ignore_eos else frozenset()
    return Request(
        state, params, Transcript(ready.reader, usage, params.logprobs, seed), min(ready.max_tokens, limit - len(state.ids)),
        ends | frozenset(params.stop_token_ids), ready.hidden_ids, held is None, ready.constraint,
    )  # fmt: skip


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
