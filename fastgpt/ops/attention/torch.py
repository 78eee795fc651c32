"""Attention by what torch ships: ``torch.nn.functional.scaled_dot_product_attention``.

The baseline of the benchmarks and the fallback of ``auto``. Differentiable through torch's own
autograd, so it is called directly and not as a ``fastgpt::`` operator.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.ops.attention.spec import AttentionCall, AttentionSpec, AttentionTensors
from fastgpt.ops.checks import concrete
from fastgpt.ops.torch import own_sdpa

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


REFUSED = {
    "softcap": "scaled_dot_product_attention has no softcap",
    "dropout": "scaled_dot_product_attention's dropout bits are not fastgpt's Philox bits",
    "alibi": "scaled_dot_product_attention has no ALiBi",
    "sink": "scaled_dot_product_attention has no sink",
    "varlen": "scaled_dot_product_attention has no packed sequences",
    "key_ranges": "scaled_dot_product_attention takes keys of different lengths as a mask only",
    "lse": "scaled_dot_product_attention does not return lse",
}


def unsupported(call: AttentionCall) -> list[str]:
    reasons = []
    if call.dtype not in DTYPES:
        reasons.append(f"dtype {call.dtype} is not one of float32, bfloat16, float16, float64")
    return reasons + [REFUSED[name] for name in call.features if name in REFUSED]


def _mask(q: Tensor, sq: int, sk: int, spec: AttentionSpec, bias: Tensor | None) -> Tensor | None:
    """The (sq, sk) matrix for windows and bottom-right alignment; None where no key is hidden."""
    i = torch.arange(sq, device=q.device)[:, None] + (sk - sq)
    j = torch.arange(sk, device=q.device)[None, :]
    mask = None
    if spec.window_right >= 0:
        mask = j <= i + spec.window_right
    if spec.window_left >= 0:
        left = j >= i - spec.window_left
        mask = left if mask is None else mask & left
    if bias is None or mask is None:
        return mask if bias is None else bias
    if bias.dtype == torch.bool:
        return bias & mask
    return bias.masked_fill(~mask, -torch.inf)


def scaled_dot_product_attention(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tensors: AttentionTensors
) -> Tensor:
    """out, in q's layout and dtype."""
    sq, sk = q.shape[1], k.shape[1]
    bias = tensors.attn_bias
    # On the CPU an fp32 bias is taken as it is; elsewhere the fused kernels want q's dtype.
    if bias is not None and bias.dtype != torch.bool and not (bias.dtype == torch.float32 and q.is_cpu):
        bias = bias.to(q.dtype)
    plain_causal = spec.window_left < 0 and spec.window_right == 0 and sq == sk and bias is None
    one_query = spec.window_left < 0 and spec.window_right == 0 and sq == 1  # it sees every key
    out = own_sdpa(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=bias if plain_causal or one_query else _mask(q, sq, sk, spec, bias),
        is_causal=plain_causal,
        scale=spec.softmax_scale,
        enable_gqa=concrete(q.shape[2]) != concrete(k.shape[2]),
    )
    return out.transpose(1, 2)
