"""``python -m bench report``: one page that needs nothing else, in a real browser where one is installed."""

import html
import json
import re
import shutil
import subprocess

import pytest
import torch

from bench import cases, ops, report, timing
from bench.__main__ import main

BROWSERS = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)


def rows_of(c, mode, failures=None, **seconds):
    case = cases.Case("batch_norm", (32, c, 56, 56), "float32", "contiguous")
    timings = {name: timing.summarise([value, value * 1.01, value * 0.99]) for name, value in seconds.items()}
    return ops.make_rows(case, mode, timings, failures or {})


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of two runs, of two measurements and one, one of which loses."""
    folder = tmp_path_factory.mktemp("page")
    first = [
        *rows_of(96, "forward", eager=4e-3, compile=2e-3, normfused=1e-3, copy_mapped=0.5e-3),
        *rows_of(144, "backward", eager=0.9e-3, normfused=1e-3, copy_mapped=0.5e-3),
    ]
    trap = {"compile": "</script><script>document.title = 'broken'</script>"}
    second = rows_of(96, "forward", trap, eager=4e-3, normfused=1e-3, copy_mapped=0.5e-3)
    for name, rows in (("first", first), ("second", second)):
        report.write(rows, report.environment(["ops"]), folder / name)
    out = folder / "report.html"
    assert (
        main(["report", str(folder / "first" / "ops.json"), str(folder / "second" / "ops.json"), "--out", str(out)])
        == 0
    )
    return out


def test_the_page_stands_alone(page):
    text = page.read_text(encoding="utf-8")
    assert not re.search(
        r"""(src|href)=|@import|url\(|https?://(?!www\.w3\.org/2000/svg)""", text.split('id="data"')[0]
    )
    assert text.count("</script>") == 2
    embedded = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)[1]
    data = json.loads(embedded)
    assert [len(run["rows"]) for run in data["runs"]] == [7, 4]
    assert data["runs"][0]["environment"]["torch"] == torch.__version__


def test_what_is_no_run_is_refused(tmp_path, capsys):
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(SystemExit) as ended:
        main(["report", str(tmp_path / "other.json")])
    assert ended.value.code == 2
    assert "is not a file that" in capsys.readouterr().err


def dom(page, view=""):
    """The document after its scripts ran, in a browser without a window."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", "--dump-dom"]
    answer = subprocess.run([*command, f"file://{page}{view}"], capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    return html.unescape(answer.stdout)


@pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is installed")
@pytest.mark.parametrize(
    ("view", "measurements", "lost", "points", "bars"),
    [("", 3, 1, 7, 4), ("#mode=forward", 2, 0, 5, 3), ("#mode=backward", 1, 1, 2, 1), ("#mode=sideways", 3, 1, 7, 4)],
)
def test_the_page_in_a_browser(page, view, measurements, lost, points, bars):
    document = dom(page, view)
    assert re.search(r'<p id="error" role="alert">(.*?)</p>', document)[1] == ""
    assert "<title>normfused: measurements</title>" in document
    assert f">{measurements} measurements, {lost} lost." in document
    assert document.count("<circle ") == points
    assert document.count("<rect ") == bars
    body = re.search(r"<tbody>(.*?)</tbody>", document, re.DOTALL)[1]
    assert body.count("<tr") == measurements
    assert body.count('class="lost"') == lost
    # What a provider said is text, whatever it is.
    assert "compile: </script><script>document.title = 'broken'</script> (1 measurements)" in document
