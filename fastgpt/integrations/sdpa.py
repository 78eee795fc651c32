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
with MATH, torch has the second derivatives that neither fastgpt nor torch's flash attention has.

On GPUs there is torch's own hook for flash attention, too: after :func:`register`,
``torch.nn.attention.activate_flash_attention_impl("fastgpt")``. No GPU has run this module yet.
"""

from __future__ import annotations

import functools
import logging
import math
import threading
import warnings
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import dispatch
from fastgpt.ops import checks
from fastgpt.ops.attention.api import attention, attention_varlen
from fastgpt.ops.attention.library import pack
from fastgpt.ops.attention.spec import FEATURES, AttentionCall, AttentionSpec, AttentionTensors, used
from fastgpt.ops.torch import own_sdpa

SDPA = "scaled_dot_product_attention"
MHA = "_native_multi_head_attention"
# The fewest multiply-adds of q kᵀ for which fastgpt takes less time than torch, by whether storage has 16
# bits and whether gradients are asked for. Torch's time over fastgpt's, 2 threads, AVX-512, torch 2.13: fp32
# forward 0.5–1.0 from 2^15 to 2^18, 1.2–2.6 from 2^20; with backward 0.5 at 2^15, 0.8–1.1 at 2^20, 1.2–2.5
# from 2^21; bf16 forward 1–7; with backward 0.5 at 2^12, 1.4 at 2^15, 1.2–8 above. With dropout, where torch
# materialises the matrix, 1.1–16 at any size. With AVX2, from 2^20: fp32 0.8–1.2, bf16 1.1–2.5, fp16 1.5–10.
FEWEST = {(False, False): 1 << 18, (False, True): 1 << 21, (True, False): 0, (True, True): 1 << 15}
# Likewise for all of nn.MultiheadAttention in eval: fp32 0.7–1.1 to 2^23, 1.1–2.0 from 2^24; bf16 0.9–1.1 at
# any size; either with a mask 0.9–1.3 to 2^23, 1.1–5 from 2^24.
FEWEST_MHA = 1 << 24

_lock = threading.RLock()
_active: list[Serving] = []
_libraries: list[torch.library.Library] = []  # what the first of _active has registered
# A call does not hold the kernel that torch's dispatcher has found for it. Freed meanwhile by another thread,
# one has been seen to run as some other function; so the last few hundred are kept.
_alive: deque[Any] = deque(maxlen=1024)


class _Shape(NamedTuple):
    """What q, k and v are broadcast to: the axes before the heads, q's heads, and those of k and v."""

    batch: tuple[int, ...]
    nheads: int
    nheads_k: int


def _broadcast(*shapes: tuple[int, ...]) -> tuple[int, ...] | None:
    result = []
    for sizes in zip(*shapes, strict=True):
        most = max(sizes)
        if any(size not in (1, most) for size in sizes):
            return None
        result.append(most)
    return tuple(result)


def _shape(query: Tensor, key: Tensor, enable_gqa: bool) -> _Shape | None:
    """None where torch refuses them."""
    rank = max(4, query.dim(), key.dim())
    (*batch_q, nheads), (*batch_k, nheads_k) = (
        (1,) * (rank - t.dim()) + tuple(t.shape[:-2]) for t in (query, key)
    )
    batch, heads = _broadcast(tuple(batch_q), tuple(batch_k)), _broadcast((nheads,), (nheads_k,))
    if batch is None:
        return None
    if nheads_k == 1 or (enable_gqa and nheads % nheads_k == 0):
        return _Shape(batch, nheads, nheads_k)
    return None if enable_gqa or heads is None else _Shape(batch, *heads, *heads)


def _refused(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, scale: float | None
) -> str | None:
    """What fastgpt has not, or torch itself refuses, in which case it is torch that says so."""
    tensors = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    if any(t.is_nested or t.layout != torch.strided or t.device != query.device for t in tensors):
        return "nested or sparse tensors, or several devices"
    if min(query.dim(), key.dim(), value.dim()) < 2 or not all(t.numel() for t in tensors):
        return "tensors without elements or rows"
    if query.shape[-1] != key.shape[-1] or key.shape[:-1] != value.shape[:-1]:
        return "query, key and value of sizes that differ"
    if query.dtype not in checks.FLOATING or not query.dtype == key.dtype == value.dtype:
        return f"query, key and value of {query.dtype}, {key.dtype} and {value.dtype}"
    if not 0 <= dropout_p < 1:
        return f"dropout_p {dropout_p:g}"
    if scale is not None and not math.isfinite(scale):
        return f"scale {scale:g}"
    return None


