"""What setup.py decides, and the package as it installs where there is no compiler."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import normfused

ROOT = Path(__file__).parent.parent


def run_setup(*args, **environment):
    return subprocess.run(
        [sys.executable, "setup.py", *args],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def test_no_compiler_installs_pure_python_and_says_so():
    result = run_setup("--name", CXX="no-such-compiler")
    assert result.returncode == 0
    assert result.stdout.count("installing without the C++ core") == 1
    assert "no-such-compiler" in result.stdout


def test_a_compiler_that_compiles_nothing_counts_as_none():
    result = run_setup("--name", CXX="false")
    assert result.returncode == 0
    assert "cannot compile" in result.stdout


def test_force_cuda_without_cuda_kernels_fails():
    result = run_setup("--name", FORCE_CUDA="1")
    assert result.returncode != 0
    assert "FORCE_CUDA=1" in result.stderr


def test_use_cuda_0_is_taken_for_the_reason():
    probe = "import setuptools; setuptools.setup = lambda **k: None; import setup; print(setup.why_no_cuda())"
    result = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, env=os.environ | {"USE_CUDA": "0"}, capture_output=True, text=True
    )
    assert "USE_CUDA=0" in result.stdout, result.stderr


@pytest.fixture
def pure_python(tmp_path):
    """A copy of the package without its libraries; runs code with it and returns the completed process."""
    shutil.copytree(ROOT / "normfused", tmp_path / "normfused", ignore=shutil.ignore_patterns("*.so", "__pycache__"))

    # An editable install's finder would find the libraries of the original.
    prelude = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"

    def run(code):
        return subprocess.run([sys.executable, "-c", prelude + code], cwd=tmp_path, capture_output=True, text=True)

    return run


def test_without_the_core_everything_runs_on_torch_with_one_warning(pure_python):
    result = pure_python(
        "import torch, normfused\n"
        "torch.manual_seed(0)\n"
        "layer = normfused.BatchNormAct2d(3)\n"
        "x = torch.randn(2, 3, 4, 4, requires_grad=True)\n"
        "for _ in range(3): y = layer(x)\n"
        "y.sum().backward()\n"
        "native = torch.nn.functional.relu6(torch.nn.functional.batch_norm(x, None, None, training=True))\n"
        "assert torch.allclose(y, native) and layer.num_batches_tracked == 3\n"
        "normfused.GroupNormAct(1, 3)(x)\n"
        "info = normfused.info()\n"
        "assert info['backend'] == {'cpu': 'torch'} and not info['extension']['built']\n"
        "print(info['extension']['why_not'])\n"
        "try:\n"
        "    with normfused.use_backend('extension'): pass\n"
        "except RuntimeError as error: print(error)\n"
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("served by PyTorch's own operators") == 1
    assert result.stdout.count("install a C++ compiler") == 2


def test_without_the_core_the_first_call_may_be_a_compiled_one(pure_python):
    result = pure_python(
        "import torch, normfused\n"
        "layer = normfused.BatchNormAct2d(3)\n"
        "compiled = torch.compile(layer, fullgraph=True, backend='eager')\n"
        "compiled(torch.randn(2, 3, 4, 4))\n"
        "assert layer.num_batches_tracked == 1\n"
    )
    assert result.returncode == 0, result.stderr


def test_python_m_normfused_prints_info():
    result = subprocess.run([sys.executable, "-m", "normfused"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert f'"version": "{normfused.__version__}"' in result.stdout
