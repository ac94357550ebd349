"""Triton's interpreter made fit for tests: it rounds as compiled kernels do, and it is faster."""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_convert_float = interpreter._convert_float
_patch_lang = interpreter._patch_lang
_patched = set()


def convert_float(values, from_dtype, to_dtype, rounding_mode):
    """float32 to bfloat16 rounds to nearest, ties to even; the interpreter of triton 3.9 cuts off the low bits."""
    if from_dtype == tl.float32 and to_dtype == tl.bfloat16:
        bits = np.ascontiguousarray(values).view(np.uint32)
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        return np.where((bits & 0x7FFFFFFF) > 0x7F800000, (bits >> 16) | 0x40, rounded).astype(np.uint16)
    if from_dtype == tl.bfloat16 and to_dtype == tl.float32:
        return np.ascontiguousarray(values).view(np.uint16).astype(np.uint32) << 16
    return _convert_float(values, from_dtype, to_dtype, rounding_mode)


class _Patched:
    def restore(self):
        """Nothing: the language stays patched."""


def patch_lang_once(fn):
    """The interpreter patches triton.language on every launch and every call of a function, most of its time."""
    if id(fn.__globals__) not in _patched:
        _patch_lang(fn)
        _patched.add(id(fn.__globals__))
    return _Patched()


def prepare():
    interpreter._convert_float = convert_float
    interpreter._patch_lang = patch_lang_once
