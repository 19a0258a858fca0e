"""All pairs at once, by PyTorch's own scaled_dot_product_attention: its flash kernels where no mask is needed."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from attngraph.kernels.contract import DenseLayout, Dropout, Modifiers
from attngraph.kernels.dropout import keep_factor, kept
from attngraph.kernels.memory import apart

# Nodes up to which half precision runs as float32 on a CPU: forward + backward took half the time there.
MAX_UPCAST_NODES = 256


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    causal: bool,
    bias: Tensor | None,
    scale: float,
    dropout: Dropout | None,
) -> Tensor:
    """q (B, H, N, D), k and v (B, Hkv, M, ·), mask (…, N, M), bias (…, N, M) → out (B, H, N, ·).

    `causal` without a mask is Causal(); neither is Full(). With dropout, all weights are held: PyTorch's kernels drop
    what only they know.
    """
    if dropout is not None:
        scores = _scores(q, k, mask, causal=causal, bias=bias, scale=scale)
        nodes = [torch.arange(size, device=q.device) for size in scores.shape]
        places = [x.view(-1, *[1] * (3 - axis)) for axis, x in enumerate(nodes)]
        weights = torch.ops.aten._safe_softmax(scores, -1) * kept(dropout, *places) * keep_factor(dropout.p)
        return (weights @ _repeat_kv(v, q).to(weights.dtype)).to(q.dtype)
    if bias is not None:
        bias = bias.to(torch.promote_types(bias.dtype, q.dtype))
        mask = bias if mask is None else bias.masked_fill(~mask, -torch.inf)
    options = {"causal": causal, "scale": scale}
    half = q.dtype in (torch.bfloat16, torch.float16)
    if half and q.device.type == "cpu" and max(q.shape[2], k.shape[2]) <= MAX_UPCAST_NODES:
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.float()
        with torch.autocast("cpu", enabled=False):  # which would cast them back
            return _attention(q.float(), k.float(), v.float(), mask, **options).to(q.dtype)
    if mask is not None and mask.dtype not in (torch.bool, q.dtype):
        if q.device.type != "cpu":
            mask = _rounded(mask, q.dtype)
        elif mask.dtype != torch.float32:
            mask = mask.to(q.dtype)
    return _attention(q, k, v, mask, **options)


def _rounded(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """A bias (…, N, M) in the precision of q, which is all that PyTorch's kernels for a GPU take.

    The largest of each row becomes 0, which changes no weight: so those are rounded most that weigh least.
    """
    if not bias.shape[-1]:
        return bias.to(dtype)
    largest = bias.detach().amax(-1, keepdim=True)
    return (bias - largest.masked_fill(largest == -torch.inf, 0)).to(dtype)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, causal: bool, scale: float) -> Tensor:
    """PyTorch's own attention, which can be transformed and differentiated again and again: its flash kernels can't."""
    compiled, grouped = torch.compiler.is_compiling(), {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    if not compiled and torch._C._are_functorch_transforms_active():
        with sdpa_kernel(SDPBackend.MATH):
            return scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=scale, **grouped)
    out = scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=scale, **grouped)
    if out.requires_grad and not compiled:
        node = out.grad_fn
        if node is not None and hasattr(type(node), "_saved_logsumexp"):
            node.register_hook(_gradients_by_products)
    return out


def _gradients_by_products(grad_inputs: tuple, grad_outputs: tuple) -> tuple | None:
    """In place of a flash kernel's gradients those of matrix products, which have gradients, with create_graph=True."""
    if not torch.is_grad_enabled():
        return None
    node: Any = torch._C._current_autograd_node()
    q, k, v = sides = apart(node._saved_query, node._saved_key, node._saved_value)
    mask = getattr(node, "_saved_attn_mask", None)  # on a CPU
    mask = getattr(node, "_saved_attn_bias", None) if mask is None else mask  # on a GPU
    with sdpa_kernel(SDPBackend.MATH), torch.autocast(q.device.type, enabled=False):
        options = {"scale": node._saved_scale, "enable_gqa": q.shape[1] != k.shape[1]}
        out = scaled_dot_product_attention(q, k, v, mask, 0.0, node._saved_is_causal, **options)
    needed = [side for side, gradient in zip(sides, grad_inputs, strict=False) if gradient is not None]
    found = iter(torch.autograd.grad(out, needed, grad_outputs[0], create_graph=True))
    return *(None if gradient is None else next(found) for gradient in grad_inputs[:3]), *grad_inputs[3:]


