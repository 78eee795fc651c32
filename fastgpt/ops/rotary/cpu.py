"""Not written: of the native kernels only decode's turns its queries and keys itself."""

from __future__ import annotations

from fastgpt.ops.rotary.spec import RotaryCall

WHY_NOT = "rotary_embedding is not written for the CPU kernels (attention_with_kvcache has it built in)"


def unsupported(call: RotaryCall) -> list[str]:
    return [WHY_NOT]
