"""The report of ``python -m bench gpu``: what each part came to, the goals, and what was measured."""

import json
import time
from pathlib import Path

from . import plots, report

_LARGE = 64e6  # bytes of x from which on bandwidth is what counts
_LAUNCH = 5e-6  # seconds that a smaller one may take beyond a copy


class Report:
    """Outcomes and rows as they come; written to ``out`` after every change."""

    def __init__(self, out, device):
        self.out, self.device = Path(out), device
        self.where = None
        self.parts = []
        self.interrupted = False
        self.seconds = None
        self._sections = {}
        self._plotted = 0
        self._begun = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

    def add(self, name, status, sentence, seconds, correctness=True):
        """Record the outcome of a part; returns ``status``."""
        self.parts.append(
            {
                "name": name,
                "status": status,
                "outcome": sentence,
                "seconds": round(seconds, 1),
                "correctness": correctness,
            }
        )
        print(f"    {name}: {status}, {sentence}", flush=True)
        self.write()
        return status

    def merge(self, section, path):
        """Take the rows that a run of ``python -m bench ops`` has written so far."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        self.where = self.where or content["environment"]
        self._sections[section] = content["rows"]
        self.write()

    def rows_of(self, section):
        """The rows of a section."""
        return self._sections.get(section, [])

    def rows(self):
        """All rows, each with its section."""
        return [{**row, "section": section} for section, rows in self._sections.items() for row in rows]

    def failed(self):
        """Names of the parts about correctness that failed."""
        return [part["name"] for part in self.parts if part["correctness"] and part["status"] == "failed"]

    def paths(self):
        """The files of the report."""
        names = ("report.md", "report.json", "report.csv", "log.txt", *(f"{name}.png" for name in plots.NAMES))
        return [path for name in names if (path := self.out / name).exists()]

    def summary(self):
        """One line for each part and each goal."""
        lines = [f"{part['status']:<8} {part['name']}: {part['outcome']}" for part in self.parts]
        for goal in goals(self.rows()):
            lines.append(f"{goal['verdict']:<8} {goal['goal']}: {goal['found']}")
        failed = self.failed()
        return "\n".join([*lines, f"failed: {', '.join(failed)}" if failed else "nothing failed"])

    def finish(self, seconds):
        """Write the whole report."""
        self.seconds = round(seconds, 1)
        self.write(plot=True)

    def write(self, plot=False):
        """Write what there is, every file whole at every moment."""
        rows = self.rows()
        content = {
            "begun": self._begun,
            "seconds": self.seconds,
            "interrupted": self.interrupted,
            "device": self.device,
            "environment": self.where,
            "parts": self.parts,
            "failed": self.failed(),
            "goals": goals(rows),
            "geometric_means": {name: report.geometric_means(part) for name, part in self._sections.items()},
            "rows": rows,
        }
        report.replace(self.out / "report.json", json.dumps(content, indent=1) + "\n")
        report.replace(self.out / "report.md", self._markdown(rows))
        report.write_csv(rows, self.out / "report.csv")
        if plot or len(rows) > self._plotted + 200:
            self._plotted = len(rows)
            plots.draw(rows, self.where, self.out)

    def _markdown(self, rows):
        page = [
            "# normfused on a GPU" if self.device == "cuda" else "# normfused: the report's machinery, without a GPU"
        ]
        page += ["", *(report.conditions(self.where) if self.where else [f"begun {self._begun}"])]
        if self.interrupted:
            page += ["", "**Interrupted: only what was found until then.**"]
        lines = [[part["name"], part["status"], part["outcome"], f"{part['seconds']:.0f} s"] for part in self.parts]
        page += ["", "## Parts", "", *report.table(["part", "", "outcome", "time"], lines)]
        met = [[goal["goal"], goal["found"], goal["verdict"]] for goal in goals(rows)]
        page += ["", "## Goals", "", *report.table(["goal", "found", ""], met)]
        page += ["", "## Geometric means", "", "Peer's time over normfused's; above 1 normfused is faster."]
        for name, part in self._sections.items():
            page += ["", f"### {name}", "", *report.means_table(part), "", *report.losing_lines(part)]
            page += ["", *report.failed_lines(part)]
        page += ["", "## All rows", "", report.ROWS_LEGEND]
        for name, part in self._sections.items():
            page += ["", f"### All rows: {name}", "", *report.rows_table(part)]
        return "\n".join([*page, ""])


def _once(rows):
    """Rows of normfused that ran, each measurement once; together with the other rows of the same measurement."""
    found = {}
    for row in rows:
        found.setdefault((row.get("section"), report.key(row)), {})[row["provider"]] = row
    once = {}
    for (_, key), providers in found.items():
        ours = providers.get(report.OURS)
        if ours is not None and ours["failure"] is None:
            once.setdefault(key, providers)
    return list(once.values())


def _goal(text, values, met, worst, show):
    """A goal that every one of ``values`` has to meet; the worst, min or max of them, is shown."""
    if not values:
        return {"goal": text, "found": "not measured", "verdict": "–", "measurements": 0}
    missed = sum(not met(value) for value in values)
    found = show(worst(values)) + (f"; {missed} of {len(values)} miss it" if missed else f"; all {len(values)}")
    return {"goal": text, "found": found, "verdict": "missed" if missed else "met", "measurements": len(values)}


def _mean_goal(text, values, target):
    mean = report.geometric_mean(values)
    if mean is None:
        return {"goal": text, "found": "not measured", "verdict": "–", "measurements": 0}
    verdict = "met" if mean >= target else "missed"
    return {"goal": text, "found": f"{mean:.2f}, of {len(values)}", "verdict": verdict, "measurements": len(values)}


def _bytes_of_x(row):
    """S, from the copy's 2 S."""
    return row["floor_bytes"] / 2