def logsumexp(q: Tensor, k: Tensor, mask: Tensor | None, *, causal: bool, bias: Tensor | None, scale: float) -> Tensor:
    """The lse (B, H, N) that belongs to `dense`, differentiable; -inf where a query has no edge."""
    if mask is None and bias is None and q.device.type == "cpu" and q.shape[2] and k.shape[2]:
        return _FlashLogsumexp.apply(q.contiguous(), _repeat_kv(k, q).contiguous(), causal, scale)
    return _logsumexp_of_scores(q, k, mask, causal=causal, bias=bias, scale=scale)


def _logsumexp_of_scores(
    q: Tensor, k: Tensor, mask: Tensor | None, *, causal: bool, bias: Tensor | None, scale: float
) -> Tensor:
    """The same from a matrix of all scores."""
    scores = _scores(q, k, mask, causal=causal, bias=bias, scale=scale)
    has_edge = (scores != -torch.inf).any(-1, keepdim=True)  # rows of -inf alone would have NaN gradients
    return torch.where(has_edge, scores, 0).logsumexp(-1).masked_fill(~has_edge[..., 0], -torch.inf)


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, *, causal: bool, bias: Tensor | None, scale: float) -> Tensor:
    """All of them, (B, H, N, M), of at least float32; -inf where there is no edge."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    with nullcontext() if q.is_meta else torch.autocast(q.device.type, enabled=False):
        scores = q.to(dtype) @ _repeat_kv(k, q).to(dtype).mT * scale
    if bias is not None:
        scores = scores + bias
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    return scores if mask is None else scores.masked_fill(~mask, -torch.inf)


class _FlashLogsumexp(torch.autograd.Function):
    """The same from the flash kernel, without any matrix of scores.

    Its value comes with the kernel's result. Its gradient, d lse_i = Σ_j p_ij d s_ij, is what the same kernel's
    backward makes of it: dq_i = scale · Σ_j p_ij k_j dlse_i, and dk_j = scale · Σ_i p_ij q_i dlse_i, as for values.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, k, 0.0, causal, scale=scale)
        ctx.save_for_backward(q, k, out, lse)
        ctx.causal, ctx.scale = causal, scale
        return lse.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        q, k, out, lse = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            q, k = apart(q, k)
            lse = _logsumexp_of_scores(q, k, None, causal=ctx.causal, bias=None, scale=ctx.scale)
            sides = [side for side, needed in zip((q, k), ctx.needs_input_grad, strict=False) if needed]
            found = iter(torch.autograd.grad(lse, sides, grad_outputs, create_graph=True))
            dq, dk = (next(found) if needed else None for needed in ctx.needs_input_grad[:2])
            return dq, dk, None, None
        dlse = grad_outputs[0][..., None].to(q.dtype)
        dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            (dlse * q).contiguous(), q, k, k, out, lse, 0.0, ctx.causal, scale=ctx.scale
        )[2]
        return dlse * out * ctx.scale, dv * ctx.scale, None, None


def _repeat_kv(k: Tensor, q: Tensor) -> Tensor:
    """Each key head for all the query heads that share it."""
    return k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)


# ------------------------------------------------------------------------------------------- as part of a plan


MASKED_SCORE = -1e30  # added to the score of a pair without an edge
MAX_FLASH_DIM = 256  # dimension of a head that the flash kernel of a GPU takes


