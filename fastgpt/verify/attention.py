"""Attention's table of cases, and each of them computed three times.

Every result is ``(what, got, plain, exact)``: of the backend, of plain PyTorch in the same dtype, and of the
same in float64. Tensors are made on torch's default device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastgpt
from fastgpt import dispatch
from fastgpt.ops import checks
from fastgpt.ops.attention import reference
from fastgpt.ops.attention.spec import AttentionCall
from fastgpt.verify.rule import Result, as_called


def mask_name(causal: bool, window: tuple[int, int]) -> str:
    name = "causal" if causal else "full"
    return f"{name}-w{window[0]}_{window[1]}" if max(window) >= 0 else name


# out and lse of tensors; the optional tensors of a call.
Attention = Callable[..., tuple[Tensor, Tensor]]
Optionals = tuple[Tensor | None, ...]


class AttentionCase(NamedTuple):
    batch: int
    sq: int
    sk: int
    nheads: int
    nheads_k: int
    headdim: int
    headdim_v: int
    causal: bool = True
    window: tuple[int, int] = (-1, -1)
    layout: str = "bshd"  # or "bhsd" (transposed), "packed" (slices of one qkv tensor, padded rows)

    def __str__(self) -> str:
        mask = mask_name(self.causal, self.window)
        heads, dims = f"h{self.nheads}-{self.nheads_k}", f"d{self.headdim}-{self.headdim_v}"
        return f"b{self.batch}-{self.sq}x{self.sk}-{heads}-{dims}-{mask}-{self.layout}"

    def laid_out(self, values: Tensor) -> Tensor:
        """The values of a (batch, seqlen, heads, dim) tensor in the case's layout."""
        if self.layout == "bhsd":
            return values.transpose(1, 2).contiguous().transpose(1, 2)
        if self.layout == "packed":
            # Rows of another tensor between, before and behind: reading or writing there is seen.
            batch, seqlen, heads, dim = values.shape
            full = torch.full((batch, seqlen, 3, heads + 1, dim + 5), torch.nan, dtype=values.dtype)
            full[:, :, 1, :heads, :dim] = values
            return full[:, :, 1, :heads, :dim]
        return values

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        shapes = (
            (self.sq, self.nheads, self.headdim),
            (self.sk, self.nheads_k, self.headdim),
            (self.sk, self.nheads_k, self.headdim_v),
        )
        q, k, v = (self.laid_out(torch.randn(self.batch, *shape).to(dtype)) for shape in shapes)
        return q, k, v


ATTENTION = [
    AttentionCase(1, 1, 1, 1, 1, 1, 1),
    AttentionCase(2, 5, 7, 4, 2, 3, 5),
    AttentionCase(1, 17, 17, 1, 1, 33, 17, layout="bhsd"),
    AttentionCase(2, 64, 64, 2, 2, 64, 64),
    AttentionCase(1, 97, 193, 2, 2, 64, 64, layout="packed"),
    AttentionCase(1, 200, 200, 3, 1, 80, 80),  # MQA
    AttentionCase(2, 131, 131, 6, 2, 96, 96, layout="bhsd"),  # GQA
    AttentionCase(1, 129, 129, 2, 2, 128, 128),
    AttentionCase(1, 70, 70, 1, 1, 256, 256),
    AttentionCase(1, 70, 70, 1, 1, 255, 1),
    AttentionCase(1, 150, 100, 2, 2, 64, 64),  # sq > sk: the first 50 rows see no key
    AttentionCase(1, 100, 150, 2, 1, 64, 32),  # sq < sk
    AttentionCase(1, 3, 500, 8, 2, 64, 64),  # few queries: the decode path
    AttentionCase(2, 1, 300, 4, 4, 40, 40),
    AttentionCase(1, 120, 120, 2, 2, 64, 64, causal=False),
    AttentionCase(1, 90, 40, 2, 2, 32, 32, causal=False, layout="packed"),
    AttentionCase(1, 300, 300, 2, 1, 64, 64, window=(40, 0)),
    AttentionCase(1, 300, 300, 2, 2, 64, 64, window=(0, 0)),  # each query sees itself
    AttentionCase(1, 257, 311, 1, 1, 64, 64, causal=False, window=(30, 20)),
    AttentionCase(1, 311, 257, 1, 1, 48, 48, causal=False, window=(10, 3)),  # rows without a key
    AttentionCase(1, 200, 200, 1, 1, 64, 64, causal=False, window=(-1, 17)),
    AttentionCase(1, 5, 0, 2, 2, 16, 16),  # no keys at all
    AttentionCase(0, 5, 5, 2, 2, 16, 16),
    AttentionCase(2, 0, 5, 2, 2, 16, 16),
    AttentionCase(1, 700, 700, 1, 1, 64, 64),  # several blocks in both directions
    AttentionCase(1, 1000, 1000, 1, 1, 16, 16, window=(100, 0)),
]


