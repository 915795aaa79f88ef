"""Which part of a step each kernel belongs to, and profiles of real steps on the CPU."""

import argparse
import re

import pytest
import torch
from small_models import CONFIG, FIELDS, HEADS, TOKENS, WIDTH, Model, inputs, passes_only

import lighthouse_fx
from lighthouse_fx import LighthouseConfig
from lighthouse_fx.cli import profile as command_profile
from lighthouse_fx.cli.main import main
from lighthouse_fx.measure.cost import Card
from lighthouse_fx.measure.kernel_names import Event, attribute_kernels, attribute_ops
from lighthouse_fx.measure.layer import LayerShape
from lighthouse_fx.measure.profile import profile
from lighthouse_fx.measure.profile_steps import layer_step, llama_step, model_step
from lighthouse_fx.passes.pyramid import pyramid_over

CARD = Card(name="a CPU", matmul=1e11, attention=5e10, bandwidth=1e10)
S = pyramid_over(TOKENS, CONFIG).gathered
CUDNN = "cudnn_generated_fort_native_sdpa_sm90_flash_{}_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0"
FLASH = "void pytorch_flash::flash_{}<Flash_fwd_kernel_traits<128, 64, 64, 4>, true>(pytorch_flash::Flash_params)"


def timeline(*names):
    return [Event(name=name, start=10.0 * place, duration=5.0) for place, name in enumerate(names)]


def parts(*names):
    return [(a.part, a.call) for a in attribute_kernels(timeline(*names))]


FORWARD = {
    "_score_kernel_0": ("selection", False),
    "_score_kernel_1": ("selection", False),
    "_select_kernel_2": ("selection", True),
    "_collect_kernel_3": ("gather", True),
    CUDNN.format("fprop"): ("attention on S", True),
    "_spread_kernel_6": ("scatter", True),
}
BACKWARD = {
    "_collect_kernel_0": ("scatter backward", True),
    "void cudnn::fusion::compute_dot_do_o_specialized<true, __nv_bfloat16>(P)": ("attention on S backward", False),
    CUDNN.format("bprop"): ("attention on S backward", True),
    "void cudnn::fusion::convert_dq_to_16bits<false, __nv_bfloat16>(cudnn::fusion::P)": ("attention on S backward", False),
    "_spread_kernel_1": ("gather backward", True),
    "_spread_kernel_2": ("gather backward", True),
}
DENSE = {
    FLASH.format("fwd_kernel"): ("dense attention", True),
}
DENSE_BACKWARD = {
    FLASH.format("bwd_dot_do_o_kernel"): ("dense attention backward", False),
    FLASH.format("bwd_dq_dk_dv_loop_seqk_parallel_kernel"): ("dense attention backward", True),
    FLASH.format("bwd_convert_dq_kernel"): ("dense attention backward", False),
}
# Inductor names a kernel after the ops that it fuses; what others call their kernels is not ours.
REST = {
    "triton_poi_fused__scaled_dot_product_cudnn_attention_backward_transpose_3": ("rest", True),
    "triton_red_fused_flash_0": ("rest", True),
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n": ("rest", True),
    "my_collect_kernel": ("rest", True),
    "_select_kernels": ("rest", True),
    "Memset (Device)": ("rest", True),
}


@pytest.mark.parametrize(
    "sequence",
    [
        [FORWARD, BACKWARD],
        [DENSE, FORWARD, REST, FORWARD, DENSE, REST, DENSE_BACKWARD, BACKWARD, REST, BACKWARD, DENSE_BACKWARD],
        [FORWARD, FORWARD, FORWARD, BACKWARD, FORWARD, REST, BACKWARD],  # checkpointed: a forward between two backwards
        [DENSE, REST, DENSE, DENSE_BACKWARD, DENSE, DENSE_BACKWARD, FORWARD, BACKWARD],
    ],
    ids=["layer", "dense layers", "checkpointed", "dense then Lighthouse"],
)
def test_kernels(sequence):
    names = [name for step in sequence for name in step]
    expected = [part for step in sequence for part in step.values()]
    assert parts(*names) == expected


def test_kernels_where_a_recomputed_forward_does_not_scatter():
    early = {name: part for name, part in FORWARD.items() if "spread" not in name}
    sequence = [FORWARD, early, BACKWARD, early, BACKWARD]
    assert parts(*(n for step in sequence for n in step)) == [p for step in sequence for p in step.values()]