def _refused_mask(query: Tensor, key: Tensor, mask: Tensor, shape: _Shape) -> str | None:
    if mask.dtype not in (torch.bool, torch.float32, query.dtype):
        return f"attn_mask of {mask.dtype} with query of {query.dtype}"
    full = (*shape.batch, shape.nheads, query.shape[-2], key.shape[-2])
    if not 2 <= mask.dim() <= max(query.dim(), key.dim()):
        return f"attn_mask of {mask.dim()} dimensions with query of {query.dim()}"
    if any(a not in (1, b) for a, b in zip(reversed(mask.shape), reversed(full), strict=False)):
        return "attn_mask of a shape that does not broadcast"
    return None


def unserved(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    backend: str | None = None,
) -> str | None:
    """Why a call of F.scaled_dot_product_attention is left to torch; None if fastgpt serves it.

    Reads metadata alone, of fake tensors as well. The arguments are those of torch's function, backend is
    that of :func:`enable`.
    """
    if reason := _refused(query, key, value, attn_mask, dropout_p, scale):
        return reason
    shape = _shape(query, key, enable_gqa)
    if shape is None:
        return "query, key and value of batches or heads that do not broadcast"
    if attn_mask is not None:
        if is_causal:
            return "is_causal together with attn_mask"
        if reason := _refused_mask(query, key, attn_mask, shape):
            return reason
    asked, backward = dispatch.requested(backend), checks.needs_autograd(query, key, value, attn_mask)
    window = max(query.shape[-2] - key.shape[-2], 0) if is_causal else -1
    spec = AttentionSpec(1.0, -1, window, dropout_p=dropout_p, bias=attn_mask is not None)
    try:
        name = _choose(asked, query, value, spec, False, backward)
    except dispatch.BackendUnsupported as error:
        return str(error)
    if name == "torch" or (name == "reference" and asked == "auto"):
        return f"{asked!r} has {query.dtype} on {query.device.type} served by {name}"
    if asked == "auto" and not dropout_p and query.is_cpu:
        fewest = FEWEST[query.dtype.itemsize == 2, backward]
        rows = math.prod(shape.batch) * shape.nheads * query.shape[-2]
        if rows * key.shape[-2] * query.shape[-1] < fewest:
            return f"under {fewest:,} multiply-adds of {query.dtype}, for which torch takes less time"
    return None


def _choose(asked: str, query: Tensor, value: Tensor, spec: AttentionSpec, lse: bool, backward: bool) -> str:
    metadata = checks.device_type(query), query.dtype, query.shape[-1], value.shape[-1]
    return dispatch.choose(asked, AttentionCall, FEATURES, used(spec, lse, backward), *metadata)


def _around(*tensors: Tensor | None) -> str | None:
    """Why the calls of this place are left to torch."""
    for t in tensors:
        if t is not None and type(t) not in checks.PLAIN_TENSORS:
            return f"{type(t).__name__} in the place of a plain tensor"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func's transforms"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode derivatives"
    if not torch.backends.cuda.flash_sdp_enabled():
        return "flash attention is switched off (torch.nn.attention.sdpa_kernel)"
    return None


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
    """What :func:`unserved` has nothing against."""
    shape = _shape(query, key, enable_gqa)
    assert shape is not None
    rank = max(query.dim(), key.dim())

    def bhsd(t: Tensor, nheads: int) -> Tensor:
        """(batch, nheads, seqlen, headdim), a view where batches merge and rows are dense."""
        full = (*shape.batch, nheads, *t.shape[-2:])
        t = t if t.shape == full else t.expand(full)
        t = t if t.dim() == 4 else t.flatten(0, -4)
        return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()

    seqlen_q, seqlen_k = query.shape[-2], key.shape[-2]
    right = -1
    if is_causal:
        # torch aligns a causal mask top-left, j <= i: no query sees a key past the last query's place, and
        # where keys are fewer than queries, fastgpt's window, aligned bottom-right, makes up for it.
        key, value = key[..., :seqlen_q, :], value[..., :seqlen_q, :]
        right = max(seqlen_q - seqlen_k, 0)
    if attn_mask is not None:
        attn_mask = attn_mask[(None,) * (len(shape.batch) + 3 - attn_mask.dim())]
        if attn_mask.dim() > 4:
            attn_mask = attn_mask.expand(*shape.batch, *attn_mask.shape[-3:]).flatten(0, -4)
    out: Any = attention(
        bhsd(query, shape.nheads).transpose(1, 2),
        bhsd(key, shape.nheads_k).transpose(1, 2),
        bhsd(value, shape.nheads_k).transpose(1, 2),
        causal=False,
        window_size=(-1, right),
        softmax_scale=scale,
        attn_bias=attn_mask,
        dropout_p=dropout_p,
        backend=backend,
    )
    out = out.transpose(1, 2)
    if rank > 4:
        return out.unflatten(0, shape.batch)
    return out[(0,) * (4 - rank)] if rank < 4 else out


