"""What was measured, as Markdown, CSV and JSON."""

import csv
import datetime
import json
import math
import os
import platform
import shlex
import subprocess
from pathlib import Path

import torch

import normfused

OURS = "normfused"
PEERS = ("eager", "compile")
_COLUMNS = (
    "family form n c h w groups dtype layout mode provider "
    "median_s q25_s q75_s rounds repeats floor_bytes gb_per_s copies"
).split()


def environment(arguments):
    """Where and how a run was made; ``arguments`` are those after ``python -m bench``."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "bench", *arguments]),
        "commit": _commit(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "normfused": normfused.info(),
    }


def _commit():
    """The commit of the working tree, with "-dirty" where it was changed; None outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def _cpu_model():
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _key(row):
    return tuple(row[name] for name in ("family", "form", "n", "c", "h", "w", "groups", "dtype", "layout", "mode"))


def by_case(rows):
    """{case and mode: {provider: row}}, in the order of measurement."""
    table = {}
    for row in rows:
        table.setdefault(_key(row), {})[row["provider"]] = row
    return table


def geometric_means(rows):
    """Geometric means of peer's time / normfused's per (family, form, layout, dtype, mode).

    Returns:
        A list of {"family", "form", "layout", "dtype", "mode", "cases", "eager", "compile"}; a mean is None where that
        peer was not measured.
    """
    groups = {}
    for row in rows:
        if row["provider"] == OURS and row["failure"] is None:
            key = tuple(row[name] for name in ("family", "form", "layout", "dtype", "mode"))
            groups.setdefault(key, []).append(row["ratio"])
    means = []
    for key, ratios in groups.items():
        mean = dict(zip(("family", "form", "layout", "dtype", "mode"), key, strict=True), cases=len(ratios))
        for peer in PEERS:
            logs = [math.log(ratio[peer]) for ratio in ratios if peer in ratio]
            mean[peer] = math.exp(math.fsum(logs) / len(logs)) if logs else None
        means.append(mean)
    return means


def losing(rows):
    """Rows of normfused that are slower than the better of eager and compile, the worst first."""
    found = []
    for row in rows:
        if row["provider"] == OURS and row["failure"] is None:
            ratios = {peer: row["ratio"][peer] for peer in PEERS if peer in row["ratio"]}
            peer = min(ratios, key=ratios.get, default=None)
            if peer is not None and ratios[peer] < 1:
                found.append((ratios[peer], peer, row))
    return sorted(found, key=lambda item: item[0])


def _time(row):
    if row is None:
        return "–"
    if row["failure"] is not None:
        return "failed"
    unit, name = (1e-3, "ms") if row["median_s"] >= 1e-3 else (1e-6, "µs")
    spread = (row["q75_s"] - row["q25_s"]) / 2
    return f"{row['median_s'] / unit:.4g} ± {spread / unit:.2g} {name}"


def _number(value, digits=2):
    return "–" if value is None else f"{value:.{digits}f}"


def _size(row):
    groups = "" if row["groups"] is None else f"/{row['groups']}"
    return f"{row['n']}×{row['c']}×{row['h']}×{row['w']}{groups}"


def _label(row):
    return f"{row['family']} {row['form']} {_size(row)} {row['dtype']} {row['layout']} {row['mode']}"


def table(header, lines):
    """Lines of a Markdown table."""
    return [
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(map(str, line)) + " |" for line in lines),
    ]


def conditions(where):
    """Lines of Markdown on where and how a run was made; ``where`` is what ``environment`` returned."""
    lines = [
        f"`{where['command']}`, {where['date']}, commit {where['commit']}",
        "",
        f"{where['cpu']}, {where['threads']} threads on {where['cores']} cores, torch {where['torch']}",
        "",
        _backend_sentence(where),
    ]
    load = where["load_average"]
    if load and load[0] > 0.5:
        lines += ["", f"**Load average {load[0]:.1f} before the run: other programs took their share of the cores.**"]
    return lines


