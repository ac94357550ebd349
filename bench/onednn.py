"""oneDNN's BatchNorm fused with ReLU, as a peer on the CPU: the C interface of Debian's libdnnl2 (oneDNN 2.x).

PyTorch carries a oneDNN of its own, whose BatchNorm it calls without the activation. The running statistics are not
updated: what that saves, a pass over C values, is oneDNN's advantage.
"""

import ctypes
import functools

import torch

_LIBRARY = "libdnnl.so.2"

# dnnl_types.h
_TRAINING, _INFERENCE, _BACKWARD = 64, 96, 128
_GLOBAL_STATISTICS, _FUSED_RELU, _SCALE, _SHIFT = 1, 4, 8, 16
_DTYPES = {torch.bfloat16: 2, torch.float32: 3, torch.uint8: 6}
_CPU, _WORKSPACE_OF = 1, 135
_ARGUMENTS = {
    **{"x": 1, "y": 17, "mean": 49, "var": 50, "weight": 51, "bias": 52, "workspace": 64},
    **{"dx": 129, "dy": 145, "dweight": 255, "dbias": 256},
}
# Room for the library's descriptors, whose fields are its own business: the largest has 2 kB.
_DESCRIPTOR_BYTES = 8192


class _Argument(ctypes.Structure):
    _fields_ = [("index", ctypes.c_int), ("memory", ctypes.c_void_p)]


class _Version(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("major", "minor", "patch")]


@functools.cache
def _library():
    """(library, engine, stream).

    Raises:
        OSError: it is not installed.
    """
    library = ctypes.CDLL(_LIBRARY)
    library.dnnl_version.restype = ctypes.POINTER(_Version)
    library.dnnl_primitive_desc_query_md.restype = ctypes.c_void_p
    library.dnnl_memory_desc_get_size.restype = ctypes.c_size_t
    engine, stream = ctypes.c_void_p(), ctypes.c_void_p()
    _succeed(library.dnnl_engine_create(ctypes.byref(engine), _CPU, ctypes.c_size_t(0)))
    _succeed(library.dnnl_stream_create(ctypes.byref(stream), engine, 1))
    return library, engine, stream


def version():
    """Of the library, "2.6.3" say; None where it is not installed."""
    try:
        found = _library()[0].dnnl_version().contents
    except OSError:
        return None
    return f"{found.major}.{found.minor}.{found.patch}"


def _succeed(status):
    if status != 0:
        raise RuntimeError(f"oneDNN answered with status {status}")


def _descriptor(t):
    library, (dims, strides) = _library()[0], ((ctypes.c_int64 * 12)(*sizes) for sizes in (t.shape, t.stride()))
    descriptor = ctypes.create_string_buffer(_DESCRIPTOR_BYTES)
    _succeed(library.dnnl_memory_desc_init_by_strides(descriptor, t.dim(), dims, _DTYPES[t.dtype], strides))
    return descriptor


class _Primitive:
    """A compiled kernel for tensors like ``x``, and its memory objects; ``hint`` is the forward one of a backward."""

    def __init__(self, kind, x, eps, flags, hint=None):
        library, engine, _ = _library()
        data, operation = _descriptor(x), ctypes.create_string_buffer(_DESCRIPTOR_BYTES)
        eps, flags = ctypes.c_float(eps), ctypes.c_uint(flags)
        if hint is None:
            _succeed(library.dnnl_batch_normalization_forward_desc_init(operation, kind, data, eps, flags))
        else:
            _succeed(library.dnnl_batch_normalization_backward_desc_init(operation, kind, data, data, eps, flags))
        self.description, self._handle, self._memory = ctypes.c_void_p(), ctypes.c_void_p(), {}
        forward = None if hint is None else hint.description
        _succeed(library.dnnl_primitive_desc_create(ctypes.byref(self.description), operation, None, engine, forward))
        _succeed(library.dnnl_primitive_create(ctypes.byref(self._handle), self.description))

    def workspace_bytes(self):
        """Bytes that the forward pass leaves for the backward pass, besides its tensors."""
        library = _library()[0]
        descriptor = library.dnnl_primitive_desc_query_md(self.description, _WORKSPACE_OF, 0)
        return library.dnnl_memory_desc_get_size(ctypes.c_void_p(descriptor)) if descriptor else 0

    def _bind(self, name, t):
        library, engine, _ = _library()
        if name not in self._memory:
            self._memory[name] = memory = ctypes.c_void_p()
            _succeed(library.dnnl_memory_create(ctypes.byref(memory), _descriptor(t), engine, None))
        _succeed(library.dnnl_memory_set_data_handle(self._memory[name], ctypes.c_void_p(t.data_ptr())))
        return _Argument(_ARGUMENTS[name], self._memory[name])

    def __call__(self, **tensors):
        library, _, stream = _library()
        arguments = (_Argument * len(tensors))(*(self._bind(name, t) for name, t in tensors.items()))
        _succeed(library.dnnl_primitive_execute(self._handle, stream, len(arguments), arguments))


def batch_norm_relu(x, weight, bias, eps, statistics=None):
    """A function of no arguments but x: relu(batch_norm(x)).

    Args:
        x: (N, C, H, W) or (N, C, D, H, W), float32 or bfloat16, dense: others like it are what the function takes.
        weight, bias: (C,), float32.
        statistics: (mean, var) of evaluation, (C,), float32; None: those of the batch, in training.

    Raises:
        OSError: the library is not installed.
        RuntimeError: it has no such kernel.
    """
    flags = _FUSED_RELU | _SCALE | _SHIFT
    if statistics is not None:
        mean, var = statistics
        evaluate = _for_each_number_of_threads(lambda: _Primitive(_INFERENCE, x, eps, flags | _GLOBAL_STATISTICS))

        def evaluated(x):
            y = torch.empty_like(x)
            evaluate()(x=x, weight=weight.detach(), bias=bias.detach(), mean=mean, var=var, y=y)
            return y

        evaluate()
        return evaluated

    def both():
        forward = _Primitive(_TRAINING, x, eps, flags)
        return forward, _Primitive(_BACKWARD, x, eps, flags, forward), forward.workspace_bytes()

    train = _for_each_number_of_threads(both)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, bias):
            run, _, workspace_bytes = train()
            y, mean, var = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
            workspace = torch.empty(workspace_bytes, dtype=torch.uint8)
            run(x=x, weight=weight, bias=bias, y=y, mean=mean, var=var, workspace=workspace)
            ctx.save_for_backward(x, weight, bias, mean, var, workspace)
            return y

        @staticmethod
        def backward(ctx, dy):
            x, weight, bias, mean, var, workspace = ctx.saved_tensors
            dx, dweight, dbias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
            given = {"x": x, "dy": dy, "weight": weight, "mean": mean, "var": var, "workspace": workspace}
            train()[1](**given, bias=bias, dx=dx, dweight=dweight, dbias=dbias)
            return dx, dweight, dbias

    train()
    return lambda x: Function.apply(x, weight, bias)


def _for_each_number_of_threads(make):
    """``make()``, once for each number of PyTorch's threads: a primitive keeps the one it was made with."""
    made = functools.cache(lambda threads: make())
    return lambda: made(torch.get_num_threads())
