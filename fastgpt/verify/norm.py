"""The norms' table of cases, and each of them computed three times (see :mod:`fastgpt.verify.attention`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastgpt
from fastgpt.ops.norm.reference import philox_keep
from fastgpt.verify.rule import Result, as_called, require

KINDS = ("layer", "rms")
NORMS = {"layer": fastgpt.layer_norm, "rms": fastgpt.rms_norm}
NAMES = ("x", "residual", "weight", "bias")
EPS = 1e-5
Norm = Callable[..., Any]  # out, or out and the sum, of kind, x, residual, weight, bias, dropout_p


class NormCase(NamedTuple):
    """One call; ``weight`` is none, same (x's dtype) or float32, ``layout`` that of every (..., hidden)."""

    lead: tuple[int, ...]
    hidden: int
    weight: str = "same"
    bias: bool = True
    residual: bool = False
    prenorm: bool = False
    layout: str = "contiguous"
    offset: float = 0.0  # mean of x over its standard deviation
    dropout_p: float = 0.0

    def __str__(self) -> str:
        used = [name for name in ("bias", "residual", "prenorm") if getattr(self, name)]
        size = "x".join(map(str, (*self.lead, self.hidden)))
        weight = "no-weight" if self.weight == "none" else f"{self.weight}-weight"
        return (
            "-".join([size, weight, *used, *([self.layout] if self.layout != "contiguous" else [])])
            + (f"-offset{self.offset:g}" if self.offset else "")
            + (f"-dropout{self.dropout_p:g}" if self.dropout_p else "")
        )


CASES = [
    NormCase((0,), 768, residual=True, prenorm=True),
    NormCase((), 7),
    NormCase((3,), 1, residual=True),
    NormCase((257,), 1, weight="none", bias=False),
    NormCase((3,), 7, weight="none", bias=True, residual=True, prenorm=True),
    NormCase((257,), 7, residual=True, prenorm=True),
    NormCase((257,), 64),
    NormCase((3, 1, 5), 64, weight="float32", residual=True),
    NormCase((67,), 512, residual=True, prenorm=True),
    NormCase((1,), 576, bias=False, residual=True, prenorm=True),
    NormCase((2, 17), 576, weight="float32", bias=False, residual=True, prenorm=True),
    NormCase((257,), 768, residual=True, prenorm=True),
    NormCase((33,), 768, prenorm=True),
    NormCase((65,), 768, offset=1e4),
    NormCase((65,), 768, residual=True, offset=1e4),
    NormCase((33,), 768, layout="slice", residual=True, prenorm=True),
    NormCase((33,), 1000, weight="none", bias=False),
    NormCase((4, 5), 1000, layout="transpose", residual=True, prenorm=True),
    NormCase((9,), 1000, layout="expand", residual=True, prenorm=True),
    NormCase((17,), 4096 + 3, weight="float32", residual=True, prenorm=True),
    NormCase((2,), 131072, weight="none", bias=True, residual=True, prenorm=True),
    # Every set of parameters at the ends of the range of hidden sizes, and with dropout all and none of them.
    *(
        NormCase((2 if hidden > 1000 else 67,), hidden, weight, bias, residual=True, dropout_p=dropout_p)
        for hidden in (1, 2, 3, 17, 131072)
        for weight, bias in (("same", True), ("same", False), ("none", True), ("none", False))
        # 0.5 scales exactly: plain PyTorch then has the same sums, and no luck with gradients of 3 elements.
        for dropout_p in ((0.0, 0.5) if bias == (weight == "same") else (0.0,))
    ),
    NormCase((0,), 5, residual=True, prenorm=True, dropout_p=0.3),
    NormCase((), 7, prenorm=True, dropout_p=0.3),
    NormCase((257,), 768, dropout_p=0.1),
    NormCase((3, 1, 5), 64, weight="float32", residual=True, prenorm=True, dropout_p=0.6),
    NormCase((33,), 768, layout="slice", residual=True, prenorm=True, dropout_p=0.1),
    NormCase((4, 5), 1000, layout="transpose", prenorm=True, dropout_p=0.9),
    NormCase((9,), 1000, layout="expand", residual=True, prenorm=True, dropout_p=0.1),
    NormCase((17,), 4096 + 3, residual=True, prenorm=True, dropout_p=0.5),
]
MEDIUM = [
    NormCase((8192,), 768),
    NormCase((4096,), 4096, residual=True, prenorm=True),
    NormCase((1000,), 8192, bias=False, residual=True),
    NormCase((257,), 16384, dropout_p=0.1),
]
# Seed and offset of every case's dropout, not next to each other.
STATE = torch.tensor([2**63 - 25, 0, 2**33 + 5])[::2]


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The values of t (of one row of t, for expand) in another memory layout."""
    if layout == "slice":  # what lies beside a row is NaN
        wide = torch.full((*t.shape[:-1], t.shape[-1] + 5), torch.nan, dtype=t.dtype)
        wide[..., 3:-2] = t
        return wide[..., 3:-2]
    if layout == "transpose":
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "expand":
        return t[:1].expand_as(t)
    return t


def make_inputs(case: NormCase, dtype: torch.dtype) -> tuple[Any, ...]:
    """x, residual, weight, bias, and the gradients of out and of the sum."""
    shape = (*case.lead, case.hidden)
    x, residual, dout, dsum = (torch.randn(shape) for _ in range(4))
    if case.hidden <= 3:
        # Few elements are often nearly equal or 0, where the gradient has no digits. Of these signs, sums are
        # not, whatever dropout leaves of x.
        signs = torch.tensor([1.0, -1.0, 0.5])[: case.hidden]
        x, residual = signs * (1 + x.abs()), signs * (1 + residual.abs())
    x, residual, dout, dsum = (laid_out(t.to(dtype), case.layout) for t in (x, residual, dout, dsum))
    weight_dtype = torch.float32 if case.weight == "float32" else dtype
    weight, bias = (torch.randn(case.hidden).to(weight_dtype) for _ in range(2))
    return (
        laid_out((x.float() + case.offset).to(dtype), case.layout),
        residual if case.residual else None,
        None if case.weight == "none" else weight,
        bias if case.bias else None,
        dout,
        dsum,
    )


def plain_norm(
    kind: str,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(out, sum) as anyone would write it with what torch ships, and the bits of STATE."""
    z = x * philox_keep(STATE.to(x.device), dropout_p, x.shape) / (1 - dropout_p) if dropout_p else x
    z = z if residual is None else z + residual
    wide = z.to(torch.promote_types(z.dtype, next((t for t in (weight, bias) if t is not None), z).dtype))
    if kind == "layer":
        return F.layer_norm(wide, x.shape[-1:], weight, bias, EPS).to(x.dtype), z
    out = F.rms_norm(wide, x.shape[-1:], weight, EPS)
    return (out if bias is None else out + bias).to(x.dtype), z


def fused_norm(backend: str) -> Norm:
    def norm(
        kind: str,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        dropout_p: float = 0.0,
        prenorm: bool = True,
    ) -> Any:
        state = STATE.to(x.device) if dropout_p else None
        options: dict[str, Any] = {
            "residual": residual,
            "prenorm": prenorm,
            "dropout_p": dropout_p,
            "rng_state": state,
        }
        with as_called():
            return NORMS[kind](x, weight, bias, EPS, **options, backend=backend)

    return norm


def gradients(norm: Norm, kind: str, case: NormCase, inputs: Sequence[Any]) -> dict[str, Tensor]:
    """The gradient of each input that the case has, by name."""
    *tensors, dout, dsum = inputs
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    out, total = norm(kind, *leaves, case.dropout_p)
    if case.prenorm:
        torch.autograd.backward([out, total], [dout, dsum])
    else:
        out.backward(dout)
    return {name: t.grad for name, t in zip(NAMES, leaves, strict=True) if t is not None}


def double(tensors: Sequence[Tensor | None]) -> list[Any]:
    return [None if t is None else t.double() for t in tensors]


def forward_results(
    case: NormCase, kind: str, dtype: torch.dtype, backend: str, other: Norm = plain_norm
) -> list[Result]:
    """(what, got, plain, exact) of out and the sum."""
    *tensors, _, _ = make_inputs(case, dtype)
    got = fused_norm(backend)(kind, *tensors, case.dropout_p, prenorm=case.prenorm)
    got = got if case.prenorm else (got,)
    require(got[0].is_contiguous() and all(t.dtype == dtype for t in got), "out: not contiguous in x's dtype")
    plain = other(kind, *tensors, case.dropout_p)
    exact = other(kind, *double(tensors), case.dropout_p)
    return list(zip(("out", "sum"), got, plain, exact, strict=False))


def backward_results(
    case: NormCase, kind: str, dtype: torch.dtype, backend: str, other: Norm = plain_norm
) -> list[Result]:
    """(what, got, plain, exact) of the gradients of every input that the case has."""
    inputs = make_inputs(case, dtype)
    got = gradients(fused_norm(backend), kind, case, inputs)
    plain = gradients(other, kind, case, inputs)
    exact = gradients(other, kind, case, double(inputs))
    require(all(got[name].dtype == plain[name].dtype for name in exact), "a gradient has another dtype")
    return [(f"d{name}", got[name], plain[name], exact[name]) for name in exact]
