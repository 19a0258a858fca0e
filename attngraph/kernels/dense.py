"""All pairs at once, by PyTorch's own scaled_dot_product_attention: its flash kernels where no mask is needed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

SHORT = 256  # nodes up to which half precision runs as float32 on a CPU: forward + backward took half the time there


def dense(q, k, v, mask: Tensor | None, *, causal: bool, bias: Tensor | None, scale: float, dropout_p: float) -> Tensor:
    """q (B, H, N, D), k and v (B, Hkv, M, ·), mask (N, M) or (H, N, M), bias (…, N, M) → out (B, H, N, ·).

    `causal` without a mask is Causal(); neither is Full().
    """
    if bias is not None:
        bias = bias.to(torch.promote_types(bias.dtype, q.dtype))
        mask = bias if mask is None else bias.masked_fill(~mask, -torch.inf)
    options = {"scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
    if q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16) and max(q.shape[2], k.shape[2]) <= SHORT:
        sides = q.float(), k.float(), v.float(), mask if mask is None or mask.dtype == torch.bool else mask.float()
        with torch.autocast("cpu", enabled=False):  # which would cast them back
            return scaled_dot_product_attention(*sides, dropout_p, causal, **options).to(q.dtype)
    if bias is not None and mask.dtype not in (q.dtype, torch.float32):
        mask = mask.to(q.dtype)
    return scaled_dot_product_attention(q, k, v, mask, dropout_p, causal, **options)


def logsumexp(q, k, mask: Tensor | None, *, causal: bool, bias: Tensor | None, scale: float) -> Tensor:
    """The lse (B, H, N) that belongs to `dense`, differentiable; -inf where a query hears nobody."""
    if mask is None and bias is None and q.device.type == "cpu" and q.shape[2] and k.shape[2]:
        return _FlashLogsumexp.apply(q.contiguous(), _repeated(k, q).contiguous(), causal, scale)
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        scores = q.to(dtype) @ _repeated(k, q).to(dtype).mT * scale
    if bias is not None:
        scores = scores + bias
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    heard = (scores != -torch.inf).any(-1, keepdim=True)  # rows of -inf alone would have NaN gradients
    return torch.where(heard, scores, 0).logsumexp(-1).masked_fill(~heard[..., 0], -torch.inf)


class _FlashLogsumexp(torch.autograd.Function):
    """The same from the flash kernel, without any matrix of scores.

    Its value comes with the kernel's result. Its gradient, d lse_i = Σ_j p_ij d s_ij, is what the same kernel's
    backward makes of it: dq_i = scale · Σ_j p_ij k_j dlse_i, and dk_j = scale · Σ_i p_ij q_i dlse_i, as for values.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, k, 0.0, causal, scale=scale)
        ctx.save_for_backward(q, k, out, lse)
        ctx.causal, ctx.scale = causal, scale
        return lse.clone()

    @staticmethod
    def backward(ctx, dlse: Tensor):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "the lse of backend='dense' can be differentiated once; with backend='edges' again and again"
            )
        q, k, out, lse = ctx.saved_tensors
        dlse = dlse[..., None].to(q.dtype)
        dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            (dlse * q).contiguous(), q, k, k, out, lse, 0.0, ctx.causal, scale=ctx.scale
        )[2]
        return dlse * out * ctx.scale, dv * ctx.scale, None, None


def _repeated(k: Tensor, q: Tensor) -> Tensor:
    """Each key head for all the query heads that share it."""
    return k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)


# ------------------------------------------------------------------------------------------- as part of a plan


HIDDEN = -1e30  # added to the score of a pair that is no edge
WIDEST_FLASH = 256  # dimension of a head that the flash kernel of a GPU takes