class Variant(NamedTuple):
    """A case with more of the specification; shapes of the optional tensors, None for none."""

    case: AttentionCase
    softcap: float = 0.0
    slopes: tuple[int, ...] | None = None
    bias: tuple[int, ...] | None = None
    mask: float = 0.0  # above 0: the bias is boolean, and true in this share of its places
    lowest: float = 0.0  # above 0: the bias hides this share of keys, but the first, by the least number
    sink: bool = False
    dropout_p: float = 0.0
    lengths_q: tuple[int, ...] | None = None  # packed sequences; the case has their totals
    lengths_k: tuple[int, ...] | None = None
    seqused_k: tuple[int, ...] | None = None
    leftpad_k: tuple[int, ...] | None = None


_C = AttentionCase

VARIANTS = {
    "softcap": Variant(_C(2, 70, 130, 4, 2, 40, 24), softcap=1.5),
    "softcap, few queries": Variant(_C(2, 2, 130, 4, 2, 40, 24), softcap=1.5),
    "alibi": Variant(_C(2, 130, 170, 4, 2, 16, 16), slopes=(4,)),
    "alibi per batch": Variant(_C(2, 130, 70, 4, 2, 16, 16, causal=False), slopes=(2, 4)),
    "alibi, few queries": Variant(_C(2, 3, 170, 4, 1, 16, 16), slopes=(2, 4)),
    "sink": Variant(_C(2, 111, 111, 6, 2, 32, 32), sink=True),
    "sink of rows that see no key": Variant(_C(1, 90, 40, 2, 1, 32, 32, window=(20, 0)), sink=True),
    "sink, few queries": Variant(_C(2, 1, 600, 6, 2, 32, 48), sink=True),
    "sink, no keys": Variant(_C(1, 3, 0, 2, 2, 16, 16), sink=True),
    "bias": Variant(_C(2, 70, 133, 4, 2, 24, 24, causal=False), bias=(2, 4, 70, 133)),
    "bias of a head": Variant(_C(2, 70, 100, 4, 2, 24, 24), bias=(1, 4, 70, 100)),
    "bias of a sequence": Variant(_C(3, 40, 100, 4, 2, 24, 24), bias=(3, 1, 40, 100)),
    "bias of all": Variant(_C(2, 70, 100, 4, 2, 24, 24), bias=(1, 1, 70, 100)),
    "bias of a key": Variant(_C(2, 70, 100, 4, 2, 24, 24), bias=(2, 1, 1, 100)),
    "bias of a query": Variant(_C(2, 70, 101, 4, 2, 24, 24), bias=(2, 4, 70, 1)),
    "bias, few queries": Variant(_C(2, 2, 301, 4, 2, 24, 24), bias=(2, 1, 2, 301)),
    "mask": Variant(_C(2, 70, 133, 4, 2, 24, 24, causal=False), bias=(2, 4, 70, 133), mask=0.6),
    "mask of a key": Variant(_C(2, 70, 133, 4, 2, 24, 24), bias=(2, 1, 1, 133), mask=0.5),
    "mask of a query": Variant(_C(2, 70, 133, 4, 2, 24, 24), bias=(2, 1, 70, 1), mask=0.5),
    "mask of finite numbers": Variant(
        _C(2, 70, 133, 4, 2, 24, 24, causal=False), bias=(2, 4, 70, 133), lowest=0.9
    ),
    "sparse mask": Variant(_C(1, 300, 300, 2, 1, 16, 16, causal=False), bias=(1, 2, 300, 300), mask=0.001),
    "mask, few queries": Variant(_C(2, 2, 133, 4, 2, 24, 24), bias=(2, 4, 2, 133), mask=0.6),
    "dropout": Variant(_C(2, 130, 210, 4, 2, 40, 24), dropout_p=0.4),
    "dropout, few queries": Variant(_C(2, 3, 210, 4, 2, 40, 24, window=(77, 0)), dropout_p=0.4),
    "varlen": Variant(
        _C(1, 318, 275, 4, 2, 32, 16), lengths_q=(3, 0, 117, 1, 197), lengths_k=(5, 4, 117, 0, 149)
    ),
    "varlen, not causal": Variant(
        _C(1, 130, 330, 2, 2, 32, 32, causal=False, window=(50, 9), layout="packed"),
        lengths_q=(100, 30),
        lengths_k=(300, 30),
    ),
    "varlen, everything": Variant(
        _C(1, 221, 260, 4, 1, 32, 32, window=(60, 0)),
        softcap=3.0,
        slopes=(3, 4),
        sink=True,
        dropout_p=0.3,
        lengths_q=(20, 101, 100),
        lengths_k=(20, 101, 139),
        seqused_k=(20, 60, 101),
        leftpad_k=(0, 7, 20),
    ),
    "seqused_k": Variant(_C(3, 70, 200, 4, 2, 32, 32), seqused_k=(0, 70, 200)),
    "seqused_k, few queries": Variant(_C(3, 2, 200, 4, 2, 32, 32), seqused_k=(1, 70, 200)),
    "left padding": Variant(_C(3, 120, 120, 4, 2, 32, 32), leftpad_k=(0, 50, 120)),
    "left padding, few queries": Variant(_C(3, 1, 120, 4, 2, 32, 32), leftpad_k=(0, 50, 120), slopes=(4,)),
    "padding on both sides, bias": Variant(
        _C(2, 60, 120, 4, 2, 32, 32), leftpad_k=(3, 50), seqused_k=(110, 120), bias=(2, 4, 60, 120)
    ),
    "padding on both sides, shared bias": Variant(
        _C(2, 60, 120, 4, 2, 32, 32), leftpad_k=(3, 50), seqused_k=(110, 120), bias=(1, 1, 60, 120)
    ),
    "everything": Variant(
        _C(2, 150, 170, 4, 2, 80, 72, causal=False, window=(90, 30), layout="packed"),
        softcap=3.0,
        slopes=(2, 4),
        bias=(2, 4, 150, 170),
        sink=True,
        dropout_p=0.3,
    ),
}


