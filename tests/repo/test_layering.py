"""Holds the code to its layout: who may import whom, file sizes, docstrings, and nothing that hides the compiler."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Top folder of the checkout -> package that pyproject.toml maps it to.
MAPPED = {"lighthouse_fx": "lighthouse_fx", "passes": "lighthouse_fx.passes", "kernels": "lighthouse_fx.kernels"}
ALLOWED = {
    "kernels": ("lighthouse_fx.kernels",),
    "passes": ("lighthouse_fx.passes", "lighthouse_fx.kernels"),
}
# The rooms of the package, lowest first: each may import those before it. Files beside them are the face, which may import all,
# but for the helpers that every room may import.
ROOMS = (
    *("kernels", "passes", "report", "runtime", "backend", "frontend", "functional"),
    *("measure", "evaluation", "training", "integrations", "cli"),
)
HELPERS = ("arguments", "extras", "version")
FILES = sorted(path for folder in MAPPED for path in (ROOT / folder).rglob("*.py"))
SCRIPTS = sorted(path for folder in ("examples", "benchmarks") for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of everything that `tree`, a module lying in `package`, imports, at any depth.

    `from lighthouse_fx import x` counts as `lighthouse_fx.x`, for x may be a layer of its own.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join(parts[: len(parts) - node.level + 1] + ([node.module] if node.module else []))
            if base == "lighthouse_fx":
                yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, base


def package_of(path: Path) -> str:
    folder, *inner = path.relative_to(ROOT).parent.parts
    return ".".join([MAPPED[folder], *inner])


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def test_imports_are_resolved_as_python_does():
    source = "from . import a\nfrom .b import c\nfrom .. import config\nfrom ..config import X\nimport torch.fx"
    found = [name for _, name in imported(ast.parse(source), "lighthouse_fx.passes")]
    assert found == [
        "lighthouse_fx.passes",
        "lighthouse_fx.passes.b",
        "lighthouse_fx.config",
        "lighthouse_fx.config",
        "torch.fx",
    ]


@pytest.mark.parametrize("folder", ALLOWED)
def test_lower_layers_import_nothing_higher(folder: str):
    wrong = [
        f"{name_of(path)}:{line} imports {name}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, name in imported(ast.parse(path.read_text()), package_of(path))
        if within(name, "lighthouse_fx") and not any(within(name, allowed) for allowed in ALLOWED[folder])
    ]
    assert not wrong, "\n".join(wrong)


def room_of(name: str) -> str:
    """The room of an absolute dotted name; "" for the face."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else ""


def test_rooms_import_only_rooms_below():
    rooms = {path.parent.name for path in (ROOT / "lighthouse_fx").glob("*/__init__.py")}
    assert rooms <= set(ROOMS), "give the new room its place in ROOMS"
    wrong = []
    for path in FILES:
        package = package_of(path)
        room = room_of(f"{package}.{path.stem}")
        for line, name in imported(ast.parse(path.read_text()), package):
            if not within(name, "lighthouse_fx") or not room or name.removeprefix("lighthouse_fx.").split(".")[0] in HELPERS:
                continue
            other = room_of(name)
            if not other or ROOMS.index(other) > ROOMS.index(room):
                wrong.append(f"{name_of(path)}:{line} imports {name}, which is not below {room}")
    assert not wrong, "\n".join(wrong)


def test_config_stands_alone():
    # The passes may import it, so it would be a way up for them if it imported more than the kernels.
    (path,) = (path for path in FILES if path.name == "config.py")
    names = [name for _, name in imported(ast.parse(path.read_text()), package_of(path))]
    assert not [n for n in names if within(n, "lighthouse_fx") and not within(n, "lighthouse_fx.kernels")]


def test_every_package_is_listed():
    # A sub-folder that pyproject.toml does not name would be missing from the wheel without a word.
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert {package: folder for folder, package in MAPPED.items()} == setuptools["package-dir"]
    listed = setuptools["packages"]
    assert len(listed) == len(set(listed))
    assert set(listed) == {package_of(path) for path in FILES}, "[tool.setuptools] packages has to name every folder"
    assert all((path.parent / "__init__.py").is_file() for path in FILES)


