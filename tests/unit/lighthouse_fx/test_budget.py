"""`BudgetControl`: what is measured, which budgets follow, that they are what runs, and how many graphs that takes."""

import importlib
import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from small_models import (
    CONFIG,
    FIELDS,
    TOKENS,
    Model,
    assert_same_gradients,
    functional,
    gradients,
    inputs,
    twin,
)
from torch import nn

import lighthouse_fx
from lighthouse_fx import BudgetControl, LighthouseConfig, RunLog, TwoStage, backend, dense, pretraining
from lighthouse_fx.kernels import Pyramid
from lighthouse_fx.runtime import stage
from lighthouse_fx.training.run_file import read_run
from lighthouse_fx.training.score_entropy import EntropyProbe, head_entropies

TOPK = (2, 4, 8)
MIDDLE = LighthouseConfig(**FIELDS | {"topk": TOPK[1]})


@pytest.fixture(autouse=True)
def without_inductor(monkeypatch):
    """What Inductor makes of a graph is tested elsewhere, and takes long."""
    compile_fx = importlib.import_module("torch._inductor.compile_fx")  # the package has a function of that name
    for module in (compile_fx, backend):
        monkeypatch.setattr(module, "compile_fx", lambda gm, inputs, **options: gm)


def controlled(layers=4, model=None, **arguments):
    """A model whose first block is dense, and its control; by default its thresholds leave all blocks in the middle."""
    model = model or Model(layers)
    lighthouse_fx.compile(model, CONFIG, dense_layers=(0,))
    return model, BudgetControl(model, **{"topk": TOPK, "every": 2, "thresholds": (0.001, 0.9999999)} | arguments)


def train(model, budget, steps, log=None):
    """Losses and budgets of some steps of plain gradient descent; the batch is that of the step."""
    found = []
    for step in steps:
        torch.manual_seed(step)
        x = inputs()
        with pretraining(), budget.step(step, x):
            loss = (model(x) - x.roll(1, 1)).square().mean()
            loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
        found.append((loss.item(), tuple(budget.budgets.values())))
    return found


def moved_to(budget, *buckets):
    """Put the parts into buckets."""
    budget.load_state_dict(budget.state_dict() | {"buckets": dict(zip(budget.budgets, buckets, strict=True))})


# --- what is measured -------------------------------------------------------------------------------------------------


def brute_entropies(q, k, levels, pooling):
    """The definition, written out with loops and Python's floats: a mean for each key/value head."""
    batch, groups, length = k.shape[:3]
    norms = [x.double().norm(dim=-1).unflatten(1, (groups, -1)).amax(2).tolist() for x in (q, k)]
    found = []
    for g in range(groups):
        values = []
        for b, scores, level in itertools.product(range(batch), norms, range(1, levels)):
            width = pooling**level
            count = length // pooling ** (levels - 1) * pooling ** (levels - 1 - level)
            windows = [max(scores[b][g][i * width : (i + 1) * width]) for i in range(count)]
            shares = [s / sum(windows) for s in windows]
            values.append(-sum(p * math.log(p) for p in shares if p) / math.log(count))
        found.append(sum(values) / len(values))
    return found


@pytest.mark.parametrize("levels, pooling, length", [(3, 2, 67), (2, 4, 64), (4, 2, 33)])
def test_entropy_is_the_definition(levels, pooling, length):
    q, k = torch.randn(2, 4, length, 8), torch.randn(2, 2, length, 8)
    q[:, :2] *= torch.rand(length, 1) ** 4  # the first group's queries are more decided
    scores = [x.norm(dim=-1).unflatten(1, (2, -1)).amax(2) for x in (q, k)]
    found = head_entropies(*scores, Pyramid(length=length, levels=levels, pooling=pooling, topk=1)).tolist()
    assert found == pytest.approx(brute_entropies(q, k, levels, pooling), abs=1e-6)
    assert found[0] < found[1] < 1


