"""``python -m bench ops``: every provider on every case, checked first, then timed side by side."""

import contextlib
import gc
import random
import sys
import time

import torch

from . import cases, check, cuda, providers, timing

# Copies and sums of the case's tensors, measured in the same rounds.
PLAIN = ("copy_fresh", "copy_mapped", "copy", "add")


def run(
    selected,
    modes,
    names,
    seconds,
    rows,
    *,
    device="cpu",
    threads=None,
    seed=0,
    finished=lambda: None,
    progress=sys.stderr,
):
    """Measure cases in shuffled order and append their rows to ``rows`` as they are finished (so that Ctrl-C keeps
    them). What ``rows`` has already is not measured again.

    Args:
        selected: list of cases.Case.
        modes: names out of cases.MODES; the tiny family is measured in "host" only, the others in all but that.
        names: names out of providers.PROVIDERS.
        seconds: timing budget of one case in one mode, all providers together.
        rows: list that receives one dict per provider (see ``make_rows``).
        device: of the tensors.
        threads: numbers of PyTorch's threads, each measured in the same rounds; None: what is set.
        seed: of the order of cases and of rounds, and of the numbers.
        finished: called after each case.
        progress: text stream for one line per case, or None.
    """
    threads = threads or [torch.get_num_threads()]
    done = {}
    for row in rows:
        done.setdefault(_identity(row), set()).add((row["provider"], row["threads"]))
    left = []
    for case in selected:
        taking_part = {name for name in names if providers.applies(name, case)}
        wanted = {(name, number) for name in taking_part for number in threads}
        missing = [m for m in cases.modes_of(case, modes) if not wanted <= done.get(_identity_of(case, m), set())]
        if missing:
            left.append((case, missing, [name for name in names if name in taking_part]))
    random.Random(seed).shuffle(left)
    try:
        _run(left, seconds, rows, device, threads, seed, finished, progress)
    finally:
        gc.unfreeze()
        listed = [_identity_of(case, mode) for case in selected for mode in cases.MODES]
        rank = {identity: index for index, identity in enumerate(listed)}
        rows.sort(key=lambda row: rank.get(_identity(row), len(rank)))


def _run(left, seconds, rows, device, threads, seed, finished, progress):
    start = time.monotonic()
    for index, (case, missing, taking_part) in enumerate(left):
        if progress is not None:
            time_left = ""
            if index:
                minutes = (time.monotonic() - start) / index * (len(left) - index) / 60
                time_left = f"  (about {minutes:.0f} min left)" if minutes >= 1 else "  (less than 1 min left)"
            print(f"[{index + 1}/{len(left)}] {case}{time_left}", file=progress, flush=True)
        for found in _measured(case, missing, taking_part, seconds, device=device, threads=threads, seed=seed):
            again = _identity(found[0]) if found else None
            rows[:] = [row for row in rows if _identity(row) != again] + found
            for row in found if progress is not None else ():
                print(f"    {_progress_text(row)}", file=progress, flush=True)
        finished()
        if index == 0:
            # What was imported until here is not searched for garbage in every round to come: it takes a second.
            gc.collect()
            gc.freeze()


def _measured(case, modes, names, seconds, **options):
    """``measure``; where it cannot go on, the modes that are left have rows that say why."""
    left = list(modes)
    try:
        for found in measure(case, modes, names, seconds, **options):
            left.pop(0)
            yield found
    except Exception as error:  # no memory for the tensors, say
        for mode in left:
            failures = dict.fromkeys(names, timing.reason(error))
            yield [row for number in options["threads"] for row in make_rows(case, mode, {}, failures, number)]


def _identity(row):
    """What is measured together: a case in a mode, whoever the provider and with however many threads."""
    names = ("family", "layer", "shape", "dtype", "layout", "form", "mode")
    return tuple(tuple(row[name]) if name == "shape" else row[name] for name in names)


def _identity_of(case, mode):
    return _identity({**_description(case), "mode": mode})


def _description(case):
    return {
        "family": case.family,
        "form": case.form,
        "layer": case.layer,
        "shape": list(case.shape),
        "groups": case.groups,
        "activation": case.activation,
        "residual": case.residual,
        "dtype": case.dtype,
        "layout": case.layout,
    }


def measure(case, modes, names, seconds, *, device="cpu", threads=None, seed=0):
    """Yield the rows of one case, one list per mode."""
    # A provider compiles for this shape alone, and what it compiled for the last case is of no use any more.
    torch._dynamo.reset()
    inputs = cases.inputs(case, device, seed)
    on_gpu = torch.device(device).type != "cpu"
    if on_gpu:
        rotation = cuda.Rotation(inputs)
    checked, threads = {}, threads or [torch.get_num_threads()]
    for mode in modes:
        training = mode != "eval"
        if training not in checked:
            checked[training] = _checked_layers(case, names, inputs, device, training)
        layers, failures = checked[training]
        timers = {}
        for number in threads:
            # A copy says how near the floor a time is; a tiny case has no floor but the host's.
            if on_gpu:
                found = rotation.timers(layers, mode) | ({} if mode == "host" else rotation.copies(mode))
            else:
                found = timing.host_timers(layers, inputs, mode, threads=number)
                found |= {} if mode == "host" else timing.copies(inputs.x, number)
            timers |= {(name, number): timer for name, timer in found.items()}
        timings, broken = timing.interleave(timers, seconds, seed=seed)
        found = timers = None  # what graphs keep
        yield _rows_of_threads(case, mode, threads, timings, failures, broken)


