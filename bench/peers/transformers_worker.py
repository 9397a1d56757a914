"""transformers behind the line protocol: `use_cache`, batch 1, no padding, one token per call when decoding.

Options: `dtype` (`bfloat16` or `float32`), `experts` (how routed experts are computed: `eager`, `grouped_mm`, `batched_mm`).
Its V4 has one implementation of attention, `eager`.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Engine:
    """One model and the cache of one sequence."""

    def load(self, model: str, threads: int, options: dict[str, Any]) -> dict[str, Any]:
        """Load an unquantised folder in the dtype asked for."""
        self.torch: Any = importlib.import_module("torch")
        transformers: Any = importlib.import_module("transformers")
        self.torch.set_num_threads(threads)
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.model, report = transformers.DeepseekV4ForCausalLM.from_pretrained(
            model, dtype=getattr(self.torch, options["dtype"]), attn_implementation="eager",
            experts_implementation=options["experts"], output_loading_info=True,
        )  # fmt: skip
        stray = [name for names in report.values() for name in names]
        if stray:
            raise RuntimeError(f"transformers does not bind {len(stray)} keys, the first is {stray[0]}")
        self.model.eval()
        self.cache: Any = None
        return {
            "version": transformers.__version__,
            "settings": {
                **options, "attn_implementation": self.model.config._attn_implementation, "use_cache": True,
                "threads": self.torch.get_num_threads(), "torch": self.torch.__version__,
            },
        }  # fmt: skip

    def prefill(self, ids: list[int], every: bool) -> NDArray[np.float32]:
        """Read a prompt into an empty cache."""
        self.cache = None
        return self._read(ids, 0 if every else 1)

    def decode(self, token: int) -> NDArray[np.float32]:
        """Read one more token."""
        return self._read([token], 1)

    def _read(self, ids: list[int], keep: int) -> NDArray[np.float32]:
        with self.torch.inference_mode():
            out = self.model(
                self.torch.tensor([ids]), past_key_values=self.cache, use_cache=True, logits_to_keep=keep
            )
            self.cache = out.past_key_values
            logits: NDArray[np.float32] = out.logits[0].float().numpy()
            return logits
