"""v4sdk itself behind the line protocol, so that it is measured as its peers are.

Options: `backend`, `numerics`, `kv_format` (None for the default of the numerics), `prefill_chunk`.
Decoding runs the step that `Session` runs, sampling included; the drawn token is then replaced by the given one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import v4sdk
from v4sdk.decode import DecodeStep, Sampler
from v4sdk.engine import Engine as Runner
from v4sdk.loading import LoadOptions, open_model
from v4sdk.progress import silent
from v4sdk.sampling import SamplingParams
from v4sdk.sequence import SequenceState
from v4sdk.session import PREFILL_CHUNK, SNAPSHOT_INTERVAL


class Engine:
    """One model and one sequence."""

    def load(self, model: str, threads: int, options: dict[str, Any]) -> dict[str, Any]:
        """Bind a folder; weights are mapped and read when they are first used."""
        torch.set_num_threads(threads)
        chosen = LoadOptions(options.get("backend"), options.get("numerics"), options.get("kv_format"))
        loaded = open_model(model, chosen, silent)
        self.backend, self.config = loaded.backend, loaded.config
        chunk = options.get("prefill_chunk") or PREFILL_CHUNK
        self.engine = Runner(loaded.model, loaded.cache, loaded.backend, chunk, SNAPSHOT_INTERVAL)
        self.state: SequenceState | None = None
        self.step: DecodeStep | None = None
        self._plain, self._logits = loaded.model.logits, torch.empty(0)
        # what a step computes on the way to its token; a replayed step writes to the same place again
        vars(loaded.model)["logits"] = self._kept
        without = [row.op for row in loaded.binding.without_kernel]
        return {
            "version": v4sdk.__version__,
            "settings": {
                "backend": loaded.backend.name, "numerics": loaded.numerics.name, "kv_format": loaded.kv_format,
                "prefill_chunk": chunk, "threads": torch.get_num_threads(), "torch": torch.__version__,
                "without_kernel": without,
            },
            "evidence": loaded.backend.evidence,
        }  # fmt: skip

    def prefill(self, ids: list[int], every: bool) -> NDArray[np.float32]:
        """Read a prompt into an empty sequence."""
        if self.state is not None:
            self.engine.free(self.state)
        self.step, self.state = None, self.engine.new_state()
        self.state.ids = list(ids)
        select = (lambda state, first, last: list(range(first, last))) if every else None
        return self._host(self.engine.advance([self.state], select=select))

    def decode(self, token: int) -> NDArray[np.float32]:
        """Read one more token."""
        state = self.state
        assert state is not None
        # what the step drew itself gives way to the token that everybody reads
        del state.ids[state.num_cached :]
        state.ids.append(token)
        if self.step is None or self.step.is_spent:
            params = [SamplingParams(temperature=0.0)]
            sampler = Sampler(params, [state], [None], self.config.vocab_size, self.engine.cache.device)
            self.step = self.engine.decode_step([state], sampler)
        else:
            with torch.inference_mode():
                self.step.batch.token_ids.fill_(token)
        self.engine.decode(self.step, [state])
        return self._host(self._logits)

    def _kept(self, *given: Any) -> torch.Tensor:
        self._logits = self._plain(*given)
        return self._logits

    def _host(self, logits: torch.Tensor) -> NDArray[np.float32]:
        self.backend.synchronize()
        rows: NDArray[np.float32] = logits.float().cpu().numpy().copy()
        return rows
