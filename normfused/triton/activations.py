"""Every activation, written once: forward(z) and backward(z, dy), the gradient of z.

Comparisons are ordered as in csrc/kernels/activations.h: a NaN z comes out as NaN and lets dy pass, -0.0 stays -0.0,
and the gradient over a dead region is selected (an infinite dy there gives 0), never multiplied.
"""

import triton
import triton.language as tl


@triton.jit
def relu_forward(z):
    return tl.where(z < 0, 0.0, z)


@triton.jit
def relu_backward(z, dy):
    return tl.where(z <= 0, 0.0, dy)


@triton.jit
def relu6_forward(z):
    below = tl.where(z > 6, 6.0, z)
    return tl.where(below < 0, 0.0, below)


@triton.jit
def relu6_backward(z, dy):
    below = tl.where(z >= 6, 0.0, dy)
    return tl.where(z <= 0, 0.0, below)


@triton.jit
def sigmoid_forward(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def sigmoid_backward(z, dy):
    # s (1 - s) without the difference, which is 0 from z = 17 on in float32; even in z.
    e = tl.exp(tl.where(z < 0, z, -z))
    s = 1.0 / (1.0 + e)
    return dy * (e * s * s)


@triton.jit
def silu_forward(z):
    return z / (1.0 + tl.exp(-z))


@triton.jit
def silu_backward(z, dy):
    s = sigmoid_forward(z)
    return dy * (s * (1.0 + z * (1.0 - s)))


@triton.jit
def hardswish_forward(z):
    return z * relu6_forward(z + 3.0) / 6.0


@triton.jit
def hardswish_backward(z, dy):
    middle = tl.where(z < 3, dy * (z / 3.0 + 0.5), dy)
    return tl.where(z <= -3, 0.0, middle)


@triton.jit
def leaky_relu_forward(z):
    return tl.where(z <= 0, z * 0.01, z)


@triton.jit
def leaky_relu_backward(z, dy):
    return tl.where(z <= 0, dy * 0.01, dy)


@triton.jit
def forward(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        y = relu_forward(z)
    elif ACTIVATION == "relu6":
        y = relu6_forward(z)
    elif ACTIVATION == "silu":
        y = silu_forward(z)
    elif ACTIVATION == "hardswish":
        y = hardswish_forward(z)
    elif ACTIVATION == "sigmoid":
        y = sigmoid_forward(z)
    elif ACTIVATION == "leaky_relu":
        y = leaky_relu_forward(z)
    else:
        tl.static_assert(ACTIVATION is None)
        y = z
    return y


@triton.jit
def backward(z, dy, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        dz = relu_backward(z, dy)
    elif ACTIVATION == "relu6":
        dz = relu6_backward(z, dy)
    elif ACTIVATION == "silu":
        dz = silu_backward(z, dy)
    elif ACTIVATION == "hardswish":
        dz = hardswish_backward(z, dy)
    elif ACTIVATION == "sigmoid":
        dz = sigmoid_backward(z, dy)
    elif ACTIVATION == "leaky_relu":
        dz = leaky_relu_backward(z, dy)
    else:
        tl.static_assert(ACTIVATION is None)
        dz = dy
    return dz
