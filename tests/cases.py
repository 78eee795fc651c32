"""The tables of cases that every backend runs; they are part of the package, for `fastgpt verify`."""

from fastgpt.verify.attention import ATTENTION, VARIANTS, AttentionCase, Variant
from fastgpt.verify.decode import DECODE, DECODE_VARIANTS, DecodeCase, DecodeVariant

__all__ = [
    "ATTENTION",
    "DECODE",
    "DECODE_VARIANTS",
    "VARIANTS",
    "AttentionCase",
    "DecodeCase",
    "DecodeVariant",
    "Variant",
]
