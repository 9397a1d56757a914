"""Two ways to compute one model, side by side over the same tokens: logits, choices, and the tokens each would write.

A side is a backend, a numerics option and a KV format. Neither is right by itself; the first is what the other is
measured against.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from v4sdk import Session
from v4sdk.backend import Backend
from v4sdk.config import ModelConfig
from v4sdk.kv_cache import KVCache
from v4sdk.loading import Loaded
from v4sdk.sampling import SamplingParams
from v4sdk_bench.dialogues import dialogues, questions, written
from v4sdk_bench.golden import sets_agree
from v4sdk_bench.metrics import BF16_MEAN_KL, Agreement, Verdict, agreement, by_bucket, verdict
from v4sdk_bench.stage import BenchError

# most positions whose logits are held at once: of 129,280 scores each they take 265 MB a side
MAX_ROWS = 512
RANDOM_TOKENS = 320
# of the rule for "the same tokens"
PROMPTS, TOKENS, MARGIN_FACTOR, MARGIN_SHARE = 5, 32, 4.0, 0.8


class References(Backend):
    """A backend without kernels: every op runs its reference, in main memory, on weights as they are stored."""

    name = "references"

    def unavailable(self) -> str | None:
        """Never."""
        return None

    @property
    def device(self) -> torch.device:
        """Main memory."""
        return torch.device("cpu")


@dataclass(frozen=True)
class Side:
    """One way to compute the model: a backend (or its name), a numerics option, a KV format (None for its default)."""

    backend: str | Backend
    numerics: str = "fast"
    kv_format: str | None = None

    @classmethod
    def parse(cls, text: str) -> Side:
        """Read `backend[:numerics[:kv_format]]`; `references` is the backend without kernels.

        Raises:
            BenchError: if there are more parts, or an empty one.
        """
        parts = text.split(":")
        if len(parts) > 3 or not all(parts):
            raise BenchError(
                f"side `{text}` is not understood, expected backend[:numerics[:kv_format]]",
                hint="for example --a auto:reference:native --b auto:fast:bf16",
            )
        backend: str | Backend = References() if parts[0] == References.name else parts[0]
        return cls(backend, parts[1] if len(parts) > 1 else "fast", parts[2] if len(parts) > 2 else None)

    def load(self, model: str | Path | None) -> Session:
        """Open the model this way; close the session, or use it in a `with` block."""
        return Session.load(model, backend=self.backend, numerics=self.numerics, kv_format=self.kv_format)


def label(session: Session) -> str:
    """`backend:numerics:kv_format` of a session."""
    return f"{session.loaded.backend.name}:{session.numerics.name}:{session.kv_format}"


@dataclass(frozen=True)
class Text:
    """What both sides read.

    Attributes:
        prompts: token ids. counts: by prompt, which positions the verdict is about [T]; all others only inform.
        rows: by prompt, positions whose logits are compared. what: in words.
    """

    prompts: tuple[tuple[int, ...], ...]
    counts: tuple[Tensor, ...]
    rows: tuple[Tensor, ...]
    what: str

    @classmethod
    def of(cls, prompts: Iterable[Sequence[int]], what: str, counts: Sequence[Tensor] | None = None) -> Text:
        """Text of which every position is compared, evenly thinned out beyond `MAX_ROWS`.

        Raises:
            BenchError: if there is nothing to read.
        """
        kept = tuple(tuple(ids) for ids in prompts if len(ids))
        if not kept:
            raise BenchError("there is no text to compare on", hint="give token ids or text with --prompts")
        masks = tuple(counts) if counts else tuple(torch.ones(len(ids), dtype=torch.bool) for ids in kept)
        most = max(1, MAX_ROWS // len(kept))
        return cls(kept, masks, tuple(_thinned(len(ids), most) for ids in kept), what)

    @classmethod
    def every(cls, prompts: Sequence[Sequence[int]], what: str, counts: Sequence[Tensor]) -> Text:
        """Text of a model with a small vocabulary, of which no position need be left out."""
        rows = tuple(torch.arange(len(ids)) for ids in prompts)
        return cls(tuple(tuple(ids) for ids in prompts), tuple(counts), rows, what)

    @property
    def positions(self) -> Tensor:
        """Of every compared row, [R]."""
        return torch.cat(self.rows)

    @property
    def counted(self) -> Tensor:
        """Which compared rows the verdict is about, [R]."""
        return torch.cat([mask[rows] for mask, rows in zip(self.counts, self.rows, strict=True)])


def _thinned(length: int, most: int) -> Tensor:
    """All positions, or the first half of `most` and the rest evenly: the boundaries lie at the start."""
    if length <= most:
        return torch.arange(length)
    head = most // 2
    rest = torch.linspace(head, length - 1, most - head).round().long()
    return torch.tensor(sorted({*range(head), *rest.tolist()}))


def default_text(session: Session, count: int = 2, seed: int = 0) -> Text:
    """Held-out dialogues for the bundled model, where what it writes counts; random ids for any other.

    Args:
        count: dialogues per task.
    """
    if session.loaded.is_bundled:
        prompts = dialogues(session, count)
        counts = [written(session, ids) for ids in prompts]
        what = f"{len(prompts)} held-out dialogues; what the model writes counts"
        return Text.every(prompts, what, counts)
    draw = random.Random(seed)
    length = min(RANDOM_TOKENS, session.context_limit)
    ids = draw.choices(range(session.config.vocab_size), k=length)
    return Text.of([ids], f"{length} random ids, seed {seed}")


def read_prompts(path: Path, session: Session) -> Text:
    """Text from a file: one prompt per line, or one JSON list of token ids per line.

    Raises:
        BenchError: if the file cannot be read or an id is not one of the model's.
    """
    import json

    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as exc:
        raise BenchError(f"cannot read prompts from {path}: {exc}", hint="give a UTF-8 text file") from exc
    prompts: list[list[int]] = []
    for number, line in enumerate(lines, 1):
        if not line.lstrip().startswith("["):
            prompts.append([session.config.bos_token_id, *session.tokenizer.encode(line)])
            continue
        try:
            ids = json.loads(line)
        except ValueError as exc:
            raise BenchError(
                f"line {number} of {path} is not a JSON list of ids: {exc}", hint="write it as [1, 2, 3]"
            ) from exc
        if not all(type(i) is int and 0 <= i < session.config.vocab_size for i in ids):
            raise BenchError(
                f"line {number} of {path} holds something other than ids from 0 to {session.config.vocab_size - 1}",
                hint="write it as [1, 2, 3]",
            )
        prompts.append(ids)
    longest = max((len(ids) for ids in prompts), default=0)
    if longest > session.context_limit:
        raise BenchError(
            f"a prompt of {path} has {longest:,} tokens, the model reads {session.context_limit:,}",
            hint="shorten it",
        )
    return Text.of(prompts, f"{len(prompts)} prompts of {path.name}")


@dataclass(frozen=True)
class Scored:
    """What one side made of a text.

    Attributes:
        logits: of the compared rows [R, V] float32, in main memory. choices: by name (`route_ids_0`, `index_topk_1`) the
            lists of every position [T, K].
    """

    logits: Tensor
    choices: dict[str, Tensor]


@torch.inference_mode()
def score(loaded: Loaded, text: Text, chunk: int = 1024) -> Scored:
    """Read a text, each prompt from a fresh state, in chunks."""
    logits: list[Tensor] = []
    choices: dict[str, list[Tensor]] = {}

    def observe(name: str, value: Tensor) -> None:
        if not value.is_floating_point():
            choices.setdefault(name, []).append(value.cpu())

    cache = KVCache(loaded.config, loaded.kv_format, loaded.backend.device)
    for ids, rows in zip(text.prompts, text.rows, strict=True):
        slot = cache.allocate()
        for at in range(0, len(ids), chunk):
            part = list(ids[at : at + chunk])
            streams = loaded.model.forward(cache.batch([slot], [part], [at]), cache, observe)
            wanted = rows[(rows >= at) & (rows < at + len(part))] - at
            if wanted.numel():
                logits.append(loaded.model.logits(streams[wanted.to(streams.device)]).float().cpu())
        cache.release(slot)
    return Scored(torch.cat(logits), {name: torch.cat(found) for name, found in choices.items()})


@dataclass(frozen=True)
class Comparison:
    """Side b against side a over one text.

    Attributes:
        counted: over the positions the verdict is about. everywhere: over all compared ones. buckets: those by position.
        routes, picks: share of tokens whose experts, or picked entries, are the same set, over all layers; None where the
            model has none. worst_choice: the layer that agrees least.
    """

    counted: Agreement
    everywhere: Agreement
    buckets: dict[str, Agreement]
    routes: float | None
    picks: float | None
    worst_choice: str
    same_side: bool
    rounded: bool

    @property
    def verdict(self) -> Verdict:
        """In words, over what counts; where nothing is rounded, over everything."""
        return verdict(self.counted if self.rounded else self.everywhere, self.same_side, self.rounded)


def compare(
    a: Scored, b: Scored, text: Text, config: ModelConfig, same_side: bool = False, rounded: bool = True
) -> Comparison:
    """Put two sides' results beside each other.

    Args:
        same_side: both are the same build with the same options. rounded: a side rounds anything.
    """
    counted = text.counted
    counted = counted if counted.any() else torch.ones_like(counted)
    shares = {
        name: float(sets_agree(b.choices[name], value).double().mean()) for name, value in a.choices.items()
    }
    worst = min(shares, key=lambda name: shares[name], default="")
    return Comparison(
        agreement(a.logits[counted], b.logits[counted]),
        agreement(a.logits, b.logits),
        by_bucket(a.logits, b.logits, config, text.positions),
        _mean(shares, "route_ids"),
        _mean(shares, "index_topk"),
        f"{worst}: {shares[worst]:.4f}" if worst else "",
        same_side,
        rounded,
    )


def _mean(shares: dict[str, float], prefix: str) -> float | None:
    found = [share for name, share in shares.items() if name.startswith(prefix)]
    return sum(found) / len(found) if found else None


@dataclass(frozen=True)
class Difference:
    """The first place where two greedy answers part: prompt, number of the token, both tokens, and side a's margin there."""

    prompt: int
    at: int
    a: int
    b: int
    margin: float


