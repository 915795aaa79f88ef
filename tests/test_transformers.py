"""Real models from transformers: every layer rewritten, whole and layer by layer, gradients as by the functional form."""

import pytest
import torch
import torch.nn.functional as F
from small_models import FIELDS, passes_only

import lighthouse_fx
from lighthouse_fx import LighthouseConfig

transformers = pytest.importorskip("transformers")

LAYERS, TOKENS = 3, 72
CONFIG = LighthouseConfig(**FIELDS)
TOLERANCE = {"rtol": 1e-8, "atol": 1e-10}
FUSED = {"rtol": 1e-4, "atol": 1e-7}  # Llama's norm computes in float32 even in a float64 model; Inductor fuses it


def llama():
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=96, n_positions=128, n_embd=32, n_layer=LAYERS, n_head=4, use_cache=False,
        attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


MODELS = {"llama": llama, "gpt2": gpt2}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]().double()


def tokens():
    return torch.randint(0, 96, (2, TOKENS))


def layers(model):
    return model.model.layers if hasattr(model, "model") else model.transformer.h


def loss_and_gradients(model, run, ids):
    logits = run(input_ids=ids).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    names, parameters = zip(*model.named_parameters(), strict=True)
    return loss.detach(), dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def by_functional_form(model, ids):
    """The model with its attention replaced by the functional form, by transformers' own registry of attentions.

    Compiled whole, transformers repeats keys and values before the attention, which the passes undo.
    """

    def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        out = lighthouse_fx.lighthouse_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True, config=CONFIG
        )
        return out.transpose(1, 2), None

    transformers.AttentionInterface.register("lighthouse_oracle", attention)
    own = model.config._attn_implementation
    model.set_attn_implementation("lighthouse_oracle")
    try:
        return loss_and_gradients(model, model, ids)
    finally:
        model.set_attn_implementation(own)


def assert_same(found, expected, tolerance=TOLERANCE):
    torch.testing.assert_close(found[0], expected[0], **tolerance)
    for name, value in expected[1].items():
        torch.testing.assert_close(found[1][name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def test_compiled_whole(model):
    ids = tokens()
    run = torch.compile(model, backend=passes_only, options=FIELDS, fullgraph=True)
    found = loss_and_gradients(model, run, ids)
    report = lighthouse_fx.reports()[-1]
    assert report.rewritten == len(report.calls) == LAYERS, report.summary()
    assert all(call.is_causal for call in report.calls)
    assert_same(found, by_functional_form(model, ids))


def test_the_mask_leaves_the_graph(model):
    report = lighthouse_fx.explain(model, input_ids=tokens(), config=CONFIG)
    (graph,) = report.graphs
    square = f"{TOKENS}, {TOKENS}]"
    assert any(data["shape"].endswith(square) for _, data in graph.before.nodes(data=True))
    assert not any(data["shape"].endswith(square) for _, data in graph.after.nodes(data=True))
    assert not any(data["target"] in ("diff", "cumsum", "le") for _, data in graph.after.nodes(data=True))


def test_compiled_layer_by_layer(model):
    ids = tokens()
    expected = by_functional_form(model, ids)
    before = len(lighthouse_fx.reports())
    for layer in layers(model):
        layer.compile(backend=passes_only, options=dict(FIELDS), fullgraph=True)
    found = loss_and_gradients(model, model, ids)
    (report,) = lighthouse_fx.reports()[before:]  # one graph for all layers
    assert report.rewritten == len(report.calls) == 1, report.summary()
    assert_same(found, expected)


@pytest.mark.usefixtures("float64_through_inductor")
def test_through_inductor_with_checkpointing():
    model = llama().double()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = tokens()
    run = torch.compile(model, backend="lighthouse", options=FIELDS)
    found = loss_and_gradients(model, run, ids)
    assert lighthouse_fx.reports()[-1].rewritten == LAYERS
    assert_same(found, by_functional_form(model, ids), FUSED)


def test_inference_is_the_dense_model(model):
    ids = tokens()
    run = torch.compile(model, backend=passes_only, options=FIELDS)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(run(input_ids=ids).logits, model(input_ids=ids).logits, **TOLERANCE)
    assert lighthouse_fx.reports()[-1].rewritten == 0


def test_attention_mask_of_the_user_is_not_taken_for_causal(model):
    ids = tokens()
    report = lighthouse_fx.explain(model, input_ids=ids, attention_mask=torch.ones_like(ids), config=CONFIG)
    assert report.rewritten == 0
    assert all("attention_mask" in call.reason and "attention_mask" in call.remedy for call in report.calls)


def test_default_convenience():
    model = llama()
    lighthouse_fx.compile(model, CONFIG, dense_layers=(0, -1))
    ids = tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    report = lighthouse_fx.explain(model, input_ids=ids)
    assert [call.rewritten for call in report.calls] == [False, True, False]
    assert [call.module for call in report.calls] == [f"model.layers.{layer}.self_attn" for layer in range(LAYERS)]
