"""`TwoStage`: stages by step, resuming after a real kill, and everything that it refuses."""

import json
import math
import signal
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import killed_run
import pytest
import torch
from small_models import CONFIG, FIELDS, Model, assert_same_gradients, functional, inputs, passes_only, twin

import lighthouse_fx
from lighthouse_fx import LighthouseConfig, StageEvent, TwoStage
from lighthouse_fx.runtime import stage
from lighthouse_fx.training import saved_config
from lighthouse_fx.training.saved_config import DEFAULTS_0_1_0

SCRIPT = Path(killed_run.__file__)


def kinds(schedule, micro=1):
    """The stage of each step that is left."""
    found = []
    for _ in schedule:
        for _ in range(micro):
            with schedule.stage():
                found.append(stage.current.kind)
    return found


# --- stages by step ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how, expected",
    [({"fraction": 0.625}, 5), ({"lighthouse_steps": 3}, 3), ({"fraction": 0}, 0), ({"lighthouse_steps": 0}, 0), ({}, 4)],
)
def test_the_stage_follows_from_the_step(how, expected):
    schedule = TwoStage(8, **how)
    assert schedule.lighthouse_steps == expected
    assert [schedule.is_dense(step) for step in range(8)] == [False] * expected + [True] * (8 - expected)
    assert kinds(schedule) == ["pretraining"] * expected + ["dense"] * (8 - expected)
    assert schedule.finished and list(schedule) == []


def test_micro_batches_are_in_the_stage_of_their_step():
    assert kinds(TwoStage(4, lighthouse_steps=3), micro=3) == ["pretraining"] * 9 + ["dense"] * 3


def test_one_model_is_switched_and_recompiles_once():
    model = Model(1).double()
    oracles = {False: twin(model, functional()), True: twin(model, None)}
    run = torch.compile(model, backend=passes_only, options=FIELDS)
    schedule = TwoStage(6, lighthouse_steps=3)
    x = inputs(dtype=torch.float64)
    before = len(lighthouse_fx.reports())
    for step in schedule:
        with schedule.stage():
            assert_same_gradients(run, oracles[schedule.is_dense()], x, rtol=1e-10, atol=1e-12)
        assert [r.rewritten for r in lighthouse_fx.reports()[before:]] == [1, 0][: 1 + (step >= 3)]


def test_a_schedule_may_bring_stage_1s_config():
    model = Model(1).double()
    run = torch.compile(model, backend=passes_only)  # whose own options keep so short a sequence dense
    schedule = TwoStage(2, lighthouse_steps=1, config=CONFIG)
    for step, attend in ((0, functional()), (1, None)):
        with schedule.stage(step):
            assert_same_gradients(run, twin(model, attend), inputs(dtype=torch.float64), rtol=1e-10, atol=1e-12)
        assert lighthouse_fx.reports()[-1].rewritten == 1 - step


def test_evaluation_in_stage_1_is_dense():
    model = Model(1)
    run = torch.compile(model, backend=passes_only, options=FIELDS)
    schedule = TwoStage(2, lighthouse_steps=1)
    for _ in schedule:
        with schedule.stage():
            run(inputs()).sum().backward()
            x = inputs()
            model.eval()
            with torch.no_grad():
                torch.testing.assert_close(run(x), model(x), rtol=0, atol=0)
            model.train()
        break


def test_a_loop_that_counts_for_itself():
    schedule = TwoStage(6, lighthouse_steps=3)
    found = []
    for step in (0, 0, 1, 2, 3, 3, 5):  # micro-batches; a step that is left out
        with schedule.stage(step):
            found.append(stage.current.kind)
        assert schedule.step == step
    assert found == ["pretraining"] * 4 + ["dense"] * 3


def test_as_a_decorator_the_step_is_that_of_each_call():
    schedule = TwoStage(3, lighthouse_steps=2)

    @schedule.stage()
    def train():
        return stage.current.kind

    assert [train() for _ in schedule] == ["pretraining", "pretraining", "dense"]
    with pytest.raises(RuntimeError, match="does not know the step"):
        train()


def test_a_context_cannot_be_kept_for_another_step():
    schedule = TwoStage(3, lighthouse_steps=1)
    for _ in schedule:
        context = schedule.stage()
        with context:
            pass
        with pytest.raises((RuntimeError, AttributeError)), context:
            pytest.fail("the stage of an earlier step was entered")
        break


