"""The native CPU kernels; csrc/cpu/module.cpp."""

_Tensor = tuple[int, ...]  # pointer; batch, seq and head stride

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
    softmax_scale: float,
    window_left: int,
    window_right: int,
    num_threads: int,
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
