"""`lighthouse_fx.compile` of models with several lists of blocks, hybrids, parts of models, and inside another compilation."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from small_models import CONFIG, FIELDS, Block, Model, functional, inputs, twin
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

import lighthouse_fx
from lighthouse_fx import LighthouseConfig, backend
from lighthouse_fx.frontend.blocks import find_blocks
from lighthouse_fx.runtime import journal


@pytest.fixture(autouse=True)
def without_inductor(monkeypatch):
    monkeypatch.setattr(backend, "compile_fx", lambda gm, example_inputs, config_patches=None: aot_eager(gm, example_inputs))


def rewritten(model, x):
    """Which attention calls of a training step ran rewritten."""
    with journal.watch() as calls:
        model(x).sum().backward()
    return [call.rewritten for call in calls]


# --- inside another compilation ---------------------------------------------------------------------------------------


def outer_model(model, backend, **options):
    return torch.compile(model, backend=backend, **options)


def outer_in_place(model, backend, **options):
    model.compile(backend=backend, **options)
    return model


def outer_step(model, backend, **options):
    return torch.compile(lambda x: model(x * 1.0), backend=backend, **options)


@pytest.mark.parametrize("outer", [outer_model, outer_in_place, outer_step])
@pytest.mark.parametrize("arguments", [{"backend": "aot_eager"}, {"backend": "lighthouse", "options": FIELDS}])
def test_inside_another_compilation_blocks_run_as_they_were_compiled(outer, arguments):
    model, x = Model(3), inputs()
    oracle = twin(model, functional())
    oracle.layers[0].attn.attend = model.layers[0].attn.attend
    run = outer(lighthouse_fx.compile(model, CONFIG, dense_layers=(0,)), **arguments)
    for _ in range(2):
        torch.testing.assert_close(run(x), oracle(x))
    assert rewritten(run, x) == [False, True, True]
    with lighthouse_fx.dense():
        torch.testing.assert_close(run(x), twin(model, None)(x))


def test_one_whole_graph_with_compiled_blocks_is_an_error_with_its_reason():
    model = lighthouse_fx.compile(Model(2), CONFIG, dense_layers=())
    with pytest.raises(RuntimeError, match=r"blocks that lighthouse_fx.compile has compiled are no part of another graph"):
        torch.compile(model, backend="aot_eager", fullgraph=True)(inputs())


def test_models_compiled_twice_run_as_the_second_time():
    model = lighthouse_fx.compile(lighthouse_fx.compile(Model(3), CONFIG, dense_layers=(0,)), CONFIG, dense_layers=(2,))
    assert rewritten(model, inputs()) == [True, True, False]


# --- what keeps Dynamo from compiling ---------------------------------------------------------------------------------


def test_strict_names_a_stance():
    model = lighthouse_fx.compile(Model(2), CONFIG, dense_layers=())
    with torch.compiler.set_stance("force_eager"), pytest.raises(RuntimeError, match=r"set_stance\('force_eager'\)") as error:
        model(inputs())
    assert "attn_implementation" not in str(error.value)


def test_strict_names_a_compilation_that_failed_quietly(monkeypatch):
    def fail(*_, **__):
        raise ValueError("no")

    monkeypatch.setattr(backend, "compile_fx", fail)
    model = lighthouse_fx.compile(Model(2), CONFIG, dense_layers=())
    with torch._dynamo.config.patch(suppress_errors=True), pytest.raises(RuntimeError, match="suppress_errors is on"):
        model(inputs())


def test_strict_names_a_compiler_that_is_switched_off():
    script = """
import sys
sys.path[:0] = sys.argv[1:]
import lighthouse_fx
from small_models import CONFIG, Model, inputs
try:
    lighthouse_fx.compile(Model(2), CONFIG, dense_layers=())(inputs())
except RuntimeError as error:
    assert "TORCH_COMPILE_DISABLE" in str(error) and "attn_implementation" not in str(error), error
else:
    raise SystemExit("no error")
