"""llama-cpp-python behind the line protocol, through its low-level `llama_decode`; reads a GGUF.

Options: `repack` (extra buffer types that rearrange weights for the processor), `flash_attn` (`auto`, `on`, `off`),
`n_ubatch` (tokens of one physical batch), `context` (tokens).
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

_FLASH = {"auto": -1, "off": 0, "on": 1}
_BATCH = 2048


class Engine:
    """One model and one context of one sequence."""

    def load(self, model: str, threads: int, options: dict[str, Any]) -> dict[str, Any]:
        """Load a GGUF on the CPU."""
        self.lib: Any = importlib.import_module("llama_cpp")
        lib = self.lib
        lib.llama_backend_init()
        how = lib.llama_model_default_params()
        how.n_gpu_layers = 0
        how.use_extra_bufts = bool(options["repack"])
        self.model = lib.llama_model_load_from_file(model.encode(), how)
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {model}")
        context = lib.llama_context_default_params()
        context.n_ctx, context.n_batch, context.n_ubatch = options["context"], _BATCH, options["n_ubatch"]
        context.n_threads = context.n_threads_batch = threads
        context.flash_attn_type = _FLASH[options["flash_attn"]]
        self.context = lib.llama_init_from_model(self.model, context)
        if not self.context:
            raise RuntimeError(f"llama.cpp makes no context with {options}")
        self.vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.position = 0
        return {
            "version": lib.__version__,
            "settings": {
                **options, "n_batch": _BATCH, "n_threads": threads, "n_gpu_layers": 0, "type_k": "f16", "type_v": "f16",
                "system": lib.llama_print_system_info().decode().strip(),
            },
        }  # fmt: skip

    def prefill(self, ids: list[int], every: bool) -> NDArray[np.float32]:
        """Read a prompt into an empty context."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        self.position = 0
        found = []
        for at in range(0, len(ids), _BATCH):
            part = ids[at : at + _BATCH]
            wanted = range(len(part)) if every else [len(part) - 1] if at + _BATCH >= len(ids) else []
            found += self._read(part, list(wanted))
        return np.stack(found)

    def decode(self, token: int) -> NDArray[np.float32]:
        """Read one more token."""
        return np.stack(self._read([token], [0]))

    def _read(self, ids: list[int], wanted: list[int]) -> list[NDArray[np.float32]]:
        lib = self.lib
        batch = lib.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            chosen = set(wanted)
            for i, token in enumerate(ids):
                batch.token[i], batch.pos[i] = token, self.position + i
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                batch.logits[i] = i in chosen
            status = lib.llama_decode(self.context, batch)
            if status != 0:
                raise RuntimeError(f"llama_decode returned {status} for {len(ids)} tokens")
            self.position += len(ids)
            return [
                np.ctypeslib.as_array(lib.llama_get_logits_ith(self.context, i), (self.vocab,)).copy() for i in wanted
            ]  # fmt: skip
        finally:
            lib.llama_batch_free(batch)
