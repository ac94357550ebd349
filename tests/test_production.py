"""A converted model on its way out: torch.compile, torch.export, AOTInductor, ONNX, folding into convolutions."""

import copy
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from convert_models import Bottleneck, FunctionalBlock, MobileNet, convert
from helpers import randn
from torch import nn
from torch._inductor.utils import run_fw_bw_and_get_code

import normfused
from normfused import BatchNormAct1d, BatchNormAct2d, GroupNormAct

ours = pytest.mark.skipif(
    normfused.info()["extension"]["why_not"] is not None, reason="without the C++ core nothing of ours is in a graph"
)


@pytest.fixture
def models():
    """(converted, native): layers fused with modules, functions and sums, with nothing, and a GroupNorm."""
    torch.manual_seed(0)
    native = nn.Sequential(
        MobileNet().features, nn.Conv2d(8, 4, 1), Bottleneck(True), FunctionalBlock(), nn.GroupNorm(2, 4), nn.SiLU()
    )
    with torch.no_grad():
        for _ in range(3):
            native(x4())
    model = copy.deepcopy(native)
    assert sum(outcome.startswith("fused") for outcome in convert(model).values()) == 10
    return model, native


def x4(n=4, seed=0):
    return randn(n, 4, 6, 6, seed=seed)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


# torch.compile


@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.thorough)])
def test_compiles_without_graph_breaks(models, training):
    for model in models:
        model.train(training)
    explanation = torch._dynamo.explain(copy.deepcopy(models[0]))(x4())
    assert (explanation.graph_count, explanation.graph_break_count) == (1, 0)
    compiled = torch.compile(models[0], backend="aot_eager", fullgraph=True)
    outputs = []
    for model in (compiled, models[1]):
        y = model(x4())
        y.square().mean().backward()
        outputs.append(y)
    assert_close(*outputs)
    assert_close(*([p.grad for p in model.parameters()] for model in models))
    assert_close(*(list(model.buffers()) for model in models))


@pytest.mark.thorough
@ours
def test_inductor_copies_nothing_around_a_layer():
    """Its convolutions are channels_last whatever the model is; our kernels read what they put out, as it is."""
    model = nn.Sequential(nn.Conv2d(8, 16, 3, bias=False), BatchNormAct2d(16), nn.Conv2d(16, 8, 3, bias=False))
    with torch._inductor.config.patch(force_disable_caches=True):
        compiled = torch.compile(copy.deepcopy(model), fullgraph=True)
        y, (forward, backward) = run_fw_bw_and_get_code(lambda: compiled(randn(4, 8, 12, 12)))
    assert re.search(r"(buf\d+) = extern_kernels.convolution\(.*batch_norm_act.default\(\1, ", forward, re.DOTALL)
    given = re.search(r"batch_norm_act_backward.default\((\w+), (\w+), ", backward)
    assert re.search(rf"{given[1]} = buf\d+\[0\]\n.*'torch.ops.aten.convolution_backward.default'", backward)
    # x is what the forward kept, not a buffer that a generated kernel filled.
    assert not re.fullmatch(r"buf\d+", given[2])
    assert_close(y, model(randn(4, 8, 12, 12)))


# torch.export


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("strict", [pytest.param(True, marks=pytest.mark.thorough), False])
def test_export_and_its_round_trip(models, training, strict):
    model, native = (model.train(training) for model in models)
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    with torch.no_grad():
        program = torch.export.export(copy.deepcopy(model), (x4(),), dynamic_shapes=(batch,), strict=strict)
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        buffer.seek(0)
        loaded = torch.export.load(buffer).module()
        for seed, n in enumerate((4, 7)):
            assert_close(loaded(x4(n, seed)), native(x4(n, seed)))
    # The exported program keeps the statistics, too; a strict one leaves out what evaluation does not read.
    statistics, kept = dict(native.named_buffers()), dict(loaded.named_buffers())
    assert (strict and not training) or kept.keys() == statistics.keys()
    assert {name for name in statistics if "running" in name} <= kept.keys()
    assert_close(kept, {name: statistics[name] for name in kept})


@ours
def test_exported_graph_holds_our_operators(models):
    with torch.no_grad():
        program = torch.export.export(models[0].eval(), (x4(),))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count("normfused.batch_norm_act.default") == 12
    assert targets.count("normfused.group_norm_act.default") == 1
    assert not any("batch_norm" in target and "normfused" not in target for target in targets)


