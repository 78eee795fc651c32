"""``flash_attn.ops.triton.layer_norm``: norms with what stands before them in a block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt.ops.norm.api import layer_norm, rms_norm


def _dropped(x: Tensor, dropout_p: float) -> tuple[Tensor, Tensor]:
    """dropout(x), and which elements it keeps."""
    keep = torch.rand_like(x, dtype=torch.float32) >= dropout_p
    return torch.where(keep, x / (1 - dropout_p), 0), keep


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Any:
    """The norm of ``z = dropout(rowscale · x) + dropout(x1) + residual``, and another one of the same z.

    Where z is ``dropout(x) + residual`` in x's dtype, it is one kernel, :func:`fastgpt.layer_norm` or
    :func:`fastgpt.rms_norm`; else torch makes z, in float32, and the kernel has the norm.

    Args:
        x: (..., hidden). x1: of its shape, or None. residual: of its shape, in any dtype.
        weight, bias, weight1, bias1: (hidden); with weight1 there are two results.
        rowscale: (...): a factor of each row of x.
        prenorm: also return z, in residual's dtype, without one in x's.
        residual_in_fp32: z is in float32 where there is no residual.
        zero_centered_weight: the weights are 1 more than given.
        return_dropout_mask: also return which elements of x, and of x1, are kept; bool, None without dropout.
        out_dtype: the result's; default x's.
        out, residual_out: where the results are written.

    Returns:
        out, or a tuple of out, out of weight1, z, and the masks of x and x1, those that are asked for.

    Raises:
        RuntimeError: an argument is not as above; the message names it.
    """
    if x1 is not None and rowscale is not None:
        raise RuntimeError("rowscale: got a tensor, expected None with x1")
    if zero_centered_weight:
        weight, weight1 = weight + 1, None if weight1 is None else weight1 + 1
    z_dtype = residual.dtype if residual is not None else torch.float32 if residual_in_fp32 else x.dtype
    norm: Callable[..., Any] = rms_norm if is_rms_norm else layer_norm
    results: list[Any]
    masks: list[Tensor | None] = [None, None]
    try:
        if z_dtype == x.dtype and x1 is None and rowscale is None and not return_dropout_mask:
            first, z = norm(x, weight, bias, eps, residual=residual, prenorm=True, dropout_p=dropout_p)
        else:
            z = x.float() if rowscale is None else x.float() * rowscale[..., None]
            if dropout_p:
                z, masks[0] = _dropped(z, dropout_p)
            if x1 is not None:
                other = x1.float()
                if dropout_p:
                    other, masks[1] = _dropped(other, dropout_p)
                z = z + other
            z = (z if residual is None else z + residual).to(z_dtype)
            first = norm(z, _taken(weight, z), _taken(bias, z), eps)
        results = [first.to(out_dtype or x.dtype)]
        if weight1 is not None:
            results.append(norm(z, _taken(weight1, z), _taken(bias1, z), eps).to(out_dtype or x.dtype))
    except (TypeError, ValueError) as error:
        raise RuntimeError(str(error)) from error
    if out is not None:
        results[0] = out.copy_(results[0])
    if prenorm:
        results.append(z if residual_out is None else residual_out.copy_(z))
    if return_dropout_mask:
        results += masks if x1 is not None else masks[:1]
    return results[0] if len(results) == 1 else tuple(results)


def _taken(parameter: Tensor | None, z: Tensor) -> Tensor | None:
    """In a dtype that a norm of z takes."""
    if parameter is None or parameter.dtype in (z.dtype, torch.float32):
        return parameter
    return parameter.to(z.dtype)


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    return_dropout_mask: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Any:
    """:func:`layer_norm_fn` with ``is_rms_norm``."""
    return layer_norm_fn(
        x,
        weight,
        bias,
        residual,
        x1,
        weight1,
        bias1,
        eps,
        dropout_p,
        rowscale,
        prenorm,
        residual_in_fp32,
        zero_centered_weight,
        True,
        return_dropout_mask,
        out_dtype,
        out,
        residual_out,
    )


class RMSNorm(nn.Module):
    """:func:`rms_norm_fn` with its weight, and a dropout that is on in training."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        zero_centered_weight: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.dropout_p, self.zero_centered_weight = eps, dropout_p, zero_centered_weight
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.bias = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.0 if self.zero_centered_weight else 1.0)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Any:
        return rms_norm_fn(
            x,
            self.weight,
            self.bias,
            residual=residual,
            eps=self.eps,
            dropout_p=self.dropout_p if self.training else 0.0,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
            zero_centered_weight=self.zero_centered_weight,
        )
