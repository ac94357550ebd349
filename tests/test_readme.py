"""README and the pages of docs/: examples run as written, commands exist, links lead somewhere.

What takes minutes is not run here but looked up: make's targets, the options of ``python -m bench``. The ways to
install are run by .ci/check_install.py, in CI.
"""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bench.__main__ import parser

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = {page.relative_to(ROOT).as_posix(): page.read_text() for page in (README, ROOT / "CONTRIBUTING.md")}
PAGES |= {page.relative_to(ROOT).as_posix(): page.read_text() for page in sorted((ROOT / "docs").glob("*.md"))}
BLOCKS = [
    (name, language, block)
    for name, text in PAGES.items()
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
]
# Their examples stand alone; on the other pages some go on where a model is given.
RUN = ("README.md", "docs/quickstart.md", "docs/semantics.md", "docs/distributed.md")
EXAMPLES = [(name, block) for name, language, block in BLOCKS if language == "python"]
COMMANDS = sorted(
    {
        line.partition("#")[0].strip()
        for name, language, block in BLOCKS
        for line in block.splitlines()
        if language == "" and line.strip() and re.match(r"[\w./= ]*\b(make|pip|uv|python|pre-commit) ", line)
    }
)
# What check_install.py, CI and the rest of this suite run.
INSTALLS = {
    "pip install .",
    "pip install --no-build-isolation .",
    "uv pip install .",
    "CXX=none pip install .",
    "FORCE_CUDA=1 pip install --no-build-isolation .",
    "python -m normfused",
}


@pytest.mark.parametrize(("page", "example"), EXAMPLES, ids=[f"{p}-{i}" for i, (p, _) in enumerate(EXAMPLES)])
def test_example(page, example):
    code = compile(example, page, "exec")
    if page in RUN:
        exec(code, {})


def _targets():
    text = (ROOT / "Makefile").read_text().replace("\\\n", "")
    return set(re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)[1].split())


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command):
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=.*", word)]
    if words[0] == "make":
        assert set(words[1:]) <= _targets()
    elif words[1:3] == ["-m", "bench"]:
        if "--help" in words:
            with pytest.raises(SystemExit) as leaves:
                parser().parse_args(words[3:])
            assert leaves.value.code == 0
        else:
            parser().parse_args(words[3:])
    elif words[1:3] == ["-m", "pytest"] or words[0] == "pytest":
        assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))
    elif words[1:2] == [".ci/check_install.py"]:
        arguments = [word for word in words[2:] if "*" not in word]
        run = subprocess.run([sys.executable, ROOT / words[1], *arguments, "--help"], capture_output=True)
        assert run.returncode == 0
    elif words[0] == "pre-commit":
        assert (ROOT / ".pre-commit-config.yaml").exists()
    else:
        assert command in INSTALLS


def test_there_are_examples_and_commands():
    assert {"README.md", "docs/quickstart.md"} <= {page for page, _ in EXAMPLES}
    assert {"pip install .", "make demo", "make gpu OUT=out/gpu"} <= set(COMMANDS)


def test_make_help_names_every_target():
    text = subprocess.run(["make", "-C", ROOT, "help"], capture_output=True, text=True, check=True).stdout
    assert _targets() - {"help", "format"} == set(re.findall(r"^make ([\w-]+)", text, re.MULTILINE))


def test_every_step_of_ci_is_a_make_target():
    for workflow in (ROOT / ".github/workflows").iterdir():
        text = workflow.read_text()
        steps = re.findall(r"^ *-? *run: *(.*)$", text, re.MULTILINE)
        assert steps
        matrix = re.search(r"target: \[(.*)\]", text)[1].split(", ")
        for step in steps:
            command, target, *_ = step.split()
            assert command == "make"
            named = step.replace("make ${{ matrix.target }}", "")
            assert target in _targets() if named else set(matrix) <= _targets()


def _anchors(text):
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links(page):
    prose = re.sub(r"^```.*?^```|`[^`\n]*`", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if link.startswith(("http:", "https:")):
            continue
        path, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target.read_text()), link


def test_the_picture_is_what_the_tables_say():
    picture = runpy.run_path(str(ROOT / "docs/picture.py"))
    assert picture["PICTURE"].read_text() == picture["draw"](picture["TABLES"].read_text())
    assert picture["groups"](picture["TABLES"].read_text())
