"""The log of a training run: what it takes down, what a kill or a resumption leaves of it, what is shown of it."""

import json
import math
import re
import signal
import subprocess
import sys
import warnings
from dataclasses import fields, replace

import pytest
import torch
from small_models import CONFIG, FIELDS, HEADS, TOKENS, WIDTH, Model, inputs, passes_only

import lighthouse_fx
from lighthouse_fx import Divergence, RunLog
from lighthouse_fx.cli.main import main
from lighthouse_fx.passes.pyramid import pyramid_over
from lighthouse_fx.training import run_page
from lighthouse_fx.training.loss_monitor import LossMonitor, Reference, read_reference
from lighthouse_fx.training.run_file import read_run

GATHERED = pyramid_over(TOKENS, CONFIG).gathered


def compiled(layers=2, **arguments):
    model = Model(layers, **arguments)
    return model, torch.compile(model, backend=passes_only, options=FIELDS)


def train(log, call, steps, stage=lighthouse_fx.pretraining):
    for number in steps:
        x = inputs()
        with stage(), log.step(number, tokens=x.shape[0] * x.shape[1]) as step:
            loss = call(x).square().mean()
            loss.backward()
            step.loss = loss.item()


def flops(length, layers):
    """SPEC.md, "Cost", written out for the small model in a batch of two."""
    forward = 2 * length**2 * (WIDTH // HEADS) * HEADS
    return 2 * layers * round(3.5 * forward)


def plain(log, number, loss):
    """A step without a model, for tests of the file alone."""
    with log.step(number) as step:
        step.loss = loss


# --- what is written --------------------------------------------------------------------------------------------------


def test_steps_are_those_that_ran(tmp_path):
    model, call = compiled()
    log = RunLog(tmp_path / "deep" / "run.jsonl", model=model, config=CONFIG, seed=7, note="mine")
    train(log, call, range(3))
    train(log, call, range(3, 5), stage=lighthouse_fx.dense)
    log.validation(5, 1.25)
    log.event("warm-up", step=3, text="again", rate=0.1)
    run = read_run(log.path)

    (header,) = run.headers
    assert header["seed"] == 7 and header["note"] == "mine" and header["config"]["topk"] == CONFIG.topk
    assert header["parameters"] == sum(p.numel() for p in model.parameters())
    assert header["versions"]["torch"] and header["card"] and "python" in header["command"]
    assert [step.stage for step in run.steps] == ["lighthouse"] * 3 + ["dense"] * 2
    first, last = run.steps[0], run.steps[-1]
    assert (first.length, first.gathered, first.calls, first.rewritten) == (TOKENS, GATHERED, 2, 2)
    assert (last.length, last.gathered, last.calls, last.rewritten) == (TOKENS, None, 2, 0)
    assert first.dense_flops == last.dense_flops == flops(TOKENS, 2)
    assert first.saved_flops == flops(TOKENS, 2) - flops(GATHERED, 2) and last.saved_flops == 0
    assert first.tokens == 2 * TOKENS and first.tokens_per_second == first.tokens / first.seconds > 0
    assert all(math.isfinite(step.loss) and step.uncounted == 0 for step in run.steps)
    assert run.validation == {5: 1.25}
    assert [(e.name, e.step) for e in run.events] == [("switch", 3), ("warm-up", 3)]
    assert run.events[1].more == {"rate": 0.1}


def test_options_are_found_out_from_the_model(tmp_path):
    model = lighthouse_fx.compile(Model(3), CONFIG, dense_layers=(0,))
    RunLog(tmp_path / "run.jsonl", model=model)
    assert read_run(tmp_path / "run.jsonl").headers[0]["config"]["topk"] == CONFIG.topk


def test_a_recomputed_checkpoint_and_a_validation_inside_the_step_count_once(tmp_path):
    _, call = compiled()
    _, again = compiled(checkpointing="inside")
    _, outside = compiled()
    log = RunLog(tmp_path / "run.jsonl")
    train(log, call, [0])
    train(log, again, [1])
    train(log, lambda x: torch.utils.checkpoint.checkpoint(outside, x, use_reentrant=False), [2])
    with log.step(3):
        call(inputs()).mean().backward()
        with torch.no_grad():
            call(inputs())
    assert [step.dense_flops for step in read_run(log.path).steps] == [flops(TOKENS, 2)] * 4
    assert [step.rewritten for step in read_run(log.path).steps] == [2] * 4


def test_bidirectional_attention_costs_twice(tmp_path):
    import torch.nn.functional as F

    _, call = compiled(attend=lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
    log = RunLog(tmp_path / "run.jsonl")
    train(log, call, [0])
    assert read_run(log.path).steps[0].dense_flops == 2 * flops(TOKENS, 2)


def test_dynamic_shapes_are_said_not_guessed(tmp_path):
    call = torch.compile(Model(2), backend=passes_only, options=FIELDS, dynamic=True)
    log = RunLog(tmp_path / "run.jsonl")
    train(log, call, [0])
    (step,) = read_run(log.path).steps
    assert (step.uncounted, step.dense_flops, step.saved_flops, step.rewritten) == (2, 0, 0, 2)


def test_a_call_that_falls_back_is_warned_of(tmp_path):
    _, call = compiled()
    log = RunLog(tmp_path / "run.jsonl")
    train(log, call, [0])
    with pytest.warns(RuntimeWarning, match="step 1: 1 attention calls ran rewritten, and 2 in the step before"):
        train(log, call, [1], stage=lambda: lighthouse_fx.pretraining(dense_layers=("layers.1",)))
    (event,) = read_run(log.path).events
    assert (event.name, event.step) == ("warning", 1)


def test_a_step_that_raises_is_an_event_and_no_step(tmp_path):
    log = RunLog(tmp_path / "run.jsonl")
    with pytest.raises(RuntimeError), log.step(0):
        raise RuntimeError("out of memory")
    run = read_run(log.path)
    assert run.steps == () and [(e.name, e.text) for e in run.events] == [("error", "RuntimeError: out of memory")]


def test_a_loss_that_is_no_number(tmp_path):
    log = RunLog(tmp_path / "run.jsonl")
    with pytest.warns(RuntimeWarning, match="step 0: the training loss is nan"):
        plain(log, 0, math.nan)
    for line in log.path.read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # strict JSON
    assert math.isnan(read_run(log.path).steps[0].loss)


# --- kills and resumptions --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_run_leaves_every_line_but_the_last(tmp_path):
    path = tmp_path / "run.jsonl"
    script = (
        "import itertools, sys\nfrom lighthouse_fx import RunLog\nlog = RunLog(sys.argv[1])\n"
        "for n in itertools.count():\n    with log.step(n) as step:\n        step.loss = 1.0\n    print(n, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if int(line) == 100:
                process.send_signal(signal.SIGKILL)
                break
        rest = process.stdout.read().split()
    assert process.returncode == -signal.SIGKILL
    steps = read_run(path).steps
    assert len(steps) >= max(map(int, ["100", *rest]))
    assert [step.step for step in steps] == list(range(len(steps)))


def test_a_resumed_run_replaces_what_it_does_again(tmp_path):
    path = tmp_path / "run.jsonl"
    log = RunLog(path)
    for number in range(6):
        plain(log, number, 1.0)
    log.validation(4, 1.0)
    log.validation(6, 1.0)
    log.event("note", step=2)
    log.event("note", step=5)
    log.close()
    path.write_bytes(path.read_bytes() + b'{"kind": "step", "step": 6, "lo')  # killed here
    log = RunLog(path)
    log.event("resumed", step=4)
    for number in (4, 5):
        plain(log, number, 2.0)
    run = read_run(path)
    assert [(step.step, step.loss) for step in run.steps] == [(0, 1), (1, 1), (2, 1), (3, 1), (4, 2), (5, 2)]
    assert run.validation == {4: 1.0}, "that after six steps was of another model"
    assert [(event.name, event.step) for event in run.events] == [("note", 2), ("resumed", 4)]
    assert (run.torn, run.replaced, len(run.headers)) == (1, 2, 2)
    # A reader that comes while a line is being written sees the rest.
    path.write_bytes(path.read_bytes()[:-5])
    assert [step.step for step in read_run(path).steps] == [0, 1, 2, 3, 4]


def test_a_switch_is_seen_from_the_step_before_not_from_the_line_before(tmp_path):
    """A run that was killed after its switch goes on from a checkpoint before it; then another run begins in the same file."""
    _, call = compiled(1)
    path = tmp_path / "run.jsonl"
    train(RunLog(path), call, range(2))
    train(RunLog(path), call, range(2, 4), stage=lighthouse_fx.dense)
    assert [event.step for event in read_run(path).named("switch")] == [2]
    train(RunLog(path), call, range(1, 2))
    assert read_run(path).named("switch") == []
    train(RunLog(path), call, range(2, 4), stage=lighthouse_fx.dense)
    assert [event.step for event in read_run(path).named("switch")] == [2]
    train(RunLog(path), call, range(1))
    assert read_run(path).named("switch") == []


def test_a_later_line_of_a_step_wins(tmp_path):
    log = RunLog(tmp_path / "run.jsonl")
    plain(log, 0, 1.0)
    plain(log, 0, 2.0)
    assert [step.loss for step in read_run(log.path).steps] == [2.0]


def test_what_is_no_log_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("dear diary\n")
    with pytest.raises(ValueError, match=r"path='.*notes.txt' is no log of a run"):
        RunLog(path)
    assert path.read_text() == "dear diary\n"
    newer = tmp_path / "newer.jsonl"
    newer.write_text('{"kind": "run", "format": 99}\n')
    with pytest.raises(ValueError, match="has format 99, and this version reads up to 1"):
        read_run(newer)


# --- the loss monitor -------------------------------------------------------------------------------------------------

RULE = Divergence(margin=0.1, lighthouse_margin=1.0, recovery=100, smooth=2, patience=3)
FLAT = Reference(name="dense.csv", validation={0: 1.0, 1000: 1.0}, training={0: 1.0, 1000: 1.0})


def heard(monitor, losses, start=0):
    return [start + n for n, loss in enumerate(losses) if monitor.validation(start + n, loss)]


def test_rule_of_the_monitor():
    # The mean of two is above from 2 on, for the third time at 4; then below; then above again from 10 on, said at 12.
    losses = [1.0, 1.0, 1.5, 1.5, 1.5, 1.5, 1.5, 1.0, 1.0, 1.0, 1.5, 1.5, 1.5]
    assert heard(LossMonitor(FLAT, RULE), losses) == [4, 12]
    assert heard(LossMonitor(FLAT, RULE), [1.09] * 20) == []
    assert heard(LossMonitor(FLAT, RULE), [1.5] * 5, start=2000) == [], "beyond the reference nothing is known"


def test_the_reference_is_a_line_between_its_points():
    rising = Reference(name="x", validation={0: 1.0, 10: 2.0})
    monitor = LossMonitor(rising, Divergence(smooth=1, patience=1))
    assert heard(monitor, [1.0 + n / 10 + 0.05 for n in range(11)]) == []
    assert heard(LossMonitor(rising, Divergence(smooth=1, patience=1)), [1.0 + n / 10 + 0.15 for n in range(11)]) == [0]


def test_lighthouse_training_losses_are_never_compared_and_its_stage_has_a_wider_margin():
    monitor = LossMonitor(FLAT, RULE)
    assert not any(monitor.training(n, 99.0, stage="lighthouse") for n in range(10))
    assert heard(monitor, [1.5] * 10) == []
    assert heard(monitor, [2.5] * 10, start=10) == [13], "the first mean, of 1.5 and 2.5, is on the margin"


def test_recovery_after_the_switch():
    monitor = LossMonitor(FLAT, RULE)
    monitor.training(0, 1.0, stage="lighthouse")
    monitor.training(50, 1.0, stage="dense")
    assert heard(monitor, [1.5] * 99, start=51) == []
    assert heard(monitor, [1.5] * 10, start=150) == [152]


def test_recovery_takes_half_of_the_lighthouse_steps_unless_it_is_given():
    monitor = LossMonitor(FLAT, Divergence(smooth=1, patience=1))
    monitor.training(0, 1.0, stage="lighthouse")
    monitor.training(50, 1.0, stage="dense")
    assert heard(monitor, [1.5] * 10, start=65) == []
    assert heard(monitor, [1.5] * 10, start=75) == [75]


def test_dense_training_losses_are_compared_where_there_is_no_validation():
    monitor = LossMonitor(FLAT, RULE)
    said = [monitor.training(n, 1.5, stage="dense") for n in range(6)]
    assert [bool(text) for text in said] == [False, False, False, True, False, False]
    assert "training loss of the dense stage is 0.500 nats above dense.csv" in said[3]
    monitor = LossMonitor(FLAT, RULE)
    monitor.validation(0, 1.0)
    assert not any(monitor.training(n, 1.5, stage="dense") for n in range(6)), "validation is the better judge"


def test_monitor_in_a_log_that_is_resumed(tmp_path):
    reference = tmp_path / "dense.csv"
    reference.write_text("step,loss\n0,1.0\n1000,1.0\n")
    log = RunLog(tmp_path / "run.jsonl", reference=reference, rule=RULE)
    with warnings.catch_warnings(action="error"):
        for step in (0, 1, 2):
            log.validation(step, 1.5)
    log.close()
    log = RunLog(tmp_path / "run.jsonl", reference=reference, rule=RULE)
    with pytest.warns(RuntimeWarning, match=r"step 3: the dense validation loss is 0.500 nats above dense.csv"):
        log.validation(3, 1.5)
    run = read_run(log.path)
    assert [event.step for event in run.named("warning")] == [3]
    assert run.headers[0]["reference"] == "dense.csv" and run.headers[0]["rule"]["margin"] == 0.1


def test_references(tmp_path):
    log = RunLog(tmp_path / "run.jsonl")
    plain(log, 3, 2.0)
    log.validation(4, 1.5)
    found = read_reference(log.path)
    assert (found.validation, found.training) == ({4: 1.5}, {3: 2.0})
    path = tmp_path / "a.csv"
    path.write_text("step, validation_loss, training_loss\n1, , 3.0\n2, 2.5, 2.0\n")
    assert read_reference(path).validation == {2: 2.5} and read_reference(path).training == {1: 3.0, 2: 2.0}
    for text, said in (
        ("a,b\n1,2\n", r"has the columns \['a', 'b'\]: give step,loss"),
        ("step,loss\n1,x\n", "has step='1', loss='x': give an integer and a number"),
        ("step,loss\n1,\n", "has no loss under dense attention"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=said):
            read_reference(path)


@pytest.mark.parametrize("name, value", [("margin", 0.0), ("lighthouse_margin", math.nan), ("smooth", 0), ("patience", 0)])
def test_bad_rules(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}"):
        Divergence(**{name: value})


# --- what is shown ----------------------------------------------------------------------------------------------------


@pytest.fixture
def two_stages(tmp_path):
    model, call = compiled()
    log = RunLog(tmp_path / "run.jsonl", model=model, seed=0)
    train(log, call, range(4))
    log.validation(4, 1.5)
    train(log, call, range(4, 6), stage=lighthouse_fx.dense)
    log.validation(6, 1.25)
    log.event("warning", step=5, text="<script>alert(1)</script> [red]")
    return log.path


def test_report(two_stages, tmp_path, capsys):
    page = tmp_path / "pages" / "run.html"
    assert main(["report", str(two_stages), "--out", str(page)]) == 0
    printed = capsys.readouterr().out
    share = 1 - (GATHERED / TOKENS) ** 2
    rows = {line.split("│")[1].strip(): line for line in printed.splitlines() if "│" in line}
    assert f"{share:.1%}" in rows["lighthouse"] and "1.500" in rows["lighthouse"] and "*" in rows["lighthouse"]
    assert "1.250" in rows["dense"] and "*" not in rows["dense"]
    assert f"{share * 4 / 6:.1%}" in rows["all"]
    assert "from lighthouse to dense attention" in printed and "<script>alert(1)</script> [red]" in printed
    html = page.read_text()
    assert "<script>" not in html and "&lt;script&gt;" in html
    assert html.count("<svg") == 1 and "validation, dense attention" in html and "not a likelihood" in html
    fetched = re.findall(r"""(?:src|href)=["'](?!#)([^"']*)|url\((?!#)([^)]*)\)|@import""", html)
    assert not fetched, "the page stands alone"


def test_report_of_a_log_with_nothing_but_a_header(tmp_path, capsys):
    RunLog(tmp_path / "run.jsonl")
    assert main(["report", str(tmp_path / "run.jsonl"), "--out", str(tmp_path / "run.html")]) == 0
    assert "0 steps" in capsys.readouterr().out


def test_a_reference_without_a_page_is_an_error(two_stages, capsys):
    assert main(["report", str(two_stages), "--reference", str(two_stages)]) == 2
    assert "give --out run.html" in capsys.readouterr().err


def test_a_page_is_html(two_stages, tmp_path, capsys):
    assert main(["report", str(two_stages), "--out", str(tmp_path / "run.pdf")]) == 2
    assert "a page is HTML" in capsys.readouterr().err and not (tmp_path / "run.pdf").exists()


def test_reference_in_the_page(two_stages, tmp_path):
    reference = Reference(name="other.jsonl", validation={1: 2.0, 5: 1.0})
    text = run_page.save_page(read_run(two_stages), tmp_path / "run.html", reference=reference).read_text()
    assert "dense reference other.jsonl" in text


def test_scalars_for_tensorboard(two_stages, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert main(["report", str(two_stages), "--tensorboard", str(tmp_path / "board")]) == 0
    events = accumulator.EventAccumulator(str(tmp_path / "board")).Reload()
    run = read_run(two_stages)
    scalars = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    assert scalars["loss/validation_dense"] == {4: 1.5, 6: 1.25}
    assert scalars["loss/training_lighthouse"].keys() == {0, 1, 2, 3}
    assert scalars["loss/training_dense"] == {s.step: pytest.approx(s.loss) for s in run.steps[4:]}
    assert scalars["attention/flops_saved"][0] == pytest.approx(run.steps[0].saved_flops)


@pytest.mark.parametrize(
    "lines",
    [
        '{"kind": "run", "format": "x"}',
        '{"kind": "run", "format": 1}\n{"kind": "step"}',
        '{"kind": "run", "format": 1}\n{"kind": "step", "step": 0, "stage": "dense", "colour": 1}',
        '{"kind": "run", "format": 1}\n{"kind": "validation", "step": 3}',
        '{"kind": "run", "format": 1}\n{"kind": "event"}',
    ],
)
def test_a_line_that_is_not_the_logs(lines, tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text(lines + "\n", encoding="utf-8")
    if "colour" in lines:  # a newer version of the same format may have more to say
        assert read_run(path).steps[0].stage == "dense"
        return
    with pytest.raises(ValueError, match="holds a line that RunLog did not write"):
        read_run(path)


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def whole_log(tmp_path):
    """The lines of a log of every kind, as objects."""
    path = tmp_path / "run.jsonl"
    with RunLog(path, seed=0, config=CONFIG) as log:
        for number in range(3):
            with log.step(number, tokens=8) as step:
                step.loss = 1.0
        log.validation(3, 1.5)
        log.event("note", step=2, text="all is well")
    return path, [json.loads(line) for line in path.read_text().splitlines()]


# What a damaged field may hold instead.
VALUES = [
    None, True, 7, -1, 10**30, 1.5, -0.0, 1e300, 5e-324, math.nan, math.inf, "x", "1", "nan", "\x1b[2J", "\ud800", "$\\frac$",
    [], [1], {}, {"a": 1},
]  # fmt: skip


@pytest.mark.parametrize("extra", [[], ["--out", "run.html"]], ids=["table", "page"])
def test_a_damaged_field_is_shown_or_named_by_its_line(whole_log, extra, monkeypatch, capsys):
    if extra:
        pytest.importorskip("matplotlib")
    path, lines = whole_log
    monkeypatch.chdir(path.parent)
    fields = [(place, name) for place, line in enumerate(lines) for name in line]
    places = fields if not extra else fields[::3]
    refused = shown = 0
    for n, (place, name) in enumerate(places):
        for value in VALUES[n % 2 :: 2] if not extra else VALUES[n % 9 :: 9]:
            damaged = [line | ({name: value} if at == place else {}) for at, line in enumerate(lines)]
            path.write_text("\n".join(map(json.dumps, damaged)) + "\n")
            status = main(["report", str(path), *extra])  # an exception fails the test
            out, error = capsys.readouterr()
            assert not any(ord(c) < 32 and c not in "\n\t" for c in out + error)
            if status:
                assert "run.jsonl" in error and f"line {place + 1}" in error, (name, value, error)
                refused += 1
            else:
                shown += 1
    assert refused > 5 and shown > 5


@pytest.mark.parametrize("damage", [b"\x00", b"\xff\xfe", b"[" * 100_000, b"7" * 5000, b'{"kind": "stpe"}', b"{"])
def test_a_line_that_is_no_line_is_left_out(whole_log, damage, capsys):
    path, lines = whole_log
    path.write_bytes(b"\n".join([json.dumps(lines[0]).encode(), damage, *(json.dumps(x).encode() for x in lines[1:])]) + b"\n")
    assert main(["report", str(path)]) == 0
    assert "were left out: 1" in capsys.readouterr().out and len(read_run(path).steps) == 3


@pytest.mark.parametrize(
    "text, said",
    [
        (b"step,loss\n1,1.0\n,2.0\n", "line 3 has step='', loss='2.0'"),
        (b"loss,step\n1.0\n", "line 2 has step=None, loss='1.0'"),
        (b"step,loss\n1,\xff\n", "is no CSV"),
        (b"step,loss\n1," + b"1" * 200_000 + b"\n", "is no CSV"),
        (b"", "has the columns"),
    ],
)
def test_damaged_references_name_the_file(text, said, tmp_path):
    path = tmp_path / "dense.csv"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        read_reference(path)
    assert "dense.csv" in str(error.value)


def test_no_control_character_reaches_the_terminal(whole_log, capsys):
    path, _ = whole_log
    with RunLog(path, config=CONFIG) as log:
        log.event("no\x9bte", text="\x1b]0;title\x07\x1b[2J\x1b[31mred")
    assert main(["report", str(path)]) == 0
    shown = capsys.readouterr().out
    assert r"\x1b]0;title\x07\x1b[2J\x1b[31mred" in shown and r"no\x9bte" in shown
    assert not any((ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 for c in shown)


def test_a_reference_named_as_a_formula_is_drawn_as_it_is(whole_log, tmp_path):
    pytest.importorskip("matplotlib")
    reference = tmp_path / "$\\frac$ and \x1b$.csv"
    reference.write_text("step,loss\n0,1.0\n9,1.0\n")
    page = run_page.save_page(read_run(whole_log[0]), tmp_path / "run.html", reference=read_reference(reference))
    assert "dense reference $\\frac$ and \\x1b$.csv" in page.read_text()


# --- full disks and several writers -----------------------------------------------------------------------------------


def test_every_line_that_was_accepted_can_be_read_after_a_full_disk(tmp_path):
    """A limit on the size of files stands for the disk: a part of a line is written, and the rest fails."""
    script = """
import os, resource, signal, sys
from lighthouse_fx import RunLog
log = RunLog(sys.argv[1], seed=0)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(sys.argv[1]) + 150, limits[1]))
for number in range(7):
    if number == 4:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    try:
        log.event("note", step=number, text="x" * 60)
        print(number)
    except OSError as error:
        assert "run.jsonl" in str(error) and "was not written" in str(error), error
"""
    path = tmp_path / "run.jsonl"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script, path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    accepted = list(map(int, done.stdout.split()))
    assert accepted and accepted[-3:] == [4, 5, 6] and len(accepted) < 7, "some failed, and it went on when there was room"
    run = read_run(path)
    assert [event.step for event in run.events] == accepted and run.torn == 1


def test_a_write_of_a_part_is_continued(tmp_path):
    class Slow:
        """A file that takes five bytes at a time, as the system may."""

        def __init__(self, file):
            self.file = file

        def write(self, data):
            return self.file.write(data[:5])

        def close(self):
            self.file.close()

    log = RunLog(tmp_path / "run.jsonl")
    log._file = Slow(log._file)
    log.event("note", text="x" * 60)
    log.event("note", text="y" * 60)
    assert [event.text[0] for event in read_run(log.path).events] == ["x", "y"] and read_run(log.path).torn == 0


def test_a_second_writer_is_refused(tmp_path):
    path = tmp_path / "run.jsonl"
    first = RunLog(path, seed=0)
    plain(first, 0, 1.0)
    with pytest.raises(BlockingIOError, match=r"another RunLog is writing.*one rank write.*run.rank1.jsonl"):
        RunLog(path)
    script = f"from lighthouse_fx import RunLog\nRunLog({str(path)!r})"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=120)
    assert "BlockingIOError" in done.stderr and len(read_run(path).headers) == 1
    first.close()
    with RunLog(path) as second:
        plain(second, 1, 1.0)
    run = read_run(path)
    assert len(run.headers) == 2 and [step.step for step in run.steps] == [0, 1] and run.replaced == 0


@pytest.mark.parametrize(
    "call", [lambda log: log.step(1.0), lambda log: log.event("x", step="1"), lambda log: log.validation(-1, 1.0)]
)
def test_steps_that_could_not_be_read_back_are_not_written(call, tmp_path):
    log = RunLog(tmp_path / "run.jsonl")
    with pytest.raises((TypeError, ValueError), match=r"step=.*give an integer of at least 0"):
        call(log)
    assert len(log.path.read_text().splitlines()) == 1


def test_a_log_holds_the_version_and_says_when_options_change(tmp_path):
    path = tmp_path / "run.jsonl"
    RunLog(path, config=CONFIG).close()
    header = read_run(path).headers[0]
    assert header["versions"]["lighthouse-fx"] == lighthouse_fx.__version__
    assert header["config"].keys() == {field.name for field in fields(CONFIG)}
    with warnings.catch_warnings(action="error"):
        RunLog(path, config=CONFIG).close()
    with pytest.warns(RuntimeWarning, match=f"under other options than it was begun with: topk was {CONFIG.topk} and is 4"):
        RunLog(path, config=replace(CONFIG, topk=4)).close()
    assert "topk was" in read_run(path).named("warning")[0].text
