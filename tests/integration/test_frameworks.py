"""Training frameworks: the examples run as they stand, and each step of each is in its stage, also after resuming.

What Inductor makes of a graph is tested elsewhere and takes a minute for each example here, so graphs run as the passes left
them. Everything else is the framework's own: its loop, its checkpoints, its compile call.
"""

import importlib
import json
import os
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch

import lighthouse_fx.backend
from lighthouse_fx import TwoStage
from lighthouse_fx.runtime import journal, stage

FOLDER = Path(__file__).parents[2] / "examples" / "frameworks"
LIGHTHOUSE, DENSE = "Lighthouse", "dense"


@pytest.fixture(autouse=True)
def without_inductor(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    compile_fx = importlib.import_module("torch._inductor.compile_fx")  # the package has a function of that name
    for module in (compile_fx, lighthouse_fx.backend):
        monkeypatch.setattr(module, "compile_fx", lambda gm, inputs, **options: gm)


@pytest.fixture(autouse=True)
def no_compilation_by_accelerate(monkeypatch):
    """TrainingArguments(torch_compile=True) asks Accelerate to compile, by the environment, in all later tests as well."""
    before = {name for name in os.environ if name.startswith("ACCELERATE_DYNAMO_")}
    for name in before:
        monkeypatch.delenv(name)
    yield
    for name in [name for name in os.environ if name.startswith("ACCELERATE_DYNAMO_")]:
        del os.environ[name]


@pytest.fixture
def example(monkeypatch, tmp_path):
    """Runs an example; returns its variables, and what the attention calls with gradients that were to be rewritten did."""

    def run(name, folder=tmp_path):
        torch._dynamo.reset()
        monkeypatch.setattr(sys, "argv", [name, str(folder)])
        with journal.watch() as calls:
            found = runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        reasons = [LIGHTHOUSE if call.rewritten else call.reason for call in calls if "excluded" not in call.reason]
        return found, [DENSE if "dense stage" in reason else reason for reason in reasons if "gradients" not in reason]

    return run


def losses(printed):
    """Of `step 3: loss 1.2345` lines, by step."""
    lines = (line.split() for line in printed.splitlines() if line.startswith("step") and len(line.split()) == 4)
    return {int(step.rstrip(":")): loss for _, step, _, loss in lines}


def after(done):
    """The schedule's state in a checkpoint after some steps."""
    schedule = TwoStage(6)
    for step in schedule:
        schedule.finish()
        if step + 1 == done:
            return schedule.state_dict()


def without_frameworks(names):
    return [pytest.importorskip(name, reason=f"{name} is not installed") for name in names]


# --- plain PyTorch ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_plain(example, capsys, tmp_path):
    without_frameworks(["transformers"])
    _, stages = example("plain")
    printed = capsys.readouterr().out
    assert stages == [LIGHTHOUSE] * 3 + [DENSE] * 3
    whole = losses(printed)
    assert list(whole) == list(range(6)) and float(whole[5]) < float(whole[0])
    assert "step 3: dense attention from here on" in printed

    # As if killed after two steps.
    torch.save(torch.load(tmp_path / "last.pt") | {"schedule": after(2)}, tmp_path / "last.pt")
    _, stages = example("plain")
    assert stages == [LIGHTHOUSE] + [DENSE] * 3


# --- Hugging Face -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_huggingface(example, tmp_path):
    without_frameworks(["transformers", "accelerate"])
    found, stages = example("huggingface")
    micro = 2
    assert stages == [LIGHTHOUSE] * 3 * micro + [DENSE] * 3 * micro
    assert found["callback"]._steps.schedule.finished
    whole = logged(found)
    assert len(whole) == 6 and whole[-1] < whole[0]

    with pytest.raises(ValueError, match=r"a finished run, all 6 steps are done.*leave LighthouseCallback out"):
        example("huggingface")
    for later in (4, 6):
        shutil.rmtree(tmp_path / f"checkpoint-{later}")
    found, stages = example("huggingface")
    assert stages == [LIGHTHOUSE] * micro + [DENSE] * 3 * micro
    assert logged(found) == whole, "a resumed run has other losses"


def logged(found):
    return [entry["loss"] for entry in found["trainer"].state.log_history if "loss" in entry]


@pytest.fixture
def trainer(tmp_path):
    """Makes a Trainer with the callback."""
    transformers, _ = without_frameworks(["transformers", "accelerate"])
    from tiny import PYRAMID, Counting, llama

    from lighthouse_fx.integrations.huggingface import LighthouseCallback

    def make(schedule, folder=tmp_path, max_steps=4, model=None, **arguments):
        given = {"logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "report_to": []} | arguments
        options = transformers.TrainingArguments(str(folder), max_steps=max_steps, use_cpu=True, **given)
        callback = LighthouseCallback(schedule, PYRAMID, dense_layers=(0, -1))
        return transformers.Trainer(
            model=model or llama(), args=options, train_dataset=Counting(), callbacks=[callback]
        )

    return make


def test_trainer_checkpoints_keep_what_is_watched(trainer, tmp_path):
    told = []
    schedule = TwoStage(4, lighthouse_steps=2, window=1, on_event=told.append)
    trainer(schedule, save_strategy="steps", save_steps=2).train()
    kinds = [event.kind for event in told]
    assert kinds[:2] == ["switch", "jump"] and kinds[2:] in (["finished"], ["recovered", "finished"])
    assert "no losses of both stages" not in told[-1].message
    saved = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["stateful_callbacks"]
    assert saved["lighthouse_fx"]["step"] == 2 and len(saved["lighthouse_fx"]["recovery"]["before"]) == 1

    again = TwoStage(4, lighthouse_steps=2, window=1)
    trainer(again).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state_dict() == schedule.state_dict()
    with pytest.raises(ValueError, match=r"state has \{'lighthouse_steps': 2\}"):
        trainer(TwoStage(4, lighthouse_steps=3)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_trainer_scales_the_learning_rate_only_for_the_step(trainer):
    rates = []
    made = trainer(TwoStage(4, lighthouse_steps=2, rewarm_steps=2), learning_rate=1.0, lr_scheduler_type="constant")
    made.create_optimizer()
    made.optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    made.train()
    assert rates == [1.0, 1.0, 0.5, 1.0]
    assert made.optimizer.param_groups[0]["lr"] == 1.0


def test_trainer_and_schedule_must_agree(trainer):
    with pytest.raises(ValueError, match=r"the trainer makes 4 steps, and the schedule has total_steps=5: .*max_steps=5"):
        trainer(TwoStage(5, lighthouse_steps=2)).train()
    with pytest.raises(ValueError, match="torch_compile=True"):
        trainer(TwoStage(4, lighthouse_steps=2), torch_compile=True).train()
    assert stage.current.kind == "default"


def test_a_finished_model_is_not_trained_on_by_the_same_callback(trainer):
    schedule = TwoStage(4, lighthouse_steps=2)
    made = trainer(schedule)
    schedule.seek(4)  # as after made.train()
    with pytest.raises(ValueError, match=r"this schedule is at step 4 of 4.*use no schedule"):
        made.train()


# --- Accelerate -------------------------------------------------------------------------------------------------------


def test_accelerate(example, capsys, tmp_path):
    without_frameworks(["accelerate", "transformers"])
    folder = tmp_path / "state"
    found, stages = example("accelerate_regions", folder)
    blocks, micro = 3, 2
    assert stages == [LIGHTHOUSE] * 3 * micro * blocks + [DENSE] * 3 * micro * blocks
    whole = losses(capsys.readouterr().out)
    assert list(whole) == list(range(6)) and float(whole[5]) < float(whole[0])
    assert found["schedule"].finished
    with pytest.warns(RuntimeWarning, match="finished run"):
        _, stages = example("accelerate_regions", folder)
    assert stages == []
    (kept,) = folder.glob("custom_checkpoint_*")
    torch.save(after(2), kept)
    _, stages = example("accelerate_regions", folder)
    assert stages == [LIGHTHOUSE] * micro * blocks + [DENSE] * 3 * micro * blocks


# --- Lightning --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_lightning(example, tmp_path):
    without_frameworks(["lightning", "transformers"])
    found, stages = example("lightning_callback")
    micro = 2
    assert stages == [LIGHTHOUSE] * 3 * micro + [DENSE] * 3 * micro
    (earlier,) = tmp_path.glob("*step=2.ckpt")
    shutil.copy(earlier, tmp_path / "last.ckpt")
    found, stages = example("lightning_callback")
    assert stages == [LIGHTHOUSE] * micro + [DENSE] * 3 * micro
    assert found["trainer"].global_step == 6


def test_lightning_leaves_no_stage_after_an_exception(tmp_path):
    (pl,) = without_frameworks(["lightning.pytorch"])
    from tiny import PYRAMID, Counting, llama

    from lighthouse_fx.integrations.lightning import LighthouseCallback

    class Broken(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = llama()

        def training_step(self, batch, index):
            assert stage.current.kind == "dense"
            raise ZeroDivisionError

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    callback = LighthouseCallback(TwoStage(4, lighthouse_steps=0), PYRAMID, dense_layers=(0, -1))
    trainer = pl.Trainer(max_steps=4, accelerator="cpu", callbacks=[callback], default_root_dir=tmp_path, **quiet)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(Broken(), torch.utils.data.DataLoader(Counting(), batch_size=4))
    assert stage.current.kind == "default"


def test_lightning_scales_the_learning_rate_and_tells_events(tmp_path):
    (pl,) = without_frameworks(["lightning.pytorch"])
    from lighthouse_fx.integrations.lightning import LighthouseCallback

    class Falling(pl.LightningModule):
        """Its weight falls by the learning rate."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.seen = []

        def training_step(self, batch, index):
            self.seen.append((self.weight.item(), stage.current.kind))
            return self.weight + 7.0

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1.0)

    told = []
    schedule = TwoStage(4, lighthouse_steps=2, rewarm_steps=2, window=1, on_event=told.append)
    callback = LighthouseCallback(schedule, compile_blocks=False)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(
        max_steps=4, accumulate_grad_batches=2, accelerator="cpu", callbacks=[callback], default_root_dir=tmp_path, **quiet
    )
    module = Falling()
    trainer.fit(module, torch.utils.data.DataLoader(torch.zeros(16, 1)))
    kinds = ["pretraining"] * 4 + ["dense"] * 4
    assert module.seen == list(zip([0, 0, -1, -1, -2, -2, -2.5, -2.5], kinds, strict=True))
    assert module.weight.item() == -3.5
    assert [(event.kind, event.loss) for event in told[:2]] == [("switch", None), ("jump", 5.0)]
    assert told[1].level == 6.0


# --- litgpt -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def default_backend():
    if not hasattr(torch.compiler, "set_default_backend"):
        pytest.skip("this torch has no default backend to set")
    before = torch.compiler.get_default_backend()
    yield
    torch.compiler.set_default_backend(before)


@pytest.mark.slow
def test_litgpt(example, default_backend, tmp_path, capsys):
    without_frameworks(["litgpt", "transformers"])
    found, stages = example("litgpt_pretrain")
    micro, layers = 2, 2
    trained = [reason for reason in stages if "not worth it" not in reason]  # that was validation outside the stages
    assert trained == [LIGHTHOUSE] * 3 * micro * layers + [DENSE] * 3 * micro * layers
    assert found["schedule"].finished
    assert "step 3: dense attention from here on" in capsys.readouterr().out
    assert (tmp_path / "final" / "lit_model.pth").exists()


# --- torchtitan -------------------------------------------------------------------------------------------------------


def test_torchtitan(example, torchtitan, capsys):
    found, stages = example("torchtitan_llama")
    layers = 2
    assert stages == [LIGHTHOUSE] * 3 * layers + [DENSE] * 3 * layers
    printed = losses(capsys.readouterr().out)
    assert list(printed) == list(range(6)) and float(printed[5]) < float(printed[0])
    assert found["schedule"].finished


# --- all --------------------------------------------------------------------------------------------------------------


def test_callbacks_take_a_schedule():
    without_frameworks(["transformers", "accelerate"])
    from lighthouse_fx.integrations.huggingface import LighthouseCallback

    with pytest.raises(TypeError, match=r"schedule=16000 is a int: give lighthouse_fx.TwoStage"):
        LighthouseCallback(16000)