def test_the_stage_ends_with_an_exception():
    schedule = TwoStage(2, lighthouse_steps=1)
    with pytest.raises(ZeroDivisionError), schedule.stage(1):
        raise ZeroDivisionError
    assert stage.current.kind == "default"


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_a_resumed_loop_goes_on_at_the_next_step():
    for killed_at in range(7):
        first = TwoStage(6, lighthouse_steps=3)
        saved = first.state_dict()
        for step in first:
            if step == killed_at:
                break
            with first.stage():
                pass
            first.finish(1.0)
            saved = first.state_dict()
        again = TwoStage(6, fraction=0.5)
        if killed_at < 6:
            again.load_state_dict(saved)
        else:
            with pytest.warns(RuntimeWarning, match="finished run"):
                again.load_state_dict(saved)
        assert again.step == killed_at
        assert kinds(again) == ["pretraining"] * max(0, 3 - killed_at) + ["dense"] * min(3, 6 - killed_at)


def test_a_state_survives_json_and_weights_only_loading(tmp_path):
    schedule = TwoStage(4, lighthouse_steps=2)
    for _ in schedule:
        schedule.finish(2.5)
        break
    torch.save(schedule.state_dict(), tmp_path / "state.pt")
    for state in (json.loads(json.dumps(schedule.state_dict())), torch.load(tmp_path / "state.pt", weights_only=True)):
        assert state == schedule.state_dict()


def test_saving_inside_a_step_is_refused_until_it_is_finished():
    schedule = TwoStage(4, lighthouse_steps=2)
    for _ in schedule:
        schedule.state_dict()  # nothing of the step has happened
        with schedule.stage():
            pass
        with pytest.raises(RuntimeError, match=r"finish\(\) after optimizer.step\(\)"):
            schedule.state_dict()
        schedule.finish()
        assert schedule.state_dict()["step"] == 1
        break
    with schedule.stage(1):
        pass
    with pytest.raises(RuntimeError, match="a new loop begins"):
        next(iter(schedule))
    schedule.seek(1)
    assert schedule.state_dict()["step"] == 1


def test_going_back_to_a_checkpoint_inside_the_loop():
    schedule = TwoStage(4, lighthouse_steps=2)
    saved, steps = schedule.state_dict(), []
    for step in schedule:
        steps.append(step)
        with schedule.stage():
            pass
        if steps == [0, 1, 2]:
            schedule.load_state_dict(saved)
    assert steps == [0, 1, 2, 0, 1, 2, 3]


@pytest.mark.slow
def test_killed_runs_go_on_with_identical_losses(tmp_path):
    """SIGKILL in stage 1 before the optimiser's step, exactly at the switch, and in stage 2 before a step is saved."""
    (tmp_path / "whole").mkdir()
    killed_run.main(tmp_path / "whole")
    whole = (tmp_path / "whole" / "losses").read_text().splitlines()
    assert [line.split()[:2] for line in whole] == [
        [str(step), "pretraining" if step < 4 else "dense"] for step in range(8)
    ]
    assert len({line.split()[2] for line in whole}) == 8
    for where, step in (("backward", 2), ("saved", 3), ("stepped", 4)):
        assert run(tmp_path / "killed", where, step) == -signal.SIGKILL
    assert run(tmp_path / "killed") == 0
    lines = (tmp_path / "killed" / "losses").read_text().splitlines()
    assert [int(line.split()[0]) for line in lines] == [0, 1, 2, 3, 4, 4, 5, 6, 7]
    assert lines == [whole[int(line.split()[0])] for line in lines]


def run(folder, *kill):
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-W", "ignore", str(SCRIPT), str(folder), *map(str, kill)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


# --- loss and learning rate -------------------------------------------------------------------------------------------


def watched(losses, switch=4, **arguments):
    told = []
    schedule = TwoStage(len(losses), lighthouse_steps=switch, on_event=told.append, **arguments)
    for step in schedule:
        with schedule.stage():
            pass
        schedule.finish(losses[step])
    return told


def test_jump_and_recovery():
    told = watched([9.0, 4.0, 2.0, 2.0, 5.0, 3.0, 1.0, 2.5, 1.0, 9.0], window=2)
    assert [(event.kind, event.step) for event in told] == [
        ("switch", 4),
        ("jump", 4),
        ("recovered", 6),
        ("finished", 9),
    ]
    assert [event.level for event in told[:3]] == [2.0, 2.0, 2.0]
    assert told[1].loss == 5.0 and "+3.0000" in told[1].message
    assert "3 steps after it" in told[2].message and "highest was 5.0000" in told[2].message


def test_one_low_loss_is_no_recovery():
    told = watched([2.0, 2.0, 2.0, 2.0, 1.9, 3.0, 3.0, 1.9], window=2)
    assert [event.kind for event in told] == ["switch", "jump", "finished"]
    assert "has not come back to 2.0000" in told[-1].message


