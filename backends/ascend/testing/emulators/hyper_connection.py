"""Hyper-connections: `npu_mhc_*` of the torch_npu 2.13.0 wheel, `mhc_*` of cann_ops_transformer, `npu_hc_*` of _C_ascend."""

from __future__ import annotations

import torch
from torch import Tensor

from .documented import HALF, Refused, emulates, garbage, refuse, want_contiguous, want_dtype, want_shape

_STREAMS = (4, 6, 8)
# the hidden sizes that the packs' kernels are documented and tested for
_C_HIDDEN = (4096, 7168)


def _gates(
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, norm_eps: float, hc_eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """h_in, h_post, raw h_res, inv_rms, h_mix, h_pre of x [.., n, D], all float32."""
    n = x.shape[-2]
    flat = x.float().flatten(-2)
    mix = flat @ phi.T
    root = torch.rsqrt(flat.square().mean(-1) + norm_eps)
    scaled = mix * root[..., None]
    pre = torch.sigmoid(alpha[0] * scaled[..., :n] + bias[:n]) + hc_eps
    post = 2 * torch.sigmoid(alpha[1] * scaled[..., n : 2 * n] + bias[n : 2 * n])
    res = (alpha[2] * scaled[..., 2 * n :] + bias[2 * n :]).reshape(*x.shape[:-1], n)
    return (pre[..., None] * x.float()).sum(-2), post, res, root, mix, pre


def _balance(x: Tensor, eps: float, rounds: int) -> Tensor:
    """Softmax over the last dim plus eps, columns; then rows and columns, rounds - 1 times."""
    m = torch.softmax(x, -1) + eps
    m = m / (m.sum(-2, keepdim=True) + eps)
    for _ in range(rounds - 1):
        m = m / (m.sum(-1, keepdim=True) + eps)
        m = m / (m.sum(-2, keepdim=True) + eps)
    return m


def _write_back(x: Tensor, h_res: Tensor, h_out: Tensor, h_post: Tensor) -> Tensor:
    """y[i] = h_post[i] * h_out + sum_j h_res[j, i] * x[j]."""
    mixed = torch.einsum("...ji,...jd->...id", h_res.float(), x.float())
    return (h_post.float()[..., None] * h_out.float()[..., None, :] + mixed).to(x.dtype)


def _check_parameters(x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor) -> None:
    n, d = x.shape[-2:]
    for name, p in (("phi", phi), ("alpha", alpha), ("bias", bias)):
        want_dtype(name, p, torch.float32)
    want_shape("phi", phi, n * n + 2 * n, n * d)
    want_shape("alpha", alpha, 3)
    want_shape("bias", bias, n * n + 2 * n)


@emulates("npu", "npu_mhc_pre", chips=("950",))
def npu_mhc_pre(
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, *, gamma: Tensor | None = None, norm_eps: float = 1e-6,
    hc_eps: float = 1e-6, out_flag: int = 0, inner_precise: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """h_in, h_post, h_res before Sinkhorn; and inv_rms, h_mix, h_pre, which are garbage without `out_flag`.

    Shapes:
        x [T, n, D] or [B, S, n, D] bfloat16 or float16, phi [n*n + 2n, n*D] f32, alpha [3], bias [n*n + 2n] f32
    """
    want_dtype("x", x, *HALF)
    refuse(x.dim() not in (3, 4), f"x has {x.dim()} dims, documented are 3 and 4")
    refuse(x.shape[-2] not in _STREAMS, f"x has {x.shape[-2]} streams, documented are {_STREAMS}")
    refuse(gamma is not None, "gamma is not emulated")
    refuse(inner_precise != 0, "inner_precise=1 multiplies in HF32, whose rounding is not documented")
    _check_parameters(x, phi, alpha, bias)
    h_in, post, res, root, mix, pre = _gates(x, phi, alpha, bias, norm_eps, hc_eps)
    if not out_flag:
        root, mix, pre = (garbage(*t.shape, dtype=t.dtype) for t in (root, mix, pre))
    return h_in.to(x.dtype), post, res, root, mix, pre


@emulates("npu", "npu_mhc_sinkhorn", chips=("950",))
def npu_mhc_sinkhorn(
    x: Tensor, *, eps: float = 1e-6, num_iters: int = 20, out_flag: int = 0
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Make matrices doubly stochastic.

    Shapes:
        x [T, n, n] or [B, S, n, n] float32 -> the same
    """
    want_dtype("x", x, torch.float32)
    refuse(x.dim() not in (3, 4) or x.shape[-1] not in _STREAMS, f"x is {list(x.shape)}")
    refuse(not 1 <= num_iters <= 100, f"num_iters is {num_iters}, documented are 1 to 100")
    refuse(out_flag != 0, "the intermediate results of out_flag are not emulated")
    return _balance(x, eps, num_iters), None, None


@emulates("npu", "npu_mhc_post", chips=("950",))
def npu_mhc_post(x: Tensor, h_res: Tensor | None, h_out: Tensor, h_post: Tensor) -> Tensor:
    """(h_res)^T x + outer(h_post, h_out); without h_res, x + outer(h_post, h_out).

    Shapes:
        x [.., n, D], h_out [.., D] bfloat16 or float16, h_res [.., n, n], h_post [.., n] float32 -> like x
    """
    if h_res is None:
        h_res = torch.eye(x.shape[-2]).expand(*x.shape[:-1], x.shape[-2])
    return _post(x, h_res, h_out, h_post)


def _post(x: Tensor, h_res: Tensor, h_out: Tensor, h_post: Tensor) -> Tensor:
    want_dtype("x", x, *HALF)
    refuse(h_out.dtype != x.dtype, f"h_out is {h_out.dtype}, x {x.dtype}")
    refuse(x.dim() not in (3, 4), f"x has {x.dim()} dims, documented are 3 and 4")
    want_dtype("h_res", h_res, torch.float32)
    want_dtype("h_post", h_post, torch.float32)
    *lead, n, d = x.shape
    want_shape("h_res", h_res, *lead, n, n)
    want_shape("h_out", h_out, *lead, d)
    want_shape("h_post", h_post, *lead, n)
    return _write_back(x, h_res, h_out, h_post)


@emulates("cann_ops_transformer", "mhc_pre_sinkhorn", chips=("910B", "910C"))
def mhc_pre_sinkhorn(
    x: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, hcMult: int, numIters: int, hcEps: float, normEps: float,  # noqa: N803
    outFlag: bool,  # noqa: N803 - the schema's words
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """h_in, h_post, h_res after Sinkhorn, flat; then five intermediate results, which are garbage here.

    Shapes:
        x [B, S, 4, C] bfloat16, C a multiple of 128 -> [B, S, C], [B, S, 4] f32, [B, S, 16] f32, ..
    """
    want_dtype("x", x, torch.bfloat16)
    refuse(x.dim() != 4 or 0 in x.shape, f"x is {list(x.shape)}, documented is [B, S, 4, C]")
    refuse(hcMult != 4 or x.shape[2] != 4, f"hcMult is {hcMult} for {x.shape[2]} streams, documented are 4")
    refuse(numIters != 20, f"numIters is {numIters}, documented is 20")
    c = x.shape[3]
    refuse(c % 128 != 0 or c > 100_000, f"C is {c}, documented are multiples of 128 to 100000")
    _check_parameters(x, phi, alpha, bias)
    h_in, post, res, root, mix, pre = _gates(x, phi, alpha, bias, normEps, hcEps)
    rest = [garbage(*t.shape, dtype=t.dtype) for t in (pre, mix, root)]
    sums = garbage(2 * numIters, *x.shape[:2], 4, dtype=torch.float32)
    norms = garbage(2 * numIters, *x.shape[:2], 4, 4, dtype=torch.float32)
    return (
        h_in.to(x.dtype),
        post,
        _balance(res, hcEps, numIters).flatten(-2),
        rest[0],
        rest[1],
        rest[2],
        sums,
        norms,
    )


@emulates("cann_ops_transformer", "mhc_post", chips=("910B", "910C"))
def mhc_post(x: Tensor, h_res: Tensor | None, h_out: Tensor, h_post: Tensor) -> Tensor:
    """As `npu_mhc_post`; h_res is required and no dim may be empty."""
    if h_res is None:
        raise Refused("mhc_post needs h_res on this chip")
    refuse(0 in x.shape, f"x is {list(x.shape)}, empty dims are not supported")
    return _post(x, h_res, h_out, h_post)


def _hc_pre(
    x: Tensor, hc_fn: Tensor, hc_scale: Tensor, hc_base: Tensor, hc_mult: int, rounds: int, norm_eps: float, hc_eps: float
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    want_dtype("x", x, torch.bfloat16)
    want_contiguous(x=x, hc_fn=hc_fn, hc_scale=hc_scale, hc_base=hc_base)
    refuse(x.dim() not in (3, 4), f"x has {x.dim()} dims, documented are 3 and 4")
    refuse(
        hc_mult != 4 or x.shape[-2] != 4, f"hc_mult is {hc_mult} for {x.shape[-2]} streams, documented are 4"
    )
    refuse(rounds != 20, f"hc_sinkhorn_iters is {rounds}, documented is 20")
    refuse(x.shape[-1] not in _C_HIDDEN, f"the hidden size is {x.shape[-1]}, documented are {_C_HIDDEN}")
    _check_parameters(x, hc_fn, hc_scale, hc_base)
    h_in, post, res, *_ = _gates(x, hc_fn, hc_scale, hc_base, norm_eps, hc_eps)
    return h_in.to(x.dtype), post, _balance(res, hc_eps, rounds)


@emulates("_C_ascend", "npu_hc_pre_v2")
def npu_hc_pre_v2(
    x: Tensor, hc_fn: Tensor, hc_scale: Tensor, hc_base: Tensor, hc_mult: int, hc_sinkhorn_iters: int,
    norm_eps: float, hc_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Collapse the streams, and give what writes back: y, post, comb.

    Shapes:
        x [T, 4, d] or [b, s, 4, d] bfloat16 contiguous, d 4096 or 7168 -> [T, d], [T, 4] f32, [T, 4, 4] f32
    """
    return _hc_pre(x, hc_fn, hc_scale, hc_base, hc_mult, hc_sinkhorn_iters, norm_eps, hc_eps)


@emulates("_C_ascend", "npu_hc_post")
def npu_hc_post(x: Tensor, residual: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """post * x plus, for every stream, the sum over the first index of comb times residual.

    Shapes:
        x [b, s, d] or [T, d], residual [.., 4, d] of its dtype, post [.., 4], comb [.., 4, 4] of one dtype -> like residual
    """
    refuse(
        x.dtype != residual.dtype or post.dtype != comb.dtype,
        "x and residual, post and comb must agree in dtype",
    )
    want_contiguous(x=x, residual=residual, post=post, comb=comb)
    *lead, n, d = residual.shape
    refuse(
        n != 4 or d not in _C_HIDDEN,
        f"residual is {list(residual.shape)}, documented are 4 streams of {_C_HIDDEN}",
    )
    want_shape("x", x, *lead, d)
    want_shape("post", post, *lead, n)
    want_shape("comb", comb, *lead, n, n)
    return _write_back(residual, comb, x, post)
