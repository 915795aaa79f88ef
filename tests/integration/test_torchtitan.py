"""torchtitan 0.3's own models: their FlexAttention, block-causal over documents, and the overrides for its compile call.

On a CPU flex_attention does not train, so Dynamo traces a block here without gradients, and what comes of its parameters is
then declared to need them.
"""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch
from functional_oracle import Functional
from small_models import CONFIG, passes_only
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import lighthouse_fx
from lighthouse_fx.passes import CALLS, run_passes
from lighthouse_fx.runtime import journal

LAYERS, VOCABULARY, N = 2, 2048, 64
DILATED = replace(CONFIG, scorer="dilated", dilation=4)


def config_of(family, attention="flex", **arguments):
    """torchtitan's smallest model of a family, with fewer layers."""
    module = importlib.import_module(f"torchtitan.models.{family}")
    (configs,) = (value for name, value in vars(module).items() if name.endswith("_configs"))
    config = configs["debugmodel"](attn_backend=attention, **arguments)
    del config.layers[LAYERS:]
    return config


def model_of(config):
    torch.manual_seed(0)
    model = config.build()
    model.init_states()
    return model.double()


def packed(batch):
    """Positions of rows that hold documents, as torchtitan numbers them, and the documents' numbers."""
    lengths = [[24, 1, 39], [40, 24], [64], [8] * 8][:batch]
    positions = [torch.cat([torch.arange(length) for length in row]) for row in lengths]
    numbers = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths]
    return torch.stack(positions), torch.stack(numbers)


class Enough(Exception):
    """Raised in place of the first run of a traced graph."""


def traced(model, positions, config=CONFIG):
    """The first block's graph as it would be in training, after the passes.

    Returns its one attention call, a function that runs it, and the block's own arguments.
    """
    block, graphs, arrived = model.layers["0"], [], []

    def backend(gm, example_inputs):
        trained = set()
        for node in gm.graph.nodes:
            value = node.meta.get("example_value")
            parameter = isinstance(value, torch.nn.Parameter)
            if parameter or node.name == "l_x_" or trained.intersection(node.all_input_nodes):
                trained.add(node)
                for tensor in value if isinstance(value, tuple) else (value,):
                    if isinstance(tensor, torch.Tensor) and (tensor.is_floating_point() or tensor.is_complex()):
                        tensor.requires_grad_()
        graphs.append(run_passes(gm, example_inputs, config=config))

        def run(*inputs):
            arrived.append(inputs)
            raise Enough

        return run

    with torch.no_grad():
        masks = model.get_attention_masks(positions)
        x = model.tok_embeddings(torch.randint(VOCABULARY, positions.shape))
        with pytest.raises(Enough):
            torch.compile(block, backend=backend, fullgraph=True)(x, masks, positions)
    (gm,), (inputs,) = graphs, arrived
    (call,) = gm.meta[CALLS]
    return call, lambda given: gm(*(given if value is x else value for value in inputs))[0], (x, masks, positions)


@pytest.fixture(autouse=True)
def masks_are_made_without_inductor(monkeypatch, torchtitan):
    monkeypatch.setattr("torchtitan.models.common.decoder.create_attention_mask", create_block_mask)


def with_gradients(run, x, block):
    x = x.clone().requires_grad_()
    out = run(x)
    torch.manual_seed(1)
    return out, torch.autograd.grad((out * torch.randn_like(out)).sum(), [x, *block.parameters()])


# --- FlexAttention, block-causal over documents -----------------------------------------------------------------------

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}  # its rotary embeddings compute in float32


@pytest.mark.parametrize("batch", [1, 3])  # torchtitan writes the mask of one row in another way
@pytest.mark.parametrize("family, config", [("llama3", CONFIG), ("qwen3", DILATED)])
def test_its_own_attention_is_rewritten_inside_documents(family, config, batch, monkeypatch):
    from torchtitan.models.common.attention import FlexAttention

    model, (positions, numbers) = model_of(config_of(family)), packed(batch)
    block = model.layers["0"]
    call, run, (x, *rest) = traced(model, positions, config)
    assert call.refusal is None and call.is_causal is True and call.documents is not None
    found = with_gradients(run, x, block)

    def expected(numbers):
        def attend(q, k, v, *, scale, enable_gqa, **_):
            out = lighthouse_fx.lighthouse_attention(
                q, k, v, is_causal=True, scale=scale, enable_gqa=enable_gqa, documents=numbers, config=config
            )
            return out, None

        monkeypatch.setattr(FlexAttention, "_compiled_flex_attn", staticmethod(attend))
        return with_gradients(lambda x: block(x, *rest), x, block)

    torch.testing.assert_close(found, expected(numbers), **TOLERANCE)
    with pytest.raises(AssertionError):  # the documents do count
        torch.testing.assert_close(found, expected(None), **TOLERANCE)


def test_what_becomes_of_its_other_models():
    positions, _ = packed(3)
    call, *_ = traced(model_of(config_of("qwen3")), positions)
    assert call.refusal is None and call.scored == "query and key before their norms"
    call, *_ = traced(model_of(config_of("deepseek_v3", moe_comm_backend="standard")), positions)
    assert call.refusal is None and call.documents is not None
    call, *_ = traced(model_of(config_of("gpt_oss", moe_comm_backend="standard")), positions)
    assert "log-sum-exp" in call.refusal.reason  # its sinks weigh the output by it


