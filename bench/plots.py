"""Pictures of what was measured, where matplotlib is installed."""

import contextlib

from . import report

NAMES = ("bandwidth.png", "speedup.png")
_COLORS = {"eager": "#9a9a9a", "compile": "#d08a2e", "triton": "#7b6cc4", "normfused": "#1f77b4"}


def draw(rows, where, folder):
    """Draw NAMES into ``folder``; nothing without matplotlib or rows."""
    with contextlib.suppress(ImportError):
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        rows = [row for row in rows if row["failure"] is None and row["mode"] != "host"]
        if rows:
            title = _title(where)
            for name, function in zip(NAMES, (_bandwidth, _speedup), strict=True):
                figure = function(plt, rows)
                figure.suptitle(title, fontsize=9)
                figure.savefig(folder / name, dpi=110)
                plt.close(figure)


def _title(where):
    if not where:
        return ""
    device = (where.get("gpu") or {}).get("name") or where["cpu"]
    return f"{device}, torch {where['torch']}, {where['date']}, commit {(where['commit'] or '?')[:12]}"


def _bandwidth(plt, rows):
    """Bytes of the floor per second against the size of x, forward and backward: the roofline of a memory-bound layer
    is the line of the copy."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
    for axis, mode, plain in zip(axes, ("forward", "backward"), ("copy", "add"), strict=True):
        for provider in (*_COLORS, plain, "copy_mapped"):
            points = [
                (found["copy"]["floor_bytes"] / 2 if "copy" in found else found["copy_mapped"]["floor_bytes"] / 2, row)
                for found in report.by_case(rows).values()
                for row in [found.get(provider)]
                if row is not None and row["mode"] == mode and ("copy" in found or "copy_mapped" in found)
            ]
            if not points:
                continue
            points.sort(key=lambda point: point[0])
            sizes, speeds = [size / 1e6 for size, _ in points], [row["gb_per_s"] for _, row in points]
            if provider in _COLORS:
                axis.scatter(sizes, speeds, s=12, label=provider, color=_COLORS[provider])
            else:
                axis.plot(sizes, speeds, color="black", linewidth=1, label=provider.replace("_", ", "))
        axis.set_xscale("log")
        axis.set_xlabel("x, MB")
        axis.set_title(mode)
        axis.grid(alpha=0.3)
        if axis.has_data():
            axis.legend(fontsize=8)
    axes[0].set_ylabel("bytes of the floor / time, GB/s")
    return figure


def _speedup(plt, rows):
    """Peers' time over normfused's, a bar for each case, forward + backward where it was measured."""
    mode = "forward+backward" if any(row["mode"] == "forward+backward" for row in rows) else "forward"
    found = [
        row
        for row in rows
        if row["provider"] == report.OURS and row["mode"] == mode and any(peer in row["ratio"] for peer in report.PEERS)
    ]
    found = sorted(found, key=lambda row: (row["family"], row["dtype"], row["layout"]))[:160]
    figure, axis = plt.subplots(figsize=(max(8, 0.14 * len(found)), 6), layout="constrained")
    for shift, peer in ((-0.2, "eager"), (0.2, "compile")):
        places = [index + shift for index, row in enumerate(found) if peer in row["ratio"]]
        heights = [row["ratio"][peer] for row in found if peer in row["ratio"]]
        if places:
            axis.bar(places, heights, width=0.4, color=_COLORS[peer], label=f"{peer} / normfused")
    axis.axhline(1, color="black", linewidth=0.8)
    labels = [f"{report.size(row)} {row['dtype'].replace('float', 'f')} {row['layout'][:4]}" for row in found]
    axis.set_xticks(range(len(found)), labels, rotation=90, fontsize=5)
    axis.set_ylabel(f"time over normfused's, {mode}")
    if found:
        axis.legend(fontsize=8)
    return figure
