"""The whole way through Inductor: `torch.compile(model, backend="lighthouse")`."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from small_models import (
    CONFIG,
    FIELDS,
    Attention,
    Block,
    Model,
    assert_same_gradients,
    causal,
    functional,
    gradients,
    inputs,
    passes_only,
    twin,
)
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import lighthouse_fx
from lighthouse_fx import LighthouseConfig, lighthouse_attention
from lighthouse_fx.kernels.torch_private import sdp_priority_order

STRICT = {"rtol": 1e-10, "atol": 1e-12}


def compiled(model, **arguments):
    options = {**FIELDS, **arguments.pop("options", {})}
    return torch.compile(model, backend="lighthouse", options=options, **arguments)


def last():
    return lighthouse_fx.reports()[-1]


def test_backend_is_known_without_an_import():
    assert "lighthouse" in torch._dynamo.list_backends()


@pytest.mark.usefixtures("float64_through_inductor")
def test_training_equals_the_functional_form_in_float64():
    model = Model(2).double()
    assert_same_gradients(
        compiled(model, fullgraph=True), twin(model, functional()), inputs(dtype=torch.float64), **STRICT
    )
    assert last().rewritten == 2


@pytest.mark.usefixtures("float64_through_inductor")
def test_same_loss_curve_as_the_functional_form():
    model = Model(2).double()
    oracle = twin(model, functional())
    batches = [inputs(dtype=torch.float64) for _ in range(4)]

    def train(run, parameters):
        optimiser = torch.optim.AdamW(parameters, lr=1e-2)
        losses = []
        for x in batches:
            loss = run(x).square().mean()
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            losses.append(loss.item())
        return losses

    found, expected = train(compiled(model), model.parameters()), train(oracle, oracle.parameters())
    assert found == pytest.approx(expected, rel=1e-9)
    assert found[-1] < found[0]


def test_without_gradients_it_is_the_same_as_inductor():
    model, x = Model(1), inputs()
    ours, inductor = compiled(model), torch.compile(copy.deepcopy(model), backend="inductor")
    with torch.no_grad():
        assert torch.equal(ours(x), inductor(x))
    assert last().rewritten == 0 and "no_grad" in last().calls[0].reason
    torch._dynamo.reset()
    with torch.inference_mode():
        assert torch.equal(ours(x), inductor(x))
    assert last().rewritten == 0 and "inference_mode" in last().calls[0].reason
    model.eval()
    assert torch.equal(ours(x), inductor(x))
    assert last().rewritten == 0 and "eval" in last().calls[0].reason


def test_eager_model_is_untouched():
    model, x = Model(2), inputs()
    before, code = model(x), type(model).forward.__code__
    state = copy.deepcopy(model.state_dict())
    compiled(model)(x).sum().backward()
    model.zero_grad()
    assert torch.equal(model(x), before)
    assert type(model).forward.__code__ is code
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(p.grad is not None for p in model.parameters())


@pytest.mark.usefixtures("float64_through_inductor")
def test_dynamic_length_is_one_graph():
    model = Model(1).double()
    ours, oracle = compiled(model, dynamic=True, fullgraph=True), twin(model, functional())
    before = len(lighthouse_fx.reports())
    for tokens in (64, 81, 119, 200):
        assert_same_gradients(ours, oracle, inputs(tokens=tokens, dtype=torch.float64), **STRICT)
    assert len(lighthouse_fx.reports()) == before + 1
    (call,) = last().calls
    assert call.rewritten and isinstance(call.length, str)


def test_modes():
    model, x = Model(1), inputs()
    for mode in ("default", "max-autotune-no-cudagraphs"):
        torch._dynamo.reset()
        with lighthouse_fx.pretraining(CONFIG):
            torch.compile(model, backend="lighthouse", mode=mode)(x).sum().backward()
        assert last().rewritten == 1


def test_options_of_inductor_are_passed_on():
    seen = []
    x = inputs()
    compiled(Model(1), options={"post_grad_custom_post_pass": seen.append, "fallback_random": True})(x)
    assert seen


@pytest.mark.parametrize(
    "options, says",
    [
        ({"topkk": 3}, ["topkk=3", "did you mean", "topk", "levels", "pooling", "list_options"]),
        ({"levels": -1}, ["levels=-1", "at least 0"]),
        ({"levels": 0}, ["levels=0", "local_window=0", "levels=2"]),
        ({"scorer": "best"}, ["scorer='best'", "'norm'", "'dilated'"]),
        ({"quota": 7}, ["quota=7", "topk=8"]),
    ],
)
def test_bad_options(options, says):
    with pytest.raises(Exception) as error:
        compiled(Model(1), options=options)(inputs())
    assert all(words in str(error.value) for words in says)


def test_unknown_mode():
    with pytest.raises(Exception, match="fastest"):
        torch.compile(Model(1), backend="lighthouse", mode="fastest")(inputs())


def test_module_in_eval_inside_a_training_model_stays_dense():
    model = Model(2)
    model.layers[0].eval()
    torch.compile(model, backend=passes_only, options=FIELDS)(inputs())
    assert [call.rewritten for call in last().calls] == [False, True]
    model.layers[0].train()
    torch.compile(model, backend=passes_only, options=FIELDS)(inputs())


# --- eval mode, however the attention's module is reached ---------------------------------------------------------------


class Core(nn.Module):
    """Attention without a parameter."""

    def forward(self, x):
        q = x.view(*x.shape[:2], 4, -1).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2).flatten(2)


class Around(nn.Module):
    def __init__(self, inner=None):
        super().__init__()
        self.linear, self.inner = nn.Linear(32, 32), inner or Core()

    def forward(self, x):
        return self.inner(self.linear(x))


def wrapped(forward):
    @functools.wraps(forward)
    def wrapper(*args, **kwargs):
        return forward(*args, **kwargs)

    return wrapper


class Decorated(Attention):
    @wrapped
    def forward(self, x):
        return super().forward(x)


class Broken(Attention):
    """Its attention is in a frame that starts in the middle of the forward."""

    def forward(self, x):
        x = x + 1
        torch._dynamo.graph_break()
        return super().forward(x)


class Dead(Attention):
    """The same, and the module itself is not needed there any more."""

    def forward(self, x):
        q = self.project(x)[..., :32].view(*x.shape[:2], 4, 8).transpose(1, 2)
        torch._dynamo.graph_break()
        return F.scaled_dot_product_attention(q, q, q, is_causal=True)


def shared():
    model = Model(2)
    model.layers[1] = model.layers[0]
    return model


@pytest.mark.parametrize("make", [Attention, Core, Around, Decorated, Broken, shared, lambda: Around(Block())])
def test_eval_is_dense_and_toggling_is_seen(make):
    model, x = make(), inputs().requires_grad_()
    run = torch.compile(model, backend=passes_only, options=FIELDS)
    for training in (True, False, True, False):
        model.train(training)
        with lighthouse_fx.runtime.journal.watch() as calls:
            run(x)
        assert any(call.rewritten for call in calls) == training
    torch.testing.assert_close(run(x), model(x), rtol=0, atol=0)


def test_eval_of_a_child_without_parameters_is_seen():
    model, x = Around(), inputs()
    run = torch.compile(model, backend=passes_only, options=FIELDS)
    run(x)
    model.inner.eval()
    torch.testing.assert_close(run(x), model(x), rtol=0, atol=0)
    assert model.training and not last().rewritten


def test_attention_compiled_alone_in_a_model_is_dense_in_eval():
    model, x = Model(2), inputs()
    oracle = copy.deepcopy(model).eval()
    for layer in model.layers:
        layer.attn.compile(backend=passes_only, options=FIELDS)
    model(x)
    model.eval()
    torch.testing.assert_close(model(x), oracle(x), rtol=0, atol=0)


def test_a_function_that_uses_a_module_heeds_its_mode():
    model, x = Attention(), inputs()

    def attend(x):
        q = model.project(x)[..., :32].view(*x.shape[:2], 4, 8).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q, is_causal=True)

    run = torch.compile(attend, backend=passes_only, options=FIELDS)
    run(x)
    assert last().rewritten == 1
    model.eval()
    torch.testing.assert_close(run(x), attend(x), rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_attention_whose_module_no_guard_can_reach_stays_dense(training):
    model, x = Dead().train(training), inputs()
    run = torch.compile(model, backend=passes_only, options=FIELDS)
    torch.testing.assert_close(run(x), model(x), rtol=0, atol=0)
    assert "eval() of that module would go unseen" in last().calls[0].reason
    assert "graph_breaks" in last().calls[0].remedy


def test_toggling_eval_reuses_graphs():
    model, x = Model(1), inputs()
    run = torch.compile(model, backend=passes_only, options=FIELDS)
    before = len(lighthouse_fx.reports())
    for _ in range(3):
        model.train()
        run(x)
        model.eval()
        run(x)
    assert len(lighthouse_fx.reports()) == before + 2


def test_function_without_modules():
    def loss(q):
        return torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).sum()

    q = torch.randn(1, 2, 64, 8, requires_grad=True)
    torch.compile(loss, backend=passes_only, options=FIELDS)(q)
    assert last().rewritten == 1


def test_frozen_parameters_still_rewrite_where_something_trains():
    model = Model(2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1" in name)
    torch.compile(model, backend=passes_only, options=FIELDS)(inputs())
    assert [call.rewritten for call in last().calls] == [False, True]
    assert "needs no gradient" in last().calls[0].reason


def test_autocast():
    model, x = Model(1), inputs()

    def step(run):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return gradients(run, x)

    loss, found = step(compiled(model, fullgraph=True))
    expected_loss, expected = step(twin(model, functional()))
    torch.testing.assert_close(loss, expected_loss, rtol=2e-2, atol=1e-3)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0.1, atol=2e-3)


def test_dropout_goes_to_the_inner_attention():
    def drop(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=1.0, is_causal=True, enable_gqa=True)

    model = Model(1, drop)
    out = torch.compile(model, backend=passes_only, options=FIELDS)(x := inputs())
    assert last().rewritten == 1
    torch.testing.assert_close(out, x + model.layers[0].attn.out.bias)


# --- every field of the configuration reaches the ops -------------------------------------------------------------------

UNUSUAL = {"levels": 4, "pooling": 3, "topk": 6, "quota": 2, "keep_first": False, "dilation": 8, "max_kept": 0.9}


@pytest.mark.parametrize("scorer", ["norm", "dilated"])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_every_field_of_the_config_counts(scorer, is_causal, scale):
    config = LighthouseConfig(**UNUSUAL, scorer=scorer)
    usual = LighthouseConfig()
    assert all(getattr(config, name) != getattr(usual, name) for name in UNUSUAL)
    tensors = [torch.randn(2, heads, 120, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    arguments = {"is_causal": is_causal, "scale": scale, "enable_gqa": True}

    def found(attend):
        out = attend(*tensors)
        return out, *torch.autograd.grad(out.square().sum(), tensors)

    run = torch.compile(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **arguments),
        backend=passes_only,
        options={**UNUSUAL, "scorer": scorer},
    )
    ours = found(run)
    assert last().rewritten == 1
    oracle = found(lambda q, k, v: lighthouse_fx.lighthouse_attention(q, k, v, config=config, **arguments))
    for one, other in zip(ours, oracle, strict=True):
        torch.testing.assert_close(one, other, **STRICT)


@pytest.mark.parametrize("kernel", ["math", pytest.param("auto", marks=pytest.mark.gpu)])
def test_the_order_of_stock_kernels_is_left_as_it_was(kernel):
    """PyTorch's own `sdpa_kernel` changes it for good where a kernel is switched off at the time."""
    q = torch.randn(1, 2, 40, 8, device="cuda" if kernel == "auto" else "cpu", requires_grad=True)
    before = sdp_priority_order()
    with sdpa_kernel(SDPBackend.MATH):
        lighthouse_attention(q, q, q, is_causal=True, config=LighthouseConfig(kernel=kernel)).sum().backward()
        run = torch.compile(lambda q: causal(q, q, q), backend="lighthouse", options={"kernel": kernel}, fullgraph=True)
        run(q).sum().backward()
    assert lighthouse_fx.reports()[-1].rewritten == 1
    assert sdp_priority_order() == before
