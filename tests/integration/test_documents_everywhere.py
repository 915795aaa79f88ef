"""Inside `documents(...)` attention that stays dense keeps to documents, too, or says that it does not; at any length."""

import threading
import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from small_models import (
    CONFIG,
    FIELDS,
    TOKENS,
    Attention,
    Model,
    assert_same_gradients,
    causal,
    inputs,
    passes_only,
    twin,
)
from torch.utils.checkpoint import checkpoint

import lighthouse_fx
from lighthouse_fx import lighthouse_attention
from lighthouse_fx.runtime import stage


def numbered(*lengths):
    """`[1, N]`: documents of these lengths, numbered in order."""
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]


NUMBERS = torch.cat([numbered(10, 23, 31), numbered(37, 27)])


def dense_inside(numbers):
    """The oracle: PyTorch's attention with the mask written out."""
    mask = (numbers[:, :, None] == numbers[:, None, :]).tril()[:, None]  # [B, 1, N, N]
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def lighthouse_inside(numbers, config=CONFIG):
    return lambda q, k, v: lighthouse_attention(
        q, k, v, is_causal=True, enable_gqa=True, documents=numbers, config=config
    )


def compiled(model, backend=passes_only, **options):
    return torch.compile(model, backend=backend, options=FIELDS | options)


def windowed(q, k, v):
    place = torch.arange(q.shape[2])
    mask = (place[:, None] >= place) & (place[:, None] - place < 16)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def unproved(q, k, v):
    """A mask that is an input, so anything."""
    mask = (q[:, :1, :, :1] < 1e9).transpose(-1, -2) & torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def bidirectional(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def by_hand(q, k, v):
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    hidden = ~torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
    scores = (q @ k.transpose(-1, -2) * q.shape[3] ** -0.5).masked_fill(hidden, float("-inf"))
    return scores.softmax(-1) @ v


# --- attention that stays dense by choice -------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [None, "inside"])
@pytest.mark.parametrize("attend", [causal, by_hand])
@pytest.mark.parametrize(
    "around, options, reason",
    [
        (lighthouse_fx.dense, {}, "the dense stage is on"),
        (nullcontext, {"dense_layers": (0, 1)}, "layer excluded"),
        (nullcontext, {"topk": 64}, "not worth it"),
        (nullcontext, {"levels": 8}, "fewer than one coarsest window"),
    ],
)
def test_dense_by_choice(around, options, reason, attend, checkpointing):
    model, x = Model(2, attend, checkpointing).double(), inputs(dtype=torch.float64)
    run = compiled(model, **options)
    with around(), lighthouse_fx.documents(NUMBERS), warnings.catch_warnings():
        warnings.filterwarnings("error", message="documents")
        assert_same_gradients(run, twin(model, dense_inside(NUMBERS)), x)
    calls = lighthouse_fx.reports()[-1].calls
    assert len(calls) == 2 and all(reason in call.reason and call.inside_documents and not call.rewritten for call in calls)


@pytest.mark.parametrize("attend", [causal, by_hand])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_evaluation(gradients, before, attend):
    """In `eval()` with gradients and without, also where the graph was first compiled outside."""
    model, x = Model(2, attend).double().eval(), inputs(dtype=torch.float64)
    run = compiled(model)
    with torch.set_grad_enabled(gradients):
        if before:
            torch.testing.assert_close(run(x), model(x))
        with lighthouse_fx.documents(NUMBERS):
            torch.testing.assert_close(run(x), twin(model, dense_inside(NUMBERS))(x))
        torch.testing.assert_close(run(x), model(x))  # and outside it is the model's own


@pytest.mark.gpu
def test_the_dense_stage_and_evaluation_on_a_gpu():
    model = Model(2).cuda()
    run, x, numbers = compiled(model, "lighthouse"), inputs().cuda(), NUMBERS.cuda()
    oracle = twin(model, dense_inside(numbers)).cuda()
    with lighthouse_fx.documents(NUMBERS), torch.autocast("cuda", torch.bfloat16):
        with lighthouse_fx.dense():
            assert_same_gradients(run, oracle, x, rtol=3e-2, atol=3e-2)
        with torch.no_grad():
            torch.testing.assert_close(run(x), oracle(x), rtol=3e-2, atol=3e-2)
    assert all(call.inside_documents for report in lighthouse_fx.reports() for call in report.calls)


def test_frozen_layers():
    model, x = Model(2).double(), inputs(dtype=torch.float64)
    model.layers[0].requires_grad_(False)
    oracle = twin(model, lighthouse_inside(NUMBERS))
    oracle.layers[0].attn.attend = dense_inside(NUMBERS)
    with lighthouse_fx.documents(NUMBERS):
        torch.testing.assert_close(compiled(model)(x), oracle(x))
    assert [call.rewritten for call in lighthouse_fx.reports()[-1].calls] == [False, True]


@pytest.mark.usefixtures("float64_through_inductor")
def test_block_by_block_in_both_stages_and_evaluation():
    """The recommended way: no layer attends across documents, through Inductor."""
    model, x = Model(3).double(), inputs(dtype=torch.float64)
    oracle, dense = twin(model, lighthouse_inside(NUMBERS)), twin(model, dense_inside(NUMBERS))
    oracle.layers[0].attn.attend = dense_inside(NUMBERS)
    lighthouse_fx.compile(model, CONFIG, dense_layers=(0,))
    with lighthouse_fx.documents(NUMBERS):
        assert_same_gradients(model, oracle, x)
        with lighthouse_fx.dense():
            assert_same_gradients(model, dense, x)
        with torch.no_grad():
            torch.testing.assert_close(model(x), dense(x))
        with lighthouse_fx.pretraining(CONFIG):  # another configuration makes no dense block a Lighthouse one
            assert_same_gradients(model, oracle, x)
    reasons = {call.reason for report in lighthouse_fx.reports() for call in report.calls}
    assert any(reason.startswith("layer excluded") for reason in reasons)


@pytest.mark.gpu  # only there does attention inside documents lay its output out otherwise
def test_the_output_lies_as_that_of_the_attention_that_it_replaces():
    """Models view it: `out.transpose(1, 2).view(B, N, width)`."""

    def model(x):  # [B, N, width]
        q = x.view(2, TOKENS, 4, 8).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2).view(2, TOKENS, 32)

    q = (x := inputs(dtype=torch.bfloat16).cuda()).view(2, TOKENS, 4, 8).transpose(1, 2)
    with lighthouse_fx.dense(), lighthouse_fx.documents(NUMBERS):
        out = compiled(model)(x.requires_grad_())
    expected = dense_inside(NUMBERS.cuda())(q, q, q)
    torch.testing.assert_close(out.view(2, TOKENS, 4, 8).transpose(1, 2), expected, rtol=3e-2, atol=3e-2)


