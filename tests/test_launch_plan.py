"""Launch plans of the CUDA kernels: every element once, within the limits of each device."""

import pytest
from helpers import examples
from hypothesis import assume, given, settings
from hypothesis import strategies as st

C = pytest.importorskip("normfused._C", reason="the C++ core is not built")

DEVICES = C.devices()
ON_CHIP = ("block", "cluster", "cooperative")
ELEMENT = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
sizes = st.one_of(
    st.integers(0, 70), st.sampled_from([1023, 1024, 1025, 3136, 12544, 65535, 65536, 131072]), st.integers(1, 300000)
)
layouts = st.sampled_from(["contiguous", "channels_last"])


@st.composite
def requests(draw):
    n, c, s = draw(sizes), draw(sizes.filter(bool)), draw(sizes)
    if n * c * s > 2**36:
        n = min(n, 64)
    assume(n * c * s <= 2**40)
    divisors = [g for g in range(1, min(c, 70) + 1) if c % g == 0]
    groups = draw(st.one_of(st.none(), st.sampled_from(divisors)))
    return {
        "n": n, "c": c, "s": s, "groups": groups, "memory_format": draw(layouts),
        "dtype": draw(st.sampled_from(sorted(ELEMENT))), "direction": draw(st.sampled_from(["forward", "backward"])),
        "reduces": groups is not None or draw(st.booleans()), "residual": groups is None and draw(st.booleans()),
        "aligned": draw(st.booleans()),
        "path": draw(st.sampled_from([None, None, "two_kernels", *ON_CHIP])),
    }  # fmt: skip


def numel(view):
    matrices, rows, channels, group = view
    return matrices * rows * channels * group


def check_launch(launch, device):
    grid_x, grid_y = launch["grid"]
    assert 1 <= grid_x <= device["max_grid_x"]
    assert 1 <= grid_y <= device["max_grid_y"]
    assert launch["block"] % 32 == 0
    assert launch["block"] <= min(1024, device["threads_per_multiprocessor"])
    assert launch["shared_bytes"] <= device["shared_per_block"]
    assert 1 <= launch["cluster"] <= device["max_cluster"]
    assert grid_x % launch["cluster"] == 0


def check_slots(launch, work_of_splits):
    """Every slot or row belongs to one split, and slots reach to the end of a row wherever it starts."""
    v = launch["vector"]
    _, _, channels, group = launch["view"]
    if launch["shape"] == "planes":
        for start in range(v) if launch["aligned"] and group % v else (0,):
            assert launch["slots_per_row"] * v >= group + start
    else:
        assert launch["tile_channels"] * group == launch["tile_vectors"] * v
        assert 1 <= launch["row_groups"] * launch["tile_vectors"] <= launch["block"]
        if v > 1:
            # Every vector starts at a multiple of its size and ends inside of the row.
            assert launch["aligned"]
            assert channels * group % v == launch["tile_channels"] * group % v == 0
    assert (launch["splits"] - 1) * launch["per_split"] < work_of_splits <= launch["splits"] * launch["per_split"]


