"""``F.scaled_dot_product_attention`` by fastgpt, in code that never heard of it.

    from fastgpt.integrations import sdpa

    with sdpa.enable():
        model(x)

Meanwhile torch's dispatcher has a kernel of fastgpt's for ``aten::scaled_dot_product_attention`` on CPU and
CUDA tensors. It reaches every caller, F.scaled_dot_product_attention by whatever name it was imported, the
modules of torch.nn, TorchScript and C++; it costs no other operator anything; tensor subclasses, autocast
and torch.func, which are dispatched before it, work as ever. Another function in the place of
``F.scaled_dot_product_attention`` would miss whoever has imported it, and break whoever compares with it, as
torch's CausalBias and nested tensors do; a TorchFunctionMode slows every function of torch by 1 to 2 µs.

In eval, nn.MultiheadAttention and nn.TransformerEncoderLayer call ``aten::_native_multi_head_attention``,
which has an attention of its own; for that there is a kernel here, too.

What fastgpt cannot serve, or not faster, is left to torch, and the logger "fastgpt" says why, at DEBUG, once
a reason; :func:`unserved` has the rule. While torch.compile or torch.export traces, that is all: a graph
outlives the block, in memory and in caches on disk that know nothing of it. (In a graph, call
fastgpt.attention by its name.) ``torch.nn.attention.sdpa_kernel`` without FLASH_ATTENTION has its way, too:
with MATH, torch has second derivatives, which fastgpt has not.

On GPUs there is torch's own hook for flash attention, too: after :func:`register`,
``torch.nn.attention.activate_flash_attention_impl("fastgpt")``. No GPU has run this module yet.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from fastgpt import dispatch
from fastgpt.integrations.sdpa.flash_impl import FlashAttention, like, register
from fastgpt.integrations.sdpa.override import left, original, override
from fastgpt.integrations.sdpa.rule import FEWEST_MHA, shape_of, unserved
from fastgpt.ops import checks
from fastgpt.ops.attention.api import attention
from fastgpt.ops.torch import own_sdpa

__all__ = ["FlashAttention", "Serving", "disable", "enable", "register", "unserved"]

SDPA = "scaled_dot_product_attention"
MHA = "_native_multi_head_attention"
PROXY = torch._C._TorchDispatchModeKey.PROXY

_lock = threading.RLock()
_active: list[Serving] = []
_libraries: list[torch.library.Library] = []  # what the first of _active has registered


def _around(*tensors: Tensor | None) -> str | None:
    """Why the calls of this place are left to torch."""
    for t in tensors:
        if t is not None and type(t) not in checks.PLAIN_TENSORS:
            return f"{type(t).__name__} in the place of a plain tensor"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func's transforms"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode derivatives"
    if torch._C._get_dispatch_mode(PROXY) is not None:
        return "make_fx, whose graphs are torch's"
    if not torch.backends.cuda.flash_sdp_enabled():
        return "flash attention is switched off (torch.nn.attention.sdpa_kernel)"
    return None


def _heads_are_sequences(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> bool:
    """Whether all axes before the last two merge in every tensor as it lies."""
    lead, qkv = query.shape[:-2], (query, key, value)
    if lead != key.shape[:-2] or not all(t.is_contiguous() for t in qkv):
        return False
    if attn_mask is None or attn_mask.shape[:-2].numel() == 1:
        return True
    return attn_mask.shape[:-2] == lead and attn_mask.is_contiguous()


def _dense_by_torch(query: Tensor, *args: Any, **kwargs: Any) -> bool:
    """Whether torch would take its math path, whose result is dense; of the others it is like query."""
    math_enabled = torch.backends.cuda.math_sdp_enabled()  # else torch may have no path, and says so
    return math_enabled and torch._fused_sdp_choice(query, *args, **kwargs) == SDPBackend.MATH.value


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    backend: str | None,
) -> Tensor:
    """What :func:`unserved` has nothing against; the result has the strides of torch's."""
    shape = shape_of(query, key, enable_gqa)
    assert shape is not None
    rank = max(query.dim(), key.dim())

    def bhsd(t: Tensor, nheads: int) -> Tensor:
        """(batch, nheads, seqlen, headdim), a view where batches merge and rows are dense."""
        full = (*shape.batch, nheads, *t.shape[-2:])
        t = t if t.shape == full else t.expand(full)
        t = t if t.dim() == 4 else t.flatten(0, -4)
        return checks.unit_rows(t)

    seqlen_q, seqlen_k = query.shape[-2], key.shape[-2]
    right = -1
    if is_causal:
        # torch aligns a causal mask top-left, j <= i: no query sees a key past the last query's place, and
        # where keys are fewer than queries, fastgpt's window, aligned bottom-right, makes up for it.
        key, value = key[..., :seqlen_q, :], value[..., :seqlen_q, :]
        right = max(seqlen_q - seqlen_k, 0)
    attend: Any = functools.partial(
        attention,
        causal=False,
        window_size=(-1, right),
        softmax_scale=scale,
        dropout_p=dropout_p,
        backend=backend,
    )
    if _heads_are_sequences(query, key, value, attn_mask):
        # Of one head each, out of which the result comes dense.
        mask = None if attn_mask is None else attn_mask.view(-1, 1, *attn_mask.shape[-2:])
        q, k, v = (t.view(-1, t.shape[-2], 1, t.shape[-1]) for t in (query, key, value))
        return attend(q, k, v, attn_bias=mask).view(*query.shape[:-1], value.shape[-1])
    mask = attn_mask
    if mask is not None:
        mask = mask[(None,) * (len(shape.batch) + 3 - mask.dim())]
        if mask.dim() > 4:
            mask = mask.expand(*shape.batch, *mask.shape[-3:]).flatten(0, -4)
    out = attend(
        bhsd(query, shape.nheads).transpose(1, 2),
        bhsd(key, shape.nheads_k).transpose(1, 2),
        bhsd(value, shape.nheads_k).transpose(1, 2),
        attn_bias=mask,
    ).transpose(1, 2)
    if rank > 4:
        out = out.unflatten(0, shape.batch)
    elif rank < 4:
        out = out[(0,) * (4 - rank)]
    args = (query, key, value, attn_mask, dropout_p, is_causal)
    if out.shape != query.shape or _dense_by_torch(*args, scale=scale, enable_gqa=enable_gqa):
        return out.contiguous()
    return like(query, out)


