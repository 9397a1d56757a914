"""Compressors of the packs: `compressor` of cann_ops_transformer (pooling alone) and of _C_ascend (with norm and rotation).

Per token K = wkv x and z = wgate x + ape[position mod ratio], kept in a paged state as [K, z]. An entry of block j pools its
`ratio` tokens by a softmax over z per channel; with coff 2 the first halves of the block before join the second halves.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .documented import (
    HALF,
    Refused,
    emulates,
    family,
    garbage,
    refuse,
    want_contiguous,
    want_dtype,
    want_shape,
)
from .norm_rope import rotate_pairs

_SHAPES = ((512, 2, 4), (128, 2, 4), (512, 1, 128))


def _checks(
    x: Tensor, wkv: Tensor, wgate: Tensor, state: Tensor, ape: Tensor, ratio: int, coff: int, cache_mode: int
) -> int:
    want_dtype("x", x, *HALF)
    refuse({wkv.dtype, wgate.dtype} != {x.dtype}, f"wkv is {wkv.dtype}, wgate {wgate.dtype}, x {x.dtype}")
    want_contiguous(x=x, wkv=wkv, wgate=wgate, state_cache=state, ape=ape)
    want_dtype("state_cache", state, torch.float32)
    want_dtype("ape", ape, torch.float32)
    refuse(x.dim() != 2, "packed tokens [T, H] are what is emulated")
    refuse(coff not in (1, 2), f"coff is {coff}, documented are 1 and 2")
    refuse(cache_mode != 1, "cache_mode 2 (a ring) is not emulated")
    hidden = x.shape[1]
    refuse(
        hidden % 512 != 0 or not 1024 <= hidden <= 10240,
        f"H is {hidden}, documented are multiples of 512 from 1024 to 10240",
    )
    d = wkv.shape[0] // coff
    refuse(d not in (128, 512), f"D is {d}, documented are 128 and 512")
    want_shape("wkv", wkv, coff * d, hidden)
    want_shape("wgate", wgate, coff * d, hidden)
    want_shape("ape", ape, ratio, coff * d)
    want_shape("state_cache", state, None, None, 2 * coff * d)
    refuse(not 1 <= state.shape[1] <= 1024 or state.shape[0] < 1, f"state_cache is {list(state.shape)}")
    return d


class _State:
    """The paged state of one sequence: the row of each position, page 0 belonging to nobody.

    No document says in which order one call reads and writes, so two positions of a call may not share a row.
    """

    def __init__(self, cache: Tensor, table: Tensor) -> None:
        self._rows = cache.flatten(0, 1)
        self._block = cache.shape[1]
        self._pages = len(cache)
        self._table = table.long()
        self._owner: dict[int, int] = {}

    def row(self, position: int) -> int | None:
        """Where a position is kept; None if its page is 0, which is left out."""
        column = position // self._block
        refuse(column >= len(self._table), f"the state's block table has no column for position {position}")
        page = int(self._table[column])
        refuse(not 0 <= page < self._pages, f"page {page} of the state is out of range")
        if page == 0:
            return None
        at = page * self._block + position % self._block
        owner = self._owner.setdefault(at, position)
        refuse(owner != position, f"positions {owner} and {position} of one call share a row of the state")
        return at

    def read(self, position: int) -> Tensor:
        """[K, z] of an earlier position."""
        at = self.row(position)
        if at is None:
            raise Refused(f"position {position} of the state is needed, and its page is 0")
        return self._rows[at]

    def write(self, position: int, value: Tensor) -> None:
        """Keep a position, unless its page is 0."""
        at = self.row(position)
        if at is not None:
            self._rows[at] = value


def _pool(
    x: Tensor, wkv: Tensor, wgate: Tensor, state: Tensor, ape: Tensor, ratio: int, coff: int, table: Tensor | None,
    bounds: Tensor | None, used: Tensor | None, start: Tensor | None, d: int,
) -> list[Tensor]:  # fmt: skip
    """Entries of every sequence in order, [D] float32 each; the state is read and brought up to date."""
    if table is None or bounds is None:
        raise Refused("packed tokens need state_block_table and cu_seqlens")
    for name, t in (
        ("state_block_table", table),
        ("cu_seqlens", bounds),
        ("seqused", used),
        ("start_pos", start),
    ):
        if t is not None:
            want_dtype(name, t, torch.int32)
    ends = bounds.tolist()
    refuse(
        ends[0] != 0 or ends[-1] != len(x) or len(ends) != len(table) + 1,
        f"cu_seqlens is {ends} for {len(x)} tokens",
    )
    starts = [0] * len(table) if start is None else start.tolist()
    kv, gate = x.float() @ wkv.float().T, x.float() @ wgate.float().T
    entries = []
    for b, (lo, hi) in enumerate(pairwise(ends)):
        count = hi - lo if used is None else int(used[b])
        refuse(not 0 <= count <= hi - lo, f"seqused is {count} for {hi - lo} tokens")
        first = starts[b]
        positions = torch.arange(first, first + count)
        fresh = torch.cat((kv[lo : lo + count], gate[lo : lo + count] + ape[positions % ratio]), -1)
        kept = _State(state, table[b])
        for block in range(first // ratio, (first + count) // ratio):
            entries.append(_entry(fresh, kept, first, block, ratio, coff, d))
        for i in range(count):
            kept.write(first + i, fresh[i])
    return entries


def _entry(fresh: Tensor, kept: _State, first: int, block: int, ratio: int, coff: int, d: int) -> Tensor:
    def rows(number: int) -> Tensor:
        at = range(number * ratio, (number + 1) * ratio)
        return torch.stack([fresh[p - first] if p >= first else kept.read(p) for p in at])

    width = coff * d
    here = rows(block)
    values, gate = here[:, width - d : width], here[:, 2 * width - d :]
    if coff == 2 and block > 0:
        before = rows(block - 1)
        values = torch.cat((before[:, :d], values))
        gate = torch.cat((before[:, width : width + d], gate))
    return (torch.softmax(gate, 0) * values).sum(0)


def _output(entries: list[Tensor], x: Tensor, sequences: int, ratio: int, d: int) -> Tensor:
    out = garbage(min(len(x), len(x) // ratio + sequences), d, dtype=x.dtype)
    if entries:
        out[: len(entries)] = torch.stack(entries).to(x.dtype)
    return out


@emulates("cann_ops_transformer", "_compressor_forward", chips=("910C", "950"))
def t_compressor(
    x: Tensor, wkv: Tensor, wgate: Tensor, state_cache: Tensor, ape: Tensor, state_block_table: Tensor | None = None,
    cu_seqlens: Tensor | None = None, seqused: Tensor | None = None, start_pos: Tensor | None = None, cmp_ratio: int = 4,
    coff: int | None = 1, cache_mode: int | None = 1, grad_enabled: bool | None = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Pool blocks of tokens into entries, neither normalised nor rotated; the state changes in place, undeclared.

    Shapes:
        x [T, H], wkv and wgate [coff * D, H], state_cache [pages, block, 2 * coff * D] f32, ape [ratio, coff * D] f32,
        state_block_table [B, columns] int32 -> [min(T, T // ratio + B), D], garbage behind the last entry; two results for
        training, and a copy of the state
    """
    coff, cache_mode = coff or 1, cache_mode or 1
    refuse(bool(grad_enabled), "training is not emulated")
    d = _checks(x, wkv, wgate, state_cache, ape, cmp_ratio, coff, cache_mode)
    powers = (2, 4, 8, 16, 32, 64, 128)
    refuse(
        family() == "910C" and cmp_ratio not in powers, f"cmp_ratio is {cmp_ratio}, documented are {powers}"
    )
    refuse(not 2 <= cmp_ratio <= 128, f"cmp_ratio is {cmp_ratio}, documented are 2 to 128")
    entries = _pool(
        x, wkv, wgate, state_cache, ape, cmp_ratio, coff, state_block_table, cu_seqlens, seqused, start_pos, d
    )
    out = _output(entries, x, 0 if cu_seqlens is None else len(cu_seqlens) - 1, cmp_ratio, d)
    training = garbage(len(out), coff * cmp_ratio, d, dtype=torch.float32)
    return out, training, training.clone(), state_cache.clone()


