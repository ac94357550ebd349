"""Nothing of a user's is executed or fetched: no pickle, no eval, no network; checkpoints load with weights_only."""

import ast
import io
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib
import torch
from helpers import randn
from test_modules import fused_and_plain
from torch import nn

import normfused

ROOT = Path(__file__).parent.parent
SHIPPED = sorted(Path(normfused.__file__).parent.rglob("*.py"))
# What runs a string, or an object that somebody else wrote.
FORBIDDEN = {
    *("eval", "exec", "compile", "__import__", "pickle", "cPickle", "dill", "marshal", "shelve", "load", "unsafe_load"),
    *("urlopen", "urlretrieve", "requests", "urllib", "http", "socket", "load_state_dict_from_url", "hub", "system"),
    *("popen", "subprocess", "Popen"),
}
# convert_rewrite compiles what Python runs already: the source of a forward, with calls taken out.
ALLOWED = {"convert_rewrite.py": {"compile"}}


def forbidden(source):
    """(line, name) of every forbidden import and call."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
        elif isinstance(node, ast.Call):
            # A method of a tensor library that is called load is no torch.load: tl.load reads memory.
            function = node.func
            names = [getattr(function, "attr", getattr(function, "id", ""))]
            if isinstance(function, ast.Attribute) and getattr(function.value, "id", "") == "tl":
                names = []
        else:
            continue
        found += [(node.lineno, name) for name in names if FORBIDDEN & set(name.split("."))]
    return found


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(Path(normfused.__file__).parent)))
def test_no_shipped_file_unpickles_evaluates_or_downloads(path):
    assert {name for _, name in forbidden(path.read_text())} <= ALLOWED.get(path.name, set())


@pytest.mark.parametrize(
    "source",
    [
        *("import pickle", "from urllib import request", "eval(text)", "torch.load(path)", "import requests.sessions"),
        *("torch.hub.load_state_dict_from_url(u)", "os.system(c)", "exec(compile(a, b, c))", "import subprocess"),
    ],
)
def test_the_search_finds(source):
    assert forbidden(source)
    assert not forbidden("x = tl.load(pointer)\nimport torch\nmodel.load_state_dict(state)")


@pytest.mark.parametrize("converted", [False, True])
def test_checkpoints_load_with_weights_only(converted):
    """Model and optimiser after a step, saved and loaded without unpickling anything but tensors."""
    fused, _ = fused_and_plain()
    model = normfused.convert(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU6())) if converted else fused
    optimizer = torch.optim.AdamW(model.parameters())
    model(randn(4, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)
    assert str(model.load_state_dict(checkpoint["model"], strict=True)) == "<All keys matched successfully>"
    optimizer.load_state_dict(checkpoint["optimizer"])


OFFLINE = """
import socket, sys

def refuse(*arguments, **keywords):
    raise AssertionError(f"a connection was asked for: {arguments}")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import torch, normfused
opened = []
sys.addaudithook(lambda event, arguments: opened.append(event) if event.startswith(("socket.", "urllib.")) else None)
normfused.info()
model = normfused.convert(torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3), torch.nn.BatchNorm2d(6), torch.nn.ReLU()))
layers = torch.nn.Sequential(model, normfused.GroupNormAct(3, 6, activation="silu"))
layers(torch.randn(2, 3, 8, 8)).sum().backward()
layers.eval()(torch.randn(2, 3, 8, 8))
assert not opened, opened
# The watch sees a socket that is only made.
socket.socket()
assert opened
"""


def test_nothing_is_downloaded_at_run_time():
    run = [sys.executable, "-W", "ignore", "-c", OFFLINE]
    result = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def constraints():
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    return {re.match(r"[\w.-]+", line)[0].lower(): line for line in lines if line}


def requirements():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = itertools.chain(*project["project"]["optional-dependencies"].values())
    texts = [*project["build-system"]["requires"], *project["project"]["dependencies"], *extras]
    return {re.match(r"[\w.-]+", text)[0].lower() for text in texts}


def test_what_builds_and_tests_are_made_with_is_pinned():
    """torch and the linters to a version; the others below the next major one."""
    pins = constraints()
    # triton comes with torch, which asks for its version exactly.
    missing = requirements() - set(pins) - {"triton"}
    assert not missing
    for name, line in pins.items():
        exact = name in ("torch", "ruff", "clang-format")
        assert re.search(r"==[\d.]+$" if exact else r"(==|<)\s*\d[\d.]*$", line), line


def test_every_install_of_the_makefile_is_constrained():
    makefile = (ROOT / "Makefile").read_text()
    assert re.findall(r"pip install.*", makefile) == ["pip install --quiet --constraint"]
    installs = re.findall(r"\$\(PIP\) *(\S+)", makefile)
    assert len(installs) >= 3
    assert all(re.search(r"constraints(-cuda)?\.txt$", file) for file in installs)