"""
    environment = os.environ | {"TORCH_COMPILE_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *sys.path],
        env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_recompile_limit_of_a_whole_model_is_warned_of():
    model = Model(1)
    run = torch.compile(model, backend="lighthouse", options=FIELDS, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(inputs(tokens=64))
        with pytest.warns(RuntimeWarning, match=r"Lighthouse attention: forward in .*recompile limit"):
            run(inputs(tokens=80))


def test_numbers_that_a_graph_does_not_show_are_warned_of():
    model = Model(2)
    for layer in model.layers:
        layer.compile(backend="lighthouse", options=FIELDS | {"dense_layers": (0,)})
    with pytest.warns(UserWarning, match="attention stays dense: dense_layers has the number 0"):
        model(inputs()).sum().backward()


# --- several lists ----------------------------------------------------------------------------------------------------


class TwoLists(nn.Module):
    """A small list of blocks behind a large one."""

    def __init__(self, first=Block, counts=(3, 2)):
        super().__init__()
        self.encoder = nn.ModuleList(first() for _ in range(counts[0]))
        self.decoder = nn.ModuleList(Block() for _ in range(counts[1]))
        self.heads = nn.ModuleList(nn.Linear(4096, 4) for _ in range(2))

    def forward(self, x):
        for block in (*self.encoder, *self.decoder):
            x = block(x)
        return x


def test_all_lists_with_attention_are_compiled():
    model = lighthouse_fx.compile(TwoLists(), CONFIG, dense_layers=(0,))
    assert rewritten(model, inputs()) == [False, True, True, False, True]
    assert all(head._compiled_call_impl is None for head in model.heads)


def test_patterns_mean_the_blocks_of_one_list():
    model = lighthouse_fx.compile(TwoLists(), CONFIG, dense_layers=("encoder.*",))
    assert rewritten(model, inputs()) == [False] * 3 + [True] * 2


class Bidirectional(nn.Module):
    """Its attention adds a bias, for which Lighthouse attention has no place."""

    def __init__(self):
        super().__init__()
        self.attn_qkv = nn.Linear(32, 96)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in self.attn_qkv(x).chunk(3, dim=-1))
        bias = torch.arange(x.shape[1], device=x.device).float().expand(x.shape[1], -1)
        return x + F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)


def test_a_list_that_cannot_be_rewritten_is_named_while_another_is():
    model = lighthouse_fx.compile(TwoLists(Bidirectional), CONFIG, dense_layers=())
    with pytest.warns(RuntimeWarning, match=r"encoder.0, encoder.1, encoder.2: explicit attn_mask") as said:
        model(inputs()).sum().backward()
        model(inputs()).sum().backward()
    assert sum("encoder" in str(warning.message) for warning in said) == 1


class EncoderAlone(TwoLists):
    def forward(self, x):
        for block in self.encoder:
            x = block(x)
        return x


def test_strict_raises_where_the_only_list_that_runs_cannot_be_rewritten():
    model = lighthouse_fx.compile(EncoderAlone(Bidirectional), CONFIG, dense_layers=())
    model(inputs())
    with pytest.raises(RuntimeError, match="explicit attn_mask"):
        model(inputs())


def test_a_list_that_does_not_run_is_no_failure():
    model = lighthouse_fx.compile(EncoderAlone(), CONFIG, dense_layers=())
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for _ in range(2):
            assert rewritten(model, inputs()) == [True] * 3


def test_lists_of_lists_are_counted_by_the_inner_ones():
    stages = nn.ModuleList(nn.ModuleList(Block() for _ in range(2)) for _ in range(2))
    assert [str(blocks) for blocks in find_blocks(nn.ModuleDict({"stages": stages}))] == [
        "2 blocks, stages.0.0 to stages.0.1",
        "2 blocks, stages.1.0 to stages.1.1",
    ]


# --- the default of dense_layers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "count, left, used", [(5, [2], None), (4, [1, 2], (0, -1)), (3, [1], (0, -1)), (2, [0, 1], ()), (1, [0], ())]
)
def test_the_default_leaves_blocks_of_a_short_list(count, left, used):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = lighthouse_fx.compile(Model(count), CONFIG)
    assert [n for n, was in enumerate(rewritten(model, inputs())) if was] == left
    said = [str(w.message) for w in said if "dense_layers" in str(w.message)]
    assert len(said) == (count < 5) and all(f"dense_layers={used} is used there" in text for text in said)


class Part(nn.Module):
    """A pipeline stage, whose blocks have the numbers of the whole model."""

    def __init__(self, numbers):
        super().__init__()
        self.layers = nn.ModuleDict({str(number): Block() for number in numbers})

    def forward(self, x):
        for block in self.layers.values():
            x = block(x)
        return x


@pytest.mark.parametrize(
    "dense_layers, expected", [((0,), [True, True]), ((3,), [True, False]), (("layers.2",), [False, True])]
)
def test_blocks_of_a_part_have_the_numbers_of_the_whole(dense_layers, expected):
    assert rewritten(lighthouse_fx.compile(Part((2, 3)), CONFIG, dense_layers=dense_layers), inputs()) == expected


@pytest.mark.parametrize("dense_layers, says", [((-1,), "numbers from its end"), (None, "give dense_layers"), ((4,), "has 4")])
def test_numbers_that_a_part_cannot_know_are_refused(dense_layers, says):
    with pytest.raises(ValueError, match=says):
        lighthouse_fx.compile(Part((2, 3)), CONFIG, dense_layers=dense_layers)


# --- hybrids ----------------------------------------------------------------------------------------------------------


class Sliding(nn.Module):
    """Attention to the last 16 tokens."""

    def __init__(self):
        super().__init__()
        self.attn_qkv = nn.Linear(32, 96)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in self.attn_qkv(x).chunk(3, dim=-1))
        places = torch.arange(x.shape[1], device=x.device)
        apart = places[:, None] - places
        mask = (apart >= 0) & (apart < 16)
        return x + F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class HybridBlock(nn.Module):
    """A block of attention, of a sliding window, or of none."""

    def __init__(self, mixer):
        super().__init__()
        self.mixer = mixer

    def forward(self, x):
        return self.mixer(x)


class FeedForward(HybridBlock):
    """A block of another class, as Jamba's are."""