def test_a_mask_that_is_assumed_to_be_causal_is_checked_in_dense_layers():
    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    model, x = Model(1, attend).double(), inputs(dtype=torch.float64)
    run = compiled(model, assume_causal=True, dense_layers=(0,))
    with lighthouse_fx.documents(NUMBERS):
        assert_same_gradients(run, twin(model, dense_inside(NUMBERS)), x)
        mask[40, 3] = False
        with pytest.raises(ValueError, match="not the causal mask: for query 40 and key 3"):
            run(x)


# --- attention that knows nothing of documents --------------------------------------------------------------------------


@pytest.mark.parametrize("attend", [windowed, unproved])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_is_warned_of_once_whenever_it_was_compiled(gradients, before, attend):
    model, x = Model(1, attend), inputs()
    run = compiled(model)
    with torch.set_grad_enabled(gradients):
        if before:
            run(x)
        with lighthouse_fx.documents(NUMBERS), pytest.warns(UserWarning, match="ignores it.*own mask"):
            torch.testing.assert_close(run(x), model(x))
        with lighthouse_fx.documents(NUMBERS), warnings.catch_warnings():
            warnings.simplefilter("error")
            run(x)
    (call,) = lighthouse_fx.reports()[-1].calls
    assert not call.rewritten and not call.inside_documents


def test_attention_that_is_not_causal_is_dense_inside_and_rewritten_outside():
    model, x = Model(1, bidirectional), inputs()
    run = compiled(model)
    for _ in range(2):
        with lighthouse_fx.documents(NUMBERS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.testing.assert_close(run(x), model(x))
        assert not torch.allclose(run(x), model(x))


class HeadsFirst(torch.nn.Module):
    """Attention over `[H, B, N, D]`, where stock attention does not mind, and documents would be taken for heads."""

    def __init__(self, together):
        super().__init__()
        self.project, self.together = torch.nn.Linear(32, 96), together

    def forward(self, x):
        batch, length, _ = x.shape
        if self.together:
            q, k, v = self.project(x).view(batch, length, 3, 2, 16).permute(2, 3, 0, 1, 4).unbind(0)
        else:
            q, k, v = (part.view(batch, length, 2, 16).permute(2, 0, 1, 3) for part in self.project(x).chunk(3, -1))
        return causal(q, k, v).permute(1, 2, 0, 3).reshape(batch, length, 32)


@pytest.mark.parametrize("together", [True, False])
def test_heads_before_the_batch_are_not_taken_for_it(together):
    model, x = HeadsFirst(together), inputs(batch=2)
    with lighthouse_fx.documents(NUMBERS), pytest.warns(UserWarning, match="ignores it"):
        torch.testing.assert_close(compiled(model)(x), model(x))
    (call,) = lighthouse_fx.reports()[-1].calls
    assert "not those of a batch and its tokens" in call.reason


class Wide(torch.nn.Module):
    """Layers of 0.8 MB each: several buckets of DDP's."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(Attention(width=256) for _ in range(6))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_buckets_of_ddp(tmp_path):
    """DDP cuts the graph where its buckets end, and copies the parts."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = Wide()
        around = torch.nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1)
        x = torch.randn(2, TOKENS, 256)
        with lighthouse_fx.documents(NUMBERS):
            found = compiled(around)(x)
            in_parts = [report.rewritten for report in lighthouse_fx.reports()]
            torch.testing.assert_close(found, compiled(model)(x))
            found.square().mean().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert sum(in_parts) == 6 and len(in_parts) > 1
    assert all(call.inside_documents for report in lighthouse_fx.reports() for call in report.calls)


