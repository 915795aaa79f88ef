"""`assume_causal`: a mask that nobody could prove counts as causal, and the compiled model raises where it is not."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from graphs import B, H, N, by_arange, heads, only_call, targets
from small_models import CONFIG, FIELDS, Model, functional, inputs, passes_only
from torch import nn

import lighthouse_fx
from lighthouse_fx import LighthouseConfig
from lighthouse_fx.kernels import reference

OPTIONS = FIELDS | {"assume_causal": True}
ASSUME = LighthouseConfig(**OPTIONS)
CHECK = torch.ops.lighthouse_fx.check_causal.default
MASKS = {
    "bool [N, N]": by_arange,
    "bool [H, N, N]": lambda: by_arange().repeat(H, 1, 1),
    "bool [1, 1, N, N]": lambda: by_arange()[None, None],
    "bool [B, 1, N, N]": lambda: by_arange()[None, None].repeat(2, 1, 1, 1),
    "bool expanded to [B, H, N, N]": lambda: by_arange()[None, None].expand(2, H, N, N),
    "0 and -inf": lambda: torch.zeros(N, N, dtype=torch.float64).masked_fill(~by_arange(), -math.inf),
    "0 and lowest": lambda: torch.zeros(2, 1, N, N, dtype=torch.float64).masked_fill(
        ~by_arange(), torch.finfo(torch.float64).min
    ),
    "0 and bfloat16's lowest": lambda: torch.zeros(N, N, dtype=torch.float64).masked_fill(
        ~by_arange(), torch.finfo(torch.bfloat16).min
    ),
}


class Masked(nn.Module):
    """A model that hands the mask that it is given to the attention of each layer."""

    def __init__(self, layers=2, checkpointing=None):
        super().__init__()
        self.mask = [None]
        self.inner = Model(layers, attend=self.attend, checkpointing=checkpointing)

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask[0], enable_gqa=True)

    def forward(self, x, mask):
        self.mask[0] = mask
        return self.inner(x)


def compiled(model, backend=passes_only, **options):
    return torch.compile(model, backend=backend, options=OPTIONS | options, fullgraph=True)


def loss_and_gradients(run, parameters, *args):
    loss = run(*args).square().mean()
    return [loss.detach(), *torch.autograd.grad(loss, list(parameters))]


def expected(model, x):
    oracle = Model(len(model.inner.layers), functional()).double()
    oracle.load_state_dict(model.inner.state_dict())
    return loss_and_gradients(oracle, oracle.parameters(), x)


@pytest.fixture
def looks(monkeypatch):
    """How often a mask was looked at."""
    seen, look = [], reference.is_causal_mask
    monkeypatch.setattr(reference, "is_causal_mask", lambda mask: seen.append(mask.shape) or look(mask))
    return seen


# --- what is rewritten ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MASKS)
def test_numbers_and_gradients_are_those_of_the_functional_form(name):
    model, x = Masked().double(), inputs(dtype=torch.float64)
    found = loss_and_gradients(compiled(model), model.parameters(), x, MASKS[name]())
    report = lighthouse_fx.reports()[-1]
    assert report.rewritten == len(report.calls) == 2
    assert all(call.assumed and call.is_causal for call in report.calls)
    torch.testing.assert_close(found, expected(model, x), rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("float64_through_inductor")
@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [None, pytest.param("inside", marks=pytest.mark.sweep)])
def test_through_inductor(checkpointing, looks):
    model, x = Masked(3, checkpointing).double(), inputs(dtype=torch.float64)
    run, mask = compiled(model, "lighthouse"), by_arange()
    found = loss_and_gradients(run, model.parameters(), x, mask)
    torch.testing.assert_close(found, expected(model, x), rtol=1e-9, atol=1e-12)
    assert looks == [(N, N)]  # once for all three layers, and not again in the backward pass
    mask[7, 9] = True
    with pytest.raises(Exception, match=r"layers\.0\.attn .* and 2 more .* query 7 and key 9 it shows it"):
        run(x, mask)


def test_mask_from_a_buffer():
    class Buffered(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("bias", torch.ones(2 * N, 2 * N).tril().view(1, 1, 2 * N, 2 * N))
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, q):
            return F.scaled_dot_product_attention(q * self.scale, q, q, attn_mask=self.bias[:, :, :N, :N] != 0)

    model, q = Buffered().double(), heads(dtype=torch.float64)
    found = compiled(model)(q)
    assert lighthouse_fx.reports()[-1].calls[0].assumed
    torch.testing.assert_close(found, lighthouse_fx.lighthouse_attention(q, q, q, is_causal=True, config=CONFIG))
    model.bias[0, 0, 5, 5] = 0
    with pytest.raises(ValueError, match="query 5 and key 5 of head 0 of batch row 0 it hides it"):
        compiled(model)(q)


def test_proved_mask_is_not_checked():
    gm, call = only_call(
        lambda q: F.scaled_dot_product_attention(q, q, q, attn_mask=by_arange()), heads(), config=ASSUME
    )
    assert call.refusal is None and call.unproved is None
    assert CHECK not in targets(gm)


def test_any_length_in_one_graph():
    def attend(q, mask):
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    run = torch.compile(attend, backend=passes_only, options=OPTIONS, dynamic=True, fullgraph=True)
    graphs = len(lighthouse_fx.reports())
    for tokens in (N, N + 9):
        q = heads(tokens=tokens)
        oracle = lighthouse_fx.lighthouse_attention(q, q, q, is_causal=True, config=CONFIG)
        torch.testing.assert_close(run(q, by_arange(tokens)), oracle)
        with pytest.raises(ValueError, match="not the causal mask"):
            run(q, ~by_arange(tokens))
    assert len(lighthouse_fx.reports()) == graphs + 1


def test_report_says_what_was_assumed():
    model = Masked()
    report = lighthouse_fx.explain(model, inputs(), by_arange(), config=ASSUME)
    assert [call.assumed for call in report.calls] == [True, True]
    assert "assumed" in str(report)
    assert "2 with an attn_mask assumed to be causal" in report.graphs[0].summary()
    assert report.to_dict()["calls"][0]["assumed"] is True


# --- what is not ------------------------------------------------------------------------------------------------------


def test_off_by_default_with_all_remedies():
    report = lighthouse_fx.explain(Masked(), inputs(), by_arange(), config=CONFIG)
    for call in report.calls:
        assert not call.rewritten and not call.assumed and not call.is_causal
        assert "mask" in call.reason and "depends on the input" in call.reason
        assert all(word in call.remedy for word in ("without attention_mask", "documents", "assume_causal=True"))


DISPROVED = {
    "sliding window": lambda: by_arange() & (torch.arange(N)[:, None] - torch.arange(N) < 9),
    "anti-causal": lambda: ~by_arange(),
    "soft": lambda: torch.where(by_arange(), 0.0, -5.0),
    "shifted": lambda: torch.ones(N, N, dtype=torch.bool).tril(-1),
}


@pytest.mark.parametrize("name", DISPROVED)
def test_mask_that_is_known_to_be_another_is_never_assumed(name):
    gm, call = only_call(
        lambda q: F.scaled_dot_product_attention(q, q, q, attn_mask=DISPROVED[name]()), heads(), config=ASSUME
    )
    assert call.refusal is not None and "assume_causal" not in call.refusal.remedy
    assert "lighthouse" not in str(targets(gm))


HIDING = {
    "window": lambda shown: by_arange() & (torch.arange(N)[:, None] - torch.arange(N) < 9) & shown,
    "window, after the unknown": lambda shown: (shown & by_arange())[None] & (torch.arange(N)[:, None] < torch.arange(N) + 9),
    "nothing": lambda shown: torch.zeros(N, N, dtype=torch.bool) & shown,
}
NOT_HIDING = {
    "causal": lambda shown: by_arange() & shown,
    "window, inverted": lambda shown: ~(~by_arange().tril(-9) & shown) | by_arange(),
    "window, or the unknown": lambda shown: by_arange().triu(-9) | (shown & by_arange()),
    "window, chosen by the unknown": lambda shown: torch.where(shown & by_arange().tril(-9), by_arange(), by_arange()),
    "many times": lambda shown: many_times(by_arange() & shown),
}


def many_times(mask):
    """As a tree, 2**40 nodes."""
    for _ in range(40):
        mask = mask & mask
    return mask


@pytest.mark.parametrize("name", HIDING)
def test_mask_that_hides_too_much_whatever_its_inputs_hold_is_never_assumed(name):
    def attend(q, shown):
        return F.scaled_dot_product_attention(q, q, q, attn_mask=HIDING[name](shown))

    _, call = only_call(attend, heads(), torch.ones(N, N, dtype=torch.bool), config=ASSUME)
    assert "hides earlier tokens" in call.refusal.reason and "the input" in call.refusal.reason


@pytest.mark.parametrize("name", NOT_HIDING)
def test_mask_that_may_be_causal_is_assumed(name):
    def attend(q, shown):
        return F.scaled_dot_product_attention(q, q, q, attn_mask=NOT_HIDING[name](shown))

    _, call = only_call(attend, heads(), torch.ones(N, N, dtype=torch.bool), config=ASSUME)
    assert call.refusal is None and call.unproved is not None


def test_full_mask_stays_full():
    full = torch.ones(N, N, dtype=torch.bool)
    _, call = only_call(
        lambda q: F.scaled_dot_product_attention(q, q, q, attn_mask=torch.ones_like(full)), heads(), config=ASSUME
    )
    assert call.refusal is None and call.is_causal is False and call.unproved is None


UNFIT = {
    "padding": (lambda: torch.ones(B, 1, 1, N, dtype=torch.bool), "has not a row and a column"),
    "one column": (lambda: torch.ones(N, 1, dtype=torch.bool), "has not a row and a column"),
    "trained": (lambda: torch.zeros(N, N, requires_grad=True), "it is trained"),
    "wider batch": (lambda: by_arange().repeat(B, 1, 1, 1), "not those of the query"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_mask_that_cannot_be_checked_is_left(name):
    build, because = UNFIT[name]
    q = heads()[:1] if name == "wider batch" else heads()
    report = lighthouse_fx.explain(
        lambda q, mask: F.scaled_dot_product_attention(q, q, q, attn_mask=mask), q, build(), config=ASSUME
    )
    (call,) = report.calls
    assert not call.rewritten and because in call.reason and "assume_causal" not in call.remedy


def test_inference_is_not_checked(looks):
    model, x = Masked(), inputs()
    run = compiled(model)
    with torch.no_grad():
        torch.testing.assert_close(run(x, ~by_arange() | by_arange().T), model(x, ~by_arange() | by_arange().T))
    assert not looks and lighthouse_fx.reports()[-1].rewritten == 0


# --- stages and configuration -----------------------------------------------------------------------------------------


def test_a_stage_can_assume():
    model, x = Masked(), inputs()
    run = torch.compile(model, backend=passes_only, options=FIELDS)
    run(x, by_arange())
    assert lighthouse_fx.reports()[-1].rewritten == 0
    with lighthouse_fx.pretraining(assume_causal=True):
        run(x, by_arange())
        assert lighthouse_fx.reports()[-1].rewritten == 2
    with lighthouse_fx.dense():
        torch.testing.assert_close(run(x, ~by_arange().T), model(x, ~by_arange().T), equal_nan=True)
    assert lighthouse_fx.reports()[-1].rewritten == 0


def test_model_that_was_dense_first_is_rewritten_afterwards():
    """A provable mask is proved in the dense stage, too: whether the graph depends on the stage hangs on it."""

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=by_arange(), enable_gqa=True)

    run, x = torch.compile(Model(attend=attend), backend=passes_only, options=FIELDS), inputs()
    with lighthouse_fx.dense():
        run(x)
    assert "dense stage" in lighthouse_fx.reports()[-1].calls[0].reason
    run(x)
    assert lighthouse_fx.reports()[-1].rewritten == 2


@pytest.mark.parametrize("value", [1, "yes", None])
def test_bad_value_is_named(value):
    with pytest.raises(TypeError, match=f"assume_causal={value!r}.*give True or False"):
        LighthouseConfig(assume_causal=value)


# --- transformers -----------------------------------------------------------------------------------------------------


def llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).double()


def test_transformers_with_an_attention_mask_of_ones():
    model, ids = llama(), torch.randint(0, 96, (2, N))
    ones = torch.ones_like(ids)
    run = compiled(model)
    found = run(input_ids=ids, attention_mask=ones).logits
    assert [call.assumed for call in lighthouse_fx.reports()[-1].calls] == [True, True]
    alone = torch.compile(model, backend=passes_only, options=FIELDS, fullgraph=True)(input_ids=ids).logits
    assert not any(call.assumed for call in lighthouse_fx.reports()[-1].calls)
    torch.testing.assert_close(found, alone)
    for padding in (slice(None, 3), slice(-3, None)):  # left, which hides whole rows, and right
        padded = ones.clone()
        padded[1, padding] = 0
        with pytest.raises(ValueError, match=r"not the causal mask: .* of batch row 1 it hides it"):
            run(input_ids=ids, attention_mask=padded)


def test_transformers_with_windows_and_an_attention_mask():
    """Layers with a sliding window stay dense, those beside them are rewritten."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Gemma3TextConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, use_cache=False,
        num_key_value_heads=2, head_dim=8, sliding_window=16, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    ids = torch.randint(0, 96, (2, N))
    report = lighthouse_fx.explain(
        transformers.Gemma3ForCausalLM(config), input_ids=ids, attention_mask=torch.ones_like(ids), config=ASSUME
    )
    window, whole = report.calls
    assert not window.rewritten and "hides earlier tokens" in window.reason
    assert whole.rewritten and whole.assumed