class Hybrid(Model):
    def __init__(self, *blocks):
        super().__init__(0)
        self.layers = nn.ModuleList(blocks)


def test_layers_without_full_attention_are_no_failure():
    blocks = FeedForward(nn.Linear(32, 32)), HybridBlock(Sliding()), HybridBlock(Block())
    model = lighthouse_fx.compile(Hybrid(*blocks), CONFIG, dense_layers=())
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert rewritten(model, inputs()) == [False, True]
    (sliding,) = [call for report in lighthouse_fx.reports() for call in report.calls if not call.rewritten]
    assert sliding.reason.startswith("sliding window")


def test_layers_that_are_dense_for_another_reason_are_warned_of_with_dense_layers():
    model = lighthouse_fx.compile(Hybrid(HybridBlock(Bidirectional()), HybridBlock(Block())), CONFIG, dense_layers=())
    with pytest.warns(RuntimeWarning, match=r"layers.0: explicit attn_mask.*name them in dense_layers"):
        model(inputs()).sum().backward()


def test_a_model_of_sliding_windows_alone_is_a_failure():
    model = lighthouse_fx.compile(Hybrid(HybridBlock(Sliding()), HybridBlock(Sliding())), CONFIG, dense_layers=())
    with pytest.raises(RuntimeError, match=r"sliding window.*dense_layers"):
        model(inputs())


def test_lists_of_torchs_own_modules_are_no_blocks():
    model = nn.ModuleDict({"net": nn.ModuleList([nn.Linear(2, 2), nn.ReLU()])})
    with pytest.raises(ValueError, match="no ModuleList of equal blocks"):
        lighthouse_fx.compile(model, LighthouseConfig())