@dataclass(frozen=True)
class SameTokens:
    """The rule for "the same tokens", applied.

    Attributes:
        prompts, tokens: what was generated. compared: tokens before the first difference of each prompt.
        logit_difference: largest difference of a logit where both read side a's answers. kl_mean: there, in nats.
        share: of positions whose margin between the two best tokens exceeds `threshold`, 4 times that difference.
        first: the difference with the largest margin, which is the least excusable; None if there is none.
        broken: what the rule forbids, in words; empty if it holds.
    """

    prompts: int
    tokens: int
    compared: int
    logit_difference: float
    kl_mean: float
    share: float
    first: Difference | None
    broken: tuple[str, ...] = field(default=())

    @property
    def threshold(self) -> float:
        """The margin from which a different token cannot be excused."""
        return MARGIN_FACTOR * self.logit_difference


def same_tokens(
    a: Session,
    b: Session,
    prompts: Iterable[Sequence[int]] | None = None,
    tokens: int = TOKENS,
    seed: int = 0,
) -> SameTokens:
    """Let both sides answer greedily, then let both read side a's answers.

    The answers come out of decode steps, the margins and the measured difference out of a prefill, so the two cannot be
    wrong together. An answer that ends early is followed by further prompts, until 5 x `tokens` tokens were written.

    Args:
        prompts: token ids; held-out questions of the bundled model, or random ids, by default.
    """
    asked = iter(prompts) if prompts is not None else _asked(a, seed)
    params = SamplingParams(temperature=0.0, max_tokens=tokens)
    texts: list[tuple[tuple[int, ...], list[int], list[int]]] = []
    written_ = 0
    for ids in asked:
        mine, theirs = (list(side.generate(list(ids), params).ids) for side in (a, b))
        texts.append((tuple(ids), mine, theirs))
        written_ += len(mine)
        if len(texts) >= PROMPTS and written_ >= PROMPTS * tokens:
            break
    if not texts:
        raise BenchError("there is no prompt to answer", hint="give token ids or text with --prompts")
    whole = [(*ids, *mine[:-1]) for ids, mine, _ in texts]
    rows = [torch.arange(len(ids) - 1, len(all_)) for (ids, _, _), all_ in zip(texts, whole, strict=True)]
    every = tuple(torch.ones(len(ids), dtype=torch.bool) for ids in whole)
    text = Text(tuple(whole), every, tuple(rows), "side a's answers")
    scored = score(a.loaded, text).logits, score(b.loaded, text).logits
    return _judged(scored, texts)