def goals(rows):
    """The project's goals for a GPU, each with what was found: [{"goal", "found", "verdict", "measurements"}].

    A verdict is "met", "missed" or "–": not measured.
    """
    fractions = {"forward": [], "backward": []}
    beyond_copy = []
    ratios = {(norm, peer): [] for norm in ("BatchNorm", "GroupNorm") for peer in report.PEERS}
    better, host = [], []
    for found in _once(rows):
        ours, copy = found[report.OURS], found.get("copy")
        mode, ratio = ours["mode"], ours["ratio"]
        peers = [ratio[peer] for peer in report.PEERS if peer in ratio]
        if mode == "host":
            host += [ratio["eager"]] if "eager" in ratio else []
            continue
        if copy is not None and mode == "forward" and "residual" not in ours["layer"]:
            if _bytes_of_x(copy) < _LARGE:
                beyond_copy.append(ours["median_s"] - copy["median_s"])
        if copy is not None and mode in fractions and _bytes_of_x(copy) >= _LARGE and ours["fraction"]:
            fractions[mode].append(ours["fraction"])
        if mode == "forward+backward":
            norm = ours["layer"].split()[0].split("/")[0]
            for peer in report.PEERS:
                if peer in ratio:
                    ratios[norm, peer].append(ratio[peer])
            better += [min(peers)] if peers else []
    batch, group = "BatchNorm", "GroupNorm"
    return [
        _mean_goal("BatchNorm forward+backward, geometric mean ≥ 2.2 × eager", ratios[batch, "eager"], 2.2),
        _mean_goal("BatchNorm forward+backward, geometric mean ≥ 1.4 × torch.compile", ratios[batch, "compile"], 1.4),
        _mean_goal("GroupNorm forward+backward, geometric mean ≥ 2 × eager", ratios[group, "eager"], 2.0),
        _mean_goal("GroupNorm forward+backward, geometric mean ≥ 1.3 × torch.compile", ratios[group, "compile"], 1.3),
        _goal(
            "none slower than the better of the two", better, lambda value: value >= 1, min, "slowest {:.2f} ×".format
        ),
        _goal(
            "forward ≥ 85 % of a copy's bandwidth, x ≥ 64 MB",
            fractions["forward"],
            lambda value: value >= 0.85,
            min,
            "lowest {:.0%}".format,
        ),
        _goal(
            "backward ≥ 80 % of the bandwidth of torch.add, x ≥ 64 MB",
            fractions["backward"],
            lambda value: value >= 0.8,
            min,
            "lowest {:.0%}".format,
        ),
        _goal(
            "forward at most 5 µs more than a copy, x < 64 MB",
            beyond_copy,
            lambda value: value <= _LAUNCH,
            max,
            lambda value: f"longest {value * 1e6:.1f} µs",
        ),
        _goal(
            "host time of a call no more than native's", host, lambda value: value >= 1, min, "lowest {:.2f} ×".format
        ),
    ]
