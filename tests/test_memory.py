"""The memory that is kept for large CPU outputs."""

import os
import pickle

import pytest
import torch

import normfused
from normfused import functional

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.normfused, "empty_cache") or torch.__version__ < "2.11",
    reason="needs the C++ core and torch >= 2.11 (from_blob with a deleter)",
)

MIB = 1 << 20


@pytest.fixture(autouse=True)
def clean():
    normfused.empty_cache()
    yield
    normfused.empty_cache()


def forward(x):
    return functional.group_norm_act(x, 4)


def large(mib=4, dtype=torch.float32):
    return torch.randn(1, 4, mib * MIB // 4 // dtype.itemsize, dtype=torch.float32).to(dtype)


def test_memory_of_a_freed_output_serves_the_next():
    x = large()
    y = forward(x)
    address = y.data_ptr()
    assert address % 64 == 0
    del y
    y = forward(x)
    assert y.data_ptr() == address
    assert forward(x).data_ptr() != address  # y lives
    torch.testing.assert_close(y, torch.nn.functional.group_norm(x, 4))


def test_a_view_keeps_the_memory():
    x = large()
    y = forward(x)
    view, expected = y[0, 1], y[0, 1].clone()
    del y
    forward(torch.zeros_like(x))
    assert torch.equal(view, expected)


def test_empty_cache_gives_back_what_is_idle():
    x = large(4)
    y = forward(x)
    forward(x)
    assert normfused.empty_cache() == 4 * MIB
    assert normfused.empty_cache() == 0
    assert torch.isfinite(y).all()
    del y
    assert normfused.empty_cache() == 4 * MIB


def test_small_outputs_are_not_kept():
    forward(torch.randn(1, 4, 1000))
    assert normfused.empty_cache() == 0


def test_a_much_smaller_output_takes_no_large_block():
    forward(large(8))
    y = forward(large(2))
    assert normfused.empty_cache() == 8 * MIB
    del y


def test_limit():
    default = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8
    try:
        normfused.set_cache_limit(6 * MIB)
        forward(large(2))
        forward(large(5))
        assert normfused.empty_cache() == 5 * MIB  # the older went
        normfused.set_cache_limit(0)
        forward(large(2))
        assert normfused.empty_cache() == 0
    finally:
        normfused.set_cache_limit(default)


@pytest.mark.parametrize(("wrong", "error"), [(-1, ValueError), ("1", TypeError), (1.5, TypeError), (None, TypeError)])
def test_wrong_limit(wrong, error):
    with pytest.raises(error, match="set_cache_limit: bytes must"):
        normfused.set_cache_limit(wrong)


def test_dtypes_share_blocks():
    forward(large(4))
    y = forward(large(4, torch.bfloat16))
    assert normfused.empty_cache() == 0
    assert y.dtype == torch.bfloat16


def test_an_output_is_a_tensor_like_any_other():
    x = large()
    y = forward(x)
    expected = torch.nn.functional.group_norm(x, 4)
    assert y.is_contiguous()
    assert y.untyped_storage().nbytes() == x.numel() * 4
    torch.testing.assert_close(pickle.loads(pickle.dumps(y)), expected)
    torch.testing.assert_close(torch.from_numpy(y.numpy()), expected)
    y += 1
    torch.testing.assert_close(y, expected + 1)
    shared = y.share_memory_()
    assert shared.is_shared()
    torch.testing.assert_close(shared, expected + 1)
    del y, shared


def test_threads_that_allocate_and_free_at_once():
    from concurrent.futures import ThreadPoolExecutor

    def work(seed):
        x = torch.full((1, 4, MIB // 8), float(seed))
        x[..., 0] += 1
        kept = [forward(x) for _ in range(3)]
        return all(torch.equal(kept[0], y) for y in kept)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(40)))


def test_a_training_loop_allocates_no_more_after_the_first_steps():
    layer = normfused.BatchNormAct2d(16)
    x = torch.randn(8, 16, 64, 64, requires_grad=True)

    def step():
        layer(layer(x)).sum().backward()
        x.grad = None

    step(), step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    allocated = [
        event for event in profile.events() if event.name.startswith("normfused") and event.cpu_memory_usage > MIB
    ]
    assert not allocated


def test_child_processes_may_use_the_cache_too():
    x = large(2)
    forward(x)
    child = os.fork()
    if child == 0:
        ok = torch.isfinite(forward(x)).all() and normfused.empty_cache() >= 2 * MIB
        os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0