# Head dims and lengths of matrix units' tiles: some blocks are whole, some end inside, some are empty.
TILED = {
    "tiled": Variant(_C(2, 257, 383, 4, 2, 128, 128)),
    "tiled, not causal": Variant(_C(1, 300, 700, 3, 1, 64, 64, causal=False, layout="bhsd")),
    "tiled, window": Variant(_C(1, 500, 500, 2, 2, 128, 128, window=(100, 0))),
    "tiled, window, d 64": Variant(_C(1, 400, 300, 2, 1, 64, 64, causal=False, window=(70, 20))),
    "tiled, window, d 256": Variant(_C(1, 129, 400, 2, 1, 256, 256, causal=False, window=(40, 150))),
    "tiled, no queries": Variant(_C(2, 0, 40, 2, 2, 64, 64)),
    "tiled, no keys": Variant(_C(2, 40, 0, 2, 2, 64, 64)),
    "tiled, varlen": Variant(
        _C(1, 530, 470, 4, 2, 128, 128), lengths_q=(1, 129, 0, 400), lengths_k=(0, 200, 20, 250)
    ),
    "tiled, varlen, not causal": Variant(
        _C(1, 300, 340, 2, 1, 64, 64, causal=False), lengths_q=(170, 130), lengths_k=(300, 40)
    ),
    "tiled, varlen, d 256": Variant(
        _C(1, 150, 150, 2, 1, 256, 256), lengths_q=(10, 140), lengths_k=(10, 140)
    ),
    "tiled, varlen, short": Variant(
        _C(1, 40, 44, 2, 2, 64, 64), lengths_q=(3, 0, 5, 0, 0, 30, 2), lengths_k=(3, 4, 0, 5, 0, 30, 2)
    ),
    "tiled, key ranges": Variant(
        _C(3, 150, 300, 2, 1, 128, 128), seqused_k=(300, 170, 0), leftpad_k=(0, 33, 0)
    ),
    "tiled, varlen, key ranges": Variant(
        _C(1, 200, 400, 2, 2, 64, 64, window=(60, 0)),
        lengths_q=(90, 110),
        lengths_k=(250, 150),
        seqused_k=(200, 150),
        leftpad_k=(5, 140),
    ),
}

