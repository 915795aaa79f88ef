"""What every test starts from: no compiled graphs, the default stage, a fixed seed; GPU tests only where there is a GPU.

A run has compiler caches of its own, which its workers share: a damaged cache of the user's cannot fail a test, nor a run
that was killed the next one.
"""

import os
import sys
import tempfile
import zlib
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    _build = Path(__file__).parents[1] / "build"
    _build.mkdir(exist_ok=True)
    # It is removed when this process ends; the workers of pytest-xdist inherit the names.
    _caches = tempfile.TemporaryDirectory(prefix="test-caches-", dir=_build, ignore_cleanup_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{_caches.name}/inductor"
    os.environ["TRITON_CACHE_DIR"] = f"{_caches.name}/triton"

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: its kernels run on the CPU, slowly

sys.path.append(str(Path(sys.prefix) / "frameworks"))  # litgpt and torchtitan, which `make` puts there: frameworks.txt

from torch._inductor import codecache  # sets both variables above where they are not set

from lighthouse_fx.kernels.ops import dispatch
from lighthouse_fx.runtime import journal, stage

# Inductor has its precompiled headers beside the user's cache, whatever the variables say.
codecache._HEADER_DIR = os.path.join(os.environ["TORCHINDUCTOR_CACHE_DIR"], "precompiled_headers")
codecache._HEADER_LOCK_DIR = os.path.join(codecache._HEADER_DIR, "locks")


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by marks
def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    sample_interpreted(items)


def sample_interpreted(items):
    """Marks as sweeps the cases of a test under Triton's interpreter but its first and one in four, which a checksum picks.

    The interpreter is a hundred times slower than the plain twins, which run every case each time.
    """
    begun = set()
    for item in items:
        test, _, case = item.nodeid.partition("[")
        if "interpreted" not in case.rstrip("]").split("-"):
            continue
        if test in begun and zlib.crc32(item.nodeid.encode()) % 4:
            item.add_marker(pytest.mark.sweep)
        begun.add(test)


@pytest.fixture(autouse=True)
def clean_start():
    torch._dynamo.reset()
    journal._reports.clear()  # it keeps the last 256, and tests count what is added
    torch.manual_seed(0)
    assert stage.current.kind == "default", "an earlier test left a stage behind"
    yield
    assert stage.current.kind == "default", "this test left a stage behind"


@pytest.fixture
def float64_through_inductor(monkeypatch, tmp_path):
    """Attention trains in float64 on the CPU through Inductor, too: in torch 2.11 without the fused kernel.

    It takes that kernel's log-sum-exp for float32, which it is not, so that Inductor's backward fails, Lighthouse or not.
    Its caches do not tell graphs with that kernel from graphs without it, so that they begin empty.
    """
    q = torch.empty(1, 1, 2, 8, dtype=torch.float64, device="meta")
    _, log_sum_exp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)
    right = log_sum_exp.dtype == q.dtype
    if not right:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with nullcontext() if right else sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.fixture(params=["plain", "interpreted", pytest.param("gpu", marks=pytest.mark.gpu)])
def kernels(request, monkeypatch):
    """What serves the ops: the plain twins, Triton under its interpreter on the CPU, or Triton on the GPU.

    On the GPU every tensor that a test makes lies there. The interpreter serves eager calls; compiled graphs keep the op.
    """
    if request.param == "interpreted":
        from interpreter import skip_without_interpreter

        skip_without_interpreter()
        monkeypatch.setattr(dispatch, "serving", lambda device: "Triton")
    if request.param == "gpu":
        torch.set_default_device("cuda")
        torch.manual_seed(0)
    yield request.param
    torch.set_default_device(None)


@pytest.fixture
def torchtitan(monkeypatch):
    """Undoes what torchtitan does to PyTorch: importing it replaces a function, its compile call changes Dynamo's settings."""
    monkeypatch.setattr(FakeTensorMode, "__init__", FakeTensorMode.__init__)
    names = ("capture_scalar_outputs", "skip_fwd_side_effects_in_bwd_under_checkpoint")
    pytest.importorskip("torchtitan.models.llama3", reason="torchtitan is not installed")
    with torch._dynamo.config.patch({name: getattr(torch._dynamo.config, name) for name in names}):
        yield