def _backend() -> str | None:
    active = _active[-1:]  # one step: another thread may just have disabled it
    return active[0].backend if active else "torch"


def _kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """aten::scaled_dot_product_attention."""
    args, backend = (query, key, value, attn_mask, dropout_p, is_causal), _backend()
    reason = _around(query, key, value, attn_mask) or unserved(*args, scale, enable_gqa, backend)
    if left(SDPA, reason):
        return own_sdpa(*args, scale=scale, enable_gqa=enable_gqa)
    return _attend(*args, scale, enable_gqa, backend)


@torch.no_grad()
def _kernel_below_autograd(*args: Any, **kwargs: Any) -> Tensor:
    return _kernel(*args, **kwargs)


def _unserved_mha(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_head: int,
    mask: Tensor | None,
    hidden: Tensor | None,
    need_weights: bool,
    backend: str | None,
    *weights: Tensor,
) -> str | None:
    if reason := _around(query, key, value, mask, *weights):
        return reason
    if need_weights:
        return "the weights are to be returned, which fastgpt never stores"
    if query.dim() != 3 or not query.shape == key.shape == value.shape or query.shape[-1] != embed_dim:
        return f"query, key and value that are not (batch, seqlen, {embed_dim}) all three"
    if embed_dim % num_head or weights[0].shape != (3 * embed_dim, embed_dim):
        return "weights of another size, or heads that do not divide them"
    if any(t.dtype != query.dtype for t in weights):
        return "weights of another dtype"
    if mask is not None and hidden is None:
        return "a mask that is not of every key or of every score"
    q, k, v = (t.unflatten(-1, (num_head, -1)).transpose(1, 2) for t in (query, key, value))
    if reason := unserved(q, k, v, hidden, backend=backend):
        return reason
    if dispatch.requested(backend) == "auto" and query.is_cpu:
        if hidden is None and query.dtype.itemsize == 2:
            return f"{query.dtype} without a mask, for which torch takes as little time"
        if query.numel() * key.shape[1] < FEWEST_MHA:
            return f"under {FEWEST_MHA:,} multiply-adds, for which torch takes less time"
    return None


