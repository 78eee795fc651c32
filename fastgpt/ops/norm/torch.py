"""Norms by what torch ships: ``torch.nn.functional.layer_norm`` and ``rms_norm``.

The baseline of the benchmarks and the fallback of ``auto``. Differentiable through torch's own
autograd, so it is called directly and not as a ``fastgpt::`` operator.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.ops.norm.spec import NormCall, NormSpec

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def unsupported(call: NormCall) -> list[str]:
    reasons = []
    if call.dtype not in DTYPES:
        reasons.append(f"dtype {call.dtype} is not one of float32, bfloat16, float16, float64")
    if "dropout" in call.features:
        reasons.append("torch's dropout bits are not fastgpt's Philox bits")
    return reasons


def composite(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, spec: NormSpec
) -> tuple[Tensor, Tensor]:
    """out and the sum x + residual, in x's dtype."""
    z = x if residual is None else x + residual
    parameter = weight if weight is not None else bias
    # Outside the CPU, F.layer_norm has no kernel for weights of another dtype than the input's.
    wide = z if parameter is None else z.to(torch.promote_types(z.dtype, parameter.dtype))
    hidden = (x.shape[-1],)
    if spec.rms:
        out = F.rms_norm(wide, hidden, weight, spec.eps)
        out = out if bias is None else out + bias
    else:
        out = F.layer_norm(wide, hidden, weight, bias, spec.eps)
    return out.to(x.dtype), z