def forward(q, k, v, layout, bias: None, scale: float) -> tuple[Tensor, Tensor]:
    """q (B, H, N, D), k and v (B, Hkv, M, ·) → out (B, H, N, ·), lse (B, H, N), by PyTorch's flash kernels."""
    if layout.lengths:
        out = q.new_zeros(*q.shape[:3], v.shape[3])
        lse = q.new_zeros(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        for nodes, own in layout.documents(q.device):
            for whole, part in zip((out, lse), forward(*_apart(nodes, q, k, v), own, bias, scale), strict=True):
                _put(whole, nodes, part)
        return out, lse
    mask, hidden = _masks(layout, q)
    sides = _of_one_width(q, _repeated(k, q), _repeated(v, q))
    out, lse = _flash_kernel(sides[0], layout)[0](*sides, hidden, layout.closed == "causal", scale)
    out, lse = out[..., : v.shape[3]], lse[..., : q.shape[2]]
    if mask is not None:
        nobody = ~mask.any(1)
        out, lse = out.masked_fill(nobody[:, None], 0), lse.masked_fill(nobody, -torch.inf)
    return out, lse


def backward(q, k, v, out, lse, dout, dlse, layout, bias: None, scale: float, bias_grad: bool):
    """What all pairs add to (dq, dk, dv, None), from the final out and lse of each query; dlse may be None.

    The kernel computes Δ as Σ dout · out. Where it is Σ dout · out - dlse, the values have one more dimension, in which
    dout is -dlse, out is 1 and v is 0.
    """
    if layout.lengths:
        found = [torch.zeros_like(side) for side in (q, k, v)]
        for nodes, own in layout.documents(q.device):
            sides = _apart(nodes, q, k, v, out, lse, dout, dlse)
            for whole, part in zip(found, backward(*sides, own, bias, scale, bias_grad)[:3], strict=True):
                _put(whole, nodes, part)
        return *found, None
    hidden = _masks(layout, q)[1]
    group, dim, value_dim = q.shape[1] // k.shape[1], q.shape[3], v.shape[3]
    width = max(dim, value_dim) + (dlse is not None)
    *sides, dout, out = _of_one_width(q, _repeated(k, q), _repeated(v, q), dout, out, width=width)
    if dlse is not None:
        dout[..., value_dim], out[..., value_dim] = -dlse, 1
    lse = lse.masked_fill(lse == -torch.inf, torch.inf).contiguous()
    dq, dk, dv = _flash_kernel(sides[0], layout)[1](dout, *sides, out, lse, hidden, layout.closed == "causal", scale)
    dk, dv = (side.unflatten(1, (-1, group)).sum(2) for side in (dk, dv))
    return dq[..., :dim], dk[..., :dim], dv[..., :value_dim], None


def _apart(nodes: Tensor, *sides: Tensor | None) -> list[Tensor | None]:
    """Of (B, H, N, …), the nodes (documents, length) as (B · documents, H, length, …)."""
    return [side if side is None else side[:, :, nodes].transpose(1, 2).flatten(0, 1).contiguous() for side in sides]


def _put(whole: Tensor, nodes: Tensor, part: Tensor) -> None:
    """The reverse, into `whole`."""
    whole[:, :, nodes] = part.unflatten(0, (len(whole), len(nodes))).transpose(1, 2).to(whole.dtype)


def _masks(layout, q: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Who is heard, bool (N, M), and what to add to the scores."""
    mask = layout.mask(q.device)
    low = max(HIDDEN, torch.finfo(q.dtype).min)
    return mask, None if mask is None else torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, low)


def _of_one_width(*sides: Tensor, width: int = 0) -> list[Tensor]:
    """Vectors filled up with zeros to the largest of their dimensions, or to this one; on a GPU, to a multiple of 8."""
    width = max(width, *(side.shape[-1] for side in sides))
    width += -width % 8 if sides[0].device.type == "cuda" else 0
    return [pad(side, (0, width - side.shape[-1])).contiguous() for side in sides]


# Each of PyTorch's kernels as (forward, backward): forward(q, k, v, hidden, causal, scale) → out, lse;
# backward(dout, q, k, v, out, lse, hidden, causal, scale) → dq, dk, dv.


def _flash_kernel(q: Tensor, layout) -> tuple[Callable, Callable]:
    """The fastest that can: on a GPU, the flash kernel knows no mask, and aligns Causal() at the other end."""
    if q.device.type == "cpu":
        return _cpu_forward, _cpu_backward
    if q.device.type != "cuda" or q.dtype == torch.float64:
        return _plain_forward, _plain_backward
    aligned = layout.closed == "full" or (layout.closed == "causal" and layout.n == layout.m)
    if aligned and q.dtype in (torch.float16, torch.bfloat16) and q.shape[3] <= WIDEST_FLASH:
        return _gpu_forward, _gpu_backward
    return _efficient_forward, _efficient_backward


def _cpu_forward(q, k, v, hidden, causal, scale):
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(q, k, v, 0.0, causal, attn_mask=hidden, scale=scale)


def _cpu_backward(dout, q, k, v, out, lse, hidden, causal, scale):
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return flash(dout, q, k, v, out, lse, 0.0, causal, attn_mask=hidden, scale=scale)


def _gpu_forward(q, k, v, hidden, causal, scale):
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]


def _gpu_backward(dout, q, k, v, out, lse, hidden, causal, scale):
    none = torch.zeros((), dtype=torch.int64)  # the state of chance, for dropout
    flash = torch.ops.aten._scaled_dot_product_flash_attention_backward
    return flash(
        dout, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, none, none, scale=scale
    )  # fmt: skip


def _aligned(hidden: Tensor | None, q: Tensor) -> Tensor | None:
    """For all batches and heads; each row begins at a multiple of 16 bytes, as SDPA sees to."""
    if hidden is None:
        return None
    keys = hidden.shape[1]
    return pad(hidden, (0, -keys % 8))[:, :keys].expand(*q.shape[:2], *hidden.shape)


def _efficient_forward(q, k, v, hidden, causal, scale):
    hidden = _aligned(hidden, q)
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, hidden, True, 0.0, causal, scale=scale
    )[:2]  # fmt: skip


def _efficient_backward(dout, q, k, v, out, lse, hidden, causal, scale):
    hidden = _aligned(hidden, q)
    none = torch.zeros((), dtype=torch.int64)
    lse = pad(lse, (0, -lse.shape[2] % 32), value=torch.inf)  # as its own forward pass gives it
    return torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        dout, q, k, v, hidden, out, lse, none, none, 0.0, [True, True, True, False], causal, scale=scale
    )[:3]


def _plain_forward(q, k, v, hidden, causal, scale):
    scores = _scores(q, k, hidden, causal, scale)
    lse = scores.logsumexp(3)
    return (scores - lse[..., None]).exp() @ v, lse


def _plain_backward(dout, q, k, v, out, lse, hidden, causal, scale):
    p = (_scores(q, k, hidden, causal, scale) - lse[..., None]).exp()
    ds = p * (dout @ v.mT - (dout * out).sum(3, keepdim=True)) * scale
    return ds @ k, ds.mT @ q, p.mT @ dout


def _scores(q, k, hidden, causal, scale):
    """All scores, where no kernel of PyTorch's gives a lse."""
    scores = q @ k.mT * scale
    if hidden is not None:
        scores = scores + hidden
    if causal:
        later = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, HIDDEN)
    return scores
