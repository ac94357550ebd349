"""Draws README's picture from the tables of docs/performance.md: python docs/picture.py (make picture).

The points are the rows that were measured, the bars their geometric means; nothing is typed in here. --check compares
the pictures that there are with what would be drawn, and fails where they differ.
"""

import argparse
import math
import re
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
TABLES, PICTURE = DOCS / "performance.md", DOCS / "images/results.svg"
PEERS = {"eager/normfused": ("PyTorch eager", "#8a8f98"), "compile/normfused": ("torch.compile", "#d08a2e")}
WIDTH, LEFT, RIGHT, TOP, ROW, BAR = 860, 250, 40, 64, 58, 20


def rows(text):
    """Every row of the tables that list measurements, as dicts by column."""
    columns = None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else None
        if cells is None:
            columns = None
        elif columns is None:
            columns = cells
        elif len(cells) == len(columns) and not set(line) <= set("|-: "):
            yield dict(zip(columns, cells, strict=True))


def groups(text):
    """{label: {peer: [ratio of each row]}} of the forward+backward rows of modules, in the tables' order."""
    found = {}
    for row in rows(text):
        shape = row.get("N×C×H×W")
        if shape is None or row.get("mode") != "forward+backward" or row.get("form", "module") != "module":
            continue
        sizes = [int(size) for size in re.split("[×/]", shape)]
        if math.prod(sizes[:4]) < 1000:
            continue  # host time of tiny tensors
        family = {"batch_norm": "BatchNorm + ReLU6", "group_norm": "GroupNorm + SiLU"}[row["family"]]
        ratios = found.setdefault((family, row["dtype"], row["layout"]), {})
        for column in PEERS:
            if row.get(column, "") not in ("", "-"):
                ratios.setdefault(column, []).append(float(row[column]))
    return found


def conditions(text):
    """What the tables say of machine, date and torch."""
    return re.search(r"^Two cores of .*?\)[^.]*torch [\d.]+\d", text, re.MULTILINE | re.DOTALL)[0].replace("\n", " ")


def draw(text):
    """The SVG."""
    found = groups(text)
    limit = max(ratio for ratios in found.values() for values in ratios.values() for ratio in values)
    ticks = [t for t in (0.5, 1, 2, 3, 4, 6, 8, 12, 16) if t <= limit * 1.1]
    low, high = math.log(0.5), math.log(max(limit * 1.1, ticks[-1]))

    def x(ratio):
        share = (math.log(max(ratio, 0.5)) - low) / (high - low)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    height = TOP + ROW * len(found) + 76
    font = 'font-family="system-ui, sans-serif"'
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" {font} font-size="13">',
        "<title>Times of PyTorch eager and torch.compile, as multiples of normfused's</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        '<text x="20" y="26" font-size="16" font-weight="600" fill="#1b1f24">Forward + backward: how many times longer '
        "than normfused</text>",
    ]
    for i, (name, colour) in enumerate(PEERS.values()):
        out.append(f'<rect x="{LEFT + 170 * i}" y="38" width="14" height="14" fill="{colour}"/>')
        out.append(f'<text x="{LEFT + 20 + 170 * i}" y="50" fill="#1b1f24">{name}</text>')
    bottom = TOP + ROW * len(found)
    for tick in ticks:
        bold = ' stroke-width="2" stroke="#1b1f24"' if tick == 1 else ' stroke="#e3e6ea"'
        out.append(f'<line x1="{x(tick)}" x2="{x(tick)}" y1="{TOP}" y2="{bottom}"{bold}/>')
        out.append(f'<text x="{x(tick)}" y="{bottom + 18}" text-anchor="middle" fill="#57606a">{tick:g} ×</text>')
    for i, ((family, dtype, layout), ratios) in enumerate(found.items()):
        y = TOP + ROW * i + 8
        out.append(f'<text x="20" y="{y + 16}" fill="#1b1f24">{family}</text>')
        out.append(f'<text x="20" y="{y + 34}" fill="#57606a">{dtype}, {layout}</text>')
        for j, (column, (_, colour)) in enumerate(PEERS.items()):
            values = ratios.get(column, [])
            if not values:
                continue
            mean = math.exp(sum(map(math.log, values)) / len(values))
            begin, end, middle = min(x(1), x(mean)), max(x(1), x(mean)), y + BAR * j + BAR / 2 + 1
            out.append(
                f'<rect x="{begin}" y="{y + BAR * j + 2}" width="{round(end - begin, 1)}" height="{BAR - 3}" '
                f'fill="{colour}" opacity="0.55"/>'
            )
            out += [f'<circle cx="{x(value)}" cy="{middle}" r="2.6" fill="{colour}"/>' for value in values]
            out.append(f'<text x="{LEFT - 8}" y="{middle + 4}" text-anchor="end" fill="#1b1f24">{mean:.2f}</text>')
    shapes = " or ".join(sorted({str(len(next(iter(r.values())))) for r in found.values()}, key=int))
    caption = (
        f"Bars: geometric means; points: each of {shapes} shapes; left of 1 × normfused is slower. Logarithmic scale.",
        f"{conditions(text)}.",
    )
    for i, line in enumerate(caption):
        out.append(f'<text x="20" y="{bottom + 44 + 16 * i}" font-size="11" fill="#57606a">{line}</text>')
    return "\n".join([*out, "</svg>", ""])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="draw nothing, fail where the picture is out of date")
    arguments = parser.parse_args()
    svg = draw(TABLES.read_text())
    if not arguments.check:
        PICTURE.parent.mkdir(exist_ok=True)
        PICTURE.write_text(svg)
    elif not PICTURE.exists() or PICTURE.read_text() != svg:
        sys.exit(f"{PICTURE} is not what {TABLES.name} says; run make picture")


if __name__ == "__main__":
    main()
