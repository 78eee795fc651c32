"""What is computed for a few rows on the native CPU kernels: ``csrc/cpu/linear.h`` and ``block.h``.

Storage fp32, bf16 or fp16, arithmetic fp32; what passes from one step to the next is rounded to storage. All
return None, and have done nothing, where the operands do not fit each other, or are not laid out as the
kernels read them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgpt import _cpu
from fastgpt.ops.few_rows.spec import Attention, Cache, Mlp, Projection, Rotary


def _out(x: Tensor, projection: Projection, transposed: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], projection.weight.shape[transposed]))


def linear(x: Tensor, projection: Projection, transposed: bool) -> Tensor | None:
    out = _out(x, projection, transposed)
    return out if _cpu.linear(x, projection, transposed, out, torch.get_num_threads()) else None


def mlp(x: Tensor, spec: Mlp) -> Tensor | None:
    out = _out(x, spec.down, spec.transposed)
    return out if _cpu.mlp(x, spec, out, torch.get_num_threads()) else None


def block(x: Tensor, attention: Attention, rotary: Rotary | None, cache: Cache, mlp: Mlp) -> Tensor | None:
    between, out = _out(x, attention.out, attention.transposed), _out(x, mlp.down, mlp.transposed)
    done = _cpu.block(x, attention, rotary, cache, mlp, between, out, torch.get_num_threads())
    return out if done else None


def attention(x: Tensor, spec: Attention, rotary: Rotary | None, cache: Cache) -> Tensor | None:
    out = _out(x, spec.out, spec.transposed)
    return out if _cpu.attention_block(x, spec, rotary, cache, out, torch.get_num_threads()) else None
