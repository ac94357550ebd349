"""What was measured, as Markdown, CSV and JSON."""

import csv
import datetime
import importlib.metadata
import json
import math
import os
import platform
import shlex
import subprocess
from pathlib import Path

import torch

import normfused

from . import PROGRAM, allocator, onednn
from .ops import PLAIN
from .providers import PROVIDERS

OURS = "normfused"
PEERS = ("eager", "compile")
_COLUMNS = (
    "family form layer shape dtype layout mode threads provider "
    "median_s q25_s q75_s rounds repeats buffers floor_bytes gb_per_s copies fresh_copies fraction scaling loses_to"
).split()
# Whose versions are told where they are installed.
_PACKAGES = ("triton", "liger-kernel", "inplace-abn", "apex", "numpy")


def environment(arguments, device="cpu"):
    """Where and how a run was made; ``arguments`` are those after the program's name."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([*PROGRAM.split(), *arguments]),
        "commit": _commit(),
        "device": device,
        "gpu": None if device == "cpu" else gpu(device),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": _versions(),
        "normfused": normfused.info(),
    }


def gpu(device):
    """Name, limits and software of a GPU."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": _first_line(
            ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader"]
        ),
    }


def _first_line(command, **options):
    """The first line that a program prints; None where it cannot be run."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20, **options)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip().split("\n")[0]


def _versions():
    found = {"onednn": onednn.version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return {name: version for name, version in found.items() if version is not None}


def _commit():
    """The commit of the working tree, with "-dirty" where it was changed; None outside one.

    A package that is installed into a folder of some working tree is not part of it.
    """
    here = Path(__file__)
    if _first_line(["git", "ls-files", "--error-unmatch", here.name], cwd=here.parent) is None:
        return None
    return _first_line(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"], cwd=here.parent)


def _cpu_model():
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def key(row):
    """What identifies a measurement, whoever the provider."""
    names = ("family", "form", "layer", "shape", "dtype", "layout", "mode", "threads")
    return tuple(tuple(row[name]) if name == "shape" else row.get(name) for name in names)


def by_case(rows):
    """{case and mode: {provider: row}}, in the order of ``rows``."""
    table = {}
    for row in rows:
        table.setdefault(key(row), {})[row["provider"]] = row
    return table


def scales(rows):
    """Whether several numbers of threads were measured against each other."""
    return any(row.get("scaling") is not None for row in rows)


def _ran(row, provider=OURS):
    return row["provider"] == provider and row["failure"] is None


def geometric_mean(values):
    """The geometric mean; None of nothing."""
    values = list(values)
    return math.exp(math.fsum(map(math.log, values)) / len(values)) if values else None


def geometric_means(rows):
    """Geometric means of peer's time / normfused's per (family, form, layout, dtype, mode, threads).

    Returns:
        A list of {"family", "form", "layout", "dtype", "mode", "threads", "cases", "fraction", "scaling", one per
        peer}; a mean is None where that was not measured.
    """
    names = ("family", "form", "layout", "dtype", "mode", "threads")
    groups = {}
    for row in rows:
        if _ran(row):
            groups.setdefault(tuple(row.get(name) for name in names), []).append(row)
    peers = _peers(rows)
    means = []
    for values, ours in groups.items():
        mean = dict(zip(names, values, strict=True), cases=len(ours))
        for peer in peers:
            mean[peer] = geometric_mean(row["ratio"][peer] for row in ours if peer in row["ratio"])
        for name in ("fraction", "scaling"):
            mean[name] = geometric_mean(row[name] for row in ours if row.get(name))
        means.append(mean)
    return means


def _peers(rows):
    """Names of the other providers that took part, PEERS first."""
    found = {row["provider"] for row in rows}
    return [name for name in PROVIDERS if name in PEERS or (name in found and name != OURS)]


def losing(rows):
    """Rows of normfused that are slower than the better of eager and compile: (ratio, peer, row), the worst first."""
    found = []
    for row in rows:
        if _ran(row):
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


def size(row):
    return "×".join(map(str, row["shape"]))


def label(row):
    """A measurement in one line."""
    threads = f"threads={row['threads']}" if row.get("scaling") is not None else ""
    parts = [row["family"], row["form"], row["layer"], size(row), row["dtype"], row["layout"], row["mode"], threads]
    return " ".join(filter(None, parts))


def table(header, lines):
    """Lines of a Markdown table."""
    return [
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(map(str, line)) + " |" for line in lines),
    ]


def conditions(where):
    """Lines of Markdown on where and how a run was made; ``where`` is what ``environment`` returned."""
    lines = [f"`{where['command']}`, {where['date']}, commit {where['commit']}", ""]
    card = where.get("gpu")
    if card:
        lines += [
            f"{card['name']} ({card['multiprocessors']} multiprocessors, L2 {card['l2_bytes'] / 1e6:.0f} MB), driver "
            f"and clocks {card['driver']}, CUDA {card['cuda']}, cuDNN {card['cudnn']}",
            "",
        ]
    lines += [
        f"{where['cpu']}, {where['threads']} threads on {where['cores']} cores, torch {where['torch']}",
        "",
        _backend_sentence(where),
    ]
    if where.get("memory") in ("fresh", "kept"):
        lines += ["", f"Memory of results, `--memory {where['memory']}`: {allocator.ABOUT[where['memory']]}."]
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
    page += [*means_table(rows), "", "## Losing rows", "", *losing_lines(rows)]
    failed = failed_lines(rows)
    page += ["", "## Failed", "", *failed] if failed else []
    return "\n".join([*page, "", "## All rows", "", ROWS_LEGEND, "", *rows_table(rows), ""])


def means_table(rows):
    """geometric_means as a Markdown table."""
    peers, scaled = _peers(rows), scales(rows)
    header = ["family", "form", "layout", "dtype", "mode", *["threads"] * scaled, "cases"]
    numbers = [*peers, "fraction", *["scaling"] * scaled]
    means = [
        [*(mean[name] for name in header), *(_number(mean[name]) for name in numbers)] for mean in geometric_means(rows)
    ]
    titles = [*(f"{peer}/normfused" for peer in peers), "of copy", *["scaling"] * scaled]
    return table([*header, *titles], means)


def losing_lines(rows):
    """What loses, as Markdown."""
    lost = losing(rows)
    compared = sum(_ran(row) and bool(row["ratio"]) for row in rows)
    lines = [f"Slower than the better of eager and compile: {len(lost)} of {compared}."]
    return lines + [""] * bool(lost) + [f"- {label(row)}: {peer}/normfused {ratio:.2f}" for ratio, peer, row in lost]


def failed_lines(rows):
    """A line for each provider and reason, as Markdown."""
    failed = {}
    for row in rows:
        if row["failure"] is not None:
            failed.setdefault((row["provider"], row["failure"]), []).append(label(row))
    lines = []
    for (provider, why), labels in failed.items():
        more = f" and {len(labels) - 1} more" if len(labels) > 1 else ""
        lines.append(f"- {provider}, {labels[0]}{more}: {why}")
    return lines


ROWS_LEGEND = (
    "Time per call: median ± half the interquartile range; what loses to the better of eager and compile is bold. GB/s "
    "counts the bytes of the floor (2 S forward, 3 S backward; S = bytes of x; a residual adds S to each) and is "
    "normfused's; so are the copies, its time as a multiple of a plain copy of x (into mapped memory, and into pages "
    "fresh from the system), and the part of the bandwidth of that copy (into mapped memory), on a GPU backward of "
    "torch.add(x, dy, out=out). Scaling is normfused's time with the fewest threads over this one."
)


def rows_table(rows):
    """Every case as a line of a Markdown table."""
    peers, scaled = _peers(rows), scales(rows)
    columns = [*peers, OURS]
    plain = [name for name in PLAIN if any(row["provider"] == name for row in rows)]
    header = [
        *("family", "form", "layer", "shape", "dtype", "layout", "mode", *["threads", "scaling"] * scaled),
        *(*columns, *(f"{peer}/normfused" for peer in peers), "GB/s", "copies", "fresh copies", "of copy"),
        *(name.replace("_", ", ") for name in plain),
    ]
    slow = {key(row) for _, _, row in losing(rows)}
    return table(header, [_line(found, peers, plain, slow, scaled) for found in by_case(rows).values()])


def _line(found, peers, plain, slow, scaled):
    row = next(iter(found.values()))
    ours = found.get(OURS, {})
    ratio = ours.get("ratio", {})
    emphasis = "**" if key(row) in slow else ""
    return [
        *(row["family"], row["form"], row["layer"], size(row), row["dtype"], row["layout"], row["mode"]),
        *([row["threads"], _number(ours.get("scaling"))] if scaled else []),
        *(_time(found.get(name)) for name in peers),
        f"{emphasis}{_time(found.get(OURS))}{emphasis}",
        *(_number(ratio.get(peer)) for peer in peers),
        _number(ours.get("gb_per_s"), 1),
        _number(ours.get("copies"), 1),
        _number(ours.get("fresh_copies"), 1),
        _number(ours.get("fraction")),
        *(_time(found.get(name)) for name in plain),
    ]


def _backend_sentence(where):
    info = where["normfused"]
    device = where.get("device", "cpu").split(":")[0]
    backend = info["backend"].get(device)
    if backend == "extension":
        built = f"C++ core for {info['extension']['instruction_set']}"
        if device == "cuda":
            built = f"CUDA kernels for {', '.join(info['cuda']['archs'])}"
        return f"normfused {info['version']}, {built}"
    if backend == "triton":
        return f"**normfused {info['version']} was served by its Triton kernels.** {info['cuda']['why_not']}"
    return (
        f"**normfused {info['version']} was served by PyTorch's own operators (backend {backend!r}): no speed-up is to "
        f"be expected.** {info['extension']['why_not']}"
    )


def write(rows, where, folder, name="ops"):
    """Write NAME.md, NAME.csv and NAME.json into ``folder``; returns their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{kind}" for kind in ("md", "csv", "json")]
    replace(paths[0], markdown(rows, where))
    write_csv(rows, paths[1])
    replace(paths[2], json.dumps(content(rows, where), indent=1) + "\n")
    return paths


