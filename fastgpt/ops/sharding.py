"""How the operators take DTensors: along which axes the ranks of a mesh can each compute their own part.

Attention is sharded by batch and by heads, norms by every axis but the last (the rows), merges by batch,
heads and queries, rotary embedding by batch and heads. What comes in sharded otherwise, DTensor redistributes
first. For each mesh dimension a rule lists what it may do: the placements of the outputs and of the inputs.
"""

from __future__ import annotations

import itertools
import math
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastgpt.dispatch import logger, traced_as_constant
from fastgpt.ops.attention.spec import AttentionTensors

# Of a mesh dimension: the placements of the outputs, and of the inputs with None for what is no tensor.
Choice = tuple[list[Any], list[Any]]
_registered = False
_lock = threading.Lock()


@traced_as_constant
def prepare() -> None:
    """Registers the rules if there may be DTensors, whose module takes longer to import than fastgpt."""
    global _registered
    if _registered or "torch.distributed.tensor" not in sys.modules:
        return
    with _lock:
        if _registered:  # by another thread, meanwhile
            return
        try:
            register()
        except Exception as error:  # of a torch to come, say: plain tensors are served in any case
            logger.warning("fastgpt: DTensors are not served with this torch: %r", error)
        _registered = True


def _replicated(outputs: int, inputs: Sequence[object]) -> Choice:
    from torch.distributed.tensor import Replicate

    return [Replicate()] * outputs, [Replicate() if _is_tensor(t) else None for t in inputs]


def _if(tensor: object, place: Any) -> Any:
    return None if tensor is None else place


def _is_tensor(value: object) -> bool:
    return hasattr(value, "tensor_meta")


def _divisible(heads: int, mesh: Any) -> bool:
    """Whether the mesh dimensions that heads can be spread over, in any combination, take equally many."""
    sizes = [mesh.size(i) for i in range(mesh.ndim)]
    combinations = itertools.chain.from_iterable(
        itertools.combinations(sizes, n) for n in range(1, len(sizes) + 1)
    )
    parts = [math.prod(some) for some in combinations]
    return all(heads % n == 0 for n in parts if n <= heads)


