"""The command line, on a CPU and at sizes that take seconds. `lighthouse report` is tested with the log, in test_audit.py."""

import json
import math
from contextlib import redirect_stdout
from io import StringIO

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lighthouse_fx.cli.main import main, new_parser
from lighthouse_fx.cli.validate import windows

PYRAMID = ["--levels", "3", "--pooling", "2", "--topk", "8"]
COMMANDS = ("bench", "explain", "profile", "report", "tune", "validate")

MODULE = """
import torch
from transformers import LlamaForCausalLM, LlamaConfig

def model(**fields):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**dict({config}, **fields), attn_implementation="sdpa"))

def pair():
    return model(), torch.zeros(1, 128, dtype=torch.long)

def deep_pair():
    return model(num_hidden_layers=5), torch.zeros(1, 128, dtype=torch.long)

def with_a_dict():
    return model(), {{"input_ids": torch.zeros(1, 128, dtype=torch.long)}}

def compiled_pair():
    import lighthouse_fx
    config = lighthouse_fx.LighthouseConfig(levels=3, pooling=2, topk=8)
    return lighthouse_fx.compile(model(), config, dense_layers=(0, -1)), torch.zeros(1, 128, dtype=torch.long)

def neither():
    return 3
"""
SMALL = {
    "vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch, request):
    """A folder with a module of the user's, the one that the command runs in. Returns the module's name."""
    name = f"mine_{request.node.name.partition('[')[0]}"
    (tmp_path / f"{name}.py").write_text(MODULE.format(config=SMALL))
    monkeypatch.chdir(tmp_path)
    return name


@pytest.mark.slow
def test_bench(tmp_path, capsys):
    figures, picture = tmp_path / "a" / "layer.json", tmp_path / "a" / "layer.png"
    sizes = ["--lengths", "512", "1030", "--topk", "16", "--heads", "4", "--groups", "2", "--dim", "16", "--dtype", "float32"]
    assert main(["bench", *sizes, "--device", "cpu", "--json", str(figures), "--picture", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "1,030" in printed and "speed over dense" in printed
    result = json.loads(figures.read_text())
    assert [row["gathered"] for row in result["rows"]] == [512 // 16 + 2 * 4 * 16, 1030 // 16 + 1030 % 16 + 2 * 4 * 16]
    assert all(row["layer"][1] > 0 and row["memory"] is None for row in result["rows"])
    assert picture.read_bytes().startswith(b"\x89PNG")


def help_of(*command):
    """What a terminal of 80 columns shows."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as printed:
        patch.setenv("COLUMNS", "80")
        with pytest.raises(SystemExit) as stopped:
            main([*command, "--help"])
    assert stopped.value.code == 0
    return printed.getvalue()


def examples():
    """The command lines that the helps give as examples."""
    return [line.strip() for name in COMMANDS for line in help_of(name).partition("examples:\n")[2].splitlines()]


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command):
    printed = help_of(command)
    assert f"usage: lighthouse {command}" in printed
    assert max(map(len, printed.splitlines())) <= 80
    assert printed.count(f"\n  lighthouse {command} ") >= 2, "examples"


@pytest.mark.parametrize("line", examples())
def test_examples_of_the_help(line):
    """All are understood; those that need no GPU, no files of the user's and no compiler run."""
    program, *arguments = line.split()
    assert program == "lighthouse" and new_parser().parse_args(arguments).run
    if "--predict" in arguments:
        assert main(arguments) == 0


def test_help_lists_the_commands():
    printed = help_of()
    assert all(f"    {command} " in printed for command in COMMANDS)
    assert max(map(len, printed.splitlines())) <= 80 and len(printed.splitlines()) < 20


def test_explain_a_function(here, capsys):
    assert main(["explain", f"{here}:pair", *PYRAMID, "--dense-layers", "0", "model.layers.2", "--out", "graph.svg"]) == 0
    printed = capsys.readouterr().out
    assert "LlamaForCausalLM: 1 of 3 attention calls rewritten" in printed and "written: graph.svg" in printed
    with open("graph.svg") as file:
        assert "<svg" in file.read()
    assert main(["explain", f"{here}:pair", "--levels", "1"]) == 1, "nothing is rewritten"


def test_explain_a_transformers_config(tmp_path, capsys):
    # Half a million million parameters: nothing of it is made.
    wide = LlamaConfig(**SMALL | {"hidden_size": 2**17, "intermediate_size": 2**19}, architectures=["LlamaForCausalLM"])
    wide.save_pretrained(tmp_path)
    assert main(["explain", str(tmp_path), "--length", "98304"]) == 0
    printed = capsys.readouterr().out
    assert "3 of 3 attention calls rewritten" in printed and "98,304" in printed and "73,728" in printed
    assert main(["explain", str(tmp_path), "--length", "98304", "--levels", "3", "--topk", "1536"]) == 0
    assert "18,432" in capsys.readouterr().out
    assert main(["explain", str(tmp_path)]) == 0, "whatever its length is"
    assert "3 of 3 attention calls rewritten" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command, said",
    [
        ("bench --lengths 0", "'0' is no number of tokens: give an integer of at least 1"),
        ("explain nowhere --length -3", "'-3' is no number of tokens"),
        ("tune 512 --predict --memory -1.5", "'-1.5' is no amount: give a number above 0"),
        ("tune 512 --predict --seconds nan", "'nan' is no amount"),
        ("profile --device foo", "'foo' is no device: give cuda or cpu"),
        ("validate nowhere --text x --device cuda", "there is no GPU here"),
    ],
)
def test_bad_lengths_and_devices(command, said, capsys):
    if "cuda" in command and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        main(command.split())
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("command", ["bench --lengths 512 --topk 512", "profile --length 512 --topk 512"])
def test_a_layer_that_would_stay_dense_is_not_measured(command, capsys):
    assert main([*command.split(), "--dtype", "float32", "--heads", "1", "--dim", "16", "--device", "cpu"]) == 2
    assert "topk=512 gather 672 of 512 tokens, so attention stays dense: give fewer, such as levels=2, topk=64" in (
        capsys.readouterr().err
    )


def test_a_layer_that_no_pyramid_helps(capsys):
    assert main(["bench", "--lengths", "7", "--device", "cpu"]) == 2
    assert "so attention stays dense: give a longer sequence" in capsys.readouterr().err


def test_a_model_that_stays_dense_is_not_profiled(here, capsys):
    assert main(["profile", f"{here}:deep_pair", "--topk", "64", "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert "1 Lighthouse blocks ran no rewritten attention" in said and "not worth it" in said
    assert main(["profile", f"{here}:compiled_pair", "--topk", "8", "--device", "cpu"]) == 2
    assert "compiled, with options of its own: leave out those given here" in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_is_profiled_under_the_default(here, capsys):
    assert main(["profile", f"{here}:deep_pair", "--device", "cpu", "--steps", "1"]) == 0
    assert "selection" in capsys.readouterr().out
    few = ["profile", f"{here}:pair", "--device", "cpu", "--steps", "1"]
    with pytest.warns(UserWarning, match=r"would leave none: dense_layers=\(0, -1\) is used there"):
        assert main(few) == 0
    capsys.readouterr()
    assert main([*few, "--dense-layers"]) == 0
    assert "selection" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("bench --heads 3 --groups 2", "groups=2 does not divide heads=3"),
        ("bench --heads 0", "heads=0: give an integer of at least 1"),
        ("profile --dim -3", "dim=-3: give an integer of at least 1"),
        ("profile --groups 0", "groups=0: give an integer of at least 1"),
        ("tune 1 --predict", "Give a longer sequence"),
    ],
)
def test_a_layer_that_there_is_not(command, said, capsys):
    name, *rest = command.split()
    short = {"bench": ["--lengths", "256", "--device", "cpu"], "profile": ["--length", "256", "--device", "cpu"]}
    assert main([name, *rest, *short.get(name, [])]) != 0
    captured = capsys.readouterr()
    assert said in captured.err + captured.out and "measure=0" not in captured.out


@pytest.mark.parametrize("command", ["explain", "profile --device cpu"])
def test_inputs_that_are_no_tuple(command, here, capsys):
    name, *rest = command.split()
    assert main([name, f"{here}:with_a_dict", *rest]) == 2
    assert "tuple" in capsys.readouterr().err


@pytest.mark.slow
def test_validate_a_function(here, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("It is a truth universally acknowledged. " * 50, encoding="utf-8")
    command = ["validate", f"{here}:model", "--text", "text.txt", "--length", "128", "--windows", "3", "--device", "cpu"]
    assert main([*command, *PYRAMID, "--dense-layers", "-1", "--passkey", "192", "--out", "found"]) == 0
    printed = capsys.readouterr().out
    assert "3 windows of 128 tokens" in printed and "2 of 3 attention calls rewritten" in printed
    assert "Is inference dense?" in printed and "passkeys found" in printed
    found = json.loads((tmp_path / "found" / "validation.json").read_text())
    assert found["passed"] and found["inference"]["rewritten"] == 0 and math.isfinite(found["lighthouse_loss"])
    assert found["passkey"]["lengths"] == [192] and (tmp_path / "found" / "passkey.png").exists()


@pytest.mark.sweep
def test_validate_a_folder(tmp_path, capsys):
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("abc" * 200, encoding="utf-8")
    command = ["validate", str(tmp_path / "model"), "--tokenizer", "bytes", "--text", str(text), "--length", "128"]
    assert main([*command, *PYRAMID, "--device", "cpu", "--dtype", "bfloat16"]) == 0
    assert "8 windows of 128 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["explain", "{here}:nothing"], "give package.module:function"),
        (["explain", "no.such.module:function"], "give package.module:function"),
        (["explain", "{here}:neither"], "it has to return (model, inputs)"),
        (["explain", "{here}:pair", "--topk", "0"], "topk=0 is below 1"),
        (["report", "missing.jsonl"], "missing.jsonl"),
        (["report", "{here}.py"], "is no log of a run"),
        (["validate", "{here}:neither", "--text", "{here}.py"], "it has to return a Module"),
        (["validate", "{here}:model", "--text", "{here}.py", "--device", "cpu"], "a window 2,049: give more text"),
        (["validate", "{here}:model", "--text", "missing.txt", "--device", "cpu"], "missing.txt"),
    ],
)
def test_mistakes_are_told_in_one_line(here, arguments, said, capsys):
    assert main([argument.replace("{here}", here) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lighthouse: ") and said in error and error.count("\n") == 1


def test_windows_of_a_text():
    text = list(range(100))
    rows = windows(text, length=9, count=5)
    assert rows.shape == (5, 10) and rows[0, 0] == 0 and rows[-1, -1] == 99
    assert all(row.tolist() == list(range(row[0], row[0] + 10)) for row in rows)
    assert windows(text, length=99, count=8).tolist() == [text]
    assert len(windows(text, length=49, count=8)) == 3, "they overlap by half at most"


def test_options_of_explain_are_laid_over_the_models_own(here, capsys):
    assert main(["explain", f"{here}:compiled_pair"]) == 0
    printed = capsys.readouterr().out
    assert "1 of 3 attention calls rewritten" in printed and "│ 64 │" in printed
    assert main(["explain", f"{here}:compiled_pair", "--topk", "4"]) == 0
    printed = capsys.readouterr().out
    assert "1 of 3 attention calls rewritten" in printed and "│ 48 │" in printed, "of three levels still, of pooling 2"