def markdown(rows, where):
    """The report as one Markdown page; ``where`` is what ``environment`` returned."""
    page = ["# normfused: operators", "", *conditions(where)]
    if where.get("interrupted"):
        page += ["", "**Interrupted: only what was measured until then.**"]
    page += ["", "## Geometric means", "", "Peer's time over normfused's; above 1 normfused is faster.", ""]
    header = ["family", "form", "layout", "dtype", "mode", "cases", "eager/normfused", "compile/normfused"]
    names = ("family", "form", "layout", "dtype", "mode", "cases")
    means = [
        [*(mean[name] for name in names), *(_number(mean[peer]) for peer in PEERS)] for mean in geometric_means(rows)
    ]
    page += table(header, means)
    lost = losing(rows)
    compared = sum(row["provider"] == OURS and bool(row.get("ratio")) for row in rows)
    page += ["", "## Losing rows", "", f"Slower than the better of eager and compile: {len(lost)} of {compared}."]
    page += [""] * bool(lost) + [f"- {_label(row)}: {peer}/normfused {ratio:.2f}" for ratio, peer, row in lost]
    failed = [row for row in rows if row["failure"] is not None]
    if failed:
        page += ["", "## Failed", ""]
        page += [f"- {row['provider']}, {_label(row)}: {row['failure']}" for row in failed]
    page += ["", "## All rows", ""]
    page.append(
        "Time per call: median ± half the interquartile range. GB/s counts the bytes of the floor (2 S forward, "
        "5 S forward+backward; S = bytes of x) and is normfused's; so are the copies: its time as a multiple of a "
        "plain copy of x into mapped memory."
    )
    header = [
        *("family", "form", "N×C×H×W", "dtype", "layout", "mode", "eager", "compile", "normfused"),
        *("eager/normfused", "compile/normfused", "GB/s", "copies", "copy, mapped", "copy, fresh"),
    ]
    page += ["", *table(header, [_line(found) for found in by_case(rows).values()]), ""]
    return "\n".join(page)


def _line(found):
    row = next(iter(found.values()))
    ours = found.get(OURS, {})
    ratio = ours.get("ratio", {})
    return [
        *(row["family"], row["form"], _size(row), row["dtype"], row["layout"], row["mode"]),
        *(_time(found.get(name)) for name in (*PEERS, OURS)),
        *(_number(ratio.get(peer)) for peer in PEERS),
        _number(ours.get("gb_per_s"), 1),
        _number(ours.get("copies"), 1),
        *(_time(found.get(name)) for name in ("copy_mapped", "copy_fresh")),
    ]


def _backend_sentence(where):
    info = where["normfused"]
    backend = info["backend"].get("cpu")
    if backend == "extension":
        return f"normfused {info['version']}, C++ core for {info['extension']['instruction_set']}"
    return (
        f"**normfused {info['version']} was served by PyTorch's own operators (backend {backend!r}): no speed-up is to "
        f"be expected.** {info['extension']['why_not']}"
    )


def write(rows, where, folder):
    """Write ops.md, ops.csv and ops.json into ``folder``; returns their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"ops.{kind}" for kind in ("md", "csv", "json")]
    paths[0].write_text(markdown(rows, where), encoding="utf-8")
    providers = (*PEERS, OURS)
    with paths[1].open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow([*_COLUMNS, *(f"{name}/this" for name in providers), "failure"])
        for row in rows:
            ratio = row.get("ratio", {})
            out.writerow([*(row.get(c) for c in _COLUMNS), *(ratio.get(p) for p in providers), row["failure"]])
    content = {
        "environment": where,
        "geometric_means": geometric_means(rows),
        "losing": [{"row": _label(row), "peer": peer, "ratio": ratio} for ratio, peer, row in losing(rows)],
        "rows": rows,
    }
    paths[2].write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return paths