def test_losses_that_are_not_finite_take_no_part():
    told = watched([2.0, math.nan, math.inf, 2.0, 3.0, math.nan, 1.0], window=2)
    assert [(event.kind, event.step) for event in told] == [
        ("switch", 4),
        ("jump", 4),
        ("recovered", 6),
        ("finished", 6),
    ]


def test_a_resumed_run_tells_the_same():
    losses = [2.0, 2.0, 2.0, 2.0, 5.0, 3.0, 1.0, 3.0]
    for killed_at in range(1, 8):
        told = []
        arguments = {"lighthouse_steps": 4, "window": 2, "on_event": told.append}
        schedule = TwoStage(8, **arguments)
        for step in schedule:
            if step == killed_at:
                again = TwoStage(8, **arguments)
                again.load_state_dict(schedule.state_dict())
                break
            with schedule.stage():
                pass
            schedule.finish(torch.tensor(losses[step], requires_grad=True))
        for step in again:
            with again.stage():
                pass
            again.finish(losses[step])
        assert told == watched(losses, window=2)


def test_events_go_to_the_log(caplog):
    with caplog.at_level("INFO", logger="lighthouse_fx"):
        watched([1.0, 1.0], switch=1)
    assert "step 1: dense attention from here on, the loss so far is 1.0000" in caplog.text
    assert "all 2 steps are done" in caplog.text


def test_events_are_values():
    (event, *_) = watched([1.0, 1.0], switch=1)
    assert isinstance(event, StageEvent)
    with pytest.raises(AttributeError):
        event.kind = "other"


def test_the_learning_rate_is_warmed_up_again_after_the_switch():
    schedule = TwoStage(10, lighthouse_steps=4, rewarm_steps=4)
    assert [schedule.lr_factor(step) for step in range(10)] == [1, 1, 1, 1, 0.25, 0.5, 0.75, 1, 1, 1]
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    plan = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)  # it computes each rate from the last
    twin_optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    twin_plan = torch.optim.lr_scheduler.CosineAnnealingLR(twin_optimizer, 10)
    for step in schedule:
        rate = optimizer.param_groups[0]["lr"]
        assert rate == twin_optimizer.param_groups[0]["lr"]
        weight.grad, before = torch.ones(()), weight.item()
        with schedule.rewarmed(optimizer):
            optimizer.step()
        assert before - weight.item() == pytest.approx(rate * schedule.lr_factor(step), rel=1e-5)
        twin_optimizer.step()
        plan.step(), twin_plan.step()


def test_the_learning_rate_is_left_alone_by_default():
    schedule = TwoStage(4, lighthouse_steps=2)
    assert [schedule.lr_factor(step) for step in range(4)] == [1, 1, 1, 1]
    assert TwoStage(4, lighthouse_steps=0, rewarm_steps=3).lr_factor(0) == 1  # nothing is switched


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_evaluation_is_no_training_step(off):
    schedule = TwoStage(2, lighthouse_steps=1)
    with off(), pytest.raises(RuntimeError, match="gradients are off"), schedule.stage(0):
        pytest.fail("a stage was entered")
    assert stage.current.kind == "default"


@pytest.mark.parametrize(
    "steps, says",
    [
        ([0, 1, 0], "step=0 comes after step 1: .*not in an epoch"),
        ([4], "step=4 does not belong to this plan, 0 to 3: the run is over.*use no TwoStage"),
        ([-1], "step=-1"),
        ([1.0], "step=1.0 is a float"),
    ],
)
def test_steps_that_are_none_of_the_plans(steps, says):
    schedule = TwoStage(4, lighthouse_steps=2)
    with pytest.raises((TypeError, ValueError), match=says):
        for step in steps:
            with schedule.stage(step):
                pass


def test_a_loop_that_gives_no_step_is_refused():
    # It would stay in step 0, under Lighthouse, for ever.
    with pytest.raises(RuntimeError, match=r"schedule.stage\(step\)"), TwoStage(4, lighthouse_steps=2).stage():
        pytest.fail("a stage was entered")


def test_a_finished_run_is_not_trained_on():
    finished = TwoStage(4, lighthouse_steps=2)
    kinds(finished)
    with pytest.raises(ValueError, match=r"all done.*use no TwoStage"):
        TwoStage(10, lighthouse_steps=8).load_state_dict(finished.state_dict())
    with pytest.raises(ValueError, match="the run is over"), finished.stage(4):
        pytest.fail("a stage was entered")