@emulates("_C_ascend", "compressor", chips=("910B", "910C"))
def c_compressor(
    x: Tensor, wkv: Tensor, wgate: Tensor, state_cache: Tensor, ape: Tensor, norm_weight: Tensor, rope_sin: Tensor,
    rope_cos: Tensor, state_block_table: Tensor | None, cu_seqlens: Tensor | None, seqused: Tensor | None,
    start_pos: Tensor | None, rope_head_dim: int, cmp_ratio: int, coff: int, norm_eps: float, rotary_mode: int, cache_mode: int,
) -> Tensor:  # fmt: skip
    """Pool, normalise and rotate; the last `rope_head_dim` channels turn by the row of the tables that has the entry's number.

    Shapes:
        as `t_compressor`; norm_weight [D] of the dtype of x, rope_sin and rope_cos [min(T, T // ratio + B), 64]
    """
    d = _checks(x, wkv, wgate, state_cache, ape, cmp_ratio, coff, cache_mode)
    refuse(
        (d, coff, cmp_ratio) not in _SHAPES,
        f"D {d}, coff {coff}, ratio {cmp_ratio}, documented are {_SHAPES}",
    )
    refuse(norm_weight.dtype != x.dtype, f"norm_weight is {norm_weight.dtype}, x {x.dtype}")
    want_shape("norm_weight", norm_weight, d)
    refuse(
        rotary_mode != 2 or rope_head_dim != 64,
        f"rotary_mode {rotary_mode} of {rope_head_dim}, documented is 2 of 64",
    )
    entries = _pool(
        x, wkv, wgate, state_cache, ape, cmp_ratio, coff, state_block_table, cu_seqlens, seqused, start_pos, d
    )
    sequences = 0 if cu_seqlens is None else len(cu_seqlens) - 1
    rows = min(len(x), len(x) // cmp_ratio + sequences)
    for name, table in (("rope_sin", rope_sin), ("rope_cos", rope_cos)):
        want_dtype(name, table, x.dtype, torch.float32)
        want_shape(name, table, rows, rope_head_dim)
    done = []
    for number, entry in enumerate(entries):
        normed = entry * torch.rsqrt(entry.square().mean() + norm_eps) * norm_weight.float()
        part = normed[d - rope_head_dim :]
        turned = part * rope_cos[number].float() + rotate_pairs(part) * rope_sin[number].float()
        done.append(torch.cat((normed[: d - rope_head_dim], turned)))
    return _output(done, x, sequences, cmp_ratio, d)
