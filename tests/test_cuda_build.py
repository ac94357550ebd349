"""The package as `make cuda` installs it: with CUDA kernels, built under another torch than the tests run on."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PYTHON = ROOT / ".venv-cuda/bin/python"
OPERATORS = ("batch_norm_act", "batch_norm_act_backward", "group_norm_act", "group_norm_act_backward")

pytestmark = pytest.mark.cuda_build


def run(code, folder, python=PYTHON, **environment):
    """What ``code`` prints as JSON, away from the source tree."""
    result = subprocess.run(
        [python, "-c", code], cwd=folder, env=os.environ | environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The folder that the package with CUDA kernels was installed into."""
    if not PYTHON.exists():
        pytest.fail(f"{PYTHON} is missing: run make cuda")
    code = "import json, normfused; print(json.dumps(normfused.__path__[0]))"
    return Path(run(code, tmp_path_factory.mktemp("elsewhere")))


def test_every_operator_has_a_cuda_kernel(package, tmp_path):
    info, found = run(
        "import json, torch, normfused\n"
        f"names = [f'normfused::{{name}}' for name in {OPERATORS}]\n"
        "found = [torch._C._dispatch_has_kernel_for_dispatch_key(name, 'CUDA') for name in names]\n"
        "assert not torch.cuda.is_initialized()\n"
        "print(json.dumps([normfused.info(), found]))",
        tmp_path,
    )
    assert found == [True] * len(OPERATORS)
    assert info["extension"]["built"]
    cuda = info["cuda"]
    assert cuda["built"]
    assert cuda["archs"]
    assert cuda["version"]
    assert cuda["why_not"] is None


def test_the_cuda_library_loads_before_or_after_the_schemas(package, tmp_path):
    for libraries in (("_cpu", "_cuda"), ("_cuda", "_cpu")):
        code = "import json, torch\n"
        for name in libraries:
            code += f"torch.ops.load_library({str(next(package.glob(f'{name}.*so')))!r})\n"
        code += "print(json.dumps(torch._C._dispatch_has_kernel_for_dispatch_key('normfused::group_norm_act', 'CUDA')))"
        assert run(code, tmp_path) is True


def test_under_a_torch_without_cuda_it_imports_and_says_what_is_missing(package, tmp_path):
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    # The same binaries under the torch that runs this test, an older one.
    (tmp_path / "normfused").symlink_to(package)
    prelude = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
    info, error = run(
        prelude + "import json, torch, normfused\n"
        "x = torch.randn(4, 6, 5, 5)\n"
        "with normfused.use_backend('extension'):\n"
        "    y = normfused.functional.batch_norm_act(x, None, None, training=True)\n"
        "z = torch.nn.functional.relu6(torch.nn.functional.batch_norm(x, None, None, training=True))\n"
        "print(json.dumps([normfused.info(), (y - z).abs().max().item()]))",
        tmp_path,
        python=sys.executable,
        PYTHONPATH=str(tmp_path),
    )
    assert info["torch"] == torch.__version__
    assert info["extension"]["built"]
    assert error < 1e-5
    assert info["cuda"]["built"]
    assert "has no CUDA; install a CUDA build" in info["cuda"]["why_not"]


@pytest.mark.parametrize("name", ["_cpu", "_cuda"])
def test_only_the_stable_symbols_of_torch_are_needed(package, name):
    (library,) = package.glob(f"{name}.*so")
    undefined = subprocess.check_output(["nm", "-D", "--undefined-only", "--demangle", library], text=True)
    symbols = [line.split(maxsplit=1)[1].split("@")[0] for line in undefined.splitlines()]
    # C++ of at::, c10:: and torch:: has no stable ABI; the C functions of the shim have.
    assert not [
        symbol for symbol in symbols if re.match(r"(vtable for |typeinfo for )?(at|c10|torch|caffe2)::", symbol)
    ]
    assert not [symbol for symbol in symbols if symbol.startswith(("Py", "_Py"))]
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols)
    needed = subprocess.check_output(["readelf", "-d", library], text=True)
    assert "libcudart" not in needed, "the CUDA runtime is linked statically"
    assert ("libtorch_cuda" in needed) == (name == "_cuda")