def _left(operator: str, reason: str | None) -> bool:
    """Whether a call is left to torch, and says why."""
    if reason is not None:
        dispatch.say_once(logging.DEBUG, f"{operator} is left to torch: {reason}")
    return reason is not None


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
    if _left(SDPA, reason):
        return own_sdpa(*args, scale=scale, enable_gqa=enable_gqa)
    return _attend(*args, scale, enable_gqa, backend)


@torch.no_grad()
def _kernel_below_autograd(*args: Any, **kwargs: Any) -> Tensor:
    return _kernel(*args, **kwargs)


def _unserved_mha(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_head: int,
    hidden: Tensor | None,
    need_weights: bool,
    backend: str | None,
    *weights: Tensor,
) -> str | None:
    if reason := _around(query, key, value, hidden, *weights):
        return reason
    if need_weights:
        return "the weights are to be returned, which fastgpt never stores"
    if query.dim() != 3 or query.shape[-1] % num_head or any(t.dtype != query.dtype for t in weights):
        return "weights of another dtype, heads that do not divide them, or no batch"
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
    original: Callable[..., Any],
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

    query, key, value: (batch, seqlen, embed_dim). mask: (batch, seqlen) with mask_type 1, otherwise
    (batch, num_head, seqlen, seqlen); what is not 0 is hidden.
    """
    weights = (qkv_weight, qkv_bias, proj_weight, proj_bias)
    hidden = mask[:, None, None] if mask is not None and mask_type == 1 else mask
    backend = _backend()
    reason = _unserved_mha(query, key, value, num_head, hidden, need_weights, backend, *weights)
    if _left(MHA, reason):
        options = (mask, need_weights, average_attn_weights, mask_type)
        return original(query, key, value, embed_dim, num_head, *weights, *options)
    if query is key is value:
        projected = F.linear(query, qkv_weight, qkv_bias).chunk(3, -1)
    else:  # autocast makes one tensor three
        parts = zip((query, key, value), qkv_weight.chunk(3), qkv_bias.chunk(3), strict=True)
        projected = tuple(F.linear(*part) for part in parts)
    q, k, v = (t.unflatten(-1, (num_head, -1)) for t in projected)
    visible = None if hidden is None else ~hidden.bool()
    out: Any = attention(q, k, v, causal=False, attn_bias=visible, backend=backend)
    return F.linear(out.flatten(2), proj_weight, proj_bias), None


def _original(operator: str, key: str) -> Callable[..., Any] | None:
    """The kernel that is in place now; None where this torch has none."""
    try:
        kernel = torch.library.get_kernel(f"aten::{operator}", key)
    except RuntimeError:
        return None
    return lambda first, *args, **kwargs: kernel.call_boxed(
        torch._C._dispatch_keys(first), first, *args, **kwargs
    )


def _override(kernels: dict[tuple[str, str], Callable[..., Any]]) -> torch.library.Library:
    """Puts them, by operator and key, in the place of torch's until the library is destroyed."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():  # torch's, that there was a kernel
        warnings.simplefilter("ignore")
        for (operator, key), kernel in kernels.items():
            library.impl(operator, kernel, key, allow_override=True)
            _alive.append(torch.library.get_kernel(f"aten::{operator}", key))
    return library


