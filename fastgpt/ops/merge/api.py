"""``fastgpt.merge_attention_states``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt import dispatch
from fastgpt.ops.checks import (
    check_same,
    check_tensor,
    device_type,
    needs_autograd,
    shape_of,
    signature,
    watched,
)
from fastgpt.ops.merge import library
from fastgpt.ops.merge.spec import FEATURES, MergeCall

BATCHED, PACKED = "(batch, seqlen, nheads, headdim_v)", "(total, nheads, headdim_v)"


def _check_out(name: str, value: object) -> None:
    if isinstance(value, Tensor) and value.dim() not in (3, 4):
        raise ValueError(f"{name}: got shape {shape_of(value)}, expected {BATCHED} or {PACKED}")
    check_tensor(name, value, PACKED if isinstance(value, Tensor) and value.dim() == 3 else BATCHED)


def _check_lse(name: str, value: object, out: Tensor) -> None:
    axes = "(nheads, total)" if out.dim() == 3 else "(batch, nheads, seqlen)"
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.Tensor {axes}")
    *lead, tokens, nheads, _ = out.shape
    if value.shape != (*lead, nheads, tokens):
        raise ValueError(
            f"{name}: got shape {shape_of(value)}, expected {(*lead, nheads, tokens)}, {axes} of out_a"
        )
    dtype = torch.float64 if out.dtype == torch.float64 else torch.float32
    if value.dtype != dtype:
        raise TypeError(f"{name}: got dtype {value.dtype}, expected {dtype} with out_a in {out.dtype}")
    if value.device != out.device:
        raise ValueError(f"{name}: got device {value.device}, expected {out.device} like out_a")


def merge_attention_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over the keys of two disjoint sets, from attention over each, with its backward.

    ``lse = log(exp(lse_a) + exp(lse_b))``, ``out = exp(lse_a − lse) · out_a + exp(lse_b − lse) · out_b``: the
    merge of Flash-Decoding (Dao et al. 2023) and of cascade attention, where queries that share a prefix
    attend to it together and to their own keys apart (FlashInfer's ``merge_state``, Ye et al. 2025,
    arXiv:2501.01005). Merges of merges give any number of sets; the order changes roundings only.

    Args:
        out_a, out_b: (batch, seqlen, nheads, headdim_v) or packed (total, nheads, headdim_v), float32,
            bfloat16, float16 (float64 on ``reference``), as :func:`fastgpt.attention` returns them. Any
            strides whose last is 1.
        lse_a, lse_b: (batch, nheads, seqlen) or (nheads, total), float32 (float64 for float64 tensors),
            natural logarithm, any strides. −inf: a row that saw no key, whose out is not read.
        backend: ``auto``, ``cpu``, ``reference``, ``triton`` or ``cuda`` (``torch`` has no such operator);
            default ``FASTGPT_BACKEND``, else ``auto``.

    Returns:
        out, in the layout and dtype of out_a, and lse, like lse_a; contiguous. A row that saw no key in
        either set gives 0 and −inf, and has gradients 0.

    Raises:
        ValueError, TypeError: an argument is not as above; the message names it.
        fastgpt.BackendUnsupported: the backend asked for cannot serve the call; the message says why.
    """
    _check_out("out_a", out_a)
    _check_lse("lse_a", lse_a, out_a)
    _check_out("out_b", out_b)
    if out_b.shape != out_a.shape:
        raise ValueError(f"out_b: got shape {shape_of(out_b)}, expected {shape_of(out_a)} like out_a")
    check_same("out_b", out_b, out_a, "out_a")
    _check_lse("lse_b", lse_b, out_a)

    backward = needs_autograd(out_a, lse_a, out_b, lse_b)
    asked = dispatch.requested(backend)
    name = dispatch.choose(asked, MergeCall, FEATURES, (backward,), device_type(out_a), out_a.dtype)
    if name == "reference":
        dispatch.warn_if_slow(asked, "merge", out_a.numel(), stacklevel=3)
    direct = not (backward or signature(out_a, lse_a, out_b, lse_b) is None or watched())
    return library.run(direct, out_a, lse_a, out_b, lse_b, name)
