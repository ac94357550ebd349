"""setuptools' build backend, except that a build requires torch and ninja only where there is a compiler."""

import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec

import setuptools
from setuptools.build_meta import *  # noqa: F403


def why_pure_python():
    """Why there is nothing to compile with, or None. A compiler that fails on our code fails the build instead."""
    if not sys.platform.startswith("linux"):
        return f"the C++ core is built on Linux only, this is {sys.platform}"
    probe = [*(compiler := os.environ.get("CXX", "c++")).split(), "-x", "c++", "-fsyntax-only", "-"]
    probe += ["-I", sysconfig.get_path("include"), "-include", "vector", "-include", "Python.h"]
    if shutil.which(probe[0]) and subprocess.run(probe, input=b"", capture_output=True).returncode == 0:
        return None
    return f"{compiler} is missing or cannot compile <vector> and <Python.h> (Debian: apt-get install g++ python3-dev)"


def check_requirements(compiles):
    """Raise RuntimeError or ModuleNotFoundError for what the build would miss later, or in more words."""
    if int(setuptools.__version__.split(".")[0]) < 77:
        raise RuntimeError(f"setuptools {setuptools.__version__} does not read pyproject.toml's license")
    # Before pip has fetched torch for the run.
    if compiles and "dist_info" in sys.argv and not find_spec("torch"):
        raise ModuleNotFoundError("No module named 'torch'")


def get_requires_for_build_wheel(config_settings=None):
    # A CUDA build of torch is gigabytes: a source distribution and a build of pure Python do without.
    return [] if why_pure_python() else ["torch>=2.10", "ninja"]


get_requires_for_build_editable = get_requires_for_build_wheel
