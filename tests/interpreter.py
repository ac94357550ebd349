"""Triton's interpreter as the compiled kernels are: bfloat16 rounded to nearest, ties to even.

The interpreter of triton 3.9 cuts off the low bits of a float32 instead.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_convert_float = interpreter._convert_float


def convert_float(values, from_dtype, to_dtype, rounding_mode):
    if from_dtype == tl.float32 and to_dtype == tl.bfloat16:
        bits = np.ascontiguousarray(values).view(np.uint32)
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        return np.where((bits & 0x7FFFFFFF) > 0x7F800000, (bits >> 16) | 0x40, rounded).astype(np.uint16)
    if from_dtype == tl.bfloat16 and to_dtype == tl.float32:
        return np.ascontiguousarray(values).view(np.uint16).astype(np.uint32) << 16
    return _convert_float(values, from_dtype, to_dtype, rounding_mode)


def round_to_nearest():
    """Makes the interpreter round."""
    interpreter._convert_float = convert_float
