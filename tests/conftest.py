"""The backends that every test runs on."""

import itertools
import os
import zlib

import pytest
import torch

# Read when triton is imported: without a GPU its kernels run on the CPU, in its interpreter.
if not torch.accelerator.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import normfused
from normfused import backends

# Why a backend cannot run on this machine (None: it can), by name.
WHY_NOT = {
    "extension": normfused.info()["extension"]["why_not"],
    "triton": backends._why_not_triton("cpu"),
    "torch": None,
}


def pytest_configure(config):
    # For small tensors a second thread costs more than it helps; on a busy machine ten times more. Tests of
    # threads choose their own number.
    torch.set_num_threads(1)
    config.addinivalue_line("markers", "nvcc: minutes of compiling for a GPU; runs with -m nvcc only")
    config.addinivalue_line("markers", "large: gigabytes of memory; runs with -m large only")
    config.addinivalue_line(
        "markers",
        "stricter_than_native(reason): the pinned behaviour goes beyond PyTorch's own, so the backend "
        "'torch', which is PyTorch's own operators, cannot have it",
    )
    # NumPy's, where a kernel computes with infinities.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.*")
    if WHY_NOT["triton"] is None:
        import interpreter

        interpreter.prepare()


def pytest_collection_modifyitems(config, items):
    for marker, why in (("nvcc", "minutes of compiling"), ("large", "gigabytes of memory")):
        if marker not in config.getoption("markexpr"):
            for item in items:
                if item.get_closest_marker(marker):
                    item.add_marker(pytest.mark.skip(reason=f"{why}: pytest -m {marker}"))
    _choose_for_the_interpreter(config, items)


def _choose_for_the_interpreter(config, items):
    """The interpreter takes milliseconds for what a kernel does in microseconds: of each test's parametrisations it
    runs those in which two parameters have values that they did not have together before."""
    if WHY_NOT["triton"] is not None or not backends.OPERATORS["triton"].INTERPRETED:
        return
    chosen, seen = set(), {}
    # In an order that only looks random, so that the parameters do not change one at a time.
    for item in sorted(items, key=lambda item: zlib.crc32(item.nodeid.encode())):
        if getattr(item, "callspec", None) is None or item.callspec.params.get("backend") != "triton":
            chosen.add(item)
            continue
        values = seen.setdefault((item.path, item.originalname), set())
        parameters = sorted((name, repr(value)) for name, value in item.callspec.params.items())
        new = set(itertools.combinations_with_replacement(parameters, 2)) - values
        if new:
            values |= new
            chosen.add(item)
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = [item for item in items if item in chosen]


@pytest.fixture(params=backends.BACKENDS)
def backend(request):
    """Runs the test with every fused layer served by one backend; the name of it."""
    name = request.param
    if WHY_NOT[name] is not None:
        pytest.skip(WHY_NOT[name])
    stricter = request.node.get_closest_marker("stricter_than_native")
    if stricter is not None and name == "torch":
        pytest.skip(f"stricter than PyTorch's own operators: {stricter.args[0]}")
    with normfused.use_backend(name):
        yield name
