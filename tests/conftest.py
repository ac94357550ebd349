"""The backends that every test runs on."""

import os

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
    config.addinivalue_line(
        "markers",
        "stricter_than_native(reason): the pinned behaviour goes beyond PyTorch's own, so the backend "
        "'torch', which is PyTorch's own operators, cannot have it",
    )
    # NumPy's, where a kernel computes with infinities.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.*")
    if WHY_NOT["triton"] is None:
        from interpreter import round_to_nearest

        round_to_nearest()


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