def _checked_layers(case, names, inputs, device, training):
    """({provider: Layer} of those whose numbers are right, {provider: reason} of the others)."""
    layers, results, failures, parameters = {}, {}, {}, None
    for name in names:
        try:
            layer = providers.PROVIDERS[name](case, device, training)
            with layer.context(), contextlib.nullcontext() if training else torch.no_grad():
                y = layer.run(*inputs.arguments)
                results[name] = (y.detach(),)
                if training:
                    results[name] += torch.autograd.grad(y, providers.wanted(inputs, layer.parameters), inputs.dy)
            layers[name], parameters = layer, layer.parameters
        except providers.Unavailable as why:
            failures[name] = str(why)
        except Exception as error:
            failures[name] = timing.reason(error)
            results.pop(name, None)
        y = None
    if results:
        statistics = None if training else providers.statistics(case, device)
        for name, wrong in check.check(case, inputs, parameters, results, statistics).items():
            if wrong is not None:
                failures[name] = wrong
                del layers[name]
    return layers, failures


def _rows_of_threads(case, mode, threads, timings, failures, broken):
    """``make_rows`` for each number of threads; ``timings`` and ``broken`` are by (provider, threads)."""
    rows = []
    for number in threads:
        own, failed = (
            {name: value for (name, of), value in found.items() if of == number} for found in (timings, broken)
        )
        rows += make_rows(case, mode, own, {**failures, **failed}, number)
    if len(threads) > 1:
        first = {row["provider"]: row for row in rows if row["threads"] == min(threads)}
        for row in rows:
            reference = first[row["provider"]]
            if row["failure"] is None and reference["failure"] is None:
                row["scaling"] = reference["median_s"] / row["median_s"]
    return rows


def make_rows(case, mode, timings, failures, threads=None):
    """One dict per provider.

    Times in seconds per call, ``floor_bytes`` what any implementation must move, ``gb_per_s`` those bytes over the
    median (1e9), ``copies`` and ``fresh_copies`` the median as a multiple of a copy of x into mapped and into fresh
    memory, ``fraction`` the bandwidth ``gb_per_s`` as a part of the copy's (into mapped memory), on a GPU of what a
    copy reaches forward and a sum of two tensors backward. ``ratio`` the median of every other provider over this one's
    (above 1: this one is faster). A failed provider has ``failure`` and no figures. Where several numbers of
    ``threads`` were measured, ``scaling`` is the time with the fewest over this one.
    """
    copy, fresh = timings.get("copy") or timings.get("copy_mapped"), timings.get("copy_fresh")
    peers = {name: found for name, found in timings.items() if name not in PLAIN}
    rows = []
    for name in (*providers.PROVIDERS, *PLAIN):
        if name not in timings and name not in failures:
            continue
        row = {**_description(case), "mode": mode, "threads": threads, "scaling": None}
        row |= {"provider": name, "failure": failures.get(name)}
        rows.append(row)
        if name not in timings:
            continue
        found = timings[name]
        tensors = {"add": 3}.get(name, 2) if name in PLAIN else case.floor_tensors(mode)
        if name in PLAIN:
            expected = _plain_seconds(tensors, timings)
        else:
            expected = _expected_seconds(case, mode, timings)
        row.update(
            median_s=found.median,
            q25_s=found.q25,
            q75_s=found.q75,
            rounds=found.rounds,
            repeats=found.repeats,
            buffers=found.buffers,
            floor_bytes=tensors * case.bytes,
            gb_per_s=None if mode == "host" else tensors * case.bytes / found.median / 1e9,
            copies=found.median / copy.median if copy else None,
            fresh_copies=found.median / fresh.median if fresh else None,
            fraction=expected / found.median if expected else None,
            ratio={peer: peers[peer].median / found.median for peer in peers if peer != name and name in peers},
        )
    return rows


def _expected_seconds(case, mode, timings):
    """Seconds in which the floor's bytes move plainly."""
    parts = ("forward", "backward") if mode in ("forward+backward", "host") else (mode,)
    seconds = [_plain_seconds(case.floor_tensors(part), timings) for part in parts]
    return None if None in seconds else sum(seconds)


def _plain_seconds(tensors, timings):
    """Seconds in which as many tensors move plainly: two as in a copy, more as in a sum of two where that was timed."""
    copy, add = timings.get("copy") or timings.get("copy_mapped"), timings.get("add")
    if add is not None and tensors > 2:
        return add.median * tensors / 3
    return copy.median * tensors / 2 if copy is not None else None


def _progress_text(row):
    label = f"{row['mode']:<16} {row['provider']:<11}"
    if row["scaling"] is not None:
        label += f" {row['threads']:>3} threads"
    if row["failure"]:
        return f"{label} failed: {row['failure']}"
    return f"{label} {row['median_s'] * 1e3:9.4f} ms ± {(row['q75_s'] - row['q25_s']) / 2 * 1e3:.2g}"
