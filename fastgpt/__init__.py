"""fastgpt: fused causal attention, layer norm and KV-cache decoding for PyTorch."""

from fastgpt.dispatch import BackendUnsupported
from fastgpt.ops.attention.api import attention, attention_varlen

__all__ = ["BackendUnsupported", "attention", "attention_varlen"]