def _judged(
    scored: tuple[Tensor, Tensor], texts: list[tuple[tuple[int, ...], list[int], list[int]]]
) -> SameTokens:
    found = agreement(*scored)
    best = scored[0].double().topk(2).values
    margins = best[:, 0] - best[:, 1]
    threshold = MARGIN_FACTOR * found.max_abs
    differences, compared, start = [], 0, 0
    for number, (_, mine, theirs) in enumerate(texts):
        at = next((i for i, (x, y) in enumerate(zip(mine, theirs, strict=False)) if x != y), None)
        if at is not None:
            differences.append(Difference(number, at, mine[at], theirs[at], float(margins[start + at])))
        compared += min(len(mine), len(theirs)) if at is None else at
        start += len(mine)
    first = max(differences, key=lambda d: d.margin, default=None)
    share = float((margins > threshold).double().mean())
    broken = []
    if first is not None and first.margin > threshold:
        broken.append(f"another token although the margin {first.margin:.2e} exceeds {threshold:.2e}")
    if not share >= MARGIN_SHARE:
        broken.append(f"only {share:.1%} of the margins exceed {threshold:.2e}, expected {MARGIN_SHARE:.0%}")
    if not found.kl_mean <= BF16_MEAN_KL:
        broken.append(f"mean KL {found.kl_mean:.2e}, expected at most {BF16_MEAN_KL:g}")
    return SameTokens(
        len(texts), len(margins), compared, found.max_abs, found.kl_mean, share, first, tuple(broken)
    )


def _asked(session: Session, seed: int) -> Iterator[Sequence[int]]:
    if session.loaded.is_bundled:
        yield from questions(session, 8)
        return
    draw = random.Random(seed)
    yield from [draw.choices(range(session.config.vocab_size), k=24) for _ in range(PROMPTS)]