def test_a_state_of_another_plan_is_refused():
    saved = TwoStage(4, lighthouse_steps=2).state_dict()
    with pytest.raises(ValueError, match=r"'lighthouse_steps': 2.*'lighthouse_steps': 3.*seek"):
        TwoStage(4, lighthouse_steps=3).load_state_dict(saved)
    with pytest.raises(ValueError, match="has no"):
        TwoStage(4, lighthouse_steps=3).load_state_dict({"step": 3})


def test_a_run_that_ends_under_lighthouse_is_warned_of():
    with pytest.warns(RuntimeWarning, match="never trains under the dense attention"):
        TwoStage(4, fraction=1.0)


def test_a_step_is_finished_once():
    schedule = TwoStage(4, lighthouse_steps=2)
    with pytest.raises(RuntimeError, match="ends no step"):
        schedule.finish()
    for _ in schedule:
        schedule.finish()
        with pytest.raises(RuntimeError, match="ends no step"):
            schedule.finish()
        break


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"total_steps": 0, "fraction": 0.5}, "total_steps=0"),
        ({"total_steps": 4.0, "fraction": 0.5}, "total_steps=4.0 is a float"),
        ({"total_steps": 4, "lighthouse_steps": 2, "fraction": 0.5}, "give one"),
        ({"total_steps": 4, "lighthouse_steps": 5}, "lighthouse_steps=5 is more than total_steps=4"),
        ({"total_steps": 4, "lighthouse_steps": True}, "lighthouse_steps=True"),
        ({"total_steps": 4, "fraction": 1.5}, "fraction=1.5"),
        ({"total_steps": 4, "fraction": 0.1}, "fraction=0.1 of total_steps=4 is no whole step"),
        ({"total_steps": 4, "fraction": math.nan}, "fraction=nan"),
        ({"total_steps": 4, "fraction": "half"}, "fraction='half'"),
        ({"total_steps": 4, "fraction": 0.5, "rewarm_steps": -1}, "rewarm_steps=-1"),
        ({"total_steps": 4, "fraction": 0.5, "window": 0}, "window=0"),
        ({"total_steps": 4, "fraction": 0.5, "config": {"topk": 8}}, "give a LighthouseConfig"),
    ],
)
def test_bad_arguments(arguments, says):
    with pytest.raises((TypeError, ValueError), match=says):
        TwoStage(**arguments)
    with pytest.raises(ValueError, match="step=5 is beyond"):
        TwoStage(4, fraction=0.5).seek(5)


def test_a_checkpoint_under_another_pyramid_is_an_error():
    saved = json.loads(json.dumps(TwoStage(8, config=CONFIG).state_dict()))
    TwoStage(8, config=CONFIG).load_state_dict(saved)
    TwoStage(8).load_state_dict(saved)  # the model's own options, which may be the same
    with pytest.raises(ValueError, match=r"state is of a run under LighthouseConfig\(.*and this plan has.*schedule\.seek"):
        TwoStage(8, config=replace(CONFIG, topk=CONFIG.topk + 4)).load_state_dict(saved)


def test_a_plan_without_a_config_takes_that_of_the_state():
    begun, resumed = TwoStage(8, config=CONFIG), TwoStage(8)
    resumed.load_state_dict(begun.state_dict())
    assert resumed.config == CONFIG


def test_a_config_given_to_a_run_without_one_is_an_error():
    with pytest.raises(ValueError, match=r"the compiled model's own options, and this plan has config=.*leave it out"):
        TwoStage(8, config=CONFIG).load_state_dict(TwoStage(8).state_dict())


# --- states of other versions, and damaged ones -----------------------------------------------------------------------

# As 0.1.0 wrote them, letter by letter.
OF_0_1_0 = {
    "total_steps": 8,
    "lighthouse_steps": 4,
    "rewarm_steps": 0,
    "config": {
        "levels": 3, "pooling": 4, "topk": 1536, "quota": None, "keep_first": True, "scorer": "norm", "dilation": 64,
        "max_kept": 0.75, "kernel": "auto", "max_documents": 256, "dense_layers": (), "assume_causal": False,
    },
    "step": 2,
    "recovery": {"before": [5.0, 4.5], "after": [], "peak": None, "recovered": None},
}  # fmt: skip
ADDED = {"causal_selection": False, "local_window": 0}  # fields that are newer, and what attention was before them
NAMES = [field.name for field in fields(LighthouseConfig)]


def published():
    added = {name: value for name, value in ADDED.items() if name in NAMES}
    return LighthouseConfig(**OF_0_1_0["config"], **added)