def _kernels() -> dict[tuple[str, str], Callable[..., Any]]:
    # Below autograd, in inference mode, BackendSelect comes before the devices. With a kernel for a device
    # itself, torch.export would take the operator for one that is not composed of others, and keep it.
    kernels: dict[tuple[str, str], Callable[..., Any]] = {
        (SDPA, "AutogradCPU"): _kernel,
        (SDPA, "AutogradCUDA"): _kernel,
        (SDPA, "BackendSelect"): _kernel_below_autograd,
    }
    if original := _original(MHA, "CPU"):
        kernels[MHA, "CPU"] = functools.partial(_mha_kernel, original)
    return kernels


class Serving:
    """What :func:`enable` began; ends with :meth:`undo`, or where ``with enable():`` does."""

    def __init__(self, backend: str | None) -> None:
        self.backend = backend
        with _lock:
            if not _active:
                _libraries.append(_override(_kernels()))
            _active.append(self)

    def __enter__(self) -> Serving:
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
    headdim) are read where they lie. A row that sees no key gives 0. nn.MultiheadAttention is left to torch
    where need_weights is True.

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


class FlashAttention:
    """torch's operators of flash attention on fastgpt, from activate_flash_attention_impl to :meth:`remove`.

    Tensors are (batch, seqlen, nheads, headdim), packed ones (total, nheads, headdim), and those of the
    operators that are named after scaled_dot_product_attention (batch, nheads, seqlen, headdim), each result
    with the strides of the input that it is like, as torch.compile expects. Causal masks and windows align
    bottom-right, as fastgpt's; lse is fastgpt's. Seed and offset of dropout go from forward to backward in
    rng_state, (2), uint64.
    """

    def __init__(self, backend: str | None, key: str) -> None:
        self.asked = dispatch.requested(backend)
        kernels: dict[str, Callable[..., Any]] = {
            "_scaled_dot_product_flash_attention": self.sdpa_forward,
            "_scaled_dot_product_flash_attention_backward": self.sdpa_backward,
            "_flash_attention_forward": self.forward,
            "_flash_attention_forward_no_dropout_inplace": self.forward_inplace,
            "_flash_attention_backward": self.backward,
        }
        self.library = _override(
            {(name, key): _or_original(name, key, kernel) for name, kernel in kernels.items()}
        )

    def remove(self) -> None:
        self.library._destroy()

    def _spec(
        self,
        q: Tensor,
        v: Tensor,
        scale: float | None,
        is_causal: bool,
        left: int | None,
        right: int | None,
        dropout_p: float,
        tensors: AttentionTensors,
    ) -> tuple[AttentionSpec, str]:
        """And the backend: the same for forward and backward, since dropout's bits are one or the other's."""
        spec = AttentionSpec(
            q.shape[-1] ** -0.5 if scale is None else scale,
            -1 if left is None else left,
            0 if is_causal else -1 if right is None else right,
            dropout_p=dropout_p,
            alibi=tensors.alibi_slopes is not None,
            varlen=tensors.cu_seqlens_q is not None,
            key_ranges=tensors.seqused_k is not None,
        )
        backend = _choose(self.asked, q, v, spec, True, True)
        if backend == "reference" and self.asked == "auto":
            raise dispatch.BackendUnsupported("'auto' has it served by reference")
        return spec, backend

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cum_seq_q: Tensor | None,
        cum_seq_k: Tensor | None,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        return_debug_mask: bool,
        *,
        scale: float | None = None,
        window_size_left: int | None = None,
        window_size_right: int | None = None,
        seqused_k: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        block_table: Tensor | None = None,
        num_splits: int | None = None,
    ) -> tuple[Tensor, ...]:
        if return_debug_mask or block_table is not None:
            raise dispatch.BackendUnsupported("a debug mask or a block table")
        tensors = AttentionTensors(cum_seq_q, cum_seq_k, seqused_k, None, alibi_slopes)
        window = (is_causal, window_size_left, window_size_right)
        spec, backend = self._spec(query, value, scale, *window, dropout_p, tensors)
        rng_state = checks.check_dropout(dropout_p, None, query.device)
        options: dict[str, Any] = {
            "causal": False,
            "softmax_scale": spec.softmax_scale,
            "window_size": (spec.window_left, spec.window_right),
            "alibi_slopes": alibi_slopes,
            "seqused_k": seqused_k,
            "dropout_p": dropout_p,
            "rng_state": rng_state,
            "return_lse": True,
            "backend": backend,
        }
        with torch.no_grad():
            if cum_seq_q is None or cum_seq_k is None:
                out, lse = attention(query, key, value, **options)
            else:
                options |= {"cu_seqlens_q": cum_seq_q, "cu_seqlens_k": cum_seq_k}
                out, lse = attention_varlen(query, key, value, **options)
        state = query.new_zeros(2, dtype=torch.uint64) if rng_state is None else rng_state.view(torch.uint64)
        return _like(query, out), lse, state, query.new_zeros((), dtype=torch.uint64), query.new_empty(0)

    def forward_inplace(self, out: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result, lse, *_ = self.forward(*args, **kwargs)
        out.copy_(result)
        return lse

    def backward(
        self,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        cum_seq_q: Tensor | None,
        cum_seq_k: Tensor | None,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        rng_state: Tensor,
        unused: Tensor,
        *,
        scale: float | None = None,
        window_size_left: int | None = None,
        window_size_right: int | None = None,
    ) -> tuple[Tensor, ...]:
        state = rng_state.view(torch.int64) if dropout_p else None
        tensors = AttentionTensors(cum_seq_q, cum_seq_k, rng_state=state)
        window = (is_causal, window_size_left, window_size_right)
        spec, backend = self._spec(query, value, scale, *window, dropout_p, tensors)
        args = (query, key, value, out, logsumexp, False, *pack(spec, tensors, backend))
        grads = torch.ops.fastgpt.attention_bwd.default(grad_out, None, *args)[:3]
        return tuple(map(_like, (query, key, value), grads))

    def sdpa_forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        return_debug_mask: bool = False,
        *,
        scale: float | None = None,
    ) -> tuple[Any, ...]:
        lengths = query.shape[2], key.shape[2]
        q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        args: Any = (q, k, v, None, None, *lengths, dropout_p, is_causal, return_debug_mask)
        out, lse, *rest = self.forward(*args, scale=scale)
        return out.transpose(1, 2), lse, None, None, *lengths, *rest

    def sdpa_backward(
        self,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        *args: Any,
        scale: float | None = None,
    ) -> tuple[Tensor, ...]:
        bshd = [t.transpose(1, 2) for t in (grad_out, query, key, value, out)]
        grads: Any = self.backward(*(*bshd, logsumexp, *args), scale=scale)
        return tuple(d.transpose(1, 2) for d in grads)


