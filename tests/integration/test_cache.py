"""An upgrade of the package must never be served a stale gradient from a warm compiler cache (pytorch#144344)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lighthouse_fx.kernels.revision import REVISION, source_digest

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import torch
import torch.nn.functional as F
torch.manual_seed(0)
weight = torch.randn(1, 1, 64, 4, requires_grad=True)
def loss(q):
    return F.scaled_dot_product_attention(q, q, q, is_causal=True).square().sum()
torch.compile(loss, backend="lighthouse", options={"levels": 2, "pooling": 4, "topk": 4})(weight).backward()
from torch._dynamo.utils import counters
import lighthouse_fx
assert lighthouse_fx.reports()[-1].rewritten == 1
hits = counters["aot_autograd"]["autograd_cache_hit"]
print(lighthouse_fx.kernels.__file__, hits, weight.grad.double().abs().sum().item())
"""


@pytest.fixture
def package(tmp_path):
    """A copy of the package that can be upgraded."""
    home = tmp_path / "site"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "lighthouse_fx", home / "lighthouse_fx", ignore=ignore)
    for part in ("passes", "kernels"):
        shutil.copytree(ROOT / part, home / "lighthouse_fx" / part, ignore=ignore)
    return home


def run(package, cache):
    environment = {**os.environ, "PYTHONPATH": str(package), "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True, cwd=package
    )
    where, hits, gradient = done.stdout.split()
    assert where.startswith(str(package))
    return int(hits), float(gradient)


def test_changed_backward_is_not_served_from_the_cache(package, tmp_path):
    cache = tmp_path / "cache"
    _, before = run(package, cache)
    hits, again = run(package, cache)
    assert again == before
    assert hits == 1, "the cache is not in use, so this test proves nothing"

    ops = package / "lighthouse_fx" / "kernels" / "ops" / "pyramid_ops.py"
    old = "return gather_backward(grad, entries, slots, ctx.length, *ctx.rest), None"
    assert old in ops.read_text()
    ops.write_text(ops.read_text().replace(old, old.replace("(grad,", "(3 * grad,")))
    hits, after = run(package, cache)
    assert hits == 0
    assert after == pytest.approx(3 * before, rel=1e-5)


def test_every_file_of_the_kernels_counts(tmp_path, monkeypatch):
    # The kernels import nothing else of the package (test_layering.py), so that these files are all that decide.
    folder = tmp_path / "copied_kernels"
    shutil.copytree(ROOT / "kernels", folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert source_digest("lighthouse_fx.kernels") == REVISION

    (folder / "__init__.py").write_text("")  # the package cannot be imported twice: its ops are registered once
    before = source_digest("copied_kernels")
    files = sorted(folder.rglob("*.py"))
    assert {path.parent for path in files} > {folder}, "no sub-folder: this test proves less than it says"
    for path in files:
        source = path.read_bytes()
        path.write_bytes(source + b"\n")
        assert source_digest("copied_kernels") != before, path.relative_to(folder)
        path.write_bytes(source)
    assert source_digest("copied_kernels") == before

    (folder / "triton" / "added.py").write_text("")
    assert source_digest("copied_kernels") != before
