"""The native CPU kernels; csrc/cpu/module.cpp."""

from typing import Any

_Tensor = tuple[int, ...]  # pointer; batch, seq and head stride
_Dropout = tuple[int, int, int, float]  # threshold, offset, seed, scale

isa: str
built_isas: str

def attention_forward(
    dtype: int,
    sizes: tuple[int, ...],
    q: _Tensor,
    k: _Tensor,
    v: _Tensor,
    out: _Tensor,
    lse: int,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    num_threads: int,
    options: tuple[Any, ...] | None,
) -> None: ...
def attention_backward(
    dtype: int,
    sizes: tuple[int, ...],
    q: _Tensor,
    k: _Tensor,
    v: _Tensor,
    out: _Tensor,
    lse: int,
    dout: _Tensor,
    dlse: int,
    dq: _Tensor,
    dk: _Tensor,
    dv: _Tensor,
    dsink: int,
    dbias: int,
    dbias_strides: tuple[int, ...],
    softmax_scale: float,
    window_left: int,
    window_right: int,
    num_threads: int,
    options: tuple[Any, ...] | None,
) -> None: ...
def decode(
    dtype: int,
    sizes: tuple[int, ...],
    q: _Tensor,
    k_cache: _Tensor,
    v_cache: _Tensor,
    out: _Tensor,
    lse: int,
    cache_seqlens: int,
    seqlen_new: int,
    k_new: _Tensor,
    v_new: _Tensor,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    num_splits: int,
    num_threads: int,
) -> None: ...
def norm_forward(
    dtype: int,
    weight_dtype: int,
    rows: int,
    hidden: int,
    x: int,
    x_stride: int,
    residual: int,
    residual_stride: int,
    weight: int,
    bias: int,
    eps: float,
    out: int,
    residual_out: int,
    mean: int,
    rstd: int,
    num_threads: int,
    dropout: _Dropout | None,
) -> None: ...
def norm_backward(
    dtype: int,
    weight_dtype: int,
    rows: int,
    hidden: int,
    dout: int,
    dout_stride: int,
    x: int,
    x_stride: int,
    weight: int,
    dresidual: int,
    dresidual_stride: int,
    mean: int,
    rstd: int,
    dx: int,
    dsum: int,
    dweight: int,
    dbias: int,
    num_threads: int,
    dropout: _Dropout | None,
) -> None: ...