def test_entropy_is_1_for_equal_scores_and_0_for_a_single_one():
    pyramid = Pyramid(length=64, levels=3, pooling=2, topk=1)
    equal, single = torch.full((2, 3, 64), 7.0), torch.zeros(2, 3, 64)
    single[..., 5] = 2.0
    assert head_entropies(equal, equal, pyramid).tolist() == pytest.approx([1] * 3)
    assert head_entropies(single, single, pyramid).tolist() == pytest.approx([0] * 3)
    # Once the token's level has a single window, that level says nothing.
    assert head_entropies(single[..., :4], equal[..., :4], Pyramid(length=4, levels=3, pooling=2, topk=1)).isnan().all()
    assert head_entropies(single, torch.full_like(single, torch.inf), pyramid).isnan().all()
    lowest = equal.index_fill(-1, torch.tensor([9]), torch.nan)
    assert head_entropies(lowest, equal, pyramid).tolist() == pytest.approx([1] * 3)  # its window has other tokens


def seen_by(attend):
    """An attention function that keeps the queries and keys it gets."""
    seen = []

    def attention(q, k, v):
        seen.append((q.detach(), k.detach()))
        return attend(q, k, v)

    return attention, seen


def test_each_head_is_measured_as_in_training():
    model, budget = controlled(3)
    attention, seen = seen_by(functional(MIDDLE))
    oracle = twin(model, attention)
    oracle.layers[0].attn.attend = model.layers[0].attn.attend  # dense
    x = inputs()
    with pretraining(), budget.step(0, x):
        pass
    oracle(x)
    (event,) = budget.events
    assert list(event.heads) == ["layers.1.attn", "layers.2.attn"]
    for heads, (q, k) in zip(event.heads.values(), seen, strict=True):
        assert heads == pytest.approx(brute_entropies(q, k, CONFIG.levels, CONFIG.pooling), abs=1e-6)
    means = [sum(heads) / len(heads) for heads in event.heads.values()]
    assert list(event.entropy.values()) == pytest.approx(means)


def test_documents_are_heeded():
    model, _ = controlled(3)
    numbers = torch.arange(TOKENS).div(20, rounding_mode="floor").expand(2, -1)

    def inside(q, k, v):
        return lighthouse_fx.lighthouse_attention(
            q, k, v, is_causal=True, enable_gqa=True, documents=numbers, config=MIDDLE
        )

    attention, seen = seen_by(inside)
    oracle = twin(model, attention)
    mask = (numbers[:, :, None] == numbers[:, None]).tril()[:, None]
    oracle.layers[0].attn.attend = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    x = inputs()
    with pretraining(), lighthouse_fx.documents(numbers):
        probe = EntropyProbe(model, LighthouseConfig(**FIELDS | {"topk": 4}, dense_layers=("layers.0",)))
        found = probe(x)
    oracle(x)
    for call, (q, k) in zip(found, seen, strict=True):
        assert call.heads == pytest.approx(brute_entropies(q, k, CONFIG.levels, CONFIG.pooling), abs=1e-6)
    assert [c.heads for c in probe(x)] != [c.heads for c in found]  # outside them it is another forward


def test_qk_norm_is_measured_before_the_norm():
    def normed(q, k, v):
        q, k = (F.rms_norm(x, x.shape[-1:]) for x in (q, k))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    model, budget = controlled(model=Model(2, normed))
    seen = []
    oracle = Model(2, lambda q, k, v: seen.append((q, k)) or normed(q, k, v))
    oracle.load_state_dict(model.state_dict())
    x = inputs()
    with pretraining(), budget.step(0, x), torch.no_grad():
        oracle(x)
    q, k = seen[1]
    (heads,) = budget.events[0].heads.values()
    assert heads == pytest.approx(brute_entropies(q, k, CONFIG.levels, CONFIG.pooling), abs=1e-6)
    assert max(heads) < 0.9999  # behind the norm all would be 1


def test_measuring_leaves_no_trace():
    class Dropping(Model):
        def forward(self, x):
            return F.dropout(super().forward(x), 0.5, self.training)

    model, budget = controlled(model=Dropping(2))
    model.layers[0].eval()
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    with pretraining(), budget.step(0, inputs(batch=1, tokens=TOKENS)):
        pass
    torch.manual_seed(3)
    x = inputs()
    state = torch.get_rng_state()
    with pretraining(), budget.step(2, x):
        assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(3), expected)
    assert len(budget.events) == 2
    assert model.training and not model.layers[0].training and all(p.grad is None for p in model.parameters())


