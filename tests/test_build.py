"""What setup.py decides, and the package as it installs where there is no compiler."""

import importlib.metadata
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import types
from pathlib import Path
from unittest import mock

import pytest

import build_backend
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


@pytest.mark.parametrize("command", ["egg_info", "dist_info"])
def test_what_pip_asks_for_before_the_build_is_answered_in_silence(command, tmp_path):
    # Without an import of torch, which takes seconds.
    (tmp_path / "torch.py").write_text("raise RuntimeError('imported')\n")
    option = {"egg_info": "--egg-base", "dist_info": "--output-dir"}[command]
    for compiler in ("no-such-compiler", "c++"):
        result = run_setup(command, option, str(tmp_path), CXX=compiler, PYTHONPATH=str(tmp_path))
        assert (result.returncode, result.stdout) == (0, ""), result.stderr


def test_a_missing_torch_is_named_before_pip_fetches_one_for_the_run(tmp_path):
    # With --no-build-isolation: dist_info is the first question. With it, egg_info is, before there is a torch.
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['torch'] = None\n")
    options = {"CXX": "c++", "PYTHONPATH": str(tmp_path)}
    assert run_setup("egg_info", "--egg-base", str(tmp_path), **options).returncode == 0
    result = run_setup("dist_info", "--output-dir", str(tmp_path), **options)
    assert result.returncode != 0
    assert (
        "normfused is not built: No module named 'torch' (it needs torch >= 2.10, setuptools >= 77, ninja)"
        in result.stderr
    )
    pure = run_setup("dist_info", "--output-dir", str(tmp_path), **options | {"CXX": "none"})
    assert pure.returncode == 0, pure.stderr


@pytest.mark.parametrize("compiler", ["c++", "none"])
def test_an_old_setuptools_is_named_instead_of_its_own_pages_of_errors(tmp_path, compiler):
    # As a new environment of Python 3.10 or 3.11 has it: 65.5.
    (tmp_path / "sitecustomize.py").write_text("import setuptools; setuptools.__version__ = '65.5.0'\n")
    result = run_setup("dist_info", "--output-dir", str(tmp_path), CXX=compiler, PYTHONPATH=str(tmp_path))
    assert result.returncode != 0
    assert result.stderr.startswith("normfused is not built: setuptools 65.5.0 ")
    assert "setuptools >= 77" in result.stderr


def test_the_output_of_a_build_is_short(tmp_path):
    result = run_setup("build_py", "--build-lib", str(tmp_path), CXX="none")
    assert (tmp_path / "normfused/modules.py").exists()
    assert len((result.stdout + result.stderr).splitlines()) <= 3


def test_a_build_requires_torch_only_where_there_is_a_compiler(monkeypatch):
    assert build_backend.get_requires_for_build_sdist() == []
    for requires in (build_backend.get_requires_for_build_wheel, build_backend.get_requires_for_build_editable):
        monkeypatch.setattr(build_backend, "why_pure_python", lambda: None)
        assert requires() == ["torch>=2.10", "ninja"]
        monkeypatch.setattr(build_backend, "why_pure_python", lambda: "there is no compiler")
        assert requires() == []


def test_a_compiler_that_compiles_nothing_counts_as_none():
    result = run_setup("--name", CXX="false")
    assert result.returncode == 0
    assert "cannot compile" in result.stdout


def test_without_pythons_headers_nothing_is_compiled_and_they_are_named(tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\ncase "$*" in *Python.h*) exit 1;; esac\n')
    compiler.chmod(0o755)
    result = run_setup("--name", CXX=str(compiler))
    assert result.returncode == 0
    assert "python3-dev" in result.stdout


@pytest.mark.parametrize("missing", ["torch", "ninja"])
def test_what_the_build_lacks_is_named(tmp_path, missing):
    # As with --no-build-isolation where nobody installed it: torch, or what torch says of a build that failed.
    (tmp_path / "torch").mkdir()
    error = "ModuleNotFoundError(\"No module named 'torch'\")" if missing == "torch" else "RuntimeError('no ninja')"
    (tmp_path / "torch/__init__.py").write_text(f"raise {error}\n")
    result = run_setup("build_ext", PYTHONPATH=str(tmp_path))
    assert result.returncode != 0
    assert result.stderr.startswith("normfused is not built: ")
    assert missing in result.stderr
    assert "Traceback" not in result.stderr


