"""What must not change an answer: how a prompt is cut, who else is in the batch, whether the state was saved, forked, rewound.

Each check reads the same token ids in two ways and compares the logits. Where both ways are the same computation the bits
must agree; where sums run over other shapes only as much may differ as float32 and, in rounded numerics, the roundings
behind it allow.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from v4sdk import Session
from v4sdk.decode import Sampler
from v4sdk.engine import Engine
from v4sdk.model import HeadWeights, V4Model
from v4sdk.numerics import Numerics
from v4sdk.sampling import SamplingParams
from v4sdk.sequence import SequenceState
from v4sdk_bench.nano.dialogues import dialogues
from v4sdk_bench.parity.metrics import BF16_MEAN_KL, QUANTISED_MEAN_KL, Agreement, agreement
from v4sdk_bench.stage import BenchError

# tokens read, and where the second part begins: a closed block of 128 and the end of a full window lie behind it
LENGTH, SPLIT, STEPS = 176, 116, 32
CHUNK = 37
# logits of float32 arithmetic without roundings, summed over other shapes
EXACT_MAX_ABS = 1e-4
_WHOLE = 1 << 20


@dataclass(frozen=True)
class Limit:
    """What is accepted: a value of `Agreement`, its largest size, and why so much."""

    value: str
    size: float
    reason: str


BITWISE = Limit("max_abs", 0.0, "the same computation twice")


def limit_of(bitwise: bool, numerics: Numerics) -> Limit:
    """The limit of a check.

    Roundings turn the last bit of a float32 sum into a BF16 or FP8 step, and a step into another expert or another entry, so
    single logits have no useful bound there; the distance of the distributions has.
    """
    if bitwise:
        return BITWISE
    if not numerics.bf16_activations:
        return Limit("max_abs", EXACT_MAX_ABS, "float32 sums over other shapes")
    if numerics.q8_gemm_input:
        return Limit(
            "kl_mean", QUANTISED_MEAN_KL, "FP8 roundings of GEMM inputs behind float32 sums over other shapes"
        )
    return Limit("kl_mean", BF16_MEAN_KL, "BF16 roundings behind float32 sums over other shapes")


@dataclass(frozen=True)
class Invariance:
    """One check.

    Attributes:
        name: `prefill = decode`. what: in words. bitwise: equal bits are required.
    """

    name: str
    what: str
    bitwise: bool
    run: Callable[[Reader], tuple[Tensor, Tensor]]

    @property
    def key(self) -> str:
        """Its part of a row's key."""
        return self.name.replace(" = ", "-")


@dataclass(frozen=True)
class Found:
    """What a check measured."""

    check: Invariance
    agreement: Agreement
    limit: Limit

    @property
    def holds(self) -> bool:
        """Within its limit; NaN is not."""
        return bool(getattr(self.agreement, self.limit.value) <= self.limit.size)

    @property
    def verdict(self) -> str:
        """`bitwise equal`, `within ...` or `differs ...`."""
        if self.agreement.max_abs == 0.0:
            return "bitwise equal"
        asked = "equal bits" if self.limit is BITWISE else f"{self.limit.value} {self.limit.size:g}"
        return f"within {asked}" if self.holds else f"differs, expected {asked}"