# --- which budgets follow ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "before, entropy, after",
    [
        (1, 0.5, 1),
        (1, 0.805, 1), (1, 0.815, 2), (2, 0.805, 2), (2, 0.795, 2), (2, 0.785, 1),  # around the upper threshold
        (1, 0.395, 1), (1, 0.385, 0), (0, 0.395, 0), (0, 0.405, 0), (0, 0.415, 1),  # around the lower one
        (0, 0.9, 2), (2, 0.1, 0), (0, 0.1, 0), (2, 0.9, 2),
        (0, math.nan, 0), (1, math.nan, 1), (2, math.nan, 2),
    ],
)  # fmt: skip
def test_a_part_moves_only_when_it_is_beyond_the_margin(before, entropy, after):
    plan = BudgetControl(controlled()[0], topk=TOPK, thresholds=(0.4, 0.8), margin=0.01).plan
    assert plan.moved(before, entropy) == after


def test_more_decided_layers_get_less():
    model, budget = controlled(3)
    with torch.no_grad():
        model.layers[1].norm.weight.zero_()  # all queries are the bias, so all scores are equal
        model.layers[2].attn.project.weight *= 5  # far more than the bias
    x = inputs()
    with pretraining(), budget.step(0, x):
        pass
    same, decided = budget.events[0].entropy.values()
    assert same == pytest.approx(1) and decided < 0.9999
    budget = BudgetControl(model, topk=TOPK, every=1, thresholds=(decided + 1e-3, (1 + decided) / 2 + 1e-3), margin=0)
    with pretraining(), budget.step(1, x):
        pass
    assert budget.budgets == {"layers.1": 8, "layers.2": 2}
    assert budget.events[0].changed == ("layers.1", "layers.2")


def test_it_is_measured_when_it_is_due_and_on_the_first_micro_batch():
    _, budget = controlled(2, every=3, thresholds=(0.0001, 0.0002))
    found = []
    for step in range(8):
        for _ in range(2):
            with pretraining(), budget.step(step, inputs()):
                found.append(budget.budgets["layers.1"])
    assert [event.step for event in budget.events] == [0, 3, 6]
    assert found == [4] * 6 + [8] * 10
    assert [event.changed for event in budget.events] == [(), ("layers.1",), ()]


def test_scores_that_are_not_finite_change_nothing(tmp_path):
    _, budget = controlled(2, thresholds=(0.0001, 0.0002), log=RunLog(tmp_path / "run.jsonl"))
    with pretraining(), budget.step(2, inputs() * torch.nan):
        pass
    assert budget.budgets == {"layers.1": 4}
    assert read_run(tmp_path / "run.jsonl").named("budget")[0].more["entropy"] == {"layers.1": "nan"}


# --- that the budgets are what runs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [None, "inside"])
def test_loss_and_gradients_are_those_of_each_layers_own_topk(checkpointing):
    model, budget = controlled(model=Model(4, checkpointing=checkpointing).double())
    x = inputs(dtype=torch.float64)
    for buckets in ((2, 0, 1), (0, 0, 2)):
        moved_to(budget, *buckets)
        oracle = twin(model, None)
        for layer, bucket in zip(oracle.layers[1:], buckets, strict=True):
            layer.attn.attend = functional(LighthouseConfig(**FIELDS | {"topk": TOPK[bucket]}))
        with pretraining(), budget.step(1, x):
            assert_same_gradients(model, oracle, x, rtol=1e-10, atol=1e-12)


def test_a_checkpoint_that_runs_again_outside_is_an_error():
    model, budget = controlled(model=Model(2, checkpointing="inside"))
    moved_to(budget, 0)
    x = inputs()
    with pretraining(), budget.step(1, x):
        loss = model(x).sum()
    with pytest.raises(RuntimeError, match=r"call backward\(\) inside the same"):
        loss.backward()


def test_other_fields_of_the_stage_hold():
    model, budget = controlled(model=Model(2).double())
    x = inputs(dtype=torch.float64)
    moved_to(budget, 0)
    expected = LighthouseConfig(levels=2, pooling=4, topk=2)
    for on in (pretraining(levels=2, pooling=4, topk=5), pretraining(LighthouseConfig(levels=2, pooling=4))):
        oracle = twin(model, functional(expected))
        oracle.layers[0].attn.attend = model.layers[0].attn.attend
        with on, budget.step(1, x):
            assert_same_gradients(model, oracle, x, rtol=1e-10, atol=1e-12)


