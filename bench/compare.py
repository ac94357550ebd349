"""``python -m bench compare``: what became slower between two runs, beyond their noise."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from . import report

# Half the interquartile range of normal noise is 0.674 of its standard deviation; a median of n rounds is
# 1.2533 / sqrt(n) times as uncertain as one round.
_STANDARD_DEVIATIONS = 1 / 1.349
_MEDIAN = 1.2533
# So many standard deviations of the difference are noise.
_SIGMAS = 3


@dataclass(frozen=True)
class Change:
    """One measurement in two runs: new time over old (None where one of them failed), and what noise explains."""

    label: str
    provider: str
    ratio: float | None
    noise: float
    verdict: str  # "slower", "faster", "same", "fails now", "works now", "not measured"


def _relative_error(row):
    spread = (row["q75_s"] - row["q25_s"]) * _STANDARD_DEVIATIONS
    return spread * _MEDIAN / math.sqrt(row["rounds"]) / row["median_s"]


def compare(old, new, providers=("normfused",), *, threshold=0.05, unit="seconds"):
    """Compare the rows of two runs.

    Args:
        old, new: rows of ``python -m bench ops``.
        providers: whose rows.
        threshold: relative change that is never called one, whatever the spread within each run.
        unit: "seconds", or "copies": times as multiples of the copy in the same run, for runs on machines that are
            not equally fast.

    Returns:
        A list of Change, in the order of ``old``.
    """
    old, new = report.by_case(old), report.by_case(new)
    changes = []
    for case, before in old.items():
        for provider in providers:
            if provider in before:
                after = new.get(case, {})
                changes.append(_change(before, after, provider, threshold, unit))
    return changes


def _change(before, after, provider, threshold, unit):
    a, b = before[provider], after.get(provider)
    label = report.label(a)
    if b is None:
        return Change(label, provider, None, 0.0, "not measured")
    if a["failure"] or b["failure"]:
        verdict = "same" if a["failure"] and b["failure"] else "fails now" if b["failure"] else "works now"
        return Change(label, provider, None, 0.0, verdict)
    ratio = b["median_s"] / a["median_s"]
    variance = _relative_error(a) ** 2 + _relative_error(b) ** 2
    if unit == "copies" and a["copies"] and b["copies"]:
        ratio = b["copies"] / a["copies"]
        variance += sum(_relative_error(_copy(found)) ** 2 for found in (before, after))
    noise = max(threshold, _SIGMAS * math.sqrt(variance))
    verdict = "slower" if ratio > 1 + noise else "faster" if ratio < 1 / (1 + noise) else "same"
    return Change(label, provider, ratio, noise, verdict)


def _copy(found):
    return found.get("copy") or found["copy_mapped"]


def markdown(changes, old, new):
    """The comparison as a Markdown page; ``old`` and ``new`` name the runs."""
    counts = {verdict: sum(change.verdict == verdict for change in changes) for verdict in _ORDER}
    page = ["# normfused: two runs", "", f"old: {old}", "", f"new: {new}", ""]
    page.append(", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count) + ".")
    shown = sorted(
        (change for change in changes if change.verdict != "same"),
        key=lambda change: (_ORDER.index(change.verdict), -(change.ratio or 0)),
    )
    lines = [
        [change.verdict, change.provider, change.label, _percent(change.ratio), f"± {change.noise * 100:.1f} %"]
        for change in shown
    ]
    if lines:
        page += ["", *report.table(["", "provider", "measurement", "time", "noise"], lines)]
    return "\n".join([*page, ""])


_ORDER = ("fails now", "slower", "not measured", "faster", "works now", "same")


def _percent(ratio):
    return "–" if ratio is None else f"{(ratio - 1) * 100:+.1f} %"


def load(path):
    """(rows, environment, a line about them) of a file that ``python -m bench ops`` or ``gpu`` wrote.

    Raises:
        ValueError: it is not one.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        where, rows = content["environment"], content["rows"]
        device = (where.get("gpu") or {}).get("name") or where["cpu"]
        about = f"{path}, {where['date']}, commit {where['commit']}, {device}, torch {where['torch']}"
        report.by_case(rows)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a file that `python -m bench ops` wrote: {error!r}") from error
    return rows, where, about


def main(options, error):
    """``python -m bench compare``: status 1 where something became slower or fails now."""
    try:
        (old, _, about_old), (new, _, about_new) = load(options.old), load(options.new)
    except ValueError as why:
        error(str(why))
    changes = compare(old, new, options.providers, threshold=options.threshold, unit=options.unit)
    if all(change.verdict == "not measured" for change in changes):
        error(f"{options.old} and {options.new} have no measurement of {', '.join(options.providers)} in common")
    print(markdown(changes, about_old, about_new))
    return 1 if any(change.verdict in ("slower", "fails now") for change in changes) else 0
