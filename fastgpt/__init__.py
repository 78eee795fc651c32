"""fastgpt: fused causal attention, layer norm and KV-cache decoding for PyTorch."""

from fastgpt.dispatch import BackendUnsupported
from fastgpt.kv_cache import KVCache
from fastgpt.ops.attention.api import attention, attention_varlen
from fastgpt.ops.decode.api import attention_with_kvcache

__all__ = ["BackendUnsupported", "KVCache", "attention", "attention_varlen", "attention_with_kvcache"]