def test_transformers_with_packed_positions():
    model, ids = llama(), torch.randint(0, 96, (2, N))
    run, together = compiled(model), torch.arange(N).expand(2, N)
    run(input_ids=ids, position_ids=together)
    assert [call.assumed for call in lighthouse_fx.reports()[-1].calls] == [True, True]
    packed = torch.cat([torch.arange(N // 2)] * 2).expand(2, N)
    with pytest.raises(ValueError, match=f"query {N // 2} and key 0 of head 0 of batch row 0 it hides it"):
        run(input_ids=ids, position_ids=packed)


# --- on a GPU ---------------------------------------------------------------------------------------------------------

ON_A_GPU = """
import torch
import torch.nn.functional as F
options = {"levels": 3, "pooling": 2, "topk": 8, "assume_causal": True}
def attend(q, mask):
    return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
run = torch.compile(attend, backend="lighthouse", options=options)
q = torch.randn(2, 4, 64, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
mask = torch.ones(64, 64, device="cuda").tril().bool()
with torch.cuda.stream(torch.cuda.Stream()):
    run(q, mask).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    run(q, mask).sum().backward()
    torch.cuda.set_sync_debug_mode("default")
torch.cuda.synchronize()
print("passed", flush=True)
mask[3, 9] = True
run(q, mask)
torch.cuda.synchronize()
print("not seen", flush=True)
"""


@pytest.mark.gpu
@pytest.mark.slow
def test_lie_on_a_gpu_is_a_device_side_assertion_and_nobody_waits():
    done = subprocess.run([sys.executable, "-c", ON_A_GPU], capture_output=True, text=True)
    assert done.stdout.split() == ["passed"], done.stderr[-3000:]
    assert "assert" in done.stderr