def test_verify_knows_dense_layers_inside_documents():
    config = lighthouse_fx.LighthouseConfig(**FIELDS, dense_layers=(0,))
    with lighthouse_fx.documents(NUMBERS):
        assert lighthouse_fx.verify(Model(2), inputs(), config=config).passed


# --- which documents are on ---------------------------------------------------------------------------------------------


def test_documents_may_be_left_in_any_order():
    one, two = lighthouse_fx.documents(NUMBERS), lighthouse_fx.documents(NUMBERS.flip(0))
    one.__enter__()
    two.__enter__()
    one.__exit__()
    assert stage.documents is two
    two.__exit__()
    assert stage.documents is None and not stage.packed

    def batches():
        for _ in range(3):
            with lighthouse_fx.documents(NUMBERS):
                yield

    for _ in zip(batches(), batches(), strict=False):
        assert stage.packed
    assert stage.documents is None


def test_documents_left_by_another_thread_stay_left():
    entered, leave = threading.Event(), threading.Event()

    def other():
        with lighthouse_fx.documents(NUMBERS.flip(0)):
            entered.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with lighthouse_fx.documents(NUMBERS):
        thread.start()
        entered.wait()
    leave.set()
    thread.join()
    assert stage.documents is None


@pytest.mark.parametrize("options", [{}, {"dense_layers": (0,)}])
def test_other_documents_around_a_recomputation_are_an_error_in_dense_layers_too(options):
    run, x = compiled(Model(1), "lighthouse", **options), inputs().requires_grad_()
    for first, second in ((NUMBERS, None), (None, NUMBERS), (NUMBERS, NUMBERS.flip(0))):
        with lighthouse_fx.documents(first) if first is not None else nullcontext():
            loss = checkpoint(run, x, use_reentrant=False).sum()
        recomputed = lighthouse_fx.documents(second) if second is not None else nullcontext()
        with recomputed, pytest.raises(RuntimeError, match="again under other documents"):
            loss.backward()


# --- any length ---------------------------------------------------------------------------------------------------------


LIGHTHOUSE, DENSE = ({}, lighthouse_inside), ({"dense_layers": (0,)}, dense_inside)


@pytest.mark.usefixtures("float64_through_inductor")
@pytest.mark.parametrize(
    "backend, dynamic, graphs, case",
    [
        (passes_only, True, 1, LIGHTHOUSE),
        (passes_only, None, 2, LIGHTHOUSE),
        (passes_only, None, 2, DENSE),
        ("lighthouse", True, 1, LIGHTHOUSE),
        ("lighthouse", None, 2, DENSE),
    ],
)
def test_documents_need_no_graph_per_length(backend, dynamic, graphs, case):
    (options, inside), model = case, Model(1).double()
    run = torch.compile(model, backend=backend, options=FIELDS | options, dynamic=dynamic)
    for tokens in range(64, 112, 8):
        numbers = torch.cat([numbered(10, tokens - 27, 17), numbered(tokens - 40, 40)])
        with lighthouse_fx.documents(numbers):
            assert_same_gradients(run, twin(model, inside(numbers)), inputs(tokens=tokens, dtype=torch.float64))
    assert len(lighthouse_fx.reports()) == graphs


@pytest.mark.parametrize("dynamic", [True, False])
def test_documents_of_another_shape_are_an_error(dynamic):
    run = torch.compile(Model(1), backend=passes_only, options=dict(FIELDS), dynamic=dynamic)
    for numbers, found in ((NUMBERS[:, :60], "[2, 60]"), (NUMBERS[:1], "[1, 64]")):
        with lighthouse_fx.documents(numbers), pytest.raises(ValueError) as error:
            run(inputs())
        assert f"documents of {found} tokens" in str(error.value) and "queries of [2, 64]" in str(error.value)
    with lighthouse_fx.documents(NUMBERS):
        run(inputs())
    assert lighthouse_fx.reports()[-1].rewritten == 1


def test_attention_on_part_of_the_tokens_beside_attention_on_all():
    """A head that predicts a token further on attends to one token less: documents fit the rest of the model only."""

    def attend(q, k, v):
        short = causal(q[:, :, :-1], k[:, :, :-1], v[:, :, :-1])
        return causal(q, k, v) + F.pad(short, (0, 0, 0, 1))

    run = torch.compile(Model(1, attend), backend=passes_only, options=dict(FIELDS), dynamic=True)
    with lighthouse_fx.documents(NUMBERS), pytest.warns(UserWarning, match="ignores it"):
        run(inputs())
    short, whole = lighthouse_fx.reports()[-1].calls
    assert whole.inside_documents and not short.rewritten and not short.inside_documents