def test_every_newer_field_says_what_attention_was_before_it():
    assert set(NAMES) - set(DEFAULTS_0_1_0) <= set(ADDED), "say in saved_config what a state without the field means"
    assert DEFAULTS_0_1_0.keys() == OF_0_1_0["config"].keys()


def test_a_state_of_0_1_0_resumes_in_the_published_form():
    schedule = TwoStage(8)
    schedule.load_state_dict(OF_0_1_0)
    assert schedule.step == 2 and schedule.config == published()
    TwoStage(8, config=published()).load_state_dict(OF_0_1_0)


def test_a_state_of_0_1_0_under_a_newer_field_is_refused(monkeypatch):
    """As with the default of a field that says something else than attention did then."""
    monkeypatch.setattr(saved_config, "_BEFORE", ADDED | {"keep_first": False})
    older = {name: value for name, value in OF_0_1_0["config"].items() if name != "keep_first"}
    with pytest.raises(ValueError, match=r"state is of a run under .*keep_first=False.*seek"):
        TwoStage(8, config=published()).load_state_dict(OF_0_1_0 | {"config": older})


def test_a_state_that_rests_on_other_defaults_is_refused_in_stage_1():
    now = asdict(LighthouseConfig())
    state = TwoStage(8).state_dict() | {"defaults": now | {"pooling": 8}, "version": "0.0.9"}
    with pytest.raises(ValueError, match=r"lighthouse-fx 0.0.9, and defaults have changed since: pooling was 8 and is 4.*seek"):
        TwoStage(8).load_state_dict(state)
    schedule = TwoStage(8)
    schedule.load_state_dict(state | {"step": 4})
    assert schedule.step == 4, "what is left is dense"


def test_a_state_of_0_1_0_without_a_config_resumes_only_under_the_defaults_of_then():
    state = OF_0_1_0 | {"config": None}
    then = LighthouseConfig(**DEFAULTS_0_1_0, **{name: ADDED[name] for name in ADDED if name in NAMES})
    schedule = TwoStage(8)
    if then == LighthouseConfig():
        schedule.load_state_dict(state)
        assert schedule.step == 2
    else:
        with pytest.raises(ValueError, match=r"lighthouse-fx 0\.1\.0, and defaults have changed since"):
            schedule.load_state_dict(state)
        assert schedule.step == 0


def test_a_state_holds_the_version_and_every_field():
    state = TwoStage(8, config=CONFIG).state_dict()
    assert state["version"] == lighthouse_fx.__version__
    assert state["config"].keys() == state["defaults"].keys() == set(NAMES)
    with pytest.raises(ValueError, match=r"state\['config'\] has unheard_of, which this version does not know"):
        TwoStage(8).load_state_dict(state | {"config": state["config"] | {"unheard_of": 1}})


@pytest.mark.parametrize(
    "path, value, says",
    [
        ([], [1], "state="),
        (["step"], "2", r"state\['step'\]='2' is a str"),
        (["step"], -1, r"state\['step'\]=-1"),
        (["step"], 9, r"state\['step'\]=9 is beyond"),
        (["total_steps"], None, r"state\['total_steps'\]=None"),
        (["lighthouse_steps"], 1.5, r"state\['lighthouse_steps'\]=1.5"),
        (["recovery"], None, r"state\['recovery'\]=None"),
        (["recovery"], {}, r"state\['recovery'\] has no 'before'"),
        (["recovery", "before"], ["x"], r"state\['recovery'\]\['before'\]=\['x'\] is damaged"),
        (["recovery", "after"], 3, r"state\['recovery'\]\['after'\]=3"),
        (["recovery", "peak"], "high", r"state\['recovery'\]\['peak'\]='high'"),
        (["recovery", "recovered"], 1.5, r"state\['recovery'\]\['recovered'\]=1.5"),
        (["config"], 7, r"state\['config'\]=7"),
        (["config", "topk"], "many", r"state\['config'\] is damaged: topk='many'"),
        (["config"], {"levels": 3}, r"state\['config'\] has no pooling"),
        (["defaults"], [], r"state\['defaults'\]=\[\]"),
    ],
)
def test_a_damaged_state_is_an_error_that_names_the_field(path, value, says):
    state = json.loads(json.dumps(TwoStage(8, config=None if path == ["defaults"] else CONFIG).state_dict()))
    schedule = TwoStage(8)
    place = state
    for name in path[:-1]:
        place = place[name]
    if path:
        place[path[-1]] = value
    with pytest.raises((TypeError, ValueError), match=says):
        schedule.load_state_dict(state if path else value)
    assert schedule.step == 0 and schedule.config is None, "nothing of it was taken"