@torch.no_grad()
def _mha_kernel(
    own: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_head: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """aten::_native_multi_head_attention, projections and all.

    query, key, value: (batch, seqlen, embed_dim). mask: (batch, seqlen) with mask_type 1, or with any
    (batch, num_head, seqlen, seqlen); what is not 0 is hidden. (seqlen, seqlen), of mask_type 0, is torch's.
    """
    weights = (qkv_weight, qkv_bias, proj_weight, proj_bias)
    hidden = None
    if mask is not None:
        if mask_type == 1 and mask.shape == query.shape[:2]:
            hidden = mask[:, None, None]
        elif mask.shape == (query.shape[0], num_head, query.shape[1], query.shape[1]):
            hidden = mask
    backend = _backend()
    sizes = (embed_dim, num_head)
    reason = _unserved_mha(query, key, value, *sizes, mask, hidden, need_weights, backend, *weights)
    if left(MHA, reason):
        options = (mask, need_weights, average_attn_weights, mask_type)
        return own(query, key, value, embed_dim, num_head, *weights, *options)
    if query is key is value:
        projected = F.linear(query, qkv_weight, qkv_bias).chunk(3, -1)
    else:  # autocast makes one tensor three
        parts = zip((query, key, value), qkv_weight.chunk(3), qkv_bias.chunk(3), strict=True)
        projected = tuple(F.linear(*part) for part in parts)
    q, k, v = (t.unflatten(-1, (num_head, -1)) for t in projected)
    visible = None if hidden is None else ~hidden.bool()
    out: Any = attention(q, k, v, causal=False, attn_bias=visible, backend=backend)
    return F.linear(out.flatten(2), proj_weight, proj_bias), None


def _kernels() -> dict[tuple[str, str], Callable[..., Any]]:
    # Below autograd, in inference mode, BackendSelect comes before the devices. With a kernel for a device
    # itself, torch.export would take the operator for one that is not composed of others, and keep it.
    kernels: dict[tuple[str, str], Callable[..., Any]] = {
        (SDPA, "AutogradCPU"): _kernel,
        (SDPA, "AutogradCUDA"): _kernel,
        (SDPA, "BackendSelect"): _kernel_below_autograd,
    }
    if own := original(MHA, "CPU"):
        kernels[MHA, "CPU"] = functools.partial(_mha_kernel, own)
    return kernels


class Serving:
    """What :func:`enable` began; ends with :meth:`undo`, or where ``with`` does, which begins it again."""

    def __init__(self, backend: str | None) -> None:
        self.backend = backend
        self._begin()

    def _begin(self) -> None:
        with _lock:
            if self not in _active:
                if not _active:
                    _libraries.append(override(_kernels()))
                _active.append(self)

    def __enter__(self) -> Serving:
        self._begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.undo()

    def undo(self) -> None:
        """Ends it. What was enabled before goes on; with the last one, torch is as it was."""
        with _lock:
            if self in _active:
                _active.remove(self)
                while _libraries and not _active:
                    _libraries.pop()._destroy()


def enable(backend: str | None = None) -> Serving:
    """F.scaled_dot_product_attention, and with it nn.MultiheadAttention and nn.Transformer, runs on
    :func:`fastgpt.attention` in the whole process, where that is faster.

    Its meaning is torch's: top-left causal masks, boolean and additive masks (with their gradient), dropout
    (of other bits), GQA, broadcasting, any number of batch axes, autocast. Tensors of (batch, nheads, seqlen,
    headdim) are read where they lie, and the result has the strides of torch's. A row that sees no key gives
    0; one hidden only by finite numbers beyond about 1e6 (a float mask of -1e9 everywhere, say) has the right
    output but no usable gradient: hide by -inf or by a boolean mask. nn.MultiheadAttention is left to torch
    where need_weights is True.

    Lost is what torch's math path has, which torch takes on the CPU with dropout, with a mask that requires a
    gradient, and for tensors that are not 4-D: second derivatives, so that a gradient penalty needs
    ``sdpa_kernel(SDPBackend.MATH)``, and writing into the result in place before its backward.

    Args:
        backend: serves all that it can, faster or not, and torch the rest. Default ``FASTGPT_BACKEND``, else
            ``auto``.

    Returns:
        what has begun, whose ``undo()`` ends it; ``with enable(): ...`` does. They nest: the last one that is
        left says which backend. :func:`disable` ends all.

    Raises:
        ValueError, TypeError: backend is not the name of one.
        fastgpt.BackendUnsupported: it is not available here.
    """
    asked = dispatch.requested(backend)
    if asked != "auto" and (reason := dispatch.unavailable(asked)):
        raise dispatch.BackendUnsupported(f"backend {asked!r} cannot serve {SDPA}: {reason}")
    return Serving(backend)


def disable() -> None:
    """Ends every :func:`enable`; nothing where there is none."""
    with _lock:
        for serving in reversed(_active.copy()):
            serving.undo()
