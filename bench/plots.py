"""Pictures of what was measured, where matplotlib is installed."""

import importlib.util
import statistics

from . import report

NAMES = ("roofline", "layers")
_COLORS = {"eager": "#9a9a9a", "compile": "#d08a2e", "onednn": "#2a9d6f", "triton": "#7b6cc4", "normfused": "#1f77b4"}
_VARIANTS = {
    **{"native": "#9a9a9a", "native-checkpoint": "#d08a2e", "normfused": "#1f77b4", "normfused-recompute": "#2a9d6f"},
    **{"native-compile": "#555555", "normfused-compile": "#174a6e"},
}
_MODES = ("forward", "eval", "backward", "forward+backward")


def available():
    """Whether there is something to draw with."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(rows, where, folder, kind="png", prefix=""):
    """Draw NAMES, of rows of ``ops``, into ``folder``; returns the paths, none without matplotlib or rows."""
    rows = [row for row in rows if row["failure"] is None and row["mode"] != "host"]
    if not rows:
        return []
    return _save(dict(zip(NAMES, (_roofline, _layers), strict=True)), rows, where, folder, kind, prefix)


def draw_memory(rows, where, folder, kind="png", prefix=""):
    """The same for ``memory``, of rows of ``model`` or ``memory``."""
    rows = [row for row in rows if row["failure"] is None]
    return _save({"memory": _memory}, rows, where, folder, kind, prefix) if rows else []


def _save(functions, rows, where, folder, kind, prefix):
    if not available():
        return []
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    paths = []
    for name, function in functions.items():
        figure = function(plt, rows)
        figure.suptitle(_title(where), fontsize=9)
        paths.append(folder / f"{prefix}{name}.{kind}")
        figure.savefig(paths[-1], dpi=110)
        plt.close(figure)
    return paths


def _title(where):
    if not where:
        return ""
    device = (where.get("gpu") or {}).get("name") or where["cpu"]
    return f"{device}, torch {where['torch']}, {where['date']}, commit {(where['commit'] or '?')[:12]}"


def _roofline(plt, rows):
    """Bytes of the floor per second against the size of x, mode by mode: the roof of a memory-bound layer is the line
    of the copy."""
    modes = [mode for mode in _MODES if any(row["mode"] == mode for row in rows)]
    size = (max(6.5, 5 * len(modes)), 5)
    figure, axes = plt.subplots(1, len(modes), figsize=size, sharey=True, squeeze=False, layout="constrained")
    measured = [(found, found.get("copy") or found.get("copy_mapped")) for found in report.by_case(rows).values()]
    for axis, mode in zip(axes[0], modes, strict=True):
        for provider in (*_COLORS, "copy", "add", "copy_mapped", "copy_fresh"):
            points = sorted(
                (copy["floor_bytes"] / 2 / 1e6, found[provider]["gb_per_s"])
                for found, copy in measured
                if copy is not None and provider in found and found[provider]["mode"] == mode
            )
            if points and provider in _COLORS:
                axis.scatter(*zip(*points, strict=True), s=14, label=provider, color=_COLORS[provider], zorder=2)
            elif points:
                # Layers of one size copy the same: their median is the roof.
                roof = {size: [] for size, _ in points}
                for size, speed in points:
                    roof[size].append(speed)
                points = [(size, statistics.median(speeds)) for size, speeds in roof.items()]
                style = ":" if provider == "copy_fresh" else "-"
                axis.plot(*zip(*points, strict=True), style, color="black", lw=1, label=provider.replace("_", ", "))
        axis.set(xscale="log", xlabel="x, MB", title=mode, ylim=(0, None))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("")
        axis.grid(alpha=0.3)
        if axis.has_data():
            axis.legend(fontsize=8)
    axes[0, 0].set_ylabel("bytes of the floor / time, GB/s")
    return figure


def _layers(plt, rows):
    """Peers' time over normfused's, a group of bars for each layer, forward + backward where it was measured."""
    mode = next(mode for mode in reversed(_MODES) if any(row["mode"] == mode for row in rows))
    found = [row for row in rows if row["provider"] == report.OURS and row["mode"] == mode and row["ratio"]]
    found = sorted(found, key=lambda row: (row["family"], row["dtype"], row["layout"]))[:160]
    figure, axis = plt.subplots(figsize=(max(8, 0.14 * len(found)), 6), layout="constrained")
    peers = [peer for peer in _COLORS if any(peer in row["ratio"] for row in found)]
    width = 0.8 / max(len(peers), 1)
    for number, peer in enumerate(peers):
        bars = [(index, row["ratio"][peer]) for index, row in enumerate(found) if peer in row["ratio"]]
        places, heights = zip(*bars, strict=True)
        places = [place + (number - (len(peers) - 1) / 2) * width for place in places]
        axis.bar(places, heights, width=width, color=_COLORS[peer], label=f"{peer} / normfused")
    axis.axhline(1, color="black", linewidth=0.8)
    labels = [f"{report.size(row)} {row['dtype'].replace('float', 'f')} {row['layout']}" for row in found]
    axis.set_xticks(range(len(found)), labels, rotation=90, fontsize=6)
    axis.set_ylabel(f"time over normfused's, {mode}")
    if peers:
        axis.legend(fontsize=8)
    return figure


def _memory(plt, rows):
    """Peak of a training step, and what is kept for the backward pass, a group of bars for each model and batch."""
    groups = {}
    for row in rows:
        groups.setdefault((row["model"], row["batch"], row["layout"], row["dtype"]), {})[row["variant"]] = row
    variants = [variant for variant in _VARIANTS if any(variant in found for found in groups.values())]
    figure, axis = plt.subplots(figsize=(max(8, 1.4 * len(groups)), 5), layout="constrained")
    width = 0.8 / len(variants)
    for number, variant in enumerate(variants):
        for field, alpha in (("peak_bytes", 0.5), ("kept_bytes", 1)):
            bars = [(i, found[variant][field]) for i, found in enumerate(groups.values()) if variant in found]
            places = [index + (number - (len(variants) - 1) / 2) * width for index, _ in bars]
            label = f"{variant}: {'peak' if alpha < 1 else 'kept for backward'}"
            heights = [size / 2**20 for _, size in bars]
            axis.bar(places, heights, width=width, color=_VARIANTS[variant], alpha=alpha, label=label)
    labels = [f"{model}\nN={batch}\n{layout} {dtype}" for model, batch, layout, dtype in groups]
    axis.set_xticks(range(len(groups)), labels, fontsize=7)
    axis.set_ylabel("MiB beyond parameters and momentum")
    axis.legend(fontsize=7)
    return figure