def _like(t: Tensor, result: Tensor) -> Tensor:
    """result with the strides of torch.empty_like(t)."""
    like = torch.empty_like(t)
    return result if result.stride() == like.stride() else like.copy_(result)


def _or_original(operator: str, key: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel; and torch's where it refuses with BackendUnsupported, if torch has one."""
    original = _original(operator, key)

    def either(*args: Any, **kwargs: Any) -> Any:
        try:
            return kernel(*args, **kwargs)
        except dispatch.BackendUnsupported as error:
            if original is None:
                raise
            _left(operator, str(error))
        return original(*args, **kwargs)

    return either


def register(backend: str | None = None) -> str:
    """Makes "fastgpt" a name that torch's own hook knows, for flash attention on GPUs in this process.

        sdpa.register()
        torch.nn.attention.activate_flash_attention_impl("fastgpt")
        ...
        torch.nn.attention.restore_flash_attention_impl()

    Where torch chooses flash attention for CUDA tensors, it is fastgpt's kernels that run: in
    F.scaled_dot_product_attention, in torch.nn.attention.varlen and in graphs of torch.compile. What they do
    not serve (block tables, and with ``auto`` GPUs on which their parity is not on record) runs on torch's.

    Args:
        backend: which of fastgpt's; the name is then ``fastgpt_`` and it. Default ``FASTGPT_BACKEND``, else
            ``auto``.

    Returns:
        the name.

    Raises:
        ValueError, TypeError: backend is not the name of one.
        RuntimeError: this torch has no such hook.
    """
    dispatch.requested(backend)  # refuses a name that is not a backend
    hook = getattr(torch.nn.attention, "register_flash_attention_impl", None)
    if hook is None:
        raise RuntimeError(
            f"torch {torch.__version__} has no torch.nn.attention.register_flash_attention_impl"
        )
    name = "fastgpt" if backend is None else f"fastgpt_{backend}"
    hook(name, register_fn=functools.partial(FlashAttention, backend, "CUDA"))
    return name
