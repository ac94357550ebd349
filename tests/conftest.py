"""The backends that every test runs on."""

import pytest
import torch

import normfused
from normfused.backends import BACKENDS

# Why a backend cannot run on this machine (None: it can), by name.
WHY_NOT = {"extension": normfused.info()["extension"]["why_not"], "torch": None}


def pytest_configure(config):
    # For small tensors a second thread costs more than it helps; on a busy machine ten times more. Tests of
    # threads choose their own number.
    torch.set_num_threads(1)
    config.addinivalue_line("markers", "nvcc: minutes of compiling for a GPU; runs with -m nvcc only")
    config.addinivalue_line(
        "markers",
        "stricter_than_native(reason): the pinned behaviour goes beyond PyTorch's own, so the backend "
        "'torch', which is PyTorch's own operators, cannot have it",
    )


def pytest_collection_modifyitems(config, items):
    if "nvcc" in config.getoption("markexpr"):
        return
    for item in items:
        if item.get_closest_marker("nvcc"):
            item.add_marker(pytest.mark.skip(reason="minutes of compiling: pytest -m nvcc"))


@pytest.fixture(params=BACKENDS)
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
