"""Installs the package as a user would, into a new virtual environment in a temporary folder, and tries it out.

python .ci/check_install.py                                         build isolation, no torch before
python .ci/check_install.py --torch 2.10.0 --no-build-isolation     into an environment that has a torch
python .ci/check_install.py dist/*.whl --torch 2.10.0 newest            one wheel under two torches
python .ci/check_install.py --without-compiler                      as pure Python

A folder, a source distribution or a wheel may stand in place of the source tree. Prints how long each step took.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# What is computed is compared with torch.nn's, in a process that sees the installed package alone.
SMOKE = """
import json, torch
from torch import nn
before = torch.cuda.is_initialized()
import normfused
assert torch.cuda.is_initialized() == before
torch.manual_seed(0)
x = torch.randn(4, 8, 6, 6, requires_grad=True)
layer, native = normfused.BatchNormAct2d(8), nn.Sequential(nn.BatchNorm2d(8), nn.ReLU6())
group, native_group = normfused.GroupNormAct(2, 8, activation="silu"), nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU())
for ours, theirs in ((layer, native), (group, native_group)):
    (dx,), (expected_dx,) = (torch.autograd.grad(f(x).square().sum(), x) for f in (ours, theirs))
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(dx, expected_dx)
torch.testing.assert_close(layer.running_var, native[0].running_var)
model = normfused.convert(nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()))
assert model[1].activation == "relu"
print(json.dumps(normfused.info()))
"""


def timed(step, command, **options):
    """Run a command; where it fails, so does everything, with its output."""
    start = time.perf_counter()
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    seconds = time.perf_counter() - start
    if result.returncode != 0:
        sys.exit(f"{result.stdout}\n{step} failed")
    print(f"{step}: {seconds:.1f} s, {len(result.stdout.splitlines())} lines of output", flush=True)
    return result.stdout


def check(source, torch, arguments):
    """Install ``source`` under a torch (None: whichever pip chooses) and run SMOKE."""
    environment = os.environ | ({"CXX": "no-compiler"} if arguments.without_compiler else {})
    environment.pop("PYTHONPATH", None)
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        scripts = Path(folder, "Scripts" if os.name == "nt" else "bin")
        python = str(scripts / "python")
        environment["PATH"] = f"{scripts}{os.pathsep}{environment['PATH']}"
        pip = ["uv", "pip", "install", "--python", python] if arguments.uv else [python, "-m", "pip", "install"]
        options = ["--no-build-isolation"] if arguments.no_build_isolation else []
        if torch is not None:
            tools = ["setuptools>=77", "wheel", "ninja"] if arguments.no_build_isolation else []
            requirement = "torch" if torch == "newest" else f"torch=={torch}"
            timed(f"installing {requirement}", [*pip, requirement, "numpy", *tools], env=environment)
        timed(f"installing {source}", [*pip, *options, str(source)], cwd=folder, env=environment)
        output = timed("importing and comparing with torch.nn", [python, "-c", SMOKE], cwd=folder, env=environment)
    info = json.loads(output.splitlines()[-1])
    print(json.dumps(info), flush=True)
    compiled = sys.platform.startswith("linux") and not arguments.without_compiler
    if info["extension"]["built"] != compiled:
        sys.exit(f"the C++ core should {'' if compiled else 'not '}be there: {info['extension']['why_not']}")
    if compiled and info["backend"]["cpu"] != "extension":
        sys.exit(f"the CPU should be served by the extension, not by {info['backend']['cpu']}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", type=Path, default=ROOT)
    parser.add_argument("--torch", nargs="+", default=[None], help="versions to have before, or newest")
    parser.add_argument("--no-build-isolation", action="store_true")
    parser.add_argument("--without-compiler", action="store_true")
    parser.add_argument("--uv", action="store_true", help="uv pip instead of pip")
    arguments = parser.parse_args()
    for torch in arguments.torch:
        check(arguments.source.resolve(), torch, arguments)


if __name__ == "__main__":
    main()
