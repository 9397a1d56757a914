"""Train the bundled model with the project's own reference ops under autograd.

    python examples/train_nano/train.py --folder v4sdk/nano --run /tmp/nano --minutes 80

Muon updates matrices, AdamW the rest. The schedule follows progress = tokens or minutes used / allowed. First attention
sees every compressed entry while the indexer learns to imitate it; from `--sparse-from` on only the indexer's picks are
attended; from `--round-from` on weights and cache rows are rounded as in the released file, gradients straight through.
The same command resumes from the last checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from batches import MIX, Mixer, Packed, Renderer, pack
from parameters import Parameters
from torch import Tensor
from training_ops import make_step, table

from v4sdk.config import ModelConfig
from v4sdk.kv_cache import KVCache
from v4sdk.model import Binder, V4Model
from v4sdk.numerics import EXACT, Numerics
from v4sdk.weights import WeightSource
from v4sdk_bench.nano.tasks import TASKS, held_out

ROUNDED = dataclasses.replace(EXACT, name="exact with rounded caches", q8_kv=True, q4_index=True)
_PAGE = 128


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, required=True, help="config.json, tokenizer.json and v4sdk.json"
    )
    parser.add_argument("--run", type=Path, required=True, help="checkpoints and log")
    parser.add_argument("--minutes", type=float, default=80.0, help="training time, kept across resumes")
    parser.add_argument("--batch", type=int, default=3072, help="tokens per step")
    parser.add_argument("--lr", type=float, default=0.003, help="peak rate of Muon")
    parser.add_argument("--adam-lr", type=float, default=0.0015, help="peak rate of AdamW")
    parser.add_argument("--embed-lr", type=float, default=0.003)
    parser.add_argument("--sparse-from", type=float, default=0.55)
    parser.add_argument("--round-from", type=float, default=0.8)
    parser.add_argument("--save-every", type=float, default=300.0, help="seconds")
    parser.add_argument("--score-every", type=float, default=300.0, help="seconds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--stop-after", type=int, default=0, help="steps, for a trial run")
    return parser.parse_args()


class Trainer:
    """Everything that a checkpoint has to hold, and one step of it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.config = ModelConfig.from_folder(args.folder)
        self.parameters = Parameters(self.config)
        matrices, rest, tables = self.parameters.groups()
        self.muon = torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
        groups = [{"params": rest, "peak": args.adam_lr}, {"params": tables, "peak": args.embed_lr}]
        self.adam = torch.optim.AdamW(groups, lr=args.adam_lr, betas=(0.9, 0.98), weight_decay=0.0)
        self.renderer = Renderer(args.folder)
        self.mixer = Mixer(self.renderer, args.batch)
        self.steps, self.tokens, self.seconds = 0, 0, 0.0
        self.model = self._bind(False)
        self.rounding = False
        self.tests = {task: [self.renderer.example(d) for d in held_out(task, 40, seed=99)] for task in TASKS}

    @property
    def progress(self) -> float:
        """Share of the training time that is used."""
        return min(1.0, self.seconds / (60 * self.args.minutes))

    def _bind(self, rounding: bool) -> V4Model:
        named = self.parameters.rounded() if rounding else self.parameters.named()
        return V4Model(Binder(self.config, WeightSource(named)), ROUNDED if rounding else EXACT)

    def run(
        self, packed: Packed, sparse: bool, numerics: Numerics
    ) -> tuple[Tensor, list[Tensor], list[Tensor], dict[int, Tensor]]:
        """Forward one packed batch: logits of target rows, indexer losses, recalls, and expert loads by layer."""
        c = self.config
        cache = KVCache(c, "float32", page_tokens=_PAGE)
        batch = cache.batch(
            [cache.allocate() for _ in packed.examples],
            [e.ids for e in packed.examples],
            [0] * len(packed.examples),
        )
        weight = torch.full((batch.num_tokens,), 0.05)
        weight[packed.target_rows] = 1.0
        step = make_step(
            batch, c.sliding_window, {r for r in c.compress_ratios if r}, c.index_topk, sparse, weight
        )
        self.model.ops, self.model.numerics = table(step), numerics
        loads: dict[int, Tensor] = {}

        def observe(name: str, value: Tensor) -> None:
            if name.startswith("route_ids_"):
                loads[int(name.rsplit("_", 1)[1])] = torch.bincount(
                    value.flatten(), minlength=c.n_routed_experts
                )

        streams = self.model.forward(batch, cache, observe)
        return self.model.logits(streams[packed.target_rows]), step.index_loss, step.recall, loads

    def train_step(self) -> dict[str, Any]:
        """One optimizer step; returns what the log shows."""
        began, at = time.perf_counter(), self.progress
        packed = self.mixer.step(self.steps, at)
        self.rounding = at >= self.args.round_from
        # experts are pieces of one tensor, cut anew under each step's graph
        self.model = self._bind(self.rounding)
        logits, index_loss, recall, loads = self.run(
            packed, at >= self.args.sparse_from, ROUNDED if self.rounding else EXACT
        )
        each = F.cross_entropy(logits, packed.targets, reduction="none")
        lesson = torch.stack(index_loss).sum() if index_loss else torch.zeros(())
        loss = each.mean() + lesson
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.parameters(), 1.0)
        self._rates(at)
        self.muon.step()
        self.adam.step()
        self.muon.zero_grad(set_to_none=True)
        self.adam.zero_grad(set_to_none=True)
        self._balance(loads)
        self.steps += 1
        self.tokens += sum(len(e.ids) for e in packed.examples)
        self.seconds += time.perf_counter() - began
        by_task = {t: each[packed.task_of == i].mean().item() for i, t in enumerate(MIX)}
        hits = (logits.argmax(-1) == packed.targets).float()
        return {
            "loss": each.mean().item(), "hit": hits.mean().item(), "norm": float(norm), "index": lesson.item(),
            "recall": [round(r.item(), 3) for r in recall], "tasks": by_task,
        }  # fmt: skip

    def _rates(self, at: float) -> None:
        """Short warm-up, then straight down to zero."""
        share = min(1.0, (self.steps + 1) / 100) * max(0.01, min(1.0, (1 - at) / 0.7))
        for group in self.muon.param_groups:
            group["lr"] = self.args.lr * share
        for group in self.adam.param_groups:
            group["lr"] = group["peak"] * share

    def _balance(self, loads: dict[int, Tensor]) -> None:
        # no loss term: biases move until experts are chosen equally often
        for layer in self.config.layers:
            bias = self.parameters.bias(layer)
            if bias is not None:
                load = loads[layer.index].float()
                bias += 0.002 * torch.sign(load.mean() - load)
                bias -= bias.mean()

    @torch.no_grad()
    def score(self) -> dict[str, float]:
        """Held-out dialogues whose every answer token is the most likely one, given the right tokens before it."""
        scores = {}
        for task, examples in self.tests.items():
            right = 0
            for i in range(0, len(examples), 10):
                packed = pack(examples[i : i + 10], list(MIX))
                logits, *_ = self.run(packed, self.progress >= self.args.sparse_from, self.model.numerics)
                wrong = packed.example_of[logits.argmax(-1) != packed.targets]
                right += len(packed.examples) - len(wrong.unique())
            scores[task] = right / len(examples)
        return scores

    def save(self, path: Path) -> None:
        """Write a checkpoint that replaces the old one only when complete."""
        state = {
            "parameters": self.parameters.state_dict(), "muon": self.muon.state_dict(), "adam": self.adam.state_dict(),
            "steps": self.steps, "tokens": self.tokens, "seconds": self.seconds, "rng": torch.get_rng_state(),
            "config": json.loads((self.args.folder / "config.json").read_text()),
        }  # fmt: skip
        draft = path.with_suffix(".part")
        torch.save(state, draft)
        os.replace(draft, path)

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint; batches follow from the step number."""
        state = torch.load(path, weights_only=True)
        self.parameters.load_state_dict(state["parameters"])
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        for group, peak in zip(self.adam.param_groups, (self.args.adam_lr, self.args.embed_lr), strict=True):
            group["peak"] = peak
        self.steps, self.tokens, self.seconds = state["steps"], state["tokens"], state["seconds"]
        torch.set_rng_state(state["rng"])
        self.model = self._bind(self.progress >= self.args.round_from)


def main() -> None:
    """Train until the time is used up."""
    args = parse()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.run.mkdir(parents=True, exist_ok=True)
    path, log = args.run / "checkpoint.pt", (args.run / "train.log").open("a", encoding="utf-8")
    trainer = Trainer(args)

    def say(text: str) -> None:
        print(text, flush=True)
        log.write(f"{text}\n")
        log.flush()

    if path.exists():
        trainer.resume(path)
        say(
            f"resumed at step {trainer.steps}, {trainer.tokens / 1e6:.2f}M tokens, {trainer.seconds / 60:.1f} min"
        )
    count = sum(p.numel() for p in trainer.parameters.parameters())
    say(f"{count / 1e6:.2f}M parameters, {args.minutes} min, {args.batch} tokens a step")
    saved = scored = time.monotonic()
    first_tokens, first_seconds = trainer.tokens, trainer.seconds
    asked_to_stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked_to_stop.append(number))
    while trainer.progress < 1.0:
        shown = trainer.train_step()
        if trainer.steps % 20 == 0:
            rate = (trainer.tokens - first_tokens) / (trainer.seconds - first_seconds)
            first_tokens, first_seconds = trainer.tokens, trainer.seconds
            tasks = " ".join(f"{t} {v:.3f}" for t, v in shown["tasks"].items())
            say(
                f"step {trainer.steps} {trainer.progress:.1%} {trainer.tokens / 1e6:.2f}M {rate:.0f} tok/s "
                f"loss {shown['loss']:.3f} hit {shown['hit']:.3f} norm {shown['norm']:.2f} "
                f"index {shown['index']:.3f} recall {shown['recall']} | {tasks}"
            )
        if time.monotonic() - scored > args.score_every:
            say("held-out " + " ".join(f"{t} {v:.2f}" for t, v in trainer.score().items()))
            scored = time.monotonic()
        if time.monotonic() - saved > args.save_every:
            trainer.save(path)
            saved = time.monotonic()
        if asked_to_stop:
            trainer.save(path)
            say(f"stopped at step {trainer.steps}; the same command goes on")
            return
        if args.stop_after and trainer.steps >= args.stop_after:
            return
    trainer.save(path)
    say("done " + " ".join(f"{t} {v:.2f}" for t, v in trainer.score().items()))


if __name__ == "__main__":
    main()
