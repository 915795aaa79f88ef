"""Tensor subclasses: rewritten where they can run the operators, dense with the reason where they cannot."""

import pytest
import torch
from graphs import heads, only_call
from small_models import CONFIG, FIELDS, causal, passes_only
from torch import distributed
from torch._dynamo.backends.debugging import aot_eager
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh
from torch.distributed.tensor.experimental import register_sharding
from torch.testing._internal.two_tensor import TwoTensor

from lighthouse_fx import backend, lighthouse_attention


class Particular(TwoTensor):
    """Runs only the operators of PyTorch."""

    @staticmethod
    def __tensor_unflatten__(inner_tensors, meta, outer_size, outer_stride):
        return Particular(inner_tensors["a"], inner_tensors["b"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func.namespace == "lighthouse_fx":
            return NotImplemented
        return super().__torch_dispatch__(func, types, args, kwargs)


def pair(kind):
    return kind(*(heads(grad=False, dtype=torch.float64) for _ in range(2))).requires_grad_()


def test_a_subclass_that_runs_the_operators_is_rewritten(monkeypatch):
    monkeypatch.setattr(backend, "compile_fx", lambda gm, inputs, config_patches: aot_eager(gm, inputs))
    q, k, v = (pair(TwoTensor) for _ in range(3))
    found = torch.compile(causal, backend="lighthouse", options=FIELDS)(q, k, v)
    for part in ("a", "b"):
        expected = lighthouse_attention(*(getattr(x, part) for x in (q, k, v)), is_causal=True, config=CONFIG)
        torch.testing.assert_close(getattr(found, part), expected)


def test_a_subclass_that_cannot_stays_dense():
    _, call = only_call(causal, *(pair(Particular) for _ in range(3)))
    assert call.refusal is not None
    assert "Particular, which cannot run Lighthouse's operators" in call.refusal.reason and call.refusal.remedy


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    store = distributed.FileStore(str(tmp_path_factory.mktemp("store") / "file"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)

    @register_sharding(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default)  # PyTorch has this rule for CUDA
    def rule(*args, **kwargs):
        return [([p] * 2, [p if n < 3 else None for n in range(len(args))]) for p in (Replicate(), Shard(0), Shard(1))]

    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def sharded(mesh):
    return [DTensor.from_local(heads(grad=False), mesh, [Shard(1)]).requires_grad_() for _ in range(3)]


def test_dtensors_stay_dense(mesh):
    q, k, v = sharded(mesh)
    found = torch.compile(causal, backend=passes_only, options=FIELDS)(q, k, v)
    torch.testing.assert_close(found.to_local(), causal(*(x.to_local() for x in (q, k, v))))
    _, call = only_call(causal, q, k, v)
    assert call.refusal is not None and "query is a DTensor" in call.refusal.reason


def test_the_function_says_what_to_give_instead(mesh):
    with pytest.raises(TypeError, match=r"query is a DTensor.*query\.to_local\(\)"):
        lighthouse_attention(*sharded(mesh), is_causal=True, config=CONFIG)
