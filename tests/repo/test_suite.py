"""The tests themselves: no test file is another's library, and a run is apart from the user's compiler caches."""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ASKS = """
import pathlib
from torch._inductor.runtime.cache_dir_utils import cache_dir, triton_cache_dir

def test_asks():
    (caches,) = pathlib.Path(__file__).parents[1].joinpath("build").iterdir()  # one for all workers
    assert cache_dir() == str(caches / "inductor")
    assert triton_cache_dir(0).startswith(str(caches))
"""


def test_no_test_file_is_another_ones_library():
    for path in TESTS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            wrong = [name for name in modules if name.startswith(("test_", "conftest", "tests"))]
            assert not wrong, f"{path.relative_to(TESTS)}:{node.lineno} imports {wrong}: move what it needs to tests/support"


def test_a_run_has_caches_of_its_own(tmp_path):
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "conftest.py").write_text((TESTS / "conftest.py").read_text())
    (folder / "test_asks.py").write_text(ASKS)
    own = ("TORCHINDUCTOR_", "TRITON_", "PYTEST_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    in_a_worker = ["-n", "1"] if importlib.util.find_spec("xdist") else []
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *in_a_worker, str(folder)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((tmp_path / "build").iterdir()) == [], "the caches are left behind"