def test_kernels_are_taken_in_the_order_of_time():
    events = timeline(*FORWARD, *BACKWARD)
    assert attribute_kernels(events[::-1]) == attribute_kernels(events)


@pytest.mark.parametrize(
    ("forward", "backward"),
    [
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80(Params)", "fmha_cutlassB_bf16_aligned_64x64_k128_sm80(Params)"),
        ("void cutlass::device_kernel<flash::FlashAttnFwdSm90<T>>", "void cutlass::device_kernel<flash::FlashAttnBwdSm90<T>>"),
    ],
)
def test_other_attention_kernels(forward, backward):
    assert parts(forward, backward) == [("dense attention", True), ("dense attention backward", True)]
    found = parts("_collect_kernel", forward, "_spread_kernel", "_collect_kernel", backward, "_spread_kernel")
    assert [part for part, _ in found] == [
        "gather", "attention on S", "scatter", "scatter backward", "attention on S backward", "gather backward",
    ]  # fmt: skip


def test_an_op_inside_an_op_is_not_counted_twice():
    outer = Event(name="lighthouse_fx::select", start=0.0, duration=10.0)  # whose scorer attends
    inner = Event(name="aten::scaled_dot_product_attention", start=2.0, duration=3.0)
    after = Event(name="aten::scaled_dot_product_attention", start=10.0, duration=4.0)
    nested = Event(name="aten::_scaled_dot_product_flash_attention_for_cpu", start=10.0, duration=3.0)
    found = attribute_ops([nested, after, inner, outer])
    assert [(a.part, a.event) for a in found] == [("selection", outer), ("dense attention", after)]


# --- real steps -------------------------------------------------------------------------------------------------------


def calls(run):
    return {part.name: part.calls for part in run.parts if part.name != "rest"}


@pytest.mark.parametrize("checkpointing", [None, "inside"])
def test_a_model(checkpointing):
    if checkpointing and torch.__version__ < "2.13":
        pytest.skip("run op by op, as here, torch 2.11 does not run a dense checkpoint's forward again")
    layers = 2
    model = torch.compile(Model(layers, checkpointing=checkpointing), backend=passes_only, options=FIELDS)
    before = [p.detach().clone() for p in model.parameters()]
    found = profile(model_step(model, (inputs(),), CONFIG), device="cpu", card=CARD, steps=2)
    forwards = layers * (2 if checkpointing else 1)
    assert calls(found.dense) == {"dense attention": forwards, "dense attention backward": layers}
    assert calls(found.lighthouse) == {
        "selection": forwards,
        "gather": 3 * forwards,
        "attention on S": forwards,
        "scatter": forwards,
        "scatter backward": layers,
        "attention on S backward": layers,
        "gather backward": 3 * layers,
    }
    for run in (found.dense, found.lighthouse):
        assert sum(part.milliseconds for part in run.parts) == pytest.approx(run.milliseconds)
        assert not run.notes
    work = {part.name: part for part in (*found.dense.parts, *found.lighthouse.parts)}
    batch, dim, size = 2, WIDTH // HEADS, 4
    assert work["dense attention"].operations == forwards * 2 * TOKENS**2 * dim * HEADS * batch
    assert work["attention on S backward"].operations == layers * 5 * S**2 * dim * HEADS * batch
    rows = batch * dim * size  # of one head
    assert work["gather"].moved == pytest.approx(forwards * (TOKENS + S) * (HEADS + 2 * 2) * rows)
    assert work["scatter backward"].moved == layers * (TOKENS + S) * HEADS * rows
    assert any((p != b).any() for p, b in zip(model.parameters(), before, strict=True)), "a step trains"


def test_rates_of_layers_that_differ_are_not_known():
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = Model(1)

        def forward(self, x):
            return self.model(x).sum() + self.model(x[:, :48]).sum()

    model = torch.compile(Two(), backend=passes_only, options=FIELDS | {"topk": 4})
    found = profile(model_step(model, (inputs(),), CONFIG), device="cpu", card=CARD, steps=1)
    assert calls(found.lighthouse)["selection"] == 2
    assert all(part.operations is None and part.moved is None for part in found.lighthouse.parts)
    assert "differ in shape" in found.lighthouse.notes[0] and "differ in shape" in str(found)