def forward(q: Tensor, k: Tensor, v: Tensor, layout: DenseLayout, modifiers: Modifiers) -> tuple[Tensor, Tensor]:
    """q (B, H, N, D), k and v (B, Hkv, M, ·) → out (B, H, N, ·), lse (B, H, N), by PyTorch's flash kernels.

    Of the modifiers it has the scale alone, here and backward.
    """
    if layout.lengths:
        out = q.new_zeros(*q.shape[:3], v.shape[3])
        lse = q.new_zeros(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        for nodes, one in layout.documents(q.device):
            q_docs, k_docs, v_docs = _documents(nodes, q), _documents(nodes, k), _documents(nodes, v)
            out_docs, lse_docs = forward(q_docs, k_docs, v_docs, one, modifiers)
            _store_documents(out, nodes, out_docs)
            _store_documents(lse, nodes, lse_docs)
        return out, lse
    mask, mask_bias = _masks(layout, q)
    k, v, value_dim = _repeat_kv(k, q), _repeat_kv(v, q), v.shape[3]
    width = _padded_width(q, v)
    sides = _pad_to(q, width), _pad_to(k, width), _pad_to(v, width)
    problem = _Problem(*sides, mask_bias, _is_causal(layout), modifiers.scale)
    out, lse = _flash_kernel(problem.q, layout).forward(problem)
    out, lse = out[..., :value_dim], lse[..., : q.shape[2]]
    if mask is not None:
        no_edge = ~mask.any(1)
        out, lse = out.masked_fill(no_edge[:, None], 0), lse.masked_fill(no_edge, -torch.inf)
    return out, lse


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    layout: DenseLayout,
    modifiers: Modifiers,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, None]:
    """What all pairs add to (dq, dk, dv, None), from the final out and lse of each query; dlse may be None.

    The kernel computes Δ as Σ dout · out. Where it is Σ dout · out - dlse, the values have one more dimension, in which
    dout is -dlse, out is 1 and v is 0.
    """
    if layout.lengths:
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for nodes, one in layout.documents(q.device):
            q_docs, k_docs, v_docs = _documents(nodes, q), _documents(nodes, k), _documents(nodes, v)
            out_docs, lse_docs, dout_docs = _documents(nodes, out), _documents(nodes, lse), _documents(nodes, dout)
            dlse_docs = None if dlse is None else _documents(nodes, dlse)
            dq_docs, dk_docs, dv_docs, _ = backward(
                q_docs, k_docs, v_docs, out_docs, lse_docs, dout_docs, dlse_docs, one, modifiers, bias_grad
            )
            _store_documents(dq, nodes, dq_docs)
            _store_documents(dk, nodes, dk_docs)
            _store_documents(dv, nodes, dv_docs)
        return dq, dk, dv, None
    mask_bias = _masks(layout, q)[1]
    group, dim, value_dim = q.shape[1] // k.shape[1], q.shape[3], v.shape[3]
    width = _padded_width(q, v, extra=dlse is not None)
    k, v = _repeat_kv(k, q), _repeat_kv(v, q)
    sides = _pad_to(q, width), _pad_to(k, width), _pad_to(v, width)
    problem = _Problem(*sides, mask_bias, _is_causal(layout), modifiers.scale)
    out, dout = _pad_to(out, width), _pad_to(dout, width)
    if dlse is not None:
        dout[..., value_dim], out[..., value_dim] = -dlse, 1
    lse = lse.masked_fill(lse == -torch.inf, torch.inf).contiguous()
    dq, dk, dv = _flash_kernel(problem.q, layout).backward(problem, out, lse, dout)
    dk, dv = dk.unflatten(1, (-1, group)).sum(2), dv.unflatten(1, (-1, group)).sum(2)
    return dq[..., :dim], dk[..., :dim], dv[..., :value_dim], None


def _documents(nodes: Tensor, x: Tensor) -> Tensor:
    """Of x (B, H, N, …), the nodes (documents, length) as (B · documents, H, length, …)."""
    return x[:, :, nodes].transpose(1, 2).flatten(0, 1).contiguous()


def _store_documents(x: Tensor, nodes: Tensor, documents: Tensor) -> None:
    """The reverse, into x."""
    x[:, :, nodes] = documents.unflatten(0, (len(x), len(nodes))).transpose(1, 2).to(x.dtype)


def _is_causal(layout: DenseLayout) -> bool:
    return layout.closed == "causal"


