"""flash-attn's interface on fastgpt's kernels: on any device, in any of its dtypes, for training too.

    from fastgpt.integrations.flash_attn import flash_attn_func  # in your own code
    fastgpt.integrations.flash_attn.install()  # in other people's: `import flash_attn`

The modules are flash-attn's: ``bert_padding``, ``layers.rotary``, ``ops.triton.layer_norm``.
"""

from __future__ import annotations

from fastgpt.integrations.flash_attn.flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from fastgpt.integrations.flash_attn.installation import VERSION as __version__
from fastgpt.integrations.flash_attn.installation import Installation, install

__all__ = [
    "Installation",
    "__version__",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "install",
]