def test_outside_of_a_step_nothing_is_controlled():
    model, budget = controlled(2)
    moved_to(budget, 0)
    calls = [block._compiled_call_impl for block in model.layers]
    x = inputs()
    plain = gradients(model, x)[0]
    with pytest.raises(ZeroDivisionError), pretraining(), budget.step(1, x):
        assert not torch.equal(gradients(model, x)[0], plain)
        raise ZeroDivisionError
    assert [block._compiled_call_impl for block in model.layers] == calls and stage.key == "pretraining()"
    assert torch.equal(gradients(model, x)[0], plain)


def test_dense_stages_stay_dense_and_are_not_measured():
    model, budget = controlled(3)
    schedule = TwoStage(8, lighthouse_steps=5)
    kinds = []
    for _ in schedule:
        x = inputs()
        with schedule.stage(), budget.step(schedule.step, x), lighthouse_fx.runtime.journal.watch() as calls:
            model(x).sum().backward()
            kinds.append(sum(call.rewritten for call in calls))
            with dense(), lighthouse_fx.runtime.journal.watch() as inside:
                model(x)
            assert not any(call.rewritten for call in inside)
    assert kinds == [2] * 5 + [0] * 3
    assert [event.step for event in budget.events] == [0, 2, 4]


# --- graphs -----------------------------------------------------------------------------------------------------------


def test_there_are_no_more_graphs_than_buckets():
    model, budget = controlled(4)
    x = inputs()
    with pretraining(), budget.step(0, x):
        model(x).sum().backward()
    before = len(lighthouse_fx.reports())
    for buckets in itertools.product(range(3), repeat=3):
        moved_to(budget, *buckets)
        with pretraining(), budget.step(1, x), lighthouse_fx.runtime.journal.watch() as calls:
            model(x).sum().backward()
        expected = [Pyramid(length=TOKENS, **FIELDS | {"topk": TOPK[b]}).gathered for b in buckets]
        assert [call.gathered for call in calls if call.rewritten] == expected
    assert len(lighthouse_fx.reports()) == before + len(TOPK) - 1  # the middle one was there


def test_a_model_compiled_whole_has_one_budget_and_a_graph_for_each():
    model = Model(3)
    call = torch.compile(model, backend="lighthouse", options={**FIELDS, "dense_layers": (0,)})
    budget = BudgetControl(call, topk=TOPK, every=1, thresholds=(0.0001, 0.0002))
    x = inputs()
    gathered = []
    for bucket in (None, 0, 1, 2, 0, 1, 2):
        if bucket is not None:
            moved_to(budget, bucket)
        with pretraining(), budget.step(0, x), lighthouse_fx.runtime.journal.watch() as calls:
            call(x).sum().backward()
        gathered.append({c.gathered for c in calls if c.rewritten}.pop())
    assert len(lighthouse_fx.reports()) == 3 and len(set(gathered)) == 3
    assert list(budget.events[0].entropy) == [""] and len(budget.events[0].heads) == 2
    assert budget.budgets == {"": 8}


# --- a run ------------------------------------------------------------------------------------------------------------


def test_a_run_that_goes_on_from_a_checkpoint_is_the_same():
    torch.manual_seed(5)
    start = Model(3)
    arguments = {"every": 2, "margin": 0.0}
    model, budget = controlled(model=twin(start, None))
    with pretraining(), budget.step(0, inputs()):
        middle = sorted(budget.events[0].entropy.values())
    arguments["thresholds"] = (middle[0] - 1e-4, middle[1] + 1e-4)  # so close that budgets change while it trains

    model, budget = controlled(model=twin(start, None), **arguments)
    whole = train(model, budget, range(9))
    assert len({budgets for _, budgets in whole}) > 1
    for killed in (3, 4):  # before a measurement, and after it
        model, budget = controlled(model=twin(start, None), **arguments)
        first = train(model, budget, range(killed))
        saved = json.loads(json.dumps(budget.state_dict()))
        again, control = controlled(model=twin(model, None), **arguments)
        control.load_state_dict(saved)
        assert first + train(again, control, range(killed, 9)) == whole


