"""What every test starts from: no compiled graphs, the default stage, a fixed seed; GPU tests only where there is a GPU."""

import pytest
import torch

from lighthouse_fx import stage


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def clean_start():
    torch._dynamo.reset()
    torch.manual_seed(0)
    assert stage.current.kind == "default", "an earlier test left a stage behind"
    yield
    assert stage.current.kind == "default", "this test left a stage behind"
