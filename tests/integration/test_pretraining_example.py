"""examples/pretraining as users run it: killed and resumed, on two ranks, and its model in plain transformers."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from transformers import AutoModelForCausalLM

FOLDER = Path(__file__).parents[2] / "examples" / "pretraining"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
STEPS, LENGTH, ROWS = 8, 128, 3

# The tests share runs.
pytestmark = pytest.mark.xdist_group("pretraining_example")


def imported(name):
    """A module of the example, which is no package."""
    spec = importlib.util.spec_from_file_location(f"pretraining_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


data, trackers = imported("data"), imported("trackers")


def write_documents(folder, *, count=80, characters=150):
    """Texts of several lengths, shorter than a row."""
    folder.mkdir()
    for number in range(count):
        words = " ".join(f"{word} times {number} is {word * number};" for word in range(99))
        (folder / f"{number:03d}.txt").write_text(words[: characters + number])
    return str(folder / "*.txt")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_documents(tmp_path_factory.mktemp("text") / "documents")


@pytest.fixture(scope="module")
def tokenizer(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    data.train_tokenizer(data.open_source(text=texts), 300, folder)
    return data.load_tokenizer(folder)


# --- data -------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["text", "shards"])
def source(request, texts, tokenizer, tmp_path):
    """A function that opens the same data anew."""
    pattern = texts
    if request.param == "shards":
        for number in range(4):
            documents = [data._encode(tokenizer, f"shard {number} document {n} " * (n + 1)) for n in range(5)]
            np.save(tmp_path / f"{number}.npy", np.concatenate(documents))
        pattern = str(tmp_path / "*.npy")

    def opened():
        source = data.open_source(**{request.param: pattern}, seed=1)
        source.tokenizer = tokenizer
        return source

    return opened


def test_position_in_the_data_is_exact_at_any_step_over_epochs(source):
    def rows():
        fresh = source()
        data.hold_out(fresh, rows=1, length=64)
        return data.Rows(fresh, rows=2, length=64)

    straight, states, loader = [], [], rows()
    for batch in islice(loader, 150):
        straight.append(batch)
        states.append(json.loads(json.dumps(loader.state_dict())))
    assert states[-1]["source"]["epoch"] >= 1
    for at in (0, 1, 60, 110, 148):
        resumed = rows()
        resumed.load_state_dict(states[at])
        for batch, expected in zip(islice(resumed, 149 - at), straight[at + 1 :], strict=True):
            assert torch.equal(batch["tokens"], expected["tokens"])
            for one, other in zip(batch["documents"], expected["documents"], strict=True):
                assert torch.equal(one.diff() != 0, other.diff() != 0)  # the same borders


def test_rows_hold_the_documents_in_order_and_borders_follow_the_end_of_text(source):
    fresh = source()
    (batch,) = islice(data.Rows(fresh, rows=4, length=50), 1)
    tokens, numbers = batch["tokens"].flatten(), batch["documents"].flatten()
    expected = np.concatenate(list(islice(iter(source()), 60)))[: len(tokens)]
    assert tokens.tolist() == expected.tolist()
    ended = tokens[:-1] == fresh.tokenizer.eos_token_id
    assert ended.any() and torch.equal(numbers.diff() != 0, ended)


def test_held_out_documents_are_not_trained_on(source):
    fresh = source()
    held = fresh.hold_out(40)
    seen = {part.tobytes() for part in islice(iter(fresh), 300)}
    assert len(seen) > 1 and not seen & {part.tobytes() for part in held}


def test_other_data_than_those_of_a_checkpoint_are_an_error(source):
    state = source().state_dict()
    with pytest.raises(ValueError, match=r"files, and 3 when the checkpoint was saved"):
        source().load_state_dict(state | {"files": 3})


@pytest.mark.parametrize("given", [{}, {"text": "stdlib", "shards": "x"}, {"text": "/nothing/*.txt"}])
def test_data_that_is_not_one_kind_or_not_there(given):
    with pytest.raises(ValueError, match=r"give (exactly one|a pattern)"):
        data.open_source(**given)


def test_tokenizer_has_a_token_for_each_digit(tokenizer):
    digits = [tokenizer.encode(f"is {digit}.", add_special_tokens=False) for digit in range(10)]
    assert len({len(tokens) for tokens in digits}) == 1 and len({tuple(tokens) for tokens in digits}) == 10
    assert tokenizer.decode(tokenizer.encode("naïve 1234")) == "naïve 1234"


# --- settings ---------------------------------------------------------------------------------------------------------


def test_settings_of_the_file_and_of_the_command_line(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    train = imported("train")
    given = ("steps=20", "optimizer.lr=3e-4", "stages.rewarm_steps=2", "trackers=[]")
    settings = train.read_settings(str(FOLDER / "small.yaml"), *given)
    assert (settings.steps, settings.optimizer["lr"], settings.trackers) == (20, 3e-4, [])
    assert settings.stages == {"fraction": 0.5, "rewarm_steps": 2} and settings.model["type"] == "llama"
    with pytest.raises(ValueError, match="steps' is no setting: give name=value"):
        train.read_settings(str(FOLDER / "small.yaml"), "steps")
    with pytest.raises(TypeError, match="unexpected keyword argument 'step'"):
        train.read_settings(str(FOLDER / "small.yaml"), "step=20")


def test_tracker_that_is_unknown_or_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    for name, error in (("mlflow", ValueError), ("wandb", ImportError)):
        with pytest.raises(error, match=name), ExitStack() as closing:
            trackers.open_trackers([name], tmp_path, step=0, settings={}, closing=closing)


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def settings(texts, tmp_path_factory):
    """GPT-2 with dropout, so that randomness has to be restored as well."""
    pytest.importorskip("torchdata")
    path = tmp_path_factory.mktemp("settings") / "tiny.yaml"
    fields = dict(
        steps=STEPS,
        sequence_length=LENGTH,
        global_batch=4,
        dtype="float32",
        model=dict(type="gpt2", n_embd=32, n_layer=3, n_head=2, attn_pdrop=0.0, resid_pdrop=0.1, embd_pdrop=0.1),
        tokenizer=dict(train=400),
        data=dict(text=texts),
        lighthouse=dict(levels=2, pooling=4, topk=4, dense_layers=[0, -1]),
        optimizer=dict(lr=3e-3),
        schedule=dict(
            name="warmup_stable_decay", num_warmup_steps=2, scheduler_specific_kwargs=dict(num_decay_steps=2)
        ),
        evaluate_every=STEPS,
        evaluation_rows=ROWS,
        probe_every=STEPS,
        leak_cuts=4,
        passkey=dict(lengths=[LENGTH], depths=1),
        save_every=2,
        trackers=["tensorboard"],
    )
    path.write_text(yaml.safe_dump(fields))
    return path


def start(settings, out, *arguments, by=()):
    out.parent.mkdir(parents=True, exist_ok=True)
    output = out.with_suffix(".output").open("w")
    command = [sys.executable, *by, str(FOLDER / "train.py"), str(settings), f"out={out}", *arguments]
    return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)


def finish(process, out):
    try:
        code = process.wait(timeout=300)
    finally:
        process.kill()
    assert code == 0, out.with_suffix(".output").read_text()
    return out


def lines(out, kind):
    path = out / "run.jsonl"
    text = path.read_text() if path.exists() else ""
    found = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in found if line["kind"] == kind]


def losses(out):
    """By step, each as often as it ran."""
    found = {}
    for line in lines(out, "step"):
        found.setdefault(line["step"], []).append(line["loss"])
    return found


@pytest.fixture(scope="module")
def straight(settings, tmp_path_factory):
    """A run from start to end."""
    out = tmp_path_factory.mktemp("straight") / "run"
    return finish(start(settings, out), out)


@pytest.fixture(scope="module")
def killed(settings, tmp_path_factory):
    """A run that is killed after its fourth step."""
    out = tmp_path_factory.mktemp("killed") / "run"
    process, until = start(settings, out), time.monotonic() + 200
    try:
        while len(lines(out, "step")) < 4 and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
    finally:
        os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, out.with_suffix(".output").read_text()
    assert 4 <= len(losses(out)) < STEPS
    return out


@pytest.mark.slow
def test_killed_and_resumed_run_has_the_same_losses(settings, straight, killed, tmp_path):
    expected = losses(straight)
    assert list(expected) == list(range(STEPS)) and all(len(found) == 1 for found in expected.values())
    assert [line["stage"] for line in lines(straight, "step")] == ["lighthouse"] * 4 + ["dense"] * 4
    out = tmp_path / "run"
    shutil.copytree(killed, out)
    finish(start(settings, out), out)
    assert "goes on from" in out.with_suffix(".output").read_text()
    found = losses(out)
    assert found.keys() == expected.keys()
    for step, values in found.items():
        assert set(values) == set(expected[step]), step  # to the bit, before the kill, after it, and where repeated
    last = [run[-1]["loss"] for run in (lines(straight, "validation"), lines(out, "validation"))]
    assert last[0] == last[1]


@pytest.mark.slow
def test_run_is_resumed_on_two_ranks(settings, straight, killed, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(killed, out)
    begun = max(losses(killed))
    finish(start(settings, out, by=TORCHRUN), out)
    found, expected = losses(out), losses(straight)
    assert found.keys() == expected.keys() and begun < STEPS - 1
    for step, values in found.items():
        assert values[-1] == pytest.approx(expected[step][0], abs=2e-5), step
    final = lines(out, "validation")[-1]["loss"]
    assert final == pytest.approx(lines(straight, "validation")[-1]["loss"], abs=2e-5)
    (exported,) = [line for line in lines(out, "event") if line["event"] == "exported"]
    assert exported["loss"] == pytest.approx(final, abs=1e-5)


@pytest.mark.slow
def test_model_in_plain_transformers_has_the_logged_loss(straight, texts):
    model, loading = AutoModelForCausalLM.from_pretrained(straight / "model", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    source = data.open_source(text=texts, seed=0)
    source.tokenizer = data.load_tokenizer(straight / "model")
    held = data.hold_out(source, rows=ROWS, length=LENGTH)
    tokens, numbers = held["tokens"].long(), held["documents"]
    same = numbers[:, :-1, None] == numbers[:, None, :-1]  # [B, N, N]
    mask = (same & torch.ones(LENGTH, LENGTH).tril().bool())[:, None]  # [B, 1, N, N]
    with torch.no_grad():
        logits = model.eval()(input_ids=tokens[:, :-1], attention_mask=mask).logits
    inside = numbers[:, 1:] == numbers[:, :-1]
    loss = F.cross_entropy(logits[inside], tokens[:, 1:][inside]).item()
    assert loss == pytest.approx(lines(straight, "validation")[-1]["loss"], abs=1e-5)
    events = {line["event"]: line for line in lines(straight, "event")}
    assert events["exported"]["loss"] == pytest.approx(loss, abs=1e-5)
    assert {"loss/dense", "leak/lighthouse", "leak/dense", "passkey/accuracy"} <= events["evaluation"].keys()


@pytest.mark.slow
def test_scalars_are_live_in_tensorboard(straight):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(straight / "tensorboard"))
    events.Reload()
    written = {scalar.step: scalar.value for scalar in events.Scalars("loss/training")}
    assert written == pytest.approx({step: values[0] for step, values in losses(straight).items()}, rel=1e-6)
    assert [scalar.step for scalar in events.Scalars("loss/dense")] == [4, STEPS]


@pytest.mark.slow
def test_checkpoint_of_another_run_is_an_error(settings, killed, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(killed, out)
    process = start(settings, out, "optimizer.lr=1e-4")
    assert process.wait(timeout=200) != 0
    assert "'optimizer': {'lr': 0.003}" in out.with_suffix(".output").read_text()