def test_measurements_are_in_the_log(tmp_path):
    log = RunLog(tmp_path / "run.jsonl")
    model, budget = controlled(3, thresholds=(0.0001, 0.0002), log=log)
    train(model, budget, range(3))
    first, second = read_run(tmp_path / "run.jsonl").named("budget")
    assert (first.step, first.more["changed"], first.more["topk"]) == (0, [], {"layers.1": 4, "layers.2": 4})
    assert (second.step, second.more["changed"]) == (2, ["layers.1", "layers.2"])
    assert second.more["topk"] == {"layers.1": 8, "layers.2": 8} and "layers.1 4 -> 8" in second.text
    assert second.more["entropy"] == dict(budget.events[1].entropy)
    assert {name: len(heads) for name, heads in second.more["heads"].items()} == {"layers.1.attn": 2, "layers.2.attn": 2}


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"topk": 8}, "topk=8 is a int"),
        ({"topk": (8,)}, r"topk=\(8,\)"),
        ({"topk": (8, 4)}, r"topk=\(8, 4\): give 2 to 5 buckets, rising"),
        ({"topk": (1, 2, 3, 4, 5, 6)}, "give 2 to 5 buckets"),
        ({"topk": (0, 4)}, "topk=0"),
        ({"topk": (2.0, 4)}, "topk=2.0"),
        ({"topk": (2, 4)}, r"thresholds=None with 2 buckets in topk=\(2, 4\)"),
        ({"thresholds": (0.5,)}, r"thresholds=\(0.5,\): give 2"),
        ({"thresholds": (0.9, 0.5)}, "rising"),
        ({"thresholds": (0.5, 1.0)}, r"in \(0, 1\)"),
        ({"thresholds": ("a", 0.5)}, "give a tuple of numbers"),
        ({"every": 0}, "every=0"),
        ({"every": 1.5}, "every=1.5 is a float"),
        ({"margin": -1}, "margin=-1"),
        ({"margin": "wide"}, "margin='wide' is a str"),
    ],
)
def test_bad_arguments(arguments, says):
    model, _ = controlled(2)
    with pytest.raises((TypeError, ValueError), match=says):
        BudgetControl(model, **{"topk": TOPK} | arguments)


def with_replaced_block():
    model = Model(2)
    model.layers[1] = torch.compile(model.layers[1], backend="lighthouse", options=FIELDS)
    return model


def with_two_configs():
    model = Model(2)
    for layer, levels in zip(model.layers, (2, 3), strict=True):
        layer.compile(backend="lighthouse", options={**FIELDS, "levels": levels})
    return model


def with_quota():
    model = Model(1)
    model.layers[0].compile(backend="lighthouse", options={**FIELDS, "quota": 4})
    return model


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: "model", "model='model' is a str"),
        (lambda: nn.Linear(2, 2), "not compiled with backend='lighthouse'"),
        (with_replaced_block, r"compile it in place, layers.1.compile"),
        (with_two_configs, "2 different sets of options"),
        (with_quota, "quota=4 does not divide topk=2"),
    ],
)
def test_bad_models(make, says):
    with pytest.raises((TypeError, ValueError), match=says):
        BudgetControl(make(), topk=TOPK)


def test_a_bucket_that_would_stay_dense_is_an_error_before_the_first_step():
    _, budget = controlled(2, topk=(2, 4, 12))
    with pytest.raises(ValueError, match="largest gathers 64 of 64 tokens, more than max_kept"), pretraining():
        budget.step(0, inputs()).__enter__()


def test_a_model_without_rewritten_attention_is_an_error():
    _, budget = controlled(2)
    with pytest.raises(ValueError, match="fewer than one coarsest window"), pretraining():
        budget.step(0, inputs(tokens=3)).__enter__()


def test_a_stage_whose_quota_does_not_fit_is_an_error():
    _, budget = controlled(2)
    with pytest.raises(ValueError, match="quota=4 does not divide topk=2"), pretraining(topk=8, quota=4):
        budget.step(0, inputs()).__enter__()


@pytest.mark.parametrize("step", [-1, 1.0, True, None])
def test_a_step_that_is_none_is_an_error(step):
    with pytest.raises(ValueError, match=f"step={step}"):
        controlled(2)[1].step(step, inputs()).__enter__()


def test_steps_without_gradients_are_an_error():
    with torch.no_grad(), pytest.raises(RuntimeError, match="gradients are off"):
        controlled(2)[1].step(0, inputs()).__enter__()


@pytest.mark.parametrize(
    "change, says",
    [
        ({"every": 3}, r"state has {'every': 3}, and this control {'every': 2}"),
        ({"buckets": {"layers.7": 1}}, r"state has budgets of \['layers.7'\]"),
        (None, "state={} has no"),
    ],
)
def test_a_state_of_another_run_is_an_error(change, says):
    _, budget = controlled(2)
    with pytest.raises(ValueError, match=says):
        budget.load_state_dict({} if change is None else budget.state_dict() | change)
