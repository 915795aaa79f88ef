"""A graph runs under the conditions that it was compiled for: threads, filtered guards, changed options, checkpoints."""

import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from small_models import CONFIG, FIELDS, Model, functional, inputs, twin
from torch._dynamo.backends.debugging import aot_eager

import lighthouse_fx
from lighthouse_fx import RunLog, backend, dense, documents, pretraining
from lighthouse_fx.runtime import journal, stage


@pytest.fixture
def meanwhile(monkeypatch):
    """What another thread does, to its end, while this one compiles; Inductor is left out."""
    waiting = []

    def compile_fx(gm, example_inputs, config_patches=None):
        while waiting:
            thread = threading.Thread(target=waiting.pop())
            thread.start()
            thread.join()
        return aot_eager(gm, example_inputs)

    monkeypatch.setattr(backend, "compile_fx", compile_fx)
    return waiting


def attend(x):
    return F.scaled_dot_product_attention(x, x, x, is_causal=True)


def sparse(x, **fields):
    config = lighthouse_fx.LighthouseConfig(**(FIELDS | fields))
    return lighthouse_fx.lighthouse_attention(x, x, x, is_causal=True, config=config)


def rows(batch=1):
    return torch.randn(batch, 2, 64, 16, requires_grad=True)


def compiled_attention(**arguments):
    return torch.compile(attend, backend="lighthouse", options=dict(FIELDS), **arguments)


# --- threads ----------------------------------------------------------------------------------------------------------


def test_a_graph_belongs_to_the_stage_that_its_passes_saw(meanwhile):
    run, x, other = compiled_attention(), rows(), dense()
    other.__enter__()
    meanwhile.append(lambda: other.__exit__(None, None, None))
    torch.testing.assert_close(run(x), attend(x))
    torch.testing.assert_close(run(x), sparse(x))
    with dense():
        torch.testing.assert_close(run(x), attend(x))
    assert [report.rewritten for report in lighthouse_fx.reports()] == [0, 1]


