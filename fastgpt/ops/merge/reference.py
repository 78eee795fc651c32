"""The merge of two attention states as it is defined, in eager PyTorch: the oracle of every other backend.

Computes in fp64 for fp64 tensors and in fp32 otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.ops.merge.spec import MergeCall


def unsupported(call: MergeCall) -> list[str]:
    return []


def _per_row(lse: Tensor) -> Tensor:
    """(..., nheads, seqlen) as (..., seqlen, nheads, 1), to go with out."""
    return lse.transpose(-1, -2)[..., None]


def _weights(lse_a: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """lse, and the weights exp(lse_x − lse) of a and b, like it: sigmoids of the difference, which keeps
    its digits where lse is large."""
    lse = torch.logaddexp(lse_a, lse_b)
    w_a, w_b = (torch.sigmoid(x).masked_fill(lse == -torch.inf, 0) for x in (lse_a - lse_b, lse_b - lse_a))
    return lse, w_a, w_b


def _read(out: Tensor, weight: Tensor) -> Tensor:
    """out in the weight's dtype, 0 where that is 0."""
    return out.to(weight.dtype).masked_fill(_per_row(weight) == 0, 0)


def forward(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """out, in the layout and dtype of out_a; lse, like lse_a."""
    lse, w_a, w_b = _weights(lse_a, lse_b)
    out = _per_row(w_a) * _read(out_a, w_a) + _per_row(w_b) * _read(out_b, w_b)
    return out.to(out_a.dtype), lse


def backward(
    dout: Tensor, dlse: Tensor | None, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of out_a, lse_a, out_b and lse_b."""
    lse, w_a, w_b = _weights(lse_a, lse_b)
    # out = w_a · out_a + w_b · out_b.
    dout = dout.to(lse.dtype)
    dout_a, dout_b = ((_per_row(w) * dout).masked_fill(_per_row(w) == 0, 0) for w in (w_a, w_b))
    # lse = log(exp(lse_a) + exp(lse_b)), so d lse/d lse_x = w_x, d w_a/d lse_a =
    # w_a (1 − w_a) = w_a w_b and d w_b/d lse_a = −w_a w_b, so d out/d lse_a = w_a w_b (out_a − out_b).
    difference = (dout * (_read(out_a, w_a) - _read(out_b, w_b))).sum(-1).transpose(-1, -2)
    dlse = torch.zeros_like(lse) if dlse is None else dlse
    dlse_a = (w_a * (dlse + w_b * difference)).masked_fill(w_a == 0, 0)
    dlse_b = (w_b * (dlse - w_a * difference)).masked_fill(w_b == 0, 0)
    return dout_a.to(out_a.dtype), dlse_a, dout_b.to(out_b.dtype), dlse_b
