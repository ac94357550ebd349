"""Memory stays what it was over a thousand calls of every operator, errors included."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from normfused import ops

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.skipif(not ops.LOADED, reason=str(ops.WHY_NOT)),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallinfo2 is glibc's"),
]

# What the allocator counts as in use, to the byte; small blocks of Python's own come from arenas that it keeps.
PROGRAM = """
import ctypes, gc, sys
import torch, normfused
from normfused.functional import batch_norm_act, group_norm_act

libc = ctypes.CDLL(None)
NAMES = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
MallInfo = type("MallInfo", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_size_t) for name in NAMES]})
libc.mallinfo2.restype = MallInfo
libc.malloc.restype = ctypes.c_void_p
leak = int(sys.argv[1])

def in_use():
    gc.collect()
    normfused.empty_cache()
    info = libc.mallinfo2()
    return info.uordblks + info.hblkhd

torch.set_num_threads(2)
x = torch.randn(4, 12, 9, 9, requires_grad=True)
strided = torch.randn(4, 12, 9, 18)[..., ::2].requires_grad_()
half = torch.randn(600, 70).half()
layer = normfused.BatchNormAct2d(12)
weight = torch.ones(12, requires_grad=True)

def call():
    for t in (x, strided):
        y = layer(t, t)
        z = group_norm_act(y, 3, weight, activation="silu")
        torch.autograd.grad(z.sum(), (t, weight, layer.weight))
    with torch.no_grad():
        batch_norm_act(half, torch.zeros(70), torch.ones(70), torch.ones(70).half(), training=True)
    for wrong in (lambda: layer(x[:, :5]), lambda: group_norm_act(x, 5), lambda: batch_norm_act(x, None, None)):
        try: wrong()
        except Exception: pass
    libc.malloc(ctypes.c_size_t(leak)) if leak else None

for _ in range(1000): call()
before = in_use()
for _ in range(1000): call()
print(in_use() - before)
"""


def growth(leak):
    """Bytes by which a process grew over 1,000 calls, each of which leaks so many."""
    run = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(leak)]
    result = subprocess.run(
        run,
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONMALLOC": "malloc"},
    )
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


@pytest.mark.thorough
def test_a_thousand_calls_leak_nothing():
    """pytorch#191340: 48 bytes with every string argument, in torch before 2.14."""
    # autograd's own tables grow at first; an object that every call keeps would show.
    assert abs(growth(leak=0)) < 24_000


@pytest.mark.thorough
def test_a_leak_of_an_empty_string_would_show():
    assert growth(leak=32) >= 32_000
