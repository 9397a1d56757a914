"""vLLM behind the line protocol, through its documented `LLM` class: no tokenizer, eager, batch 1; reads the native folder.

It gives log-probabilities over the whole vocabulary, which serve as logits: they differ from them by one number per row.
The class takes prompts and samples by itself, so tokens cannot be fed one by one: `decode` says so.

Options: `context` (tokens).
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ALL = -1


class Engine:
    """One engine; every prompt is a request of its own."""

    def load(self, model: str, threads: int, options: dict[str, Any]) -> dict[str, Any]:
        """Start the engine in this process, so that its memory and processor time are counted."""
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        self.vllm: Any = importlib.import_module("vllm")
        self.vocab = 0
        self.llm = self.vllm.LLM(
            model=model, skip_tokenizer_init=True, enforce_eager=True, max_model_len=options["context"], max_num_seqs=1,
            max_logprobs=_ALL, enable_prefix_caching=False, disable_log_stats=True,
        )  # fmt: skip
        self.vocab = self.llm.llm_engine.model_config.get_vocab_size()
        return {
            "version": self.vllm.__version__,
            "settings": {**options, "enforce_eager": True, "max_num_seqs": 1, "threads": threads},
        }

    def prefill(self, ids: list[int], every: bool) -> NDArray[np.float32]:
        """Read a prompt as a new request."""
        how = self.vllm.SamplingParams(
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            logprobs=_ALL,
            prompt_logprobs=_ALL if every else None,
        )
        found = self.llm.generate([{"prompt_token_ids": ids}], how, use_tqdm=False)[0]
        # entry i of the prompt scores token i from those before it; the first has nothing before it
        rows = list(found.prompt_logprobs[1:]) if every else []
        rows.append(found.outputs[0].logprobs[0])
        return np.stack([self._row(row) for row in rows])

    def decode(self, token: int) -> NDArray[np.float32]:
        """Refuse, until its `LLM` takes a given token at a time: without the same input there is nothing to compare."""
        raise RuntimeError(
            "its LLM class samples by itself and cannot be fed one given token after the other"
        )

    def _row(self, scored: Any) -> NDArray[np.float32]:
        row = np.full((1, self.vocab), -np.inf, np.float32)
        for token, entry in scored.items():
            row[0, token] = entry.logprob
        values: NDArray[np.float32] = row[0]
        return values