def _attention(
    q: Any, k: Any, rest: Sequence[Any], gradients: bool, bias_gradient: bool, dlse: bool
) -> list[Choice]:
    """Of attention_fwd and attention_bwd; ``rest``: what follows the tensors that every call has."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    tensors, scalars = AttentionTensors(*rest[:8]), rest[8:]
    slopes, bias = tensors.alibi_slopes, tensors.attn_bias
    packed, dropout_p = q.ndim == 3, scalars[4]
    # The axis along which each tensor is sharded; what has none, every rank has whole.
    batch = {"q": 0, "kv": 0, "lse": 0, "seqused_k": 0, "leftpad_k": 0}
    heads = {"q": q.ndim - 2, "kv": q.ndim - 2, "lse": q.ndim - 3, "sink": 0}
    if slopes is not None:
        heads["alibi_slopes"] = slopes.ndim - 1
        if slopes.ndim == 2:
            batch["alibi_slopes"] = 0
    if bias is not None:
        if bias.shape[0] > 1:
            batch["attn_bias"] = 0
        if bias.shape[1] > 1:
            heads["attn_bias"] = 1
    axes = []
    if not dropout_p:  # whose keep mask counts batch and heads from the first of the whole call
        axes = [heads] if packed else [batch, heads]
        if k.shape[-2] == 1:  # MQA: all query heads have the same key head
            del heads["kv"]
        elif not _divisible(k.shape[-2], q.mesh):  # a rank has the key heads of its query heads
            axes.remove(heads)

    def choice(axis: dict[str, int]) -> Choice:
        def place(name: str) -> Any:
            return Shard(axis[name]) if name in axis else Replicate()

        def gradient(name: str) -> Any:
            return place(name) if name in axis else Partial()

        dsink = Replicate() if tensors.sink is None else gradient("sink")
        dbias = gradient("attn_bias") if bias is not None and bias_gradient else Replicate()
        q, kv, lse = place("q"), place("kv"), place("lse")
        optional = [None if t is None else place(name) for name, t in tensors._asdict().items()]
        ends = optional + [None] * len(scalars)
        if not gradients:
            return [q, lse], [q, kv, kv, *ends]
        outputs = [q, gradient("kv"), gradient("kv"), dsink, dbias]
        return outputs, [q, lse if dlse else None, q, kv, kv, q, lse, None, *ends]

    return [choice(axis) for axis in axes]


def _attention_forward(q: Any, k: Any, v: Any, *rest: Any) -> list[Choice]:
    return [_replicated(2, (q, k, v, *rest)), *_attention(q, k, rest, False, False, False)]


def _attention_backward(*args: Any) -> list[Choice]:
    _, dlse, q, k, _, _, _, bias_gradient, *rest = args
    return [_replicated(5, args), *_attention(q, k, rest, True, bias_gradient, dlse is not None)]


def _norm_forward(*args: Any) -> list[Choice]:
    from torch.distributed.tensor import Replicate, Shard

    x, residual, weight, bias, rng_state, store_sum, rms, *_ = args
    choices = [_replicated(4, args)]
    for dim in range(x.ndim - 1) if rng_state is None else ():  # dropout counts the rows of the whole x
        rows, whole = Shard(dim), Replicate()
        stored = rows if store_sum and residual is not None else whole
        outputs = [rows, stored, whole if rms else rows, rows]
        tensors = [rows, _if(residual, rows), _if(weight, whole), _if(bias, whole)]
        choices.append((outputs, tensors + [None] * (len(args) - len(tensors))))
    return choices


def _norm_backward(*args: Any) -> list[Choice]:
    from torch.distributed.tensor import Partial, Replicate, Shard

    _, dresidual_out, z, weight, bias, _, _, rng_state, _, rms, *_ = args
    choices = [_replicated(4, args)]
    for dim in range(z.ndim - 1) if rng_state is None else ():
        rows, whole = Shard(dim), Replicate()
        outputs = [rows, whole, *(whole if t is None else Partial() for t in (weight, bias))]
        tensors = [rows, _if(dresidual_out, rows), rows, _if(weight, whole), _if(bias, whole)]
        tensors += [whole if rms else rows, rows]
        choices.append((outputs, tensors + [None] * (len(args) - len(tensors))))
    return choices


def _rotary(x: Any, cos: Any, sin: Any, seqlen_offsets: Any, cu_seqlens: Any, *scalars: Any) -> list[Choice]:
    from torch.distributed.tensor import Replicate, Shard

    whole, rest = Replicate(), [None] * len(scalars)
    heads = Shard(x.ndim - 2)
    tables = [whole, whole]
    choices = [
        _replicated(1, (x, cos, sin, seqlen_offsets, cu_seqlens, *scalars)),
        ([heads], [heads, *tables, _if(seqlen_offsets, whole), _if(cu_seqlens, whole), *rest]),
    ]
    if cu_seqlens is None:
        choices.append(([Shard(0)], [Shard(0), *tables, _if(seqlen_offsets, Shard(0)), None, *rest]))
    return choices


def _merge(outputs: int, args: Sequence[Any]) -> list[Choice]:
    from torch.distributed.tensor import Shard

    def choice(out: int, lse: int) -> Choice:
        pair = [Shard(out), Shard(lse)]
        sides = len(args[:-1]) // 2  # each an out and an lse, or the gradients of both
        places = [_if(t, place) for place, t in zip(pair * sides, args, strict=False)]
        return pair * (outputs // 2), [*places, None]

    axes = ((0, 0), (1, 2), (2, 1)) if args[0].ndim == 4 else ((0, 1), (1, 0))
    return [_replicated(outputs, args), *(choice(*pair) for pair in axes)]


RULES: dict[str, Callable[..., list[Choice]]] = {
    "attention_fwd": _attention_forward,
    "attention_bwd": _attention_backward,
    "norm_fwd": _norm_forward,
    "norm_bwd": _norm_backward,
    "merge_fwd": lambda *args: _merge(2, args),
    "merge_bwd": lambda *args: _merge(4, args),
    "rotary": _rotary,
}


def register() -> None:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
    from torch.distributed.tensor.experimental import register_sharding

    propagator = DTensor._op_dispatcher.sharding_propagator
    for name, rule in RULES.items():
        operator = getattr(torch.ops.fastgpt, name).default
        register_sharding(operator)(rule)
        # register_sharding has no say in what a remembered choice is remembered by: the integers and what
        # follows them. Booleans before them decide here, too, which outputs there are.
        propagator.register_op_strategy(
            operator, propagator.op_strategy_funcs[operator], RuntimeSchemaInfo(static_argnum=0)
        )
