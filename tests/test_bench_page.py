"""``python -m bench report``: one page that needs nothing else, in a real browser where one is installed, and pictures.

Debian's browser: ``apt-get install chromium-headless-shell``.
"""

import html
import json
import re
import shutil
import subprocess
from xml.etree import ElementTree

import pytest
import torch

from bench import cases, model, model_memory, ops, plots, report, timing
from bench.__main__ import main

BROWSERS = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is installed")


def rows_of(c, mode, failures=None, **seconds):
    case = cases.Case("batch_norm", (32, c, 56, 56), "float32", "contiguous")
    timings = {name: timing.summarise([value, value * 1.01, value * 0.99]) for name, value in seconds.items()}
    return ops.make_rows(case, mode, timings, failures or {})


def model_rows():
    """Rows of ``memory``: two variants at two batch sizes, and one that failed."""
    for batch, failure in ((8, None), (16, None), (32, "OutOfMemoryError: no memory")):
        for variant, part in (("native", 1.0), ("normfused", 0.7)):
            row = {"model": "mobilenet_v2", "layout": "channels_last", "batch": batch, "size": 224, "dtype": "float32"}
            figures = {"kept_bytes": int(part * batch * 2**25), "peak_bytes": int(part * batch * 2**26)}
            yield {**row, "variant": variant, "failure": failure, **({} if failure else figures)}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of two runs, of two measurements and one, one of which loses, and of the memory of a model."""
    folder = tmp_path_factory.mktemp("page")
    first = [
        *rows_of(96, "forward", eager=4e-3, compile=2e-3, normfused=1e-3, copy_mapped=0.5e-3),
        *rows_of(144, "backward", eager=0.9e-3, normfused=1e-3, copy_mapped=0.5e-3),
    ]
    trap = {"compile": "</script><script>document.title = 'broken'</script>"}
    second = rows_of(96, "forward", trap, eager=4e-3, normfused=1e-3, copy_mapped=0.5e-3)
    for name, rows in (("first", first), ("second", second)):
        report.write(rows, report.environment(["ops"]), folder / name)
    rows, where = list(model_rows()), report.environment(["memory"])
    model.write("memory", rows, model_memory.markdown(rows, where), where, folder / "memory")
    out = folder / "report.html"
    files = ("first/ops.json", "second/ops.json", "memory/memory.json")
    assert main(["report", *(str(folder / name) for name in files), "--out", str(out)]) == 0
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
    assert [len(run["rows"]) for run in data["models"]] == [6]
    assert data["runs"][0]["environment"]["torch"] == torch.__version__


def test_what_is_no_run_is_refused(tmp_path, capsys):
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(SystemExit) as ended:
        main(["report", str(tmp_path / "other.json")])
    assert ended.value.code == 2
    assert "is not a file that" in capsys.readouterr().err


@pytest.mark.skipif(not plots.available(), reason="matplotlib is not installed")
def test_pictures_lie_beside_the_page(page):
    for name in ("roofline", "layers", "memory"):
        assert (page.parent / f"report_{name}.png").read_bytes().startswith(b"\x89PNG")
        root = ElementTree.parse(page.parent / f"report_{name}.svg").getroot()
        assert root.tag.endswith("svg")


@pytest.mark.skipif(not plots.available(), reason="matplotlib is not installed")
def test_the_pictures_show_what_was_measured():
    import matplotlib.pyplot as plt

    rows = rows_of(96, "forward", eager=4e-3, onednn=3e-3, normfused=1e-3, copy_mapped=0.5e-3)
    (roofline,) = plots._roofline(plt, rows).axes
    size = 32 * 96 * 56 * 56 * 4
    points = {collection.get_label(): collection.get_offsets()[0].tolist() for collection in roofline.collections}
    assert points["normfused"] == pytest.approx([size / 1e6, 2 * size / 1e-3 / 1e9])
    assert set(points) == {"eager", "onednn", "normfused"}
    (roof,) = roofline.lines
    assert roof.get_xydata()[0].tolist() == pytest.approx([size / 1e6, 2 * size / 0.5e-3 / 1e9])
    (layers,) = plots._layers(plt, rows).axes
    assert [round(bar.get_height(), 6) for bar in layers.patches] == [4, 3]
    (memory,) = plots._memory(plt, [row for row in model_rows() if row["failure"] is None]).axes
    assert [bar.get_height() for bar in memory.patches[:4]] == [8 * 64, 16 * 64, 8 * 32, 16 * 32]
    plt.close("all")


def dom(page, view=""):
    """The document after its scripts ran, in a browser without a window."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", "--dump-dom"]
    answer = subprocess.run([*command, f"file://{page}{view}"], capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    return html.unescape(answer.stdout)


@needs_browser
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
    memory, document = section(document, "models"), document.replace(section(document, "models"), "")
    assert document.count("<rect ") == bars
    assert memory.count("<rect ") == 2 * 4
    assert "normfused: peak 358 MiB, kept 179 MiB" in memory
    assert memory.count("<td>0.70</td>") == 2
    body = re.search(r"<tbody>(.*?)</tbody>", document, re.DOTALL)[1]
    assert body.count("<tr") == measurements
    assert body.count('class="lost"') == lost
    # What a provider said is text, whatever it is.
    assert "compile: </script><script>document.title = 'broken'</script> (1 measurements)" in document
    assert "normfused: OutOfMemoryError: no memory (1 measurements)" in document


def section(document, name):
    """A section of the page, as text."""
    return re.search(rf'<section id="{name}".*?</section>', document, re.DOTALL)[0]


@needs_browser
def test_a_person_sorts_filters_and_leaves_a_provider_out(page, tmp_path):
    clicks = """<script>
      const heading = (name) => document.querySelector(`th[data-key="${name}"]`);
      heading("GB/s").click();
      const ascending = heading("GB/s").getAttribute("aria-sort");
      heading("GB/s").click();
      const filter = document.querySelector("select[name=mode]");
      filter.value = "forward";
      filter.dispatchEvent(new Event("change"));
      [...document.querySelectorAll("#roofline [role=button]")].find((e) => e.textContent.includes("eager")).dispatchEvent(new Event("click"));
      document.body.append(Object.assign(document.createElement("output"), { textContent: `${ascending} ${location.hash}` }));
    </script>"""  # noqa: E501
    clicked = tmp_path / "clicked.html"
    clicked.write_text(page.read_text(encoding="utf-8").replace("</body>", clicks + "</body>"), encoding="utf-8")
    document = dom(clicked)
    assert re.search(r'<p id="error" role="alert">(.*?)</p>', document)[1] == ""
    assert "<output>ascending #mode=forward</output>" in document
    assert 'data-key="GB/s" aria-sort="descending"' in document
    layers = section(document, "layers")
    assert re.search(r"<tbody>(.*?)</tbody>", layers, re.DOTALL)[1].count("<tr") == 2
    # Of the five points and three bars, eager has two and two.
    assert layers.count("<circle ") == 3
    assert layers.count("<rect ") == 1
    assert 'aria-pressed="false"' in layers


@needs_browser
def test_a_page_of_memory_alone_shows_nothing_else(page, tmp_path):
    out = tmp_path / "memory.html"
    assert main(["report", str(page.parent / "memory/memory.json"), "--out", str(out)]) == 0
    document = dom(out)
    assert re.search(r'<p id="error" role="alert">(.*?)</p>', document)[1] == ""
    assert '<section id="layers" hidden' in document
    assert '<section id="models">' in document
