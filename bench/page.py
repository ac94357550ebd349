"""``python -m bench report``: runs as one HTML page that needs nothing else: plots and tables to look around in."""

import json
import sys
from pathlib import Path

from . import compare, report
from .ops import PLAIN
from .providers import PROVIDERS

_TEMPLATE = Path(__file__).with_name("page.html")


def page(runs):
    """The page.

    Args:
        runs: list of (name, environment, rows), as ``python -m bench ops`` and ``gpu`` write them.
    """
    data = {
        "runs": [
            {
                "name": name,
                "conditions": "; ".join(line.strip("*") for line in report.conditions(where) if line).replace("`", ""),
                "environment": where,
                "rows": rows,
            }
            for name, where, rows in runs
        ],
        "order": list(PROVIDERS),
        "ours": report.OURS,
        "peers": list(report.PEERS),
        "plain": list(PLAIN),
    }
    # Within a script element only "</" could end it.
    return _TEMPLATE.read_text(encoding="utf-8").replace("/*DATA*/", json.dumps(data).replace("</", "<\\/"))


def main(options, error):
    """``python -m bench report``; returns the exit status."""
    runs = []
    for path in options.runs:
        try:
            rows, where, _ = compare.load(path)
        except ValueError as why:
            error(str(why))
        runs.append((str(path), where, rows))
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    report.replace(out, page(runs))
    print(f"written: {out}", file=sys.stderr)
    return 0
