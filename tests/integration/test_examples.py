"""The example runs as users run it: from the checkout, in a process of its own."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from lighthouse_fx.training.run_file import read_run

SCRIPT = Path(__file__).parents[2] / "examples" / "pretrain.py"
TINY = (
    "--seq-len=256 --topk=8 --pooling=2 --width=32 --heads=2 --kv-heads=1 --layers=3 --steps=6 --lighthouse-steps=4 "
    "--warmup=2 --validation-windows=2 --validate-every=3 --device=cpu"
)


def pretrain(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *flags], capture_output=True, text=True)


@pytest.mark.slow
def test_pretrain(tmp_path: Path) -> None:
    done = pretrain(*TINY.split(), f"--out={tmp_path}")
    assert done.returncode == 0, done.stdout + done.stderr
    for said in ("1 of 3 attention calls rewritten", "validation loss, dense attention", "Loss: the", "Time: the"):
        assert said in done.stdout

    result = json.loads((tmp_path / "result.json").read_text())
    lighthouse, dense = result["runs"]
    assert [stage["attention"] for stage in lighthouse["stages"]] == ["lighthouse", "dense"]
    assert [stage["attention"] for stage in dense["stages"]] == ["dense", "dense"]
    for run in (lighthouse, dense):
        assert [stage["steps"] for stage in run["stages"]] == [4, 2]
        assert set(run["validation_loss"]) == {"3", "4", "6"}
        losses = [loss for stage in run["stages"] for loss in stage["training_loss"]]
        assert all(map(math.isfinite, [*losses, *run["validation_loss"].values()]))
    # Same weights and tokens, but other attention: the first losses are close and not equal.
    first = [run["stages"][0]["training_loss"][0] for run in (lighthouse, dense)]
    assert first[0] != first[1] and abs(first[0] - first[1]) < 0.1
    assert len(result["checks"]) == 3 and all(check["passed"] for check in result["checks"])
    assert [call["rewritten"] for call in result["attention_calls"]] == [False, True, False]

    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "graph.svg").read_text() and "<svg" in (tmp_path / "graph.html").read_text()
    assert json.loads((tmp_path / "graph.json").read_text())["rewritten"] == 1

    log = read_run(tmp_path / "run.jsonl")
    assert [step.stage for step in log.steps] == ["lighthouse"] * 4 + ["dense"] * 2
    assert [step.loss for step in log.steps] == [x for stage in lighthouse["stages"] for x in stage["training_loss"]]
    assert {str(at): loss for at, loss in log.validation.items()} == lighthouse["validation_loss"]
    assert [event.name for event in log.events] == ["switch"] and log.steps[0].saved_flops > 0
    assert "dense reference dense.jsonl" in (tmp_path / "run.html").read_text()


@pytest.mark.sweep
def test_pretrain_with_checkpointing_and_without_the_dense_run(tmp_path: Path) -> None:
    flags = [*TINY.split(), "--checkpoint", "--no-dense", "--dtype=bf16", f"--out={tmp_path}"]
    done = pretrain(*flags)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = json.loads((tmp_path / "result.json").read_text())["runs"]
    assert all(math.isfinite(loss) for loss in run["validation_loss"].values())


@pytest.mark.slow
def test_pretrain_refuses_a_stage_longer_than_the_run(tmp_path: Path) -> None:
    done = pretrain("--steps=5", "--lighthouse-steps=6", f"--out={tmp_path}")
    assert done.returncode == 2
    assert "--lighthouse-steps 6: give 1 to --steps, which is 5" in done.stderr


@pytest.mark.sweep
def test_recipes(tmp_path):
    """Two recipes on the same tokens. One that is done, started again, runs no step and says the same."""
    script = SCRIPT.with_name("recipes.py")
    tiny = (
        "--seq-len=2048 --batch=1 --layers=3 --width=32 --heads=2 --mlp=48 --warmup=2 --validate-every=4 "
        "--validation-windows=2 --device=cpu --save-every=6 --steps=8"
    )

    def run(*names: str, out: Path) -> dict:
        command = [sys.executable, str(script), *names, *tiny.split(), f"--out={out}"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return {name: json.loads((out / f"{name}.json").read_text()) for name in names}

    found = run("dense", "k256-rescaled", out=tmp_path)
    dense, rescaled = found["dense"], found["k256-rescaled"]
    assert len(dense["losses"]) == len(rescaled["losses"]) == 8 and dense["factors"] == []
    assert len(rescaled["factors"]) == 1  # one Lighthouse layer
    assert dense["losses"][0] != rescaled["losses"][0]  # another attention from the first step on
    assert (tmp_path / "recipes.png").stat().st_size > 0
    again = run("k256-rescaled", out=tmp_path)["k256-rescaled"]
    assert again["losses"] == rescaled["losses"] and again["final"] == rescaled["final"]


@pytest.mark.sweep
def test_budget(tmp_path):
    """A run under budget control: thresholds below every entropy put its layer into the highest bucket."""
    script = SCRIPT.with_name("budget.py")
    tiny = (
        "--runs control --seq-len=256 --topk 2 4 8 --thresholds 0.001 0.002 --every=2 --layers=3 --width=32 --heads=2 "
        "--kv-heads=1 --steps=5 --warmup=2 --validation-windows=2 --device=cpu"
    )
    command = [sys.executable, str(script), *tiny.split(), f"--out={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "step 2: topk of model.layers.1 4 -> 8" in done.stdout
    (result,) = json.loads((tmp_path / "budget.json").read_text())["results"]
    assert [event["topk"] for event in result["events"]] == [{"model.layers.1": 4}, {"model.layers.1": 8}]
    low, high = (16 + 2 * 4 * k for k in (4, 8))  # S: 16 coarsest windows, two levels of four children each
    assert result["kept"] == pytest.approx((2 * low + high) / 3 / 256) and math.isfinite(result["final"])
    log = read_run(tmp_path / "control-0.jsonl")
    assert [step.gathered for step in log.steps] == [low, low, high, None, None]
    assert [event.step for event in log.named("budget")] == [0, 2]
    assert (tmp_path / "budget.png").read_bytes().startswith(b"\x89PNG")


def test_picture_of_the_published_runs(tmp_path):
    published = SCRIPT.parents[1] / "benchmarks" / "results" / "recipes_wsd.json"
    (tmp_path / "runs.json").write_bytes(published.read_bytes())
    command = [sys.executable, str(SCRIPT.with_name("recipe_seeds.py")), str(tmp_path / "runs.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "recipe_seeds.png").read_bytes().startswith(b"\x89PNG")