def test_export_with_gradients(models):
    """Under grad mode an export records the forward; its module computes the same."""
    model, native = (model.eval() for model in models)
    assert_close(torch.export.export(model, (x4(),)).module()(x4()), native(x4()))


@ours
@pytest.mark.thorough
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor compiles C++")
def test_aot_inductor_in_a_process_that_has_only_the_operators(tmp_path):
    torch.manual_seed(0)
    native = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU6(), nn.GroupNorm(2, 4))
    native[1].running_mean.normal_()
    model = copy.deepcopy(native).eval()
    convert(model)
    with torch.no_grad():
        program = torch.export.export(model, (x4(),))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        torch.save((x4(), native.eval()(x4())), tmp_path / "numbers.pt")
    (library,) = Path(normfused.__file__).parent.glob("_cpu*.so")
    script = (
        "import sys, torch\n"
        "package, numbers, library = sys.argv[1:]\n"
        "torch.ops.load_library(library)\n"
        "x, expected = torch.load(numbers)\n"
        "torch.testing.assert_close(torch._inductor.aoti_load_package(package)(x), expected, rtol=1e-4, atol=1e-5)\n"
        "assert 'normfused' not in sys.modules\n"
        "print('equal')\n"
    )
    command = [sys.executable, "-c", script, package, str(tmp_path / "numbers.pt"), str(library)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout == "equal\n", result.stderr


# ONNX


@pytest.mark.filterwarnings("ignore")
def test_onnx_through_revert(models, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, native = (model.eval() for model in models)
    normfused.revert(model)
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(model, (x4(),), path, dynamo=True)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x4().numpy()})
    with torch.no_grad():
        assert_close(torch.from_numpy(y), native(x4()))


@pytest.mark.filterwarnings("ignore")
def test_onnx_of_a_converted_model_refuses(models, tmp_path):
    pytest.importorskip("onnxscript")
    model, path = models[0].eval(), str(tmp_path / "model.onnx")
    with pytest.raises(Exception, match="normfused"):
        torch.onnx.export(model, (x4(),), path, dynamo=True)


# Folding into the layer before


@pytest.mark.parametrize(
    ("fuse", "before", "norm"),
    [
        (nn.utils.fuse_conv_bn_eval, nn.Conv2d(4, 4, 1), BatchNormAct2d),
        (nn.utils.fuse_linear_bn_eval, nn.Linear(4, 4), BatchNormAct1d),
    ],
)
def test_folding_refuses_a_fused_activation(fuse, before, norm):
    before = before.eval()
    for options in ({}, {"activation": None, "pre_activation": "silu"}):
        with pytest.raises(RuntimeError, match=r"would drop the fused activation '(relu6|silu)'.*normfused\.revert"):
            fuse(before, norm(4, **options).eval())
    layer = norm(4, activation=None).eval()
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    x = x4().double() if norm is BatchNormAct2d else randn(5, 4, dtype=torch.float64)
    before, layer = before.double(), layer.double()
    torch.testing.assert_close(fuse(before, layer)(x), layer(before(x)))


def test_folding_after_revert(models):
    model, native = models
    normfused.revert(model).eval()
    block = model[2]
    block.conv1, block.bn1 = nn.utils.fuse_conv_bn_eval(block.conv1, block.bn1), nn.Identity()
    assert_close(model(x4()), native.eval()(x4()))


def test_eps_is_otherwise_a_plain_attribute():
    layer = BatchNormAct2d(4, eps=1e-3)
    assert layer.eps == copy.deepcopy(layer).eps == vars(layer)["eps"] == 1e-3
    layer.eps = 0.5
    assert (layer.eps, vars(layer)["eps"]) == (0.5, 0.5)
    assert not hasattr(BatchNormAct2d, "eps")
    assert "eps=0.5" in repr(layer)
    assert GroupNormAct(2, 4, eps=0.25).eps == 0.25
    native = nn.BatchNorm2d(4, eps=0.5)
    x = x4()
    torch.testing.assert_close(BatchNormAct2d(4, eps=0.5, activation=None)(x), native(x))

    @torch.compile(backend="eager", fullgraph=True)
    def scaled(x):
        return layer(x) * layer.eps

    torch.testing.assert_close(scaled(x), layer(x) * 0.5)
