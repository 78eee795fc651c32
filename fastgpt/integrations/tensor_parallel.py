"""Tensor parallelism of fastgpt's own modules (Shoeybi et al. 2019, arXiv:1909.08053).

    from torch.distributed.tensor.parallel import parallelize_module

    parallelize_module(gpt, mesh, {"blocks.*.attention": FusedParallel(), "blocks.*.mlp": FusedParallel()})

Models whose projections are apart, such as transformers', take torch's ColwiseParallel and RowwiseParallel:
the attention that :func:`fastgpt.patch` puts into them reads the number of heads from the tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from fastgpt.gpt.model import MLP, Attention
from fastgpt.nn import FusedCausalSelfAttention


class Apart(nn.Module):
    """A projection that is several in one, as these: a rank's rows of each are no range of the whole's."""

    def __init__(self, projection: nn.Linear, sizes: tuple[int, ...]) -> None:
        super().__init__()
        weights = projection.weight.split(sizes)
        biases = [None] * len(sizes) if projection.bias is None else projection.bias.split(sizes)
        self.parts = nn.ModuleList()
        for weight, bias in zip(weights, biases, strict=True):
            part = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, "meta")
            part.weight = nn.Parameter(weight.detach().clone(), projection.weight.requires_grad)
            if bias is not None:
                part.bias = nn.Parameter(bias.detach().clone(), projection.bias.requires_grad)
            self.parts.append(part)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], -1)


def _apart(projection: nn.Linear, sizes: tuple[int, ...], mesh: DeviceMesh) -> nn.Module:
    # One input for all, so that its gradient is summed over the ranks once.
    whole = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Replicate())
    return parallelize_module(Apart(projection, sizes), mesh, {"": whole, "parts.*": ColwiseParallel()})


class FusedParallel(ParallelStyle):
    """Shards an attention of fastgpt by heads, or an MLP by its width, over a mesh of one dimension.

    For :class:`fastgpt.nn.FusedCausalSelfAttention` and the attentions and MLPs of :class:`fastgpt.GPT`.
    Input and output are tensors that every rank has whole. The projections to q, k and v, or to gate and up,
    become ``parts``, each with its weight as a DTensor sharded by rows: put one after the other, their full
    tensors are the weight that was there. Dropout of attention draws the bits of a rank's heads from the
    rank's own generator.

    Raises:
        TypeError: the module is none of these.
        ValueError: the mesh has several dimensions, the module is sharded already, or the ranks are no
            divisor of its key heads, or of its width. The module is as it was, then.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if device_mesh.ndim != 1:
            raise ValueError(f"device_mesh: got {device_mesh.ndim} dimensions, expected 1, as mesh['tp'] has")
        if any(isinstance(child, Apart) for child in module.children()):
            raise ValueError(
                f"module: got a {type(module).__name__} that is sharded already, expected a whole one"
            )
        ranks = device_mesh.size()
        # Sizes change last: what fails before leaves the module as it was.
        if isinstance(module, FusedCausalSelfAttention):
            nheads, nheads_k = module.num_heads, module.num_kv_heads
            self._check("num_kv_heads", nheads_k, ranks)
            sizes = tuple(n * module.headdim for n in (nheads, nheads_k, nheads_k))
            self._shard(module, "qkv_proj", "out_proj", sizes, device_mesh)
            module.num_heads, module.num_kv_heads = nheads // ranks, nheads_k // ranks
        elif isinstance(module, Attention):
            nheads, nheads_k = module.nheads, module.nheads_k
            self._check("nheads_k", nheads_k, ranks)
            sizes = tuple(n * module.headdim for n in (nheads, nheads_k, nheads_k))
            self._shard(module, "qkv", "out", sizes, device_mesh)
            module.nheads, module.nheads_k = nheads // ranks, nheads_k // ranks
        elif isinstance(module, MLP):
            self._check("intermediate_size", module.width, ranks)
            sizes = (module.width,) * (2 if module.gated else 1)
            self._shard(module, "up", "down", sizes, device_mesh)
            module.width //= ranks
        else:
            raise TypeError(
                f"module: got {type(module).__name__}, expected FusedCausalSelfAttention, "
                "or an attention or MLP of a GPT"
            )
        return module

    @staticmethod
    def _shard(module: nn.Module, into: str, out_of: str, sizes: tuple[int, ...], mesh: DeviceMesh) -> None:
        """By the names of the projections into the heads or the width, and out of them."""
        parts = _apart(getattr(module, into), sizes, mesh)
        parallelize_module(getattr(module, out_of), mesh, RowwiseParallel())
        setattr(module, into, parts)

    @staticmethod
    def _check(name: str, size: int, ranks: int) -> None:
        if size % ranks != 0:
            raise ValueError(f"{name}: got {size}, expected a multiple of the {ranks} ranks of the mesh")