def test_documents_entered_by_another_thread_are_those_of_the_next_graph(meanwhile):
    run, x, packed = compiled_attention(), rows(), documents(torch.arange(64)[None] // 16)
    meanwhile.append(packed.__enter__)
    torch.testing.assert_close(run(x), sparse(x))
    inside = lighthouse_fx.lighthouse_attention(x, x, x, is_causal=True, config=CONFIG, documents=torch.arange(64)[None] // 16)
    try:
        torch.testing.assert_close(run(x), inside)
    finally:
        packed.__exit__()


def test_a_stage_may_be_entered_while_another_thread_compiles(meanwhile):
    seen = []

    def evaluate():
        with dense(), documents(torch.zeros(1, 64, dtype=torch.int64)):
            seen.append(stage.current.kind)

    meanwhile.append(evaluate)
    compiled_attention()(rows())
    assert seen == ["dense"]


def test_calls_are_watched_by_thread(meanwhile, tmp_path):
    x, run = rows(), compiled_attention()
    run(x)
    thread = threading.Thread(target=lambda: run(x))
    with RunLog(tmp_path / "run.jsonl") as log, log.step(0) as step, journal.watch() as calls:
        thread.start()
        thread.join()
        assert not calls and not step._calls
        run(x)
        assert len(calls) == 1 and len(step._calls) == 1


# --- guards that are left out -----------------------------------------------------------------------------------------


def without_guards(guards):
    return [False for _ in guards]


def unguarded(model):
    return torch.compile(model, backend="lighthouse", options=dict(FIELDS, guard_filter_fn=without_guards))


def test_another_stage_without_guards_is_refused(meanwhile):
    run, x = torch.compile(attend, backend="lighthouse", options=dict(FIELDS, guard_filter_fn=without_guards)), rows()
    torch.testing.assert_close(run(x), sparse(x))
    with dense(), pytest.raises(RuntimeError, match=r"for the stage pretraining\(\), and runs in the stage dense\(\)"):
        run(x)
    with pretraining(topk=16), pytest.raises(RuntimeError, match="guard_filter_fn"):
        run(x)
    torch.testing.assert_close(run(x), sparse(x))


def test_another_mode_without_guards_is_refused(meanwhile):
    model, x = Model(1), inputs()
    run = unguarded(model)
    torch.testing.assert_close(run(x), twin(model, functional())(x))
    model.eval()
    with pytest.raises(RuntimeError, match="in train mode, and runs in eval mode"):
        run(x)
    model.train()
    torch.testing.assert_close(run(x), twin(model, functional())(x))


def test_an_eval_graph_without_guards_is_refused_in_training(meanwhile):
    model, x = Model(1).eval(), inputs()
    run = unguarded(model)
    torch.testing.assert_close(run(x), model(x))
    model.train()
    with pytest.raises(RuntimeError, match="in eval mode, and runs in train mode"):
        run(x)


def test_documents_without_guards_are_refused(meanwhile):
    run, x = torch.compile(attend, backend="lighthouse", options=dict(FIELDS, guard_filter_fn=without_guards)), rows()
    run(x)
    with documents(torch.arange(64)[None] // 16), pytest.raises(RuntimeError, match=r"outside documents\(\), and runs inside"):
        run(x)


def test_guards_that_are_not_evaluated(meanwhile):
    run, x = compiled_attention(), rows()
    run(x)
    with torch.compiler.set_stance(skip_guard_eval_unsafe=True):
        torch.testing.assert_close(run(x), sparse(x))
        with dense(), pytest.raises(RuntimeError, match="skip_guard_eval_unsafe"):
            run(x)
    with dense():
        torch.testing.assert_close(run(x), attend(x))


def test_blocks_that_share_a_graph_have_modes_of_their_own(meanwhile):
    model, x = Model(2), inputs()
    model.layers[1].eval()
    lighthouse_fx.compile(model, CONFIG, dense_layers=(), strict=False)
    oracle = twin(model, functional())
    oracle.layers[1].attn.attend = model.layers[1].attn.attend
    for _ in range(2):
        torch.testing.assert_close(model(x), oracle(x))


# --- options ----------------------------------------------------------------------------------------------------------


def test_options_are_those_of_the_first_compilation(meanwhile):
    options = dict(FIELDS)
    first = torch.compile(attend, backend="lighthouse", options=options)
    first(rows())
    options["topk"] = 4
    second = torch.compile(attend, backend="lighthouse", options=options)
    x = rows(batch=3)
    torch.testing.assert_close(second(x), sparse(x, topk=4))
    torch.testing.assert_close(first(x), sparse(x))
    assert options == FIELDS | {"topk": 4}


# --- activation checkpoints that are not torch's ----------------------------------------------------------------------


class OwnCheckpoint(torch.autograd.Function):
    """Runs a part without gradients, and again with them in the backward, as unsloth, DeepSpeed, Megatron and fairscale do."""

    @staticmethod
    def forward(ctx, part, x):
        ctx.part = part
        ctx.save_for_backward(x)
        return part(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            out = ctx.part(x)
        return None, torch.autograd.grad(out, x, grad)[0]


def test_a_checkpoint_of_ones_own_is_refused(meanwhile):
    run, x = compiled_attention(), rows()
    for _ in range(2):
        out = OwnCheckpoint.apply(run, x)
        with pytest.raises(RuntimeError, match=r"inside a backward pass.*use_reentrant=False"):
            out.sum().backward()


def test_a_checkpoint_of_ones_own_around_blocks_is_refused(meanwhile):
    model = lighthouse_fx.compile(Model(3), CONFIG, dense_layers=(0,))
    x = model.layers[0](inputs())
    with pytest.raises(RuntimeError, match="inside a backward pass"):
        OwnCheckpoint.apply(model.layers[1], x).sum().backward()


def test_a_dense_checkpoint_of_ones_own_is_as_it_is(meanwhile):
    run, x = compiled_attention(), rows()
    with dense():
        found = torch.autograd.grad(OwnCheckpoint.apply(run, x).square().sum(), x)[0]
    torch.testing.assert_close(found, torch.autograd.grad(attend(x).square().sum(), x)[0])


def test_a_training_step_inside_a_backward_hook_is_refused_with_its_remedy(meanwhile):
    run, x = compiled_attention(), rows()
    run(x)
    y = x * 1
    y.register_hook(lambda grad: run(rows()).sum() * 0 + grad)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="inside a backward pass"):
        y.register_hook(lambda grad: torch.enable_grad()(run)(rows()).sum() * 0 + grad)
        y.sum().backward()


def test_torchs_own_checkpoint_around_one_of_ones_own_is_told_apart(meanwhile):
    run, x = compiled_attention(), rows()
    out = torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False)
    found = torch.autograd.grad(out.square().sum(), x)[0]
    torch.testing.assert_close(found, torch.autograd.grad(sparse(x).square().sum(), x)[0])


def test_a_pass_without_gradients_and_then_one_with_is_warned_of(meanwhile):
    model, x = Model(1), inputs()
    run = torch.compile(model, backend="lighthouse", options=FIELDS)
    with torch.no_grad():
        run(x)
    with pytest.warns(RuntimeWarning, match="GradCache"):
        run(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(x)  # said once
        model.eval()
        with torch.no_grad():
            run(x)
        model.train()
        run(x)  # an evaluation is no such pass
        with dense(), torch.no_grad():
            run(x)
        with torch.inference_mode():
            run(x)
        run(x)
