"""Modules on the fused operators, with the parameters and the state dict of those they replace."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastgpt.ops.attention.api import attention
from fastgpt.ops.checks import unit_rows
from fastgpt.ops.few_rows.spec import Projection
from fastgpt.ops.norm.api import layer_norm, rms_norm

Module = TypeVar("Module", bound=nn.Module)


def _check_one_axis(normalized_shape: tuple[int, ...]) -> None:
    if len(normalized_shape) != 1:
        raise ValueError(f"normalized_shape: got {normalized_shape}, expected one axis, the last")


def _served(x: Tensor, weight: Tensor | None) -> bool:
    """Whether the fused norms take these: no nested tensor, a weight in x's dtype or float32."""
    return not x.is_nested and (weight is None or weight.dtype in (x.dtype, torch.float32))


class FusedLayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm`` over the last axis, by :func:`fastgpt.layer_norm`.

    It takes what ``torch.nn.LayerNorm`` takes; nested tensors are left to that. Under torch.autocast the
    result has the input's dtype, as torch's has on the CPU (on CUDA, torch's is float32).

    Args:
        normalized_shape: size of the last axis, the only one.
        eps: added to the variance.
        elementwise_affine: has a ``weight``, and a ``bias`` unless ``bias`` is False.
        bias: has a ``bias``.
        device, dtype: of the parameters; float32 parameters also serve bfloat16 and float16 inputs.
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        _check_one_axis(self.normalized_shape)

    def forward(  # type: ignore[override]
        self, input: Tensor, residual: Tensor | None = None, prenorm: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of input + residual, (..., normalized_shape) each; with ``prenorm`` also that sum."""
        if residual is None and not prenorm and not _served(input, self.weight):
            return super().forward(input)
        input, residual = unit_rows(input), unit_rows(residual)
        return layer_norm(input, self.weight, self.bias, self.eps, residual=residual, prenorm=prenorm)


class FusedRMSNorm(nn.RMSNorm):
    """``torch.nn.RMSNorm`` over the last axis, by :func:`fastgpt.rms_norm`.

    It takes what ``torch.nn.RMSNorm`` takes; nested tensors are left to that, and a weight whose dtype is
    neither the input's nor float32. Under torch.autocast the result has the input's dtype.

    Args:
        normalized_shape: size of the last axis, the only one.
        eps: added to the mean square; None is the machine epsilon of the arithmetic, as in torch: float64's
            for float64, else float32's.
        elementwise_affine: has a ``weight``.
        device, dtype: of the parameters; float32 parameters also serve bfloat16 and float16 inputs.
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        _check_one_axis(self.normalized_shape)

    def forward(  # type: ignore[override]
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of x + residual, (..., normalized_shape) each; with ``prenorm`` also that sum."""
        if residual is None and not prenorm and not _served(x, self.weight):
            return super().forward(x)
        x, residual = unit_rows(x), unit_rows(residual)
        wide = torch.promote_types(x.dtype, torch.float32)
        eps = torch.finfo(wide).eps if self.eps is None else self.eps
        return rms_norm(x, self.weight, None, eps, residual=residual, prenorm=prenorm)


FUSED: dict[type[nn.Module], type[nn.Module]] = {nn.LayerNorm: FusedLayerNorm, nn.RMSNorm: FusedRMSNorm}


def replace_norms(model: Module) -> Module:
    """Puts :class:`FusedLayerNorm` and :class:`FusedRMSNorm` in the places of a model's ``nn.LayerNorm`` and
    ``nn.RMSNorm``, in place.

    The parameters, hooks and names stay, so that optimizers and state dicts go on serving. Left as they are:
    norms over several axes, subclasses, and norms whose ``forward`` has been replaced on the instance.

    Args:
        model: any module; one that is a norm itself is not changed, but its successor returned.

    Returns:
        model.

    Raises:
        TypeError: model is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    successors: dict[nn.Module, nn.Module] = {}  # a norm may stand in several places
    for name, norm in list(model.named_modules(remove_duplicate=False)):
        if type(norm) not in FUSED or "forward" in vars(norm) or len(norm.normalized_shape) != 1:
            continue
        if norm not in successors:
            fused = FUSED[type(norm)]
            successors[norm] = fused.__new__(fused)
            vars(successors[norm]).update(vars(norm))
        if not name:
            return successors[norm]  # type: ignore[return-value]
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, successors[norm])
    return model


class FusedCausalSelfAttention(nn.Module):
    """Causal self-attention: one projection to q, k and v, :func:`fastgpt.attention`, output projection.

    ``qkv_proj`` gives the heads of q, then of k, then of v; ``out_proj`` takes the heads in order.

    Args:
        embed_dim: size of the input and the output; headdim is ``embed_dim // num_heads``.
        num_heads: query heads.
        num_kv_heads: key and value heads, a divisor of ``num_heads`` (GQA, MQA); default ``num_heads``.
        bias: both projections have a bias.
        dropout: probability of dropping a softmax probability, in training.
        window_size: (left, right) of :func:`fastgpt.attention`, −1 = unlimited; never past the query.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        window_size: tuple[int, int] = (-1, -1),
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads != 0:
            raise ValueError(f"num_heads: got {num_heads}, expected a divisor of embed_dim {embed_dim}")
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_kv_heads < 1 or num_heads % num_kv_heads != 0:
            raise ValueError(f"num_kv_heads: got {num_kv_heads}, expected a divisor of num_heads {num_heads}")
        self.headdim = embed_dim // num_heads
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.dropout, self.window_size = dropout, window_size
        width = (num_heads + 2 * num_kv_heads) * self.headdim
        self.qkv_proj = nn.Linear(embed_dim, width, bias, device, dtype)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, seqlen, embed_dim) to the same."""
        heads = self.qkv_proj(x).unflatten(-1, (-1, self.headdim))
        width = self.num_heads + 2 * self.num_kv_heads
        if heads.shape[2] != width:
            raise ValueError(
                f"qkv_proj: gave {heads.shape[2]} heads, expected {width}; it is sharded by "
                "fastgpt.integrations.tensor_parallel.FusedParallel"
            )
        q, k, v = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=2)
        out = attention(
            q,
            k,
            v,
            causal=True,
            window_size=self.window_size,
            dropout_p=self.dropout if self.training else 0.0,
        )
        assert isinstance(out, Tensor)  # a pair only where lse is asked for
        return self.out_proj(out.flatten(2))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, dropout={self.dropout}"


# Where several modules are computed in one go, as those of a block are for a few rows, each has to be no more
# than what it was known as.


def all_are_hooked() -> bool:
    """Whether every module has hooks, which calls of single ones would see."""
    module: Any = nn.modules.module
    return bool(module._global_forward_hooks or module._global_forward_pre_hooks)


def is_itself(
    module: Any,
    kind: type[nn.Module],
    forward: Callable[..., Any] | None = None,
    inert: Callable[[Iterable[Any]], bool] | None = None,
) -> bool:
    """Whether a module is of that class, with nothing before or behind its forward, which is its class's, or
    a partial of the one that is given. ``inert`` says whether hooks behind it do nothing.
    """
    own = module.__dict__ if type(module) is kind else None
    if own is None or own["_forward_pre_hooks"]:
        return False
    if (hooks := own["_forward_hooks"]) and (inert is None or not inert(hooks.values())):
        return False
    its = own.get("forward")
    return its is None or (forward is not None and getattr(its, "func", None) is forward)


def projection_of(
    module: Any, kind: type[nn.Module], forward: Callable[..., Any] | None = None
) -> Projection | None:
    """What a linear layer multiplies by, if it is_itself, and none of its parameters is replaced, as pruning,
    parametrisation and offloading do.
    """
    if not is_itself(module, kind, forward):
        return None
    parameters = module._parameters
    weight = parameters.get("weight")
    if weight is None or weight.dim() != 2 or "bias" not in parameters:
        return None
    return Projection(weight, parameters["bias"])