def _masks(layout: DenseLayout, q: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Which pairs are edges, bool (N, M), and what to add to the scores; None where all are, or as causal."""
    mask = layout.mask(q.device)
    if mask is None:
        return None, None
    masked_score = max(MASKED_SCORE, torch.finfo(q.dtype).min)
    return mask, torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, masked_score)


def _padded_width(q: Tensor, v: Tensor, *, extra: bool = False) -> int:
    """The one dimension to which q, k and v are padded; on a GPU, a multiple of 8."""
    width = max(q.shape[3], v.shape[3] + extra)
    return width + (-width % 8 if q.device.type == "cuda" else 0)


def _pad_to(x: Tensor, width: int) -> Tensor:
    """x (…, D) filled up with zeros."""
    return pad(x, (0, width - x.shape[-1])).contiguous()


# ----------------------------------------------------------------------------------------- PyTorch's kernels


class _Problem(NamedTuple):
    """q, k and v (B, H, nodes, D), mask_bias (N, M) or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask_bias: Tensor | None
    causal: bool
    scale: float

    @property
    def scores(self) -> Tensor:
        """All of them."""
        scores = self.q @ self.k.mT * self.scale
        if self.mask_bias is not None:
            scores = scores + self.mask_bias
        if self.causal:
            later = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(later, MASKED_SCORE)
        return scores

    @property
    def aligned_mask_bias(self) -> Tensor | None:
        """For all batches and heads; each row begins at a multiple of 16 bytes, as SDPA sees to."""
        if self.mask_bias is None:
            return None
        n, m = self.mask_bias.shape
        return pad(self.mask_bias, (0, -m % 8))[:, :m].expand(*self.q.shape[:2], n, m)


class _FlashKernel(Protocol):
    """One of PyTorch's kernels."""

    @staticmethod
    def forward(problem: _Problem) -> tuple[Tensor, Tensor]:
        """out, lse."""
        ...

    @staticmethod
    def backward(problem: _Problem, out: Tensor, lse: Tensor, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv."""
        ...


def _flash_kernel(q: Tensor, layout: DenseLayout) -> type[_FlashKernel]:
    """The fastest that can: on a GPU, the flash kernel knows no mask, and aligns Causal() at the other end."""
    if q.device.type == "cpu":
        return _CPU
    if q.device.type != "cuda" or q.dtype == torch.float64:
        return _Plain
    aligned = layout.closed == "full" or (layout.closed == "causal" and layout.n == layout.m)
    if aligned and q.dtype in (torch.float16, torch.bfloat16) and q.shape[3] <= MAX_FLASH_DIM:
        return _GPU
    return _Efficient


class _CPU(_FlashKernel):
    """Flash attention on a CPU."""

    @staticmethod
    def forward(problem: _Problem) -> tuple[Tensor, Tensor]:
        q, k, v, mask_bias, causal, scale = problem
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return flash(q, k, v, 0.0, causal, attn_mask=mask_bias, scale=scale)

    @staticmethod
    def backward(problem: _Problem, out: Tensor, lse: Tensor, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, mask_bias, causal, scale = problem
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return flash(dout, q, k, v, out, lse, 0.0, causal, attn_mask=mask_bias, scale=scale)


class _GPU(_FlashKernel):
    """Flash attention on a GPU, in half precision."""

    @staticmethod
    def forward(problem: _Problem) -> tuple[Tensor, Tensor]:
        q, k, v, _, causal, scale = problem
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        out, lse, *_ = flash(q, k, v, 0.0, causal, False, scale=scale)
        return out, lse

    @staticmethod
    def backward(problem: _Problem, out: Tensor, lse: Tensor, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, _, causal, scale = problem
        rng_state = torch.zeros((), dtype=torch.int64)  # for dropout: there is none
        lengths = q.shape[2], k.shape[2]
        flash = torch.ops.aten._scaled_dot_product_flash_attention_backward
        return flash(
            dout, q, k, v, out, lse, None, None, *lengths, 0.0, causal, rng_state, rng_state, scale=scale
        )  # fmt: skip


class _Efficient(_FlashKernel):
    """Memory-efficient attention on a GPU (xFormers), which takes masks and float32."""

    @staticmethod
    def forward(problem: _Problem) -> tuple[Tensor, Tensor]:
        q, k, v, _, causal, scale = problem
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        out, lse, *_ = efficient(q, k, v, problem.aligned_mask_bias, True, 0.0, causal, scale=scale)
        return out, lse

    @staticmethod
    def backward(problem: _Problem, out: Tensor, lse: Tensor, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, _, causal, scale = problem
        rng_state = torch.zeros((), dtype=torch.int64)  # for dropout: there is none
        # As its own forward pass gives them: it reads out as it would lie there, whatever its strides are.
        out = out.transpose(1, 2).contiguous().transpose(1, 2)
        lse = pad(lse, (0, -lse.shape[2] % 32), value=torch.inf)
        needs_grad = [True, True, True, False]
        dq, dk, dv, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
            dout, q, k, v, problem.aligned_mask_bias, out, lse, rng_state, rng_state, 0.0, needs_grad, causal,
            scale=scale,
        )  # fmt: skip
        return dq, dk, dv


class _Plain(_FlashKernel):
    """Matrix products, where no kernel of PyTorch's gives a lse."""

    @staticmethod
    def forward(problem: _Problem) -> tuple[Tensor, Tensor]:
        scores = problem.scores
        lse = scores.logsumexp(3)
        return (scores - lse[..., None]).exp() @ problem.v, lse

    @staticmethod
    def backward(problem: _Problem, out: Tensor, lse: Tensor, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        p = (problem.scores - lse[..., None]).exp()
        delta = (dout * out).sum(3, keepdim=True)
        ds = p * (dout @ problem.v.mT - delta) * problem.scale
        return ds @ problem.k, ds.mT @ problem.q, p.mT @ dout