@pytest.fixture
def cuda_target(monkeypatch, tmp_path):
    """setup.py's decision for a torch of a CUDA version, GPUs of some capabilities and a toolkit's nvcc."""
    for name in ("USE_CUDA", "FORCE_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)

    def run(torch_cuda="13.0", nvcc="13.1", gpus=(), **environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        home = None
        if nvcc is not None:
            home = tmp_path / "toolkit"
            (home / "bin").mkdir(parents=True, exist_ok=True)
            compiler = home / "bin/nvcc"
            compiler.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {nvcc}, V{nvcc}.1'\n")
            compiler.chmod(0o755)
        version = types.SimpleNamespace(cuda=torch_cuda)
        cuda = types.SimpleNamespace(device_count=lambda: len(gpus))
        torch = types.SimpleNamespace(version=version, cuda=cuda, __version__="2.99")

        def arch_flags():
            # As torch's: the list that is asked for, or else the GPUs that are seen.
            archs = os.environ.get("TORCH_CUDA_ARCH_LIST", ";".join(gpus)).replace("+PTX", ";PTX").split(";")
            kinds = [("compute", archs[i - 1]) if arch == "PTX" else ("sm", arch) for i, arch in enumerate(archs)]
            numbers = [(kind, arch.replace(".", "")) for kind, arch in kinds]
            return [f"-gencode=arch=compute_{number},code={kind}_{number}" for kind, number in numbers]

        tools = types.SimpleNamespace(CUDA_HOME=home and str(home), _get_cuda_arch_flags=arch_flags)
        with mock.patch("setuptools.setup"), mock.patch.dict(os.environ, CXX="false"):
            return runpy.run_path(str(ROOT / "setup.py"))["cuda_target"](torch, tools)

    return run


def test_cuda_is_built_for_the_gpus_that_are_there(cuda_target):
    flags, cuda = cuda_target(gpus=("8.6", "9.0"))
    assert cuda == {"version": "13.1", "archs": "sm_86 sm_90", "why_not": ""}
    assert flags == ["-gencode=arch=compute_86,code=sm_86", "-gencode=arch=compute_90,code=sm_90"]


def test_without_a_gpu_cuda_is_built_for_one_architecture_and_ptx(cuda_target):
    # pytorch#137261: torch itself raises an IndexError there.
    assert cuda_target()[1]["archs"] == "sm_80 compute_80"
    assert cuda_target(TORCH_CUDA_ARCH_LIST="9.0;10.0+PTX")[1]["archs"] == "sm_90 sm_100 compute_100"


def test_gpus_that_are_too_old_are_left_out(cuda_target):
    assert cuda_target(gpus=("7.5", "8.0"))[1]["archs"] == "sm_80"
    assert "8.0" in cuda_target(gpus=("7.5",))[1]["why_not"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"torch_cuda": None}, "torch 2.99 has no CUDA"),
        ({"nvcc": None}, "set CUDA_HOME"),
        ({"nvcc": "12.8"}, "nvcc is of CUDA 12.8, torch of CUDA 13.0"),
        ({"USE_CUDA": "0"}, "USE_CUDA=0"),
    ],
)
def test_why_cuda_is_not_built_is_said_once_and_force_cuda_makes_it_fail(cuda_target, capsys, options, reason):
    flags, cuda = cuda_target(**options)
    assert reason in cuda["why_not"]
    # info() must not take for built what is only asked for.
    assert (flags, cuda["archs"]) == ([], "")
    # Whoever has no CUDA or does not want it need not be told.
    chosen = "torch_cuda" in options or "USE_CUDA" in options
    assert capsys.readouterr().out.count("installing without the CUDA kernels") == (0 if chosen else 1)
    with pytest.raises(SystemExit, match="FORCE_CUDA=1") as error:
        cuda_target(**options, FORCE_CUDA="1")
    assert reason in str(error.value)


def test_cuda_is_linked_from_where_nvcc_itself_links(tmp_path):
    # A wrapper of nvcc in PATH: what torch takes for CUDA_HOME holds no libraries.
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin/nvcc"
    nvcc.write_text("""#!/bin/sh\necho '#$ LIBRARIES=  "-L/toolkit/lib/stubs" "-L/toolkit/lib"' >&2\n""")
    nvcc.chmod(0o755)
    tools = types.SimpleNamespace(CUDA_HOME=str(tmp_path), library_paths=lambda device: [f"/guess/{device}"])
    with mock.patch("setuptools.setup"), mock.patch.dict(os.environ, CXX="false"):
        dirs = runpy.run_path(str(ROOT / "setup.py"))["cuda_library_dirs"](tools)
    assert dirs == ["/guess/cuda", "/toolkit/lib/stubs", "/toolkit/lib"]


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


@pytest.mark.thorough
def test_in_a_clone_it_is_said_that_an_installed_package_is_hidden(pure_python, tmp_path):
    code = "import normfused; print(normfused.info()['extension']['why_not'])"
    assert "start Python elsewhere" not in pure_python(code).stdout
    (tmp_path / "setup.py").touch()
    assert f"this is the source tree {tmp_path}: start Python elsewhere" in pure_python(code).stdout


@pytest.mark.thorough
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


def test_import_is_quick_and_initialises_nothing():
    # A collection of torch's own objects, 0.08 s, may fall due at any import after torch's.
    code = (
        "import gc, sys, time, torch\n"
        "gc.collect()\n"
        "start = time.process_time()\n"
        "import normfused\n"
        "print(time.process_time() - start)\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert 'triton' not in sys.modules and 'torch._dynamo' not in sys.modules\n"
    )
    command = [sys.executable, "-c", code]
    runs = (subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True) for _ in range(3))
    assert any(float(run.stdout) <= 0.1 for run in runs)


def test_the_source_distribution_is_complete(tmp_path):
    for name in ("setup.py", "build_backend.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("normfused", "bench", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    # As from an environment with nothing but setuptools.
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('torch')\n")
    subprocess.run([sys.executable, "setup.py", "-q", "sdist"], cwd=tmp_path, check=True)
    (archive,) = (tmp_path / "dist").iterdir()
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    sources = {str(p.relative_to(tmp_path)) for p in (tmp_path / "csrc").rglob("*.*")}
    assert sources <= names
    assert {"setup.py", "build_backend.py", "pyproject.toml", "LICENSE", "README.md", "normfused/py.typed"} <= names
    assert not [name for name in names if name.endswith(".so")]


def test_the_version_is_the_same_everywhere():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 brings it")
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert metadata["project"]["version"] == normfused.__version__
    # uv fails where torch is to match that of the run and the metadata is not static.
    assert metadata["tool"]["uv"]["extra-build-dependencies"]["normfused"][0]["match-runtime"] is True
    assert "dynamic" not in metadata["project"]
    assert importlib.metadata.version("normfused") == normfused.__version__
    # Semantic versioning, as packaging writes it: 1.2.3, 1.2.3rc1, 1.2.3.dev0.
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?(\.dev\d+)?", normfused.__version__)