def check_on_chip(plan, request, device):
    """One kernel, whose blocks hold all of their slots; as many of a grid's as are resident at once."""
    assert request["reduces"]
    assert request["dtype"] != "float64"
    (launch,) = plan["passes"]
    matrices, _, channels, _ = launch["view"]
    planes = launch["shape"] == "planes"
    tiles = channels if planes else -(-channels // launch["tile_channels"])
    assert launch["units"] == matrices * tiles
    assert launch["grid"] == (launch["units_per_launch"] * launch["splits"], 1)
    assert plan["chunks"] == -(-launch["units"] // launch["units_per_launch"])
    tensors = 1 if request["direction"] == "forward" else 2 + request["residual"]
    # Held slots are those of the longest split; a thread of columns holds every row of its row group.
    if planes:
        assert launch["held"] == launch["per_split"]
    else:
        per_thread = -(-launch["per_split"] // launch["row_groups"])
        assert launch["held"] == per_thread * launch["row_groups"] * launch["tile_vectors"]
        depth = request["c"] // plan["groups"]
        assert launch["tile_channels"] % depth == channels % launch["tile_channels"] % depth == 0
    assert launch["shared_bytes"] >= 16 * tensors * launch["held"]
    splits = launch["splits"]
    assert (launch["cluster"], launch["cooperative"]) == {
        "block": (1, False), "cluster": (splits, False), "cooperative": (1, True)
    }[plan["path"]]  # fmt: skip
    assert splits == 1 if plan["path"] == "block" else splits > 1
    if plan["path"] == "cooperative":
        per_multiprocessor = min(
            2, device["shared_per_multiprocessor"] // (launch["shared_bytes"] + device["shared_reserved_per_block"])
        )
        # Some multiprocessors stay free.
        assert launch["grid"][0] <= per_multiprocessor * (device["multiprocessors"] - 1)
    else:
        assert plan["chunks"] == 1


@pytest.mark.parametrize(
    "device", [pytest.param(d, marks=() if d in ("sm_80", "sm_90") else pytest.mark.thorough) for d in DEVICES]
)
@settings(max_examples=examples(2000), deadline=None)
@given(request=requests())
def test_a_plan_covers_every_element_once_within_the_limits(device, request):
    plan, limits = C.launch_plan(**request, device=device), DEVICES[device]
    n, c, s = request["n"], request["c"], request["s"]
    assert numel(plan["view"]) == n * c * s
    assert plan["workspace_bytes"] >= 0
    if n * c * s == 0:
        assert (plan["path"], plan["passes"], plan["bytes_moved"]) == ("empty", [], 0)
        return
    backward = request["direction"] == "backward"
    size = n * c * s * ELEMENT[request["dtype"]]
    assert plan["bytes_moved"] >= size * (2 + backward + request["residual"])
    for launch in plan["passes"]:
        check_launch(launch, limits)
        assert numel(launch["view"]) == n * c * s
        rows = launch["view"][1]
        check_slots(launch, rows * launch.get("slots_per_row", 1))
    if plan["path"] in ON_CHIP:
        check_on_chip(plan, request, limits)
        assert plan["bytes_moved"] == size * (2 + backward + request["residual"])
        return
    assert plan["path"] == ("two_kernels" if request["reduces"] else "one_kernel")
    chunk_matrices, chunk_groups = plan["chunk"]
    matrices, groups = plan["view"][0], plan["groups"]
    assert 1 <= chunk_matrices <= matrices
    assert 1 <= chunk_groups <= groups
    chunks = -(-matrices // chunk_matrices) * -(-groups // chunk_groups)
    assert chunks == plan["chunks"]
    # A few launches; more only where the tensor is many times as large as L2.
    total, unit = size * (1 + backward + request["residual"]), max(size // groups // matrices, 1)
    assert chunks <= 4 * max(total / (0.4 * limits["l2_bytes"]), 1) + 1 or unit > 0.1 * limits["l2_bytes"]
    for launch in plan["passes"]:
        view = launch["view"]
        channels = chunk_groups * (view[2] // groups)
        tiles = channels if launch["shape"] == "planes" else -(-channels // launch["tile_channels"])
        assert launch["grid"] == (chunk_matrices * tiles, launch["splits"])
        if launch["shape"] == "columns" and launch["vector"] > 1 and chunk_groups < groups:
            # The first vector of a chunk is as aligned as the first of the tensor.
            assert channels * view[3] % launch["vector"] == 0


@pytest.mark.parametrize(
    ("shape", "options", "path"),
    [
        ((32, 192, 28 * 28), {}, "block"),
        ((32, 960, 7 * 7), {}, "block"),
        ((32, 960, 7 * 7), {"direction": "backward"}, "block"),
        ((32, 960, 7 * 7), {"aligned": False}, "two_kernels"),
        ((2, 1280, 16 * 16), {"groups": 32, "direction": "backward"}, "block"),
        ((256, 960, 14 * 14), {"dtype": "float64"}, "two_kernels"),
        # Rows of 64 bytes that are read before any of them is read again: L2 holds them, the device on chip, nothing.
        ((256, 192, 28 * 28), {"memory_format": "channels_last"}, "two_kernels"),
        ((28, 96, 112 * 112), {"memory_format": "channels_last"}, "cooperative"),
        ((256, 96, 112 * 112), {"memory_format": "channels_last"}, "two_kernels"),
    ],
)
def test_the_path_of_known_shapes(shape, options, path):
    plan = C.launch_plan(*shape, **({"dtype": "float16"} | options), device="sm_90")
    assert plan["path"] == path


def test_a_path_can_be_forced():
    assert C.launch_plan(32, 144, 56 * 56, dtype="float16", path="cluster")["passes"][0]["cluster"] == 2
    # Before sm_90 there are no clusters.
    assert C.launch_plan(32, 144, 56 * 56, dtype="float16", path="cluster", device="sm_80")["path"] == "two_kernels"


def test_chunks_go_through_l2():
    plan = C.launch_plan(32, 144, 56 * 56, dtype="float16", direction="backward", path="two_kernels")
    assert [launch["stage"] for launch in plan["passes"]] == ["reduce", "apply"]
    assert plan["chunks"] > 1
    assert plan["bytes_moved"] == 3 * 2 * 32 * 144 * 56 * 56


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "sm_75"}, "device must be one of sm_80, .*, got 'sm_75'"),
        ({"dtype": "int8"}, "dtype must be one of float32, .*, got 'int8'"),
        ({"path": "fast"}, "path must be one of automatic, .*, got 'fast'"),
        ({"memory_format": "NHWC"}, "memory_format must be one of"),
        ({"direction": "up"}, "direction must be one of"),
        ({"n": -1}, "n and s must be >= 0"),
        ({"c": 0}, "c >= 1"),
        ({"groups": 3}, "groups must divide c"),
        ({"groups": 2, "residual": True}, "GroupNorm"),
    ],
)
def test_bad_requests_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        C.launch_plan(**({"n": 2, "c": 4, "s": 8} | change))
