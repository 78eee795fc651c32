"""Not written: torch ships nothing that merges attention states.

A composition of torch's elementwise operators is what ``reference.py`` is; ``torch.distributed`` has a merge
for its ring attention, private and without a stable name.
"""

from __future__ import annotations

from fastgpt.ops.merge.spec import MergeCall

WHY_NOT = "torch has no operator that merges attention states"


def unsupported(call: MergeCall) -> list[str]:
    return [WHY_NOT]
