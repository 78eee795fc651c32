"""torch's own hook for flash attention on GPUs. No GPU has run it yet."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgpt import dispatch
from fastgpt.integrations.sdpa.override import left, original, override
from fastgpt.integrations.sdpa.rule import choose
from fastgpt.ops import checks
from fastgpt.ops.attention.api import attention, attention_varlen
from fastgpt.ops.attention.library import pack
from fastgpt.ops.attention.spec import AttentionSpec, AttentionTensors


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
        self.library = override(
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
        backend = choose(self.asked, q, v, spec, True, True)
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
        if return_debug_mask and dropout_p:
            # Torch's kernel, which alone has the mask, would draw other bits than the backward here.
            raise ValueError(
                f"return_debug_mask: got True with dropout_p {dropout_p:g}, expected False; torch's own "
                "kernel has it, after torch.nn.attention.restore_flash_attention_impl()"
            )
        if return_debug_mask or block_table is not None:
            raise dispatch.BackendUnsupported("a debug mask or a block table")
        tensors = AttentionTensors(cum_seq_q, cum_seq_k, seqused_k, None, alibi_slopes)
        window = (is_causal, window_size_left, window_size_right)
        spec, backend = self._spec(query, value, scale, *window, dropout_p, tensors)
        rng_state = checks.check_dropout(dropout_p, None, query)
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
        return like(query, out), lse, state, query.new_zeros((), dtype=torch.uint64), query.new_empty(0)

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
        return tuple(map(like, (query, key, value), grads))

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


def like(t: Tensor, result: Tensor) -> Tensor:
    """result with the strides of torch.empty_like(t)."""
    empty = torch.empty_like(t)
    return result if result.stride() == empty.stride() else empty.copy_(result)


def _or_original(operator: str, key: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel; and torch's where it refuses with BackendUnsupported, if torch has one."""
    own = original(operator, key)

    def either(*args: Any, **kwargs: Any) -> Any:
        try:
            return kernel(*args, **kwargs)
        except dispatch.BackendUnsupported as error:
            if own is None:
                raise
            left(operator, str(error))
        return own(*args, **kwargs)

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