# What the small ones do not reach: many blocks in both directions, the configurations of GPUs.
MEDIUM = {
    "medium": Variant(_C(2, 1024, 1024, 8, 8, 64, 64)),
    "medium, grouped heads": Variant(_C(1, 2048, 2048, 8, 2, 128, 128)),
    "medium, d 256": Variant(_C(1, 1000, 1100, 4, 4, 256, 256)),
    "medium, not causal": Variant(_C(1, 1100, 1900, 4, 2, 128, 128, causal=False)),
    "medium, window": Variant(_C(1, 2048, 2048, 4, 4, 128, 128, window=(255, 0))),
    "medium, varlen": Variant(
        _C(1, 2200, 2200, 8, 2, 128, 128), lengths_q=(1000, 7, 1193), lengths_k=(1000, 7, 1193)
    ),
    "medium, dropout": Variant(_C(1, 1024, 1024, 4, 4, 128, 128), dropout_p=0.1),
    "medium, bias": Variant(_C(1, 1000, 1000, 4, 4, 64, 64), bias=(1, 4, 1000, 1000)),
    "medium, everything": Variant(
        _C(1, 1000, 1200, 4, 2, 128, 128, window=(500, 0)),
        softcap=3.0,
        slopes=(4,),
        bias=(1, 1, 1000, 1200),
        sink=True,
        dropout_p=0.3,
    ),
}


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: tuple[int, int],
    scale: float | None = None,
    softcap: float = 0.0,
    slopes: Tensor | None = None,
    bias: Tensor | None = None,
    sink: Tensor | None = None,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention as anyone would write it in PyTorch, every step in q's dtype; (out, lse)."""
    (batch, sq, nheads, headdim), (_, sk, nheads_k, _) = q.shape, k.shape
    k, v = (t.repeat_interleave(nheads // nheads_k, dim=2) for t in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (headdim**-0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    # Token i of q is token i + sk - sq of the keys' sequence.
    i, j = torch.arange(sq)[:, None] + sk - sq, torch.arange(sk)[None, :]
    if slopes is not None:
        scores = scores - slopes.to(q).expand(batch, nheads)[..., None, None] * (i - j).abs().to(q)
    if bias is not None:
        scores = scores.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else scores + bias.to(q)
    left, right = window
    hidden = torch.zeros(sq, sk, dtype=torch.bool)
    if left >= 0:
        hidden |= j < i - left
    if causal or right >= 0:
        hidden |= j > i + (0 if causal else right)
    scores = scores.masked_fill(hidden, -torch.inf)
    if sink is not None:  # one more column, without a value
        scores = torch.cat([scores, sink.to(q)[None, :, None, None].expand(batch, -1, sq, 1)], dim=-1)
    # Rows that see no key are taken out first: the gradients of their softmax and logsumexp would be NaN.
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(empty, 0)
    probs = torch.softmax(scores, dim=-1).masked_fill(empty, 0)[..., :sk]
    if keep is not None:
        probs = probs * keep / (1 - dropout_p)
    lse = torch.logsumexp(scores, dim=-1).masked_fill(empty[..., 0], -torch.inf)
    return torch.einsum("bhij,bjhd->bihd", probs, v), lse


def run(
    attention: Attention,
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    grads: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """(out, lse, dq, dk, dv) of `attention` on the inputs in `dtype`; lse takes a gradient where finite."""
    leaves = [t.detach().to(dtype).requires_grad_(grads is not None) for t in inputs]
    out, lse = attention(*leaves)
    if grads is None:
        return out, lse
    dout, dlse = grads
    torch.autograd.backward([out, lse], [dout.to(out.dtype), dlse.masked_fill(lse.isinf(), 0).to(lse.dtype)])
    return out.detach(), lse.detach(), *(t.grad for t in leaves if t.grad is not None)


def variant_tensors(variant: Variant, dtype: torch.dtype) -> tuple[Optionals, dict[str, Any]]:
    """q, k, v, sink, bias and the fixed arguments of a call; None for what the variant has not."""
    case = variant.case
    q, k, v = case.inputs(dtype)
    if variant.lengths_q is not None:
        q, k, v = q[0], k[0], v[0]
    sink = torch.randn(case.nheads) if variant.sink else None
    # In q's dtype or, for 16 bit, as often in float32.
    bias_dtype = dtype if torch.rand(()) < 0.5 else torch.float32
    bias = None
    if variant.bias is not None:
        bias = torch.randn(variant.bias).to(bias_dtype)
        if variant.mask:
            bias = torch.rand(variant.bias) < variant.mask
        if variant.lowest:
            bias = torch.zeros(variant.bias, dtype=bias_dtype)
            hidden = torch.rand((*variant.bias[:3], variant.bias[3] - 1)) < variant.lowest
            bias[..., 1:].masked_fill_(hidden, torch.finfo(bias_dtype).min)
        if torch.rand(()) < 0.5:
            # Rows further apart than they are long, with what must not be read between them.
            apart = torch.full((*variant.bias[:3], variant.bias[3] + 3), torch.nan).to(bias.dtype)
            apart[..., :-3] = bias
            bias = apart[..., :-3]

    def lengths(values: tuple[int, ...] | None, edges: bool = False) -> Tensor | None:
        if values is None:
            return None
        counts = torch.tensor(values)
        return (torch.cat((torch.zeros(1), counts.cumsum(0))) if edges else counts).int()

    fixed = {
        "softcap": variant.softcap,
        "alibi_slopes": None if variant.slopes is None else torch.rand(variant.slopes),
        "dropout_p": variant.dropout_p,
        "rng_state": torch.randint(2**50, (3,))[::2] if variant.dropout_p else None,
        "seqused_k": lengths(variant.seqused_k),
        "leftpad_k": lengths(variant.leftpad_k),
        "causal": case.causal,
        "window_size": case.window,
        "return_lse": True,
    }
    if variant.lengths_q is not None:
        fixed["cu_seqlens_q"] = lengths(variant.lengths_q, edges=True)
        fixed["cu_seqlens_k"] = lengths(variant.lengths_k, edges=True)
    return (q, k, v, sink, bias), fixed


def fused_variant(
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, bias: Tensor | None, **fixed: Any
) -> Any:
    with as_called():
        if "cu_seqlens_q" in fixed:
            return fastgpt.attention_varlen(q, k, v, sink=sink, **fixed)
        return fastgpt.attention(q, k, v, sink=sink, attn_bias=bias, **fixed)


def plain_variant(
    variant: Variant,
    fixed: dict[str, Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """:func:`plain_attention`, sequence by sequence."""
    case, packed = variant.case, variant.lengths_q is not None
    batch = case.batch if variant.lengths_q is None else len(variant.lengths_q)
    queries = variant.lengths_q or (case.sq,) * batch
    keys = variant.lengths_k or (case.sk,) * batch
    outs, lses = [], []
    for b in range(batch):
        of_q, rows = sum(queries[:b]), sum(keys[:b])
        pad = 0 if variant.leftpad_k is None else variant.leftpad_k[b]
        used = keys[b] if variant.seqused_k is None else variant.seqused_k[b]
        if packed:
            qb = q[None, of_q : of_q + queries[b]]
            kb, vb = (t[None, rows + pad : rows + used] for t in (k, v))
        else:
            qb, kb, vb = q[b : b + 1], k[b : b + 1, pad:used], v[b : b + 1, pad:used]
        slopes, own = fixed["alibi_slopes"], bias
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[b : b + 1]
        if own is not None:
            own = own if own.shape[0] == 1 else own[b : b + 1]
            own = own if own.shape[3] == 1 else own[..., pad:used]
        keep = None
        if variant.dropout_p:
            shape = (1, case.nheads, qb.shape[1], kb.shape[1])
            keep = reference.philox_keep(fixed["rng_state"], variant.dropout_p, shape, first_batch=b)
        out, lse = plain_attention(
            qb,
            kb,
            vb,
            case.causal,
            case.window,
            softcap=variant.softcap,
            slopes=slopes,
            bias=own,
            sink=sink,
            keep=keep,
            dropout_p=variant.dropout_p,
        )
        outs.append(out)
        lses.append(lse)
    if packed:
        return torch.cat(outs, 1)[0], torch.cat(lses, 2)[0]
    return torch.cat(outs), torch.cat(lses)


def has_backward(backend: str, q: Tensor, headdim_v: int) -> bool:
    """Whether the backend has gradients of such calls; where it has none, out and lse are judged."""
    call = AttentionCall(checks.device_type(q), q.dtype, q.shape[-1], headdim_v, ("backward",))
    return not dispatch.implementation("attention", backend).unsupported(call)


def run_variant(
    attention: Attention, tensors: Optionals, dtype: torch.dtype, grads: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, ...]:
    """(out, lse, gradients of q, k, v, sink, bias); sink and bias keep their dtype but for float64."""
    leaves: list[Tensor | None] = []
    for i, t in enumerate(tensors):
        if t is not None and t.is_floating_point():
            t = t.detach().to(dtype if i < 3 or dtype == torch.float64 else t.dtype)
            t.requires_grad_(grads is not None)
        leaves.append(t)
    out, lse = attention(*leaves)
    if grads is None:
        return out, lse
    dout, dlse = grads
    torch.autograd.backward([out, lse], [dout.to(out.dtype), dlse.masked_fill(lse.isinf(), 0).to(lse.dtype)])
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    return out.detach(), lse.detach(), *(torch.zeros_like(t) if t.grad is None else t.grad for t in wanted)


def variant_results(
    variant: Variant, backend: str, dtype: torch.dtype, by_reference: bool = False
) -> list[Result]:
    """(what, got, plain, exact) of out, lse and every gradient. With ``by_reference``, that is what plain and
    exact are from, and backward's error has the rounding of the out that it takes in both. It keeps p and ds
    in fp32; matrix units take them in the dtype, as plain PyTorch does: of their gradients the worse of both
    counts."""
    inputs, fixed = variant_tensors(variant, dtype)
    q, v = (t for t in (inputs[0], inputs[2]) if t is not None)
    dout = variant.case.laid_out(torch.randn(variant.case.batch, *q.shape[-3:-1], v.shape[-1]).to(dtype))
    dout = dout if q.dim() == 4 else dout[0]
    dlse = torch.randn(*(q.shape[1::-1] if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])))
    grads = (dout, dlse) if has_backward(backend, q, v.shape[-1]) else None

    def fused(backend: str) -> Attention:
        return lambda *tensors: fused_variant(*tensors, backend=backend, **fixed)

    in_plain = functools.partial(plain_variant, variant, fixed)
    other = fused("reference") if by_reference else in_plain
    calls = (fused(backend), dtype), (other, dtype), (other, torch.float64)
    got, plain, exact = (run_variant(call, inputs, precision, grads) for call, precision in calls)
    if by_reference and _has_matrix_unit(backend, dtype):
        rough = run_variant(in_plain, inputs, dtype, grads)
        plain = (*plain[:2], *map(_worse, plain[2:], rough[2:], exact[2:]))
    names = ["out", "lse", "dq", "dk", "dv"]
    names += ["dsink"] * (inputs[3] is not None) + ["dbias"] * (inputs[4] is not None and not variant.mask)
    return list(zip(names[: len(got)], got, plain, exact, strict=True))


def _has_matrix_unit(backend: str, dtype: torch.dtype) -> bool:
    if backend != "cpu":
        return backend in dispatch.GPU_KERNELS
    from fastgpt import _cpu

    return dtype == torch.bfloat16 and _cpu.isa.startswith("amx")


def _worse(a: Tensor, b: Tensor, exact: Tensor) -> Tensor:
    """Of the two, where each is."""
    is_worse = b.isfinite() & ((b.double() - exact).abs() > (a.double() - exact).abs())
    return torch.where(is_worse, b, a)


def case_results(case: AttentionCase, backend: str, dtype: torch.dtype) -> list[Result]:
    """(what, got, plain, exact) of out, lse and the gradients of q, k and v."""
    inputs = case.inputs(dtype)
    dout = torch.randn(case.batch, case.sq, case.nheads, case.headdim_v).to(dtype)
    dlse = torch.randn(case.batch, case.nheads, case.sq)
    grads = (dout, dlse) if has_backward(backend, inputs[0], case.headdim_v) else None

    def fused(q: Tensor, k: Tensor, v: Tensor) -> Any:
        window = {"causal": case.causal, "window_size": case.window}
        return fused_variant(q, k, v, None, None, **window, return_lse=True, backend=backend)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return plain_attention(q, k, v, case.causal, case.window)

    got = run(fused, inputs, dtype, grads)
    rough, exact = (run(plain, inputs, precision, grads) for precision in (dtype, torch.float64))
    names = ("out", "lse", "dq", "dk", "dv")
    return list(zip(names[: len(got)], got, rough, exact, strict=True))
