"""What every test starts from: no compiled graphs, the default stage, a fixed seed; GPU tests only where there is a GPU."""

import importlib.util
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: its kernels run on the CPU, slowly

from lighthouse_fx import journal, stage
from lighthouse_fx.kernels import dispatch


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def clean_start():
    torch._dynamo.reset()
    journal._reports.clear()  # it keeps the last 256, and tests count what is added
    torch.manual_seed(0)
    assert stage.current.kind == "default", "an earlier test left a stage behind"
    yield
    assert stage.current.kind == "default", "this test left a stage behind"


def skip_without_interpreter():
    """Skip the test where Triton's kernels cannot run on the CPU."""
    if torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton, and a machine without a GPU")
    import interpreter

    if problem := interpreter.problem():
        pytest.skip(problem)


@pytest.fixture(params=["plain", "interpreted", pytest.param("gpu", marks=pytest.mark.gpu)])
def kernels(request, monkeypatch):
    """What serves the ops: the plain twins, Triton under its interpreter on the CPU, or Triton on the GPU.

    On the GPU every tensor that a test makes lies there. The interpreter serves eager calls; compiled graphs keep the op.
    """
    if request.param == "interpreted":
        skip_without_interpreter()
        monkeypatch.setattr(dispatch, "serving", lambda device: "Triton")
    if request.param == "gpu":
        torch.set_default_device("cuda")
        torch.manual_seed(0)
    yield request.param
    torch.set_default_device(None)
