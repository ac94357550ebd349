"""``python -m bench ops``: every provider on every case, checked first, then timed side by side."""

import sys
import time

import torch

from . import cases, check, providers, timing


def run(selected, modes, names, seconds, rows, progress=sys.stderr):
    """Measure cases and append their rows to ``rows`` as they are finished (so that Ctrl-C keeps them).

    Args:
        selected: list of cases.Case.
        modes: names out of cases.MODES; the tiny family is measured in "forward+backward" only.
        names: names out of providers.PROVIDERS.
        seconds: timing budget of one case in one mode, all providers together.
        rows: list that receives one dict per provider (see ``make_rows``).
        progress: text stream for one line per case, or None.
    """
    start = time.monotonic()
    for index, case in enumerate(selected):
        if progress is not None:
            left = ""
            if index:
                minutes = (time.monotonic() - start) / index * (len(selected) - index) / 60
                left = f"  (about {minutes:.0f} min left)" if minutes >= 1 else "  (less than 1 min left)"
            print(f"[{index + 1}/{len(selected)}] {case}{left}", file=progress, flush=True)
        for row in measure(case, modes, names, seconds):
            rows.append(row)
            if progress is not None:
                print(f"    {_progress_text(row)}", file=progress, flush=True)


def measure(case, modes, names, seconds):
    """Yield the rows of one case, mode by mode."""
    # A provider compiles for this shape alone, and what it compiled for the last case is of no use any more.
    torch._dynamo.reset()
    x, dy = cases.inputs(case)
    layers, results, failures, parameters = {}, {}, {}, None
    for name in names:
        try:
            layer, own = providers.PROVIDERS[name](case)
            y = layer(x)
            results[name] = (y.detach(), *torch.autograd.grad(y, (x, *own), dy))
            layers[name], parameters = (layer, own), own
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {_first_line(error)}"
    if results:
        for name, wrong in check.check(case, x, dy, parameters, results).items():
            if wrong is not None:
                failures[name] = wrong
                del layers[name]
    y = None
    results.clear()
    for mode in modes:
        if case.family == "tiny" and mode != "forward+backward":
            continue
        functions = {name: providers.call(*layer, x, dy, mode) for name, layer in layers.items()}
        # A copy says how near the floor a time is; a tiny case has no floor but the host's.
        plain = {} if case.family == "tiny" else timing.copies(x)
        timings, broken = timing.interleave({**functions, **plain}, seconds)
        yield from make_rows(case, mode, timings, {**failures, **broken})


def _first_line(error):
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"


def make_rows(case, mode, timings, failures):
    """One dict per provider.

    Times in seconds per call, ``floor_bytes`` what any implementation must move, ``gb_per_s`` those bytes over the
    median (1e9), ``copies`` the median as a multiple of a copy of x into mapped memory, ``ratio`` the median of every
    other provider over this one's (above 1: this one is faster). A failed provider has ``failure`` and no figures.
    """
    n, c, h, w = case.shape
    mapped = timings.get("copy_mapped")
    peers = {name: timing for name, timing in timings.items() if not name.startswith("copy_")}
    rows = []
    for name in (*providers.PROVIDERS, "copy_fresh", "copy_mapped"):
        if name not in timings and name not in failures:
            continue
        row = {
            "family": case.family,
            "form": case.form,
            "n": n,
            "c": c,
            "h": h,
            "w": w,
            "groups": case.groups,
            "dtype": case.dtype,
            "layout": case.layout,
            "mode": mode,
            "provider": name,
            "failure": failures.get(name),
        }
        rows.append(row)
        if name not in timings:
            continue
        own = timings[name]
        moved = 2 * case.bytes if name.startswith("copy_") else case.floor_bytes(mode)
        row.update(
            median_s=own.median,
            q25_s=own.q25,
            q75_s=own.q75,
            rounds=own.rounds,
            repeats=own.repeats,
            floor_bytes=moved,
            gb_per_s=None if case.family == "tiny" else moved / own.median / 1e9,
            copies=own.median / mapped.median if mapped else None,
            ratio={peer: peers[peer].median / own.median for peer in peers if peer != name and name in peers},
        )
    return rows


def _progress_text(row):
    label = f"{row['mode']:<16} {row['provider']:<11}"
    if row["failure"]:
        return f"{label} failed: {row['failure']}"
    return f"{label} {row['median_s'] * 1e3:9.4f} ms"
