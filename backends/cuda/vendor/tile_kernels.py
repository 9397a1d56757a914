"""Writing back into the streams by TileKernels, whose kernels are for compute capability 9.0 and 10.0.

Of its hyper-connections only this part is served: its `mhc_pre` multiplies in TF32, which moves most `post` values by
more than `hc_pre` allows. Float32 streams and other numbers of streams stay with our kernel.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from ..launch import deliver, result

MODULE, DISTRIBUTION = "tile_kernels", "tile-kernels"
# with TileLang, which compiles it
INSTALL = "tile-kernels"
CHIPS = frozenset({90, 100})
STREAMS = 4
# hidden sizes that its own tests cover come in whole blocks of this many
_BLOCK = 256


class TileKernels:
    """The op `hc_post`: TileKernels for what it takes, ours for the rest.

    Raises:
        ImportError, OSError, AttributeError: where the library cannot be loaded; the caller keeps ours.
    """

    def __init__(self, ours: Callable[..., Tensor]) -> None:
        self._ours = ours
        self._post = importlib.import_module(f"{MODULE}.modeling.mhc.ops").mhc_post_fwd

    def hc_post(self, y: Tensor, x: Tensor, post: Tensor, comb: Tensor, out: Tensor | None = None) -> Tensor:
        """See `v4sdk.ops.hc_post`.

        Source:
            TileKernels, mhc/post_kernel.py and torch/mhc.py: sequences come first, `post` has a last dimension of one,
            and the sum runs over the first index of `comb`
        """
        if not takes(y, x):
            return self._ours(y, x, post, comb, out=out)
        streams = result(out, tuple(x.shape), x.dtype, x.device)
        y, x, post, comb = (tensor.contiguous()[None] for tensor in (y, x, post, comb))
        self._post(y, x, post[..., None], comb, out=streams[None])
        return deliver(out, streams)


def takes(y: Tensor, x: Tensor) -> bool:
    """Whether the library has a kernel for a call; from shapes and dtypes alone."""
    tokens, streams, hidden = x.shape
    return y.dtype == x.dtype == torch.bfloat16 and streams == STREAMS and hidden % _BLOCK == 0 and tokens > 0
