"""The native CPU kernels; csrc/cpu/module.cpp."""

from torch import Tensor

from fastgpt.ops.few_rows.spec import Attention, Cache, Mlp, Projection, Rotary

_Dropout = tuple[int, int, int, float]  # threshold, offset, seed, scale

isa: str
built_isas: str

def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqused_k: Tensor | None,
    leftpad_k: Tensor | None,
    alibi_slopes: Tensor | None,
    sink: Tensor | None,
    bias: Tensor | None,
    dropout: _Dropout | None,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    num_threads: int,
) -> None: ...
def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dsink: Tensor | None,
    dbias: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqused_k: Tensor | None,
    leftpad_k: Tensor | None,
    alibi_slopes: Tensor | None,
    sink: Tensor | None,
    bias: Tensor | None,
    dropout: _Dropout | None,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    num_threads: int,
) -> None: ...
def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out: Tensor,
    lse: Tensor,
    k_new: Tensor | None,
    v_new: Tensor | None,
    cache_seqlens: Tensor,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    sink: Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
    q_source: Tensor | None,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    rotary_interleaved: bool,
    num_splits: int,
    num_threads: int,
) -> None: ...
def norm_forward(
    rows: int,
    hidden: int,
    x: Tensor,
    x_stride: int,
    residual: Tensor | None,
    residual_stride: int,
    weight: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    residual_out: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    dropout: _Dropout | None,
    eps: float,
    num_threads: int,
) -> None: ...
def norm_backward(
    rows: int,
    hidden: int,
    dout: Tensor,
    dout_stride: int,
    dresidual: Tensor | None,
    dresidual_stride: int,
    x: Tensor,
    x_stride: int,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    dx: Tensor,
    dsum: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    dropout: _Dropout | None,
    num_threads: int,
) -> None: ...
def merge_forward(
    out_a: Tensor,
    lse_a: Tensor,
    out_b: Tensor,
    lse_b: Tensor,
    out: Tensor,
    lse: Tensor,
    num_threads: int,
) -> None: ...
def merge_backward(
    out_a: Tensor,
    lse_a: Tensor,
    out_b: Tensor,
    lse_b: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    dout_a: Tensor,
    dlse_a: Tensor,
    dout_b: Tensor,
    dlse_b: Tensor,
    num_threads: int,
) -> None: ...

# Of fastgpt/ops/few_rows/spec.py; whether the operands fit each other: if not, nothing has happened.
def linear(x: Tensor, projection: Projection, transposed: bool, out: Tensor, num_threads: int) -> bool: ...
def mlp(x: Tensor, spec: Mlp, out: Tensor, num_threads: int) -> bool: ...
def attention_block(
    x: Tensor, spec: Attention, rotary: Rotary | None, cache: Cache, out: Tensor, num_threads: int
) -> bool: ...
def block(
    x: Tensor,
    attention: Attention,
    rotary: Rotary | None,
    cache: Cache,
    mlp: Mlp,
    between: Tensor,
    out: Tensor,
    num_threads: int,
) -> bool: ...