@pytest.mark.parametrize("case", ["not compiled", "too short"])
def test_a_step_without_lighthouse_is_an_error(case):
    model = Model(1)
    if case == "too short":
        model = torch.compile(model, backend=passes_only, options=FIELDS)
    x = inputs(tokens=4 if case == "too short" else TOKENS)

    def step():
        model(x).sum().backward()

    with pytest.raises(RuntimeError, match=r"no Lighthouse attention.*lighthouse_fx\.compile.*explain"):
        lighthouse_fx.profile(step, device="cpu", card=CARD, steps=1)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"step": None}, TypeError, "step=None"),
        ({"steps": 0}, ValueError, "steps=0"),
        ({"steps": True}, ValueError, "steps=True"),
        ({"card": "H100"}, TypeError, "card='H100'"),
    ],
)
def test_arguments(arguments, error, words):
    with pytest.raises(error, match=re.escape(words)):
        profile(**{"step": lambda: None, "device": "cpu", "card": CARD} | arguments)


@pytest.mark.parametrize("model", ["nothing", "no_such_module_here:f"])
def test_command_without_a_model(model):
    parser = argparse.ArgumentParser()
    command_profile.add_parser(parser.add_subparsers())
    options = parser.parse_args(["profile", model, "--device", "cpu"])
    with pytest.raises(ValueError, match=rf"MODEL='{model}'.*package\.module:function"):
        options.run(options)


@pytest.mark.slow
def test_command_on_a_layer(tmp_path, capsys):
    picture = tmp_path / "a" / "profile.png"
    sizes = ["--length", "512", "--topk", "8", "--heads", "2", "--groups", "1", "--dim", "16", "--dtype", "float32"]
    peaks = ["--peak-tflops", "0.001", "--peak-bandwidth-tb", "0.002"]
    assert main(["profile", *sizes, *peaks, "--device", "cpu", "--steps", "1", "--picture", str(picture)]) == 0
    printed = capsys.readouterr().out
    for part in ("selection", "gather backward", "attention on S", "dense attention backward", "rest"):
        assert part in printed
    assert "Peaks: 0.001 TFLOP/s, 0.002 TB/s" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.sweep
def test_a_llama_with_dense_layers():
    pytest.importorskip("transformers")
    shape = LayerShape(length=128, heads=2, groups=1, dim=16, dtype="float32")
    step = llama_step(shape, LighthouseConfig(**FIELDS), torch.device("cpu"), layers=3)
    found = profile(step, device="cpu", card=CARD, steps=1)
    after = calls(found.lighthouse)  # checkpointed: each forward runs twice
    assert (after["attention on S"], after["attention on S backward"]) == (2, 1)
    assert (after["dense attention"], after["dense attention backward"]) == (4, 2)
    assert calls(found.dense) == {"dense attention": 6, "dense attention backward": 3}


@pytest.mark.gpu
@pytest.mark.slow
def test_a_layer_on_a_gpu():
    shape = LayerShape(length=16_384)
    step = layer_step(shape, LighthouseConfig.paper(topk=1024), torch.device("cuda"))
    found = profile(step, steps=3)
    once = {"attention on S", "attention on S backward", "selection", "scatter", "scatter backward"}
    after = calls(found.lighthouse)
    assert {name: n for name, n in after.items() if name != "no kernel"} == {name: 1 for name in once} | {
        "gather": 3,
        "gather backward": 3,
    }
    assert {"dense attention", "dense attention backward"} <= calls(found.dense).keys()
    for part in found.lighthouse.parts:
        if part.operations:
            assert 0.1 < part.operations / (part.milliseconds / 1000) / found.card.matmul < 1.1


@pytest.mark.parametrize("make", [layer_step, llama_step])
def test_another_scorer_is_refused(make):
    shape = LayerShape(length=64, heads=1, groups=1, dim=8, dtype="float32")
    with pytest.raises(ValueError, match=r"scorer='dilated'.*scorer='norm'"):
        make(shape, LighthouseConfig(**FIELDS, scorer="dilated"), torch.device("cpu"))


def test_a_layer_is_refused_where_it_would_stay_dense():
    shape = LayerShape(length=8, heads=1, groups=1, dim=8, dtype="float32")
    step = layer_step(shape, LighthouseConfig(topk=8), torch.device("cpu"))
    with pytest.raises(RuntimeError, match="no Lighthouse attention"):
        profile(step, device="cpu", card=CARD, steps=1)
