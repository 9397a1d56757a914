"""The rule for "the same tokens": two sides write alike wherever the model is sure enough to be held to it."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from v4sdk import Session
from v4sdk.sampling import SamplingParams
from v4sdk_bench.nano.dialogues import questions
from v4sdk_bench.parity.agreement import Text, score
from v4sdk_bench.parity.metrics import BF16_MEAN_KL, agreement
from v4sdk_bench.stage import BenchError

PROMPTS, TOKENS, MARGIN_FACTOR, MARGIN_SHARE = 5, 32, 4.0, 0.8


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
