"""The Triton kernels against their plain twins: indices exactly, values within twice the plain op's error in that type.

Under Triton's interpreter on the CPU at small sizes, and on the GPU (mark `gpu`) at larger ones. The suites of select, gather,
scatter and the functional form run against the kernels, too (fixture `kernels`): here is what they leave out.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interpreter import skip_without_interpreter

from lighthouse_fx.kernels import Pyramid, reference

pytest.importorskip("triton")

@pytest.fixture(params=["interpreted", pytest.param("gpu", marks=pytest.mark.gpu)])
def triton_kernels(request):
    if request.param == "interpreted":
        skip_without_interpreter()
    from lighthouse_fx.kernels import triton as kernels

    if request.param == "gpu":
        torch.set_default_device("cuda")
    yield kernels
    torch.set_default_device(None)


@pytest.fixture
def stretch(triton_kernels):
    """How much longer sequences are on the GPU."""
    return 40 if torch.get_default_device().type == "cuda" else 1


def error(found, exact):
    return (found.double() - exact).norm()


def within_twice(kernel, plain, *tensors):
    """The kernel errs at most twice as much as plain PyTorch in the same type, by the float64 result."""
    exact = plain(*(x.double() for x in tensors))
    found, twin = kernel(*tensors), plain(*tensors)
    assert found.dtype == twin.dtype and found.shape == twin.shape
    assert found.isfinite().all()
    floor = exact.norm() * torch.finfo(torch.float32).eps  # where the plain op happens to be exact
    limit = 2 * error(twin, exact) + floor
    if twin.dtype == torch.bfloat16 and found.device.type == "cpu":
        limit = limit * 2  # Triton's interpreter cuts bits off where the GPU rounds
    assert error(found, exact) <= limit


def random_selection(pyramid, batch, groups):
    scores = [torch.rand(batch, groups, pyramid.length) for _ in range(2)]
    return reference.select_windows(*scores, pyramid)


SHAPES = [  # (p, L, k, quota)
    (2, 6, 4, 2),
    (3, 4, 5, 1),
    (4, 3, 6, 3),
    (8, 3, 2, None),
    (16, 2, 3, 1),
    (2, 1, 3, None),
    (4, 2, 7, 7),
]


@pytest.mark.parametrize("dtype", [torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_mask_is_told_from_the_causal_one(triton_kernels, stretch, dtype):
    tokens = 70 * stretch
    shown = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    hidden = 0 if dtype == torch.bool else torch.finfo(dtype).min
    causal = shown if dtype == torch.bool else torch.zeros(shown.shape, dtype=dtype).masked_fill(~shown, hidden)
    wrong = [(tokens - 1, 0), (0, tokens - 1), (17, 17), (tokens - 2, tokens - 1), (tokens - 1, tokens - 1)]
    masks = [causal, causal.expand(2, 3, -1, -1), causal.T.contiguous().T, causal.T, causal[None]]
    for at in wrong:
        masks.append(causal.repeat(2, 3, 1, 1))
        value = masks[-1][(1, 2, *at)]
        masks[-1][(1, 2, *at)] = ~value if dtype == torch.bool else -1.0
    if dtype != torch.bool:
        for value in (torch.nan, torch.inf, -torch.inf):
            masks.append(causal.clone())
            masks[-1][3, 5] = value
    found = [triton_kernels.is_causal_mask(mask).item() for mask in masks]
    assert found == [reference.is_causal_mask(mask).item() for mask in masks]
    assert found[:10] == [True, True, True, False, True, *[False] * 5]
    assert found[10:] in ([], [False, False, True])


@pytest.mark.parametrize("made", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lowest_number_of_another_dtype_hides_unless_it_is_float16s(triton_kernels, dtype, made):
    later = torch.ones(20, 20, dtype=torch.bool).triu(1)
    mask = torch.zeros(20, 20, dtype=dtype).masked_fill(later, torch.finfo(made).min)
    hides = made != torch.float16
    assert triton_kernels.is_causal_mask(mask).item() is reference.is_causal_mask(mask).item() is hides
    mask[3, 5] *= 0.99
    assert not triton_kernels.is_causal_mask(mask)
    assert not reference.is_causal_mask(mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("p, levels, topk, quota", SHAPES)
def test_every_pooling_and_depth(p, levels, topk, quota, dtype, triton_kernels, stretch):
    length = 139 * stretch + 2
    pyramid = Pyramid(length=length, levels=levels, pooling=p, topk=topk, quota=quota)
    entries, slots = random_selection(pyramid, 2, 1)
    tokens, rows = torch.randn(2, 2, length, 6).to(dtype), torch.randn(2, 2, entries.shape[2], 6).to(dtype)
    compare_rows(triton_kernels, tokens, rows, entries, slots, pyramid)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [16, 64, 80, 96, 128, 192, 256])
def test_every_head_dimension(dim, dtype, triton_kernels, stretch):
    length = 67 * stretch
    pyramid = Pyramid(length=length, levels=3, pooling=4, topk=4, quota=2)
    entries, slots = random_selection(pyramid, 1, 2)
    tokens, rows = torch.randn(1, length, 4, dim).to(dtype).transpose(1, 2), torch.randn(1, 4, entries.shape[2], dim)
    compare_rows(triton_kernels, tokens, rows.to(dtype), entries, slots, pyramid)
    for groups in (1, 2, 4):
        found = triton_kernels.norm_scores(tokens, groups, pyramid)
        torch.testing.assert_close(found, reference.norm_scores(tokens, groups, pyramid), rtol=1e-6, atol=0)


def compare_rows(kernels, tokens, rows, entries, slots, pyramid):
    within_twice(
        lambda x: kernels.gather(x, entries, pyramid), lambda x: reference.gather(x, entries, pyramid), tokens
    )
    within_twice(
        lambda x: kernels.gather_backward(x, slots, pyramid),
        lambda x: reference.gather_backward(x, slots, pyramid),
        rows,
    )
    for is_causal in (True, False):
        within_twice(
            lambda x, c=is_causal: kernels.scatter(x, slots, pyramid, is_causal=c),
            lambda x, c=is_causal: reference.scatter(x, slots, pyramid, is_causal=c),
            rows,
        )
        within_twice(
            lambda x, c=is_causal: kernels.scatter_backward(x, entries, pyramid, is_causal=c),
            lambda x, c=is_causal: reference.scatter_backward(x, entries, pyramid, is_causal=c),
            tokens,
        )


@pytest.mark.parametrize("keep_first", [True, False])
@pytest.mark.parametrize("p, levels, topk, quota", [*SHAPES, (4, 3, 64, 32), (2, 3, 10**9, None)])
def test_choice_is_the_twins(p, levels, topk, quota, keep_first, triton_kernels, stretch):
    """Many ties, and every index equal; `topk` beyond all windows, too."""
    length = (203 if topk < 1000 else 41) * stretch + 1
    pyramid = Pyramid(length=length, levels=levels, pooling=p, topk=topk, quota=quota, keep_first=keep_first)
    scores = [torch.randint(-3, 4, (2, 1, length)).float() for _ in range(2)]
    windows = [reference.window_scores(score, pyramid) for score in scores]
    for found, expected in zip(
        triton_kernels.choose_windows(*windows, pyramid), reference.choose_windows(*windows, pyramid), strict=True
    ):
        assert torch.equal(found, expected)


def test_kernels_compile_for_hopper():
    """Triton's own compiler, with no GPU: types and shapes that the interpreter takes and the compiler does not."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parents[2] / "support" / "compile_kernels.py"
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {line.split()[0] for line in done.stdout.splitlines()} == {
        "_collect_kernel",
        "_mask_kernel",
        "_score_kernel",
        "_select_kernel",
        "_spread_kernel",
    }
