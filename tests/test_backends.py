"""Whether the CUDA kernels serve a machine's GPUs, decided without one."""

import types

import pytest
import torch

from normfused import backends, ops


@pytest.mark.parametrize(
    ("arch", "capability", "runs"),
    [
        ("sm_80", (8, 0), True),
        ("sm_80", (8, 6), True),
        ("sm_86", (8, 0), False),
        ("sm_80", (9, 0), False),
        ("compute_80", (9, 0), True),
        ("compute_80", (12, 1), True),
        ("compute_90", (8, 9), False),
        ("sm_90a", (9, 0), True),
        ("sm_100a", (10, 3), False),
        ("sm_120", (12, 0), True),
    ],
)
def test_which_gpus_run_what_was_built(arch, capability, runs):
    assert backends._runs_on(arch, *capability) == runs


@pytest.fixture
def machine(monkeypatch):
    """A machine with GPUs of some compute capabilities, and kernels built for some architectures."""

    def make(archs, *gpus):
        cuda = types.SimpleNamespace(
            device_count=lambda: len(gpus),
            get_device_capability=lambda index: gpus[index],
            get_device_name=lambda index: f"GPU {index}",
        )
        monkeypatch.setattr(torch, "cuda", cuda)
        monkeypatch.setattr(ops, "WHY_NOT", None)
        monkeypatch.setattr(ops, "LOADED", True)
        monkeypatch.setattr(ops, "CUDA_WHY_NOT", None)
        monkeypatch.setitem(ops.BUILD, "cuda_archs", archs)

    return make


def test_the_extension_serves_gpus_that_it_was_built_for(machine):
    machine("sm_80 sm_90", (8, 6), (9, 0))
    assert backends._preference("cuda") == ("extension", None)


def test_gpus_below_compute_capability_8_are_left_to_others(machine):
    machine("sm_80 compute_80", (9, 0), (7, 5))
    assert "need compute capability 8.0 or above, and cuda:1 is a GPU 1 (compute capability 7.5)" in (
        backends._why_not_extension("cuda")
    )


def test_a_gpu_without_code_for_it_is_named_with_the_cure(machine):
    machine("sm_80", (12, 0))
    why_not = backends._why_not_extension("cuda")
    assert "built for sm_80, which does not run on cuda:0, a GPU 0 (compute capability 12.0)" in why_not
    assert 'TORCH_CUDA_ARCH_LIST="12.0"' in why_not


@pytest.mark.parametrize(
    ("built", "running", "reason"),
    [
        ("13.0", "12.8", "were built with CUDA 13.0, this torch runs on CUDA 12.8"),
        ("13.0", None, "has no CUDA; install a CUDA build"),
        # The runtime fits, the library is missing.
        ("12.4", "12.8", "do not load under torch"),
    ],
)
def test_a_cuda_runtime_of_another_version_is_named(monkeypatch, tmp_path, built, running, reason):
    monkeypatch.setattr(ops, "LOADED", True)
    monkeypatch.setattr(ops, "__file__", str(tmp_path / "ops.py"))
    monkeypatch.setattr(ops, "BUILD", {"cuda_version": built, "cuda_why_not": ""})
    monkeypatch.setattr(torch.version, "cuda", running)
    assert reason in ops._load_cuda()


@pytest.mark.parametrize(("running", "cure"), [("13.0", "reinstall"), (None, "install a CUDA build of torch")])
def test_kernels_that_were_not_built_are_named_with_the_cure(monkeypatch, running, cure):
    monkeypatch.setattr(ops, "LOADED", True)
    monkeypatch.setattr(ops, "BUILD", {"cuda_version": "", "cuda_why_not": "it was built with USE_CUDA=0"})
    monkeypatch.setattr(torch.version, "cuda", running)
    assert f"without CUDA kernels (it was built with USE_CUDA=0); {cure}" in ops._load_cuda()


def test_nobody_with_an_amd_gpu_is_told_to_install_cuda(monkeypatch):
    monkeypatch.setattr(ops, "LOADED", True)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", "7.2")
    why_not = ops._load_cuda()
    assert "a build for AMD's" in why_not
    assert "install" not in why_not
