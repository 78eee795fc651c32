"""Rotary embedding by torch's elementwise operators, as models write it.

The fallback of ``auto``. Differentiable through torch's own autograd, so it is called directly and not as a
``fastgpt::`` operator, and torch.compile can fuse it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt.ops.rotary.spec import RotaryCall, RotarySpec, RotaryTensors, token_positions

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def unsupported(call: RotaryCall) -> list[str]:
    if call.dtype not in DTYPES:
        return [f"dtype {call.dtype} is not one of float32, bfloat16, float16, float64"]
    return []


def composite(x: Tensor, spec: RotarySpec, tensors: RotaryTensors) -> Tensor:
    """out, contiguous, in x's dtype; fp32 in between for the narrower ones."""
    cos, sin = tensors.cos, tensors.sin
    if tensors.cu_seqlens is None and tensors.seqlen_offsets is None:
        cos, sin = (t.narrow(0, spec.seqlen_offset, x.shape[1]) for t in (cos, sin))
    else:
        positions = token_positions(x, spec, tensors)
        cos, sin = cos[positions], sin[positions]
    acc = x.dtype if x.dtype == torch.float64 else torch.float32
    cos, sin = cos.to(acc).unsqueeze(-2), sin.to(acc).unsqueeze(-2)
    pairs = cos.shape[-1]
    turned, rest = x[..., : 2 * pairs].to(acc), x[..., 2 * pairs :]
    # (x1, x2) · (cos, cos) + (x2, x1) · (−sin, sin): fewer passes over memory than half by half.
    if spec.interleaved:
        cos, sin = cos.repeat_interleave(2, -1), torch.stack((-sin, sin), -1).flatten(-2)
        swapped = turned.unflatten(-1, (pairs, 2)).flip(-1).flatten(-2)
    else:
        cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        swapped = turned.roll(pairs, -1)
    y = torch.addcmul(turned * cos, swapped, sin).to(x.dtype)
    return torch.cat((y, rest), -1) if rest.shape[-1] else y.contiguous()