def replace(path, text):
    """Write a file so that it is whole at every moment."""
    draft = path.with_name(path.name + ".part")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def content(rows, where):
    """What the JSON file holds."""
    return {
        "environment": where,
        "geometric_means": geometric_means(rows),
        "losing": [{"row": label(row), "peer": peer, "ratio": ratio} for ratio, peer, row in losing(rows)],
        "rows": rows,
    }


def write_csv(rows, path):
    """One line for each row."""
    lost = {key(row): peer for _, peer, row in losing(rows)}
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow([*_COLUMNS, *(f"{name}/this" for name in PROVIDERS), "failure"])
        for row in rows:
            ratio = row.get("ratio", {})
            loses_to = lost.get(key(row)) if row["provider"] == OURS else None
            cells = {**row, "shape": "x".join(map(str, row["shape"])), "loses_to": loses_to}
            out.writerow([*(cells.get(c) for c in _COLUMNS), *(ratio.get(p) for p in PROVIDERS), row["failure"]])


def resumable(folder, where, name="ops"):
    """The rows of an earlier run into ``folder``, none where there was none.

    Raises:
        ValueError: they cannot be read, or were measured elsewhere or of another commit.
    """
    path = Path(folder) / f"{name}.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        earlier, rows = content["environment"], content["rows"]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {error!r}") from error
    same = ("commit", "device", "cpu", "threads", "torch", "memory")
    changed = [name for name in same if earlier.get(name) != where.get(name)]
    if (earlier.get("gpu") or {}).get("name") != (where["gpu"] or {}).get("name"):
        changed.append("gpu")
    if changed:
        raise ValueError(f"{path} was measured under other conditions ({', '.join(changed)}): start anew without it")
    return rows
