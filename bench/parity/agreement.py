"""Two sides over the same tokens: logits by position and choices. Side a is what side b is measured against."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from v4sdk import Session
from v4sdk.config import ModelConfig
from v4sdk.kv_cache import KVCache
from v4sdk.loading import Loaded
from v4sdk_bench.nano.dialogues import dialogues, written
from v4sdk_bench.parity.golden import sets_agree
from v4sdk_bench.parity.metrics import Agreement, Verdict, agreement, by_bucket, verdict
from v4sdk_bench.stage import BenchError

# most positions whose logits are held at once: of 129,280 scores each they take 265 MB a side
MAX_ROWS = 512
RANDOM_TOKENS = 320


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
