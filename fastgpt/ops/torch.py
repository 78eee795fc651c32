"""What the torch backends share: torch's own scaled_dot_product_attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_OPERATOR = torch.ops.aten.scaled_dot_product_attention.default


def own_sdpa(*args: Any, **kwargs: Any) -> Tensor:
    """torch's own, past what is registered in its place: that is fastgpt, where fastgpt.integrations.sdpa is
    enabled, and would call itself."""
    if torch.compiler.is_dynamo_compiling():  # which does not look into an operator
        return F.scaled_dot_product_attention(*args, **kwargs)
    return _OPERATOR.decompose(*args, **kwargs)
