"""fastgpt: fused causal attention, layer norm and KV-cache decoding for PyTorch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from fastgpt.dispatch import BackendUnsupported
from fastgpt.kv_cache import KVCache
from fastgpt.ops.attention.api import attention, attention_varlen
from fastgpt.ops.decode.api import attention_with_kvcache
from fastgpt.ops.merge.api import merge_attention_states
from fastgpt.ops.norm.api import layer_norm, rms_norm
from fastgpt.ops.rotary.api import rotary_embedding

if TYPE_CHECKING:
    from fastgpt.gpt.config import GPTConfig
    from fastgpt.gpt.model import GPT
    from fastgpt.integrations.transformers import patch, register, unpatch

__all__ = [
    "GPT",
    "BackendUnsupported",
    "GPTConfig",
    "KVCache",
    "attention",
    "attention_varlen",
    "attention_with_kvcache",
    "layer_norm",
    "merge_attention_states",
    "patch",
    "register",
    "rms_norm",
    "rotary_embedding",
    "unpatch",
]

# Imported when first asked for: the operators alone should cost no more than torch.
_LAZY = {
    "GPT": "fastgpt.gpt.model",
    "GPTConfig": "fastgpt.gpt.config",
    "patch": "fastgpt.integrations.transformers",
    "register": "fastgpt.integrations.transformers",
    "unpatch": "fastgpt.integrations.transformers",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
