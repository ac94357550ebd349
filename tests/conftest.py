"""The backends that every test runs on."""

import contextlib
import gc
import itertools
import os
import zlib
from unittest import mock

import pytest
import torch
from hypothesis import settings

# Read when triton is imported: without a GPU its kernels run on the CPU, in its interpreter.
if not torch.accelerator.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import emulated_operators
import helpers

import normfused
from normfused import backends

# Here, where pytest finds it before it looks for what --hypothesis-profile names.
settings.register_profile("deep", max_examples=5000, derandomize=False, print_blob=True)

# Why a backend cannot run on this machine (None: it can), by name. "emulated": the CUDA operators, by the emulator.
WHY_NOT = {
    "extension": normfused.info()["extension"]["why_not"],
    "emulated": emulated_operators.why_not(),
    "triton": backends._why_not_triton("cpu"),
    "torch": None,
}
# The same for tensors on a GPU.
_NO_GPU = None if torch.cuda.is_available() else "there is no GPU here"
WHY_NOT_CUDA = {
    "extension": _NO_GPU or normfused.info()["cuda"]["why_not"],
    "triton": _NO_GPU or backends._why_not_triton("cuda"),
}

# Markers of tests that run only when asked for.
SLOW = {
    "nvcc": "minutes of compiling for a GPU",
    "cuda_build": "looks at what make cuda has built",
    "large": "gigabytes of memory",
}


def pytest_addoption(parser):
    parser.addoption(
        "--all",
        action="store_true",
        help="every parametrisation of the tests, and those marked thorough: not in minutes",
    )


def pytest_configure(config):
    # For small tensors a second thread costs more than it helps; on a busy machine ten times more. Tests of
    # threads choose their own number.
    torch.set_num_threads(1)
    helpers.everything = config.getoption("all")
    for name, meaning in SLOW.items():
        config.addinivalue_line("markers", f"{name}: {meaning}; runs with -m {name} only")
    config.addinivalue_line(
        "markers",
        "thorough(interpreted=False): takes long for what it adds; runs with --all only. interpreted=True: where the "
        "kernels are interpreted, that is",
    )
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
    for name, meaning in SLOW.items():
        if name not in config.getoption("markexpr"):
            for item in items:
                if item.get_closest_marker(name):
                    item.add_marker(pytest.mark.skip(reason=f"{meaning}: pytest -m {name}"))
    for item in items:
        if _NO_GPU and item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason=_NO_GPU))
    everything = config.getoption("all")
    thorough = set() if everything else {item for item in items if _is_thorough(item)}
    for item in thorough:
        item.add_marker(pytest.mark.skip(reason="takes long for what it adds: pytest --all"))
    # What is skipped covers nothing.
    chosen = thorough | _covering([item for item in items if item not in thorough], everything)
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = [item for item in items if item in chosen]


def pytest_collection_finish():
    # Tens of thousands of tests, and torch's own: not to be gone through again at each collection of garbage.
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


def _parameters(item):
    return item.callspec.params if hasattr(item, "callspec") else {}


def _is_interpreted(item):
    """Whether a test's kernels are: milliseconds for what a processor does in microseconds."""
    return helpers.interpreted(_parameters(item).get("backend"))


def _is_thorough(item):
    return any(_is_interpreted(item) or not mark.kwargs.get("interpreted") for mark in item.iter_markers("thorough"))


def _covering(items, everything):
    """Of each test the parametrisations in which some of its parameters have values that they did not have together
    before: two of them, or one, in all tests of a file, where kernels are interpreted or PyTorch's own operators serve.
    With --all every parametrisation, but still pairs where kernels are interpreted. What needs a GPU is never left out.
    """
    chosen, seen = set(), {}
    # In an order that only looks random, so that the parameters do not change one at a time.
    for item in sorted(items, key=lambda item: zlib.crc32(item.nodeid.encode())):
        parameters, interpreted = _parameters(item), _is_interpreted(item)
        if not parameters or item.get_closest_marker("cuda") or (everything and not interpreted):
            chosen.add(item)
            continue
        backend = parameters.get("backend")
        together = 1 if not everything and (interpreted or backend == "torch") else 2
        values = seen.setdefault((item.path, backend, item.originalname if together == 2 else None), set())
        named = sorted((name, repr(value)) for name, value in parameters.items())
        # The name, too: no test is left out.
        new = {item.originalname, *itertools.combinations_with_replacement(named, together)} - values
        if new:
            values |= new
            chosen.add(item)
    return chosen


# Where there is a GPU, ours once more on it.
_ON_GPU = () if _NO_GPU else tuple(pytest.param(f"{name} on cuda", marks=pytest.mark.cuda) for name in WHY_NOT_CUDA)


@pytest.fixture(params=(*WHY_NOT, *_ON_GPU))
def backend(request):
    """Runs the test with every fused layer served by one backend, on a GPU with tensors there; the name of it."""
    name, _, device = request.param.partition(" on ")
    why_not = (WHY_NOT_CUDA if device else WHY_NOT)[name]
    if why_not is not None:
        pytest.skip(why_not)
    stricter = request.node.get_closest_marker("stricter_than_native")
    if stricter is not None and name == "torch" and not request.config.pluginmanager.hasplugin("tests.conformance"):
        pytest.skip(f"stricter than PyTorch's own operators: {stricter.args[0]}")
    with contextlib.ExitStack() as stack:
        if device:
            stack.enter_context(torch.device(device))
            # Convolutions around the layers give the same numbers each time.
            stack.enter_context(torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False))
        if name == "emulated":
            # Not a name that use_backend knows.
            backends.OPERATORS[name] = emulated_operators.operators()
            stack.enter_context(mock.patch.object(backends, "_override", name))
        else:
            stack.enter_context(normfused.use_backend(name))
        yield name
