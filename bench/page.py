"""The subcommand ``report``: runs as one HTML page that needs nothing else, and pictures of them."""

import json
import sys
from pathlib import Path

from . import compare, plots, report
from .ops import PLAIN
from .providers import PROVIDERS

_TEMPLATE = Path(__file__).with_name("page.html")


def page(runs, models=()):
    """The page.

    Args:
        runs: list of (name, environment, rows), as ``ops`` and ``gpu`` write them.
        models: the same of ``model`` and ``memory``.
    """
    data = {
        "runs": [_described(*run) for run in runs],
        "models": [_described(*run) for run in models],
        "order": list(PROVIDERS),
        "ours": report.OURS,
        "peers": list(report.PEERS),
        "plain": list(PLAIN),
    }
    # Within a script element only "</" could end it.
    return _TEMPLATE.read_text(encoding="utf-8").replace("/*DATA*/", json.dumps(data).replace("</", "<\\/"))


def _described(name, where, rows):
    conditions = "; ".join(line.strip("*") for line in report.conditions(where) if line).replace("`", "")
    return {"name": name, "conditions": conditions, "environment": where, "rows": rows}


def main(options, error):
    """Run the command; returns the exit status."""
    runs, models = [], []
    for path in options.runs:
        try:
            rows, where, _ = compare.load(path)
            runs.append((str(path), where, rows))
        except ValueError as why:
            try:
                models.append((str(path), *_load_models(path)))
            except (OSError, ValueError, KeyError, TypeError):
                error(str(why))
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    report.replace(out, page(runs, models))
    pictures = []
    for kind in ("png", "svg"):
        rows = [row for _, _, own in runs for row in own]
        pictures += plots.draw(rows, _only([where for _, where, _ in runs]), out.parent, kind, f"{out.stem}_")
        rows = [row for _, _, own in models for row in own]
        pictures += plots.draw_memory(rows, _only([where for _, where, _ in models]), out.parent, kind, f"{out.stem}_")
    print("written: " + ", ".join(map(str, [out, *pictures])), file=sys.stderr)
    if not plots.available():
        print("no pictures: matplotlib is not installed", file=sys.stderr)
    return 0


def _only(environments):
    """The environment of a picture: none where several runs are in it."""
    return environments[0] if len(environments) == 1 else None


def _load_models(path):
    """(environment, rows) of a file that ``model`` or ``memory`` wrote."""
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    where, rows = content["environment"], content["rows"]
    for row in rows:
        if row["failure"] is None:
            _ = row["model"], row["variant"], row["peak_bytes"] + row["kept_bytes"]
    return where, rows
