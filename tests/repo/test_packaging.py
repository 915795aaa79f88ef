"""Builds the sdist and, from it, the wheel; uses wheel and editable install in a clean environment, outside the checkout."""

import configparser
import email
import os
import shutil
import subprocess
import sys
import tarfile
import textwrap
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
# The tests share what is built, so they stay in one worker.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("packaging")]

# What lies in the checkout but is no part of the source.
LEFT_OUT = (".*", "build", "dist", "out", "*.egg-info", "__pycache__")

USE = """
    import importlib.metadata
    import sys
    from pathlib import Path

    import torch
    from torch import nn

    here = Path(sys.prefix).resolve()
    # Two distributions of one name may be in reach (the checkout's own, too): the installed wheel has to be first.
    assert Path(importlib.metadata.distribution("lighthouse-fx").locate_file("")).resolve().is_relative_to(here)
    assert "lighthouse" in torch._dynamo.list_backends(), torch._dynamo.list_backends()
    assert not [name for name in sys.modules if name.startswith("lighthouse_fx")], "listing must not import the package"


    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(16, 48, bias=False)
            self.out = nn.Linear(16, 16, bias=False)

        def forward(self, x):  # [B, N, E]
            q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)  # each [B, H, N, D]
            o = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.out(o.transpose(1, 2).flatten(2))


    torch.manual_seed(0)
    model = Block()
    x = torch.randn(1, 256, 16)
    with torch.no_grad():
        before = model(x)
    # Coarsest level 64 windows, 16 of 256 tokens' windows refined: far below the length, so it is rewritten.
    compiled = torch.compile(
        model, backend="lighthouse", fullgraph=True, options={"levels": 2, "pooling": 4, "topk": 16}
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    compiled(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    assert torch.equal(model(x), before), "the eager model changed"

    import lighthouse_fx

    for name in sys.argv[1:]:  # every package
        file = importlib.import_module(name).__file__
        assert Path(file).resolve().is_relative_to(here), file
    assert (Path(lighthouse_fx.__file__).parent / "py.typed").is_file()
    calls = [call for graph in lighthouse_fx.reports() for call in graph.calls]
    assert [call.rewritten for call in calls] == [True], calls

    optimizer.step()
    with torch.no_grad():
        assert not torch.equal(model(x), before), "the step changed nothing"
    print("used", lighthouse_fx.__file__)
"""


class Built(NamedTuple):
    """The two archives, made once for this module."""

    sdist: Path
    wheel: Path


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that must succeed, without this run's own paths in its environment."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    env = {name: value for name, value in os.environ.items() if name not in hidden} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("packaging")
    source = folder / "source"
    # Building writes into the source tree, so it gets a copy, and nothing left over from an earlier build.
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*LEFT_OUT))
    # The wheel is made from the sdist, as an installer would: what the sdist lacks, the wheel lacks.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", source, cwd=folder)
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    (wheel,) = (folder / "dist").glob("*.whl")
    return Built(sdist, wheel)


def modules(folder: str) -> set[str]:
    """Every Python file below a top folder of the checkout, those of its sub-packages as well."""
    found = {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.py")}
    assert f"{folder}/__init__.py" in found
    return found


def test_sdist_holds_every_module(built: Built):
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = modules("lighthouse_fx") | modules("passes") | modules("kernels")
    assert expected | {"lighthouse_fx/py.typed", "pyproject.toml", "LICENSE", "README.md"} <= names


def test_wheel_holds_every_module_and_nothing_else(built: Built):
    with zipfile.ZipFile(built.wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    mapped = {f"lighthouse_fx/{name}" for name in modules("passes") | modules("kernels")}
    assert names == modules("lighthouse_fx") | mapped | {"lighthouse_fx/py.typed"}


def test_wheel_metadata(built: Built):
    with zipfile.ZipFile(built.wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        (entry_points,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
        fields = email.message_from_bytes(archive.read(metadata))
        registered = archive.read(entry_points).decode()
    assert fields["Name"] == "lighthouse-fx"
    assert fields["License-Expression"] == "BSD-3-Clause"
    assert str(fields.get_payload()).strip(), "README.md is the description"
    needed = {line for line in fields.get_all("Requires-Dist", []) if "extra ==" not in line}
    assert {line.split(">")[0] for line in needed} == {"torch", "networkx", "rich"}
    frameworks = {"huggingface", "accelerate", "lightning", "litgpt", "torchtitan"}
    extras = {"triton", "flash-attn", "flash-attn-4", "gla", "plot", "tensorboard", "examples", "dev"} | frameworks
    assert extras <= set(fields.get_all("Provides-Extra", []))
    sections = configparser.ConfigParser()
    sections.read_string(registered)
    assert {name: dict(entries) for name, entries in sections.items() if entries} == {
        "torch_dynamo_backends": {"lighthouse": "lighthouse_fx.backend:lighthouse"},
        "console_scripts": {"lighthouse": "lighthouse_fx.cli.main:main"},
    }


def environment(home: Path) -> Path:
    """The interpreter of a clean environment, which has torch and the other dependencies, and not this checkout."""
    venv.create(home, symlinks=True, with_pip=False)
    # By path alone, so nothing is downloaded. Path files inside those folders are not read then, so the checkout's
    # editable install stays out of reach.
    outside = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site,) = home.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text("\n".join(outside) + "\n")
    return home / "bin" / "python"


def use(python: Path, folder: Path) -> str:
    """Output of a script that trains with the package, from a folder that holds nothing else."""
    away = folder / "away"
    away.mkdir()
    script = folder / "use.py"
    script.write_text(textwrap.dedent(USE))
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    return run(python, "-W", "ignore", script, *packages, cwd=away)


def test_installed_wheel_trains_outside_the_checkout(built: Built, tmp_path: Path):
    python = environment(tmp_path / "env")
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--no-deps", "--no-index", built.wheel, cwd=tmp_path)
    assert use(python, tmp_path).startswith("used")


def test_editable_install_trains_and_follows_the_source(built: Built, tmp_path: Path):
    python = environment(tmp_path / "env")
    source = tmp_path / "env" / "source"
    with tarfile.open(built.sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (tmp_path / built.sdist.name.removesuffix(".tar.gz")).rename(source)
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--no-deps", "--no-index", "--no-build-isolation", "--editable", source, cwd=tmp_path)
    assert use(python, tmp_path).startswith(f"used {source}")
    (source / "kernels" / "ops" / "__init__.py").write_text("edited = True\n")
    run(python, "-c", "from lighthouse_fx.kernels import ops; assert ops.edited", cwd=tmp_path / "away")