class Reader:
    """Reads token ids in one session by the ways a session has: chunks, decode steps, packed sequences, states.

    Args:
        load: opens the session, and once more for the state that is resumed. length: tokens of the text, at most the model's
            context.
    """

    def __init__(self, load: Callable[[], Session], seed: int = 0, length: int = LENGTH) -> None:
        self._load = load
        self.session = load()
        length = min(length, self.session.context_limit)
        if length < 24:
            raise BenchError(
                f"the model reads {length} tokens, too few to cut in two",
                hint="give a model with a longer context",
            )
        self.ids = _text(self.session, length, seed)
        self.split = min(SPLIT, length * 2 // 3)
        loaded = self.session.loaded
        self._tap = _Tapped(loaded.model)
        self._engines = {
            size: Engine(self._tap, loaded.cache, loaded.backend, size, _WHOLE) for size in (_WHOLE, CHUNK)
        }

    @property
    def engine(self) -> Engine:
        """One that reads a prompt at once."""
        return self._engines[_WHOLE]

    def close(self) -> None:
        """Give the model back."""
        self._engines.clear()
        self.session.close()

    def read(self, ids: Sequence[int], chunk: int = _WHOLE) -> Tensor:
        """Logits after every token, from a fresh state: [T, V]."""
        state = self.engine.new_state()
        try:
            return self.more(state, ids, self._engines[chunk])
        finally:
            self.engine.free(state)

    def more(self, state: SequenceState, ids: Sequence[int], engine: Engine | None = None) -> Tensor:
        """Logits after every one of further tokens."""
        state.ids += ids
        return (engine or self.engine).advance([state], select=_every)

    def started(self, ids: Sequence[int]) -> SequenceState:
        """A state that has read `ids`."""
        state = self.engine.new_state()
        self.more(state, ids)
        return state

    def decode(self, states: Sequence[SequenceState], ids: Sequence[Sequence[int]]) -> Tensor:
        """Feed tokens one at a time through decode steps: logits [steps, B, V]."""
        found, step = [], None
        greedy = [SamplingParams(temperature=0.0)] * len(states)
        sampler = Sampler(
            greedy,
            states,
            [None] * len(states),
            self.session.config.vocab_size,
            self.session.loaded.backend.device,
        )
        for tokens in zip(*ids, strict=True):
            for state, token in zip(states, tokens, strict=True):
                del state.ids[state.num_cached :]
                state.ids.append(token)
            if step is None or step.is_spent:
                step = self.engine.decode_step(states, sampler)
            else:
                # the step would feed what it drew; the text is given
                with torch.inference_mode():
                    step.batch.token_ids.copy_(torch.tensor(tokens))
            self.engine.decode(step, states)
            found.append(self._tap.last.clone())
        for state in states:
            del state.ids[state.num_cached :]
        return torch.stack(found)

    def resumed(self, ids: Sequence[int], further: Sequence[int]) -> Tensor:
        """Save after `ids`, resume in another session, and read on: logits of `further`."""
        with tempfile.TemporaryDirectory() as folder, self.session.sequence() as sequence:
            path = Path(folder) / "saved.state"
            self.more(sequence.state_for(self.session), ids)
            sequence.save(path)
            with self._load() as other, other.resume(path) as back:
                state, loaded = back.state_for(other), other.loaded
                state.ids += further
                engine = Engine(loaded.model, loaded.cache, loaded.backend, _WHOLE, _WHOLE)
                return engine.advance([state], select=_every).cpu()


class _Tapped(V4Model):
    """A bound model that leaves its last logits where they can be read; a replayed step writes into the same memory."""

    last: Tensor

    def __init__(self, model: V4Model) -> None:
        self.__dict__.update(model.__dict__)

    def logits(self, streams: Tensor, head: HeadWeights | None = None) -> Tensor:
        """Score the vocabulary, and remember it."""
        self.last = super().logits(streams, head)
        return self.last


def _every(state: SequenceState, first: int, last: int) -> list[int]:
    return list(range(first, last))


def _text(session: Session, length: int, seed: int) -> list[int]:
    """Held-out dialogues one after the other for the bundled model, random ids for any other."""
    if session.loaded.is_bundled:
        joined = [token for ids in sorted(dialogues(session, 1), key=len, reverse=True) for token in ids]
        return joined[:length]
    return random.Random(seed).choices(range(session.config.vocab_size), k=length)


def _rerun(r: Reader) -> tuple[Tensor, Tensor]:
    return r.read(r.ids), r.read(r.ids)


def _decode(r: Reader) -> tuple[Tensor, Tensor]:
    end = min(r.split + STEPS, len(r.ids))
    state = r.started(r.ids[: r.split])
    steps = r.decode([state], [r.ids[r.split : end]])[:, 0]
    r.engine.free(state)
    return r.read(r.ids[:end])[r.split :], steps


def _chunked(r: Reader) -> tuple[Tensor, Tensor]:
    return r.read(r.ids), r.read(r.ids, CHUNK)


def _batched(r: Reader) -> tuple[Tensor, Tensor]:
    """Three sequences of unequal lengths, read packed and then decoded packed."""
    n, steps = len(r.ids), 6
    texts = [r.ids[:-steps], r.ids[n // 5 : n // 2], r.ids[n // 3 : n // 3 + 9]]
    nexts = [r.ids[-steps:]] * len(texts)
    alone = []
    for text, following in zip(texts, nexts, strict=True):
        state = r.engine.new_state()
        alone += [r.more(state, text), r.decode([state], [following])[:, 0]]
        r.engine.free(state)
    states = [r.engine.new_state() for _ in texts]
    for state, text in zip(states, texts, strict=True):
        state.ids += text
    read = torch.split(r.engine.advance(states, select=_every), [len(text) for text in texts])
    stepped = r.decode(states, nexts).unbind(1)
    for state in states:
        r.engine.free(state)
    together = [part for pair in zip(read, stepped, strict=True) for part in pair]
    return torch.cat(alone), torch.cat(together)


def _continued(r: Reader) -> Tensor:
    state = r.started(r.ids[: r.split])
    found = r.more(state, r.ids[r.split :])
    r.engine.free(state)
    return found


def _resumed(r: Reader) -> tuple[Tensor, Tensor]:
    return _continued(r).cpu(), r.resumed(r.ids[: r.split], r.ids[r.split :])


def _forked(r: Reader) -> tuple[Tensor, Tensor]:
    """Both the copy and the original go on after another copy has read something else."""
    state = r.started(r.ids[: r.split])
    copy, astray = r.engine.fork(state), r.engine.fork(state)
    r.more(astray, r.ids[: len(r.ids) - r.split][::-1])
    both = [r.more(one, r.ids[r.split :]) for one in (copy, state)]
    for one in (state, copy, astray):
        r.engine.free(one)
    return torch.cat([_continued(r)] * 2), torch.cat(both)


def _rewound(r: Reader) -> tuple[Tensor, Tensor]:
    """Back over a full window, so that what was overwritten must be computed again."""
    state = r.engine.new_state()
    state.keeps = True
    r.more(state, r.ids[: r.split // 2])
    r.engine.remember(state)
    r.more(state, [*r.ids[r.split // 2 : r.split], *r.ids[::-1]])
    r.engine.rewind(state, r.split)
    found = r.more(state, r.ids[r.split :])
    r.engine.free(state)
    return _continued(r), found


CHECKS = (
    Invariance("run = rerun", "a prompt read twice", True, _rerun),
    Invariance("prefill = decode", "tokens fed one at a time, against the same tokens in one prompt", False, _decode),
    Invariance("chunked = whole", f"a prompt in chunks of {CHUNK}, against in one piece", False, _chunked),
    Invariance("batched = alone", "three sequences packed, against each by itself", False, _batched),
    Invariance("resumed = fresh", "saved to a file, resumed by another session, read on", True, _resumed),
    Invariance("forked = original", "a copy and its original, after another copy went astray", True, _forked),
    Invariance("rewound = fresh", "gone back over a full window and read on", False, _rewound),
)  # fmt: skip


def check(load: Callable[[], Session], seed: int = 0, names: Sequence[str] = ()) -> Iterator[Found]:
    """Run the checks, one after the other.

    Args:
        load: opens the session. names: only these keys.

    Raises:
        V4Error: if the model cannot be loaded.
    """
    reader = Reader(load, seed)
    try:
        for one in CHECKS:
            if not names or one.key in names:
                a, b = one.run(reader)
                bound = limit_of(one.bitwise, reader.session.numerics)
                yield Found(one, agreement(a, b), bound)
    finally:
        reader.close()