def test_positions_that_begin_in_the_middle_of_a_document_raise():
    """torchtitan's mask then shows the first tokens of the row nothing at all."""
    positions = torch.cat([torch.arange(5, 29), torch.arange(40)])[None]
    model = model_of(config_of("llama3"))
    _, run, (x, *_) = traced(model, positions)
    with pytest.raises(RuntimeError, match="the first token of each token's document is not that"):
        run(x)


@pytest.mark.gpu
@pytest.mark.parametrize("override", [False, True])
def test_a_gpu_trains_it(override):
    config = config_of("llama3")
    model = model_of(overridden(config, "documents") if override else config).bfloat16().cuda()
    positions = packed(3)[0].cuda()
    if override:
        compiled_by_torchtitan(model)
    else:
        lighthouse_fx.compile(model, CONFIG, dense_layers=(0,))
    tokens = torch.randint(VOCABULARY, positions.shape, device="cuda")
    with lighthouse_fx.pretraining(CONFIG), journal.watch() as calls:
        model(tokens, positions, model.get_attention_masks(positions)).float().logsumexp(-1).mean().backward()
    assert [call.rewritten for call in calls] == [override, True]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# --- the overrides ----------------------------------------------------------------------------------------------------


def overridden(config, name="causal_attention"):
    from torchtitan.config.override import OverrideConfig, apply_overrides

    apply_overrides(OverrideConfig(imports=[f"lighthouse_fx.integrations.torchtitan.{name}"]), config)
    return config


def compiled_by_torchtitan(model, backend="lighthouse"):
    from torchtitan.config import CompileConfig
    from torchtitan.distributed import ParallelDims
    from torchtitan.distributed.compile import apply_compile

    one = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, world_size=1)
    apply_compile(model, compile_config=CompileConfig(enable=True, backend=backend), parallel_dims=one)


def test_it_compiles_its_own_attention_with_the_backend_under_another_class(monkeypatch):
    from torchtitan.models.common.attention import FlexAttention

    monkeypatch.setattr(FlexAttention, "_compiled_flex_attn", staticmethod(flex_attention))
    positions, _ = packed(3)
    with pytest.raises(ValueError, match="neither 'inductor' nor 'aot_eager'"):
        compiled_by_torchtitan(model_of(config_of("llama3")))
    model, own = model_of(overridden(config_of("llama3"), "documents")), model_of(config_of("llama3"))
    call, *_ = traced(model, positions)
    assert call.refusal is None and call.documents is not None

    compiled_by_torchtitan(model, passes_only)
    tokens = torch.randint(VOCABULARY, positions.shape)
    with torch.no_grad(), lighthouse_fx.pretraining(CONFIG), journal.watch() as calls:
        found, expected = (m(tokens, positions, m.get_attention_masks(positions)) for m in (model, own))
    torch.testing.assert_close(found, expected)
    assert len(calls) == LAYERS and all("gradients" in call.reason for call in calls)


def test_its_own_attention_of_other_models_is_the_same_under_another_class():
    config = overridden(config_of("gpt_oss", moe_comm_backend="standard"), "documents")
    call, *_ = traced(model_of(config), packed(3)[0])
    assert "log-sum-exp" in call.refusal.reason


def test_with_causal_attention_it_is_the_functional_form():
    def step(model):
        loss = model(tokens).square().mean()
        return loss, torch.autograd.grad(loss, list(model.parameters()))

    tokens = torch.randint(VOCABULARY, (2, N))
    model = model_of(overridden(config_of("llama3")))
    with Functional([True] * LAYERS, [16] * LAYERS, CONFIG) as oracle:
        expected = step(model)
    assert oracle.seen == LAYERS
    dense = step(model)
    compiled_by_torchtitan(model, passes_only)
    with lighthouse_fx.pretraining(CONFIG), journal.watch() as calls:
        torch.testing.assert_close(step(model), expected, **TOLERANCE)
    assert [call.rewritten for call in calls] == [True] * LAYERS
    with pytest.raises(AssertionError):
        torch.testing.assert_close(dense, expected, **TOLERANCE)


def test_other_attention_is_not_replaced():
    from torchtitan.models.common.attention import FlexAttention, ScaledDotProductAttention, VarlenAttention

    llama = overridden(config_of("llama3", "varlen"))
    assert {type(layer.attention.inner_attention) for layer in llama.layers} == {ScaledDotProductAttention.Config}
    windowed = overridden(config_of("gpt_oss", moe_comm_backend="standard"))
    assert {type(layer.attention.inner_attention) for layer in windowed.layers} == {FlexAttention.Config}
    sliding = config_of("llama3", "varlen")
    sliding.layers[0].attention.inner_attention = VarlenAttention.Config(window_size=(7, 0))
    with pytest.raises(ValueError, match=r"window_size=\(7, 0\) is not plainly causal"):
        overridden(sliding)
