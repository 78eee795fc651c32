"""The norms of a transformers model by fastgpt, on the modules that are there."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastgpt import dispatch
from fastgpt.ops.checks import device_type, unit_rows
from fastgpt.ops.norm.api import layer_norm, rms_norm

FEW = 1 << 15  # elements up to which torch's layer norm, one operator, is the faster way on a CPU
# The parameters of the forward that gpt2_block_forward stands for: before and since transformers 5.24.
GPT2_BLOCK = [
    f"self hidden_states {cache} attention_mask encoder_hidden_states encoder_attention_mask use_cache kwargs"
    for cache in ("past_key_values", "cache")
]


class Norm(NamedTuple):
    """What a module computes, in fastgpt's terms."""

    rms: bool  # else a layer norm
    eps: float
    one_more: bool  # the weight is 1 more than the parameter (Gemma)


def norm_forward(
    module: nn.Module,
    original: Callable[..., Tensor],
    norm: Norm,
    backend: str | None,
    *args: Tensor,
    residual: Tensor | None = None,
    **named: Tensor,
) -> Any:
    """The norm of x, the one argument; with a residual the norm of x + residual, and that sum."""
    if named or len(args) != 1:
        return original(*args, **named)
    (x,) = args
    weight: Any = module.weight
    bias: Any = None if norm.rms else module.bias
    # Mixed precision has rules of its own about the output's dtype.
    own = x.dtype != weight.dtype or torch.is_autocast_enabled(device_type(x))
    few = not norm.rms and x.is_cpu and x.numel() <= FEW
    if own or (few and dispatch.requested(backend) == "auto"):
        if residual is None:
            return original(x)
        x = x + residual
        return original(x), x
    if norm.one_more:
        weight = 1.0 + weight.float()
    # Vision towers normalise what a convolution made, channels first.
    x, residual = unit_rows(x), unit_rows(residual)
    return (rms_norm if norm.rms else layer_norm)(
        x, weight, bias, norm.eps, residual=residual, prenorm=residual is not None, backend=backend
    )


@torch.no_grad()
def norm_of(module: nn.Module) -> Norm | None:
    """What a norm computes, if fastgpt has it: by its class, or, of transformers' many RMS norms, by what it
    makes of a few rows."""
    weight: Any = getattr(module, "weight", None)
    if type(module) is nn.LayerNorm:
        known = len(module.normalized_shape) == 1 and weight is not None
        return Norm(False, module.eps, False) if known else None
    eps: Any = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    is_rms = "RMSNorm" in type(module).__name__ and isinstance(eps, float) and not list(module.children())
    if not is_rms or [name for name, _ in module.named_parameters()] != ["weight"] or weight.dim() != 1:
        return None
    if len(inspect.signature(type(module).forward).parameters) != 2:
        return None  # the norm of a gated x, say
    # On a weight of its own: the module's may be elsewhere, sharded or not yet loaded. Not on random numbers,
    # which the user would miss. Of small rows, eps is most.
    probe, own = copy.copy(module), torch.linspace(0.5, 1.5, len(weight), dtype=torch.float32, device="cpu")
    probe._parameters = {"weight": nn.Parameter(own)}
    x = torch.arange(4 * len(weight), dtype=torch.float32, device="cpu").sin().view(4, -1)
    x *= torch.tensor([[1.0], [0.1], [eps**0.5], [0.0]], device="cpu")
    try:
        expected = type(module).forward(probe, x)
    except Exception:  # it computes with more than its weight
        return None
    tolerance = 4 * torch.finfo(x.dtype).eps
    for one_more in (False, True):
        got = nn.functional.rms_norm(x, weight.shape, own + float(one_more), eps)
        if torch.allclose(expected, got, rtol=tolerance, atol=tolerance * eps**0.5):
            return Norm(True, eps, one_more)
    return None


def is_gpt2_block(module: nn.Module) -> bool:
    """Whether :func:`gpt2_block_forward` can stand for the module's ``forward``, its norms being patched."""
    if type(module).__name__ != "GPT2Block":
        return False
    from transformers.models.gpt2.modeling_gpt2 import GPT2Block

    # Another transformers may have written it anew.
    parameters = inspect.signature(GPT2Block.forward).parameters
    return type(module) is GPT2Block and " ".join(parameters) in GPT2_BLOCK


def gpt2_block_forward(
    block: Any, original: Callable[..., Tensor], hidden_states: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """A block of GPT-2, whose second norm adds the attention's output to the residual as it reads them.

    Args:
        args: the cache (its name differs between versions), the mask and the encoder's output, as GPT2Model
            passes them. Called otherwise, the block is its own.
    """
    norm = block.ln_2
    patched = isinstance(norm.forward, functools.partial) and norm.forward.func is norm_forward
    hooked = norm._forward_hooks or norm._forward_pre_hooks  # which expect one tensor in and out
    checkpointed = block.gradient_checkpointing and block.training  # which the original's wrapper sees to
    if len(args) != 3 or args[2] is not None or hooked or checkpointed or not patched:
        return original(hidden_states, *args, **kwargs)
    cache, attention_mask, _ = args
    attended, _ = block.attn(block.ln_1(hidden_states), cache, attention_mask=attention_mask, **kwargs)
    normed, residual = norm(attended, residual=hidden_states)
    return residual + block.mlp(normed)
