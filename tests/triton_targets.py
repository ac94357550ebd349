"""Compiles every Triton kernel for a GPU that need not be there, and prints what each came to, as JSON.

Run without TRITON_INTERPRET: ``python triton_targets.py cuda 90``.
"""

import json
import re
import subprocess
import sys
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from normfused.triton import stages
from normfused.triton.plan import Extent, plan

TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}
X = ("x", "residual", "y", "dy", "dx", "dresidual")
FINISH = ("stats_finish_kernel", "backward_finish_kernel", "parameter_gradients_kernel")
# Shapes by the layout that they stand for; Triton makes a constant of an integer that is 1.
EXTENTS = {
    "contiguous": Extent(1, 32, 96, 784, 96, False),
    "channels_last": Extent(1, 32, 96, 784, 96, True),
    "small planes": Extent(1, 32, 960, 49, 960, False),
    "grouped": Extent(8, 1, 320, 4096, 32, False),
    "ones": Extent(1, 1, 1, 1024, 1, False),
}


def source(kernel, extent, dtype, absent, **chosen):
    """The kernel as a call with this extent and dtype specialises it; ``absent``: pointers that are None."""
    p = plan(extent)
    group = extent.C // extent.G
    constants = {
        "CHANNELS_LAST": p.channels_last,
        "WIDE": p.wide,
        "BLOCK_N": p.block_n,
        "BLOCK_S": p.block_s,
        "BLOCK_C": p.block_c,
        "BLOCK_J": 32,
        "BLOCK_G": 32,
        "GROUPED": group > 1,
        "STATISTICS": True,
        "ACTIVATION": "relu6",
        "PRE_ACTIVATION": None,
        **chosen,
    }
    integers = {
        "sample": extent.N * extent.C * extent.S,
        "rows": extent.N * extent.S,
        "N": extent.N,
        "C": extent.C,
        "S": extent.S,
        "G": extent.G,
        "group": group,
        "channels": p.channels,
        "blocks": p.blocks,
        "splits": p.splits,
        "split_tiles": p.split_tiles,
        "tiles": p.tiles,
        "B": extent.B,
        "values": extent.N * extent.S * group,
        "stride": extent.B * p.splits * extent.C,
    }
    element, wide = TYPES[dtype], "fp64" if dtype == "float64" else "fp32"
    signature, constexprs, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in absent or name in constants or integers.get(name) == 1:
            signature[name], constexprs[name] = "constexpr", 1 if integers.get(name) == 1 else constants.get(name)
        elif name.endswith(("_high", "_low")):
            signature[name] = "fp32"
        elif name in integers:
            signature[name] = "i32"
        elif name == "num_batches_tracked":
            signature[name] = "*i64"
        else:
            signature[name] = "*" + ("fp64" if name == "partial" else element if name in X else wide)
        if signature[name].startswith("*") or integers.get(name, 1) % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)


def variants(architecture):
    """(kernel's name, extent's name, dtype, absent pointers, constants)."""
    training = ["residual", "dresidual", "num_batches_tracked"]
    for name in (name for name in vars(stages) if name.endswith("_kernel")):
        absent = [*training, "saved_mean", "saved_rstd"] if name == "apply_kernel" else training
        constants = {"BLOCK_C": 32} if name == "parameter_gradients_kernel" else {}
        for dtype in TYPES if architecture == "90" else ["bfloat16"]:
            every = dtype == "bfloat16" and architecture == "90"
            for extent in (
                EXTENTS if every and name not in FINISH else ("contiguous", "ones") if every else ["contiguous"]
            ):
                grouped = ["running_mean", "running_var"] if extent == "grouped" else []
                single = ["partial"] if name == "backward_kernel" and not grouped else []
                yield name, extent, dtype, [*absent, *grouped, *single], constants
    if architecture != "90":
        return
    # What else changes the code: evaluation, cumulative averages and a residual, 64-bit offsets, the activations.
    yield "apply_kernel", "contiguous", "float32", ["residual"], {}
    yield "forward_kernel", "channels_last", "float16", [], {}
    yield "backward_kernel", "channels_last", "float16", ["partial"], {"STATISTICS": False}
    yield "forward_kernel", "contiguous", "float32", training, {"WIDE": True}
    yield "backward_kernel", "channels_last", "float32", training, {"WIDE": True}
    for activation in (None, "relu", "silu", "hardswish", "sigmoid", "leaky_relu"):
        for dtype in ("float32", "float64"):
            yield "backward_apply_kernel", "contiguous", dtype, training, {"ACTIVATION": activation}
        yield "apply_kernel", "contiguous", "float64", training, {"ACTIVATION": activation}
    for name in ("stats_kernel", "forward_kernel", "backward_reduce_kernel", "backward_apply_kernel"):
        yield name, "contiguous", "bfloat16", training, {"PRE_ACTIVATION": "silu"}


def resources(cubin):
    """{"registers": of a thread, "spilled": bytes of a thread} of a CUDA binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{what}:(\d+)", report)[1]) for what in ("REG", "STACK", "LOCAL"))
    return {"registers": registers, "spilled": stack + local}


def main(backend, architecture):
    target = GPUTarget(
        backend, int(architecture) if backend == "cuda" else architecture, 32 if backend == "cuda" else 64
    )
    for name, extent, dtype, absent, constants in variants(architecture):
        compiled = triton.compile(
            source(getattr(stages, name), EXTENTS[extent], dtype, absent, **constants), target=target
        )
        assembly = compiled.asm.get("ptx") or compiled.asm.get("amdgcn")
        facts = {
            "kernel": name,
            "extent": extent,
            "dtype": dtype,
            "constants": constants,
            "shared": compiled.metadata.shared,
            "binary": len(compiled.asm.get("cubin") or compiled.asm.get("hsaco")),
            "wide_loads": assembly.count("ld.global.v4") + assembly.count("global_load_dwordx4"),
        }
        if backend == "cuda":
            facts |= resources(compiled.asm["cubin"])
        print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