@pytest.mark.parametrize("path", FILES + SCRIPTS, ids=name_of)
def test_file_is_short_and_says_what_it_does(path: Path):
    source = path.read_text()
    limit = 600 if path.is_relative_to(ROOT / "kernels") else 400
    lines = len(source.splitlines())
    assert lines < limit, f"{name_of(path)} has {lines} lines, the limit is {limit}: split it by purpose"
    assert ast.get_docstring(ast.parse(source)), f"{name_of(path)} needs a docstring that says what it does"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_switches_the_compiler_off(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            spelled = ast.unparse(node)
            read = isinstance(node.ctx, ast.Load)  # as a cause that is told
            assert node.attr != "suppress_errors" or read, f"{name_of(path)}:{node.lineno} hides compile errors"
            assert not spelled.endswith(("compiler.disable", "_dynamo.disable")), f"{name_of(path)}:{node.lineno}"
        elif isinstance(node, ast.ImportFrom) and node.module in ("torch.compiler", "torch._dynamo"):
            assert all(alias.name != "disable" for alias in node.names), f"{name_of(path)}:{node.lineno}"
        elif isinstance(node, ast.keyword):
            assert node.arg != "suppress_errors", f"{name_of(path)}:{node.value.lineno} hides compile errors"


def test_import_needs_no_optional_package():
    # Triton, FlashAttention and what only draws or trains are extras: importing the package must do without them.
    script = """
import sys

FRAMEWORKS = {"transformers", "accelerate", "lightning", "litgpt", "torchtitan"}

class Without:  # a finder that does not see some packages, as if they were not installed
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"triton", "flash_attn", "matplotlib", "numpy", *FRAMEWORKS}:
            return None
        return self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import lighthouse_fx, lighthouse_fx.backend, lighthouse_fx.integrations, lighthouse_fx.kernels, lighthouse_fx.passes
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_folder_of_kernels_is_harmless_under_its_own_name():
    # transformers asks `kernels`, a library of Hugging Face's, for its version; in a checkout's root that is our folder.
    script = """
import torch, lighthouse_fx, lighthouse_fx.kernels
before = torch.ops.lighthouse_fx.select.default
import kernels
assert not hasattr(kernels, "select")
assert torch.ops.lighthouse_fx.select.default is before
q = torch.randn(1, 1, 64, 8)
lighthouse_fx.lighthouse_attention(q, q, q, config=lighthouse_fx.LighthouseConfig(levels=2, pooling=2, topk=2))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# --- private names of PyTorch ------------------------------------------------------------------------------------------

PRIVATE = ROOT / "kernels" / "torch_private.py"


def private_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything under `torch` that has a part with a leading underscore, imported or spelled out."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        for name in names:
            parts = name.split(".")
            if parts[0] == "torch" and any(part.startswith("_") and not part.endswith("__") for part in parts):
                yield node.lineno, name


def test_private_names_are_seen_however_they_are_spelled():
    source = (
        "import torch._dynamo\nfrom torch import _guards\nfrom torch.utils._pytree import x\ntorch._C.f()\n"
        "torch.__version__\nfrom torch.utils import checkpoint\nmine._private\nfrom ._torch import y"
    )
    assert {line for line, _ in private_names(ast.parse(source))} == {1, 2, 3, 4}


@pytest.mark.parametrize("path", [path for path in FILES if path != PRIVATE], ids=name_of)
def test_private_names_of_torch_lie_in_one_file(path: Path):
    found = [f"{name_of(path)}:{line} {name}" for line, name in private_names(ast.parse(path.read_text()))]
    assert not found, f"import from kernels/torch_private.py instead: {', '.join(found)}"


def test_a_private_name_that_is_gone_is_an_error_that_says_what_to_do():
    script = """
import torch._guards
del torch._guards.TracingContext
try:
    import lighthouse_fx
except ImportError as error:
    assert torch.__version__ in str(error) and "TracingContext" in str(error) and "Use torch" in str(error), error
else:
    raise SystemExit("no error")
"""
    # Everything of torch's own that imports the name has to have done so before.
    script = "import torch._dynamo.eval_frame, torch._inductor.compile_fx\n" + script
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
