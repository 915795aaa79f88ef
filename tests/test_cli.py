"""The command line, on a CPU and at sizes that take seconds."""

import json

import pytest

from lighthouse_fx.cli import main


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


def test_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "--help"])
    assert stopped.value.code == 0
    assert "dense attention" in capsys.readouterr().out
