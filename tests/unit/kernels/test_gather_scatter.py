"""Gather, scatter and their adjoints against the brute force, in float64 and rounded; layouts, bad numbers, bad memory."""

import brute_force
import pytest
import torch

from lighthouse_fx.kernels import REVISION

pytestmark = pytest.mark.usefixtures("kernels")
OPS = torch.ops.lighthouse_fx
FLOATS = [torch.float32, torch.bfloat16, torch.float16]

# (length, levels, pooling, topk, quota): tails, exactly one coarsest window, none, primes, every level count
SHAPES = [
    (37, 3, 2, 4, 2),
    (41, 2, 4, 3, None),
    (29, 3, 3, 2, 1),
    (64, 2, 8, 4, None),
    (16, 3, 4, 1, None),
    (45, 5, 2, 6, 3),
    (7, 3, 4, 2, None),
    (1, 1, 2, 1, None),
    (23, 1, 3, 5, None),
    (73, 3, 8, 1, None),
]


def selection(shape, batch=2, groups=2, keep_first=True, seed=0):
    """A selection by random scores, from the brute force alone: as lists, and as the op's two tensors."""
    length, levels, pooling, topk, quota = shape
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    scores = [torch.rand(batch, groups, length, generator=generator).tolist() for _ in range(2)]
    pyramid = dict(length=length, levels=levels, pooling=pooling, topk=topk, quota=quota, keep_first=keep_first)
    selections = brute_force.select_all(*scores, **pyramid)
    return selections, *brute_force.to_tensors(selections, length, levels, pooling)


def gather(x, entries, slots, shape):
    return OPS.gather(x, entries, slots, shape[1], shape[2], REVISION)


def gather_backward(grad, entries, slots, shape):
    return OPS.gather_backward(grad, entries, slots, *shape[:3], REVISION)


def scatter(out, entries, slots, shape, is_causal):
    return OPS.scatter(out, entries, slots, *shape[:3], is_causal, REVISION)


def scatter_backward(grad, entries, slots, shape, is_causal):
    return OPS.scatter_backward(grad, entries, slots, shape[1], shape[2], is_causal, REVISION)


def random(*size, dtype=torch.float64, grad=False):
    return torch.randn(*size, dtype=dtype, requires_grad=grad)


def exactly_rounded(found, exact, terms, dtype, unit=0.51):
    """Sums in fp32, rounded once: half a unit in the last place, and fp32's own error on the sum of magnitudes."""
    info = torch.finfo(dtype)
    budget = exact.abs() * info.eps * unit + info.tiny * info.eps + terms * torch.finfo(torch.float32).eps
    assert found.dtype == dtype
    assert ((found.double() - exact).abs() <= budget).all()


# --- values and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_first", [True, False])
@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gather_equals_brute_force(shape, heads, keep_first):
    selections, *index = selection(shape, keep_first=keep_first)
    x = random(2, heads, shape[0], 5, grad=True)
    found, expected = gather(x, *index, shape), brute_force.per_head(brute_force.gather, x, selections, shape[2])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    grad = random(*found.shape)
    (oracle,) = torch.autograd.grad(expected, x, grad)
    torch.testing.assert_close(torch.autograd.grad(found, x, grad)[0], oracle, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gather_backward(grad, *index, shape), oracle, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("keep_first", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scatter_equals_brute_force(shape, keep_first, is_causal):
    selections, *index = selection(shape, keep_first=keep_first)
    out = random(2, 4, index[0].shape[2], 5, grad=True)
    found = scatter(out, *index, shape, is_causal)
    expected = brute_force.per_head(brute_force.scatter, out, selections, shape[0], shape[2], is_causal)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    grad = random(*found.shape)
    (oracle,) = torch.autograd.grad(expected, out, grad)
    torch.testing.assert_close(torch.autograd.grad(found, out, grad)[0], oracle, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(scatter_backward(grad, *index, shape, is_causal), oracle, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backwards_are_the_adjoints(shape, is_causal):
    """<A x, y> = <x, A' y>, for each op and the op that is said to be its adjoint."""
    _, *index = selection(shape)
    tokens, rows = random(2, 2, shape[0], 4), random(2, 2, index[0].shape[2], 4)

    def same(left, right):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-11)

    same((gather(tokens, *index, shape) * rows).sum(), (tokens * gather_backward(rows, *index, shape)).sum())
    back = scatter_backward(tokens, *index, shape, is_causal)
    same((scatter(rows, *index, shape, is_causal) * tokens).sum(), (rows * back).sum())


@pytest.mark.parametrize("is_causal", [True, False])
def test_any_order_of_differentiation(is_causal, kernels):
    if kernels == "interpreted":
        pytest.skip("thousands of launches; the ops and their adjoints are compared above")
    shape = (11, 3, 2, 2, 1)
    _, *index = selection(shape, batch=1, groups=1)
    tokens, rows = random(1, 2, 11, 2, grad=True), random(1, 2, index[0].shape[2], 2, grad=True)
    for function, x in (
        (lambda x: gather(x, *index, shape), tokens),
        (lambda x: gather_backward(x, *index, shape), rows),
        (lambda x: scatter(x, *index, shape, is_causal), rows),
        (lambda x: scatter_backward(x, *index, shape, is_causal), tokens),
    ):
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(lambda x, function=function: function(x).pow(2), x)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3], SHAPES[5]], ids=str)
def test_narrow_types_round_once(shape, dtype, is_causal, kernels):
    """Means and sums are taken in fp32 and rounded once at the end, whatever the type that they come in."""
    # Triton's interpreter cuts bits off where the GPU rounds.
    unit = 1.01 if kernels == "interpreted" and dtype == torch.bfloat16 else 0.51
    selections, *index = selection(shape)
    x = random(2, 4, shape[0], 5).to(dtype)
    exact = x.double().requires_grad_()
    expected = brute_force.per_head(brute_force.gather, exact, selections, shape[2])
    exactly_rounded(gather(x, *index, shape), expected, x.abs().max().double(), dtype, unit)
    grad = random(*expected.shape).to(dtype)
    (oracle,) = torch.autograd.grad(expected, exact, grad.double())
    exactly_rounded(gather_backward(grad, *index, shape), oracle, shape[1] * grad.abs().max().double(), dtype, unit)

    exact = grad.double().requires_grad_()
    expected = brute_force.per_head(brute_force.scatter, exact, selections, shape[0], shape[2], is_causal)
    exactly_rounded(scatter(grad, *index, shape, is_causal), expected, shape[1] * grad.abs().max().double(), dtype, unit)
    (oracle,) = torch.autograd.grad(expected, exact, x.double())
    terms = shape[2] ** (shape[1] - 1) * x.abs().max().double()
    exactly_rounded(scatter_backward(x, *index, shape, is_causal), oracle, terms, dtype, unit)


# --- what concerns what -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_a_number_goes_only_where_it_belongs(bad, dtype, kernels):
    """NaN, infinity or a huge number in one row spoils what is computed from that row and not one bit of the rest."""
    shape = (43, 3, 3, 3, None)
    for seed in range(1 if kernels == "interpreted" else 4):
        (((chosen,),), *index) = selection(shape, batch=1, groups=1, seed=seed)
        tokens, rows = random(1, 1, 43, 3).to(dtype), random(1, 1, len(chosen), 3).to(dtype)
        windows = [range(i * 3**l, (i + 1) * 3**l) for l, i in chosen]
        for is_causal in (True, False):
            reached = [brute_force.reached(entry, 43, 3, is_causal) for entry in chosen]
            for function, x, concerns in (
                (lambda x, i=index: gather(x, *i, shape), tokens, lambda j, s, of=windows: j in of[s]),
                (lambda x, i=index: gather_backward(x, *i, shape), rows, lambda s, j, of=windows: j in of[s]),
                (lambda x, i=index, c=is_causal: scatter(x, *i, shape, c), rows, lambda s, j, to=reached: j in to[s]),
                (
                    lambda x, i=index, c=is_causal: scatter_backward(x, *i, shape, c),
                    tokens,
                    lambda j, s, to=reached: j in to[s],
                ),
            ):
                before = function(x)
                for j in torch.randint(0, x.shape[2], (6,)).tolist():
                    spoiled = x.clone()
                    spoiled[0, 0, j] = bad
                    after = function(spoiled)
                    for i in range(after.shape[2]):
                        same = torch.equal(after[0, 0, i], before[0, 0, i])
                        assert same != concerns(j, i), (j, i)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_holes_and_at_most_one_contribution_per_level(shape, is_causal):
    _, *index = selection(shape)
    contributions = scatter(torch.ones(2, 2, index[0].shape[2], 1), *index, shape, is_causal)
    assert contributions.min() >= 1
    assert contributions.max() <= shape[1]


def test_holes_without_keep_first():
    """The research code's selection: window 0 is a leaf, and no token before its end gets anything."""
    shape = (32, 3, 2, 1, None)
    scores = [[[[float(token) for token in range(32)]]]] * 2
    pyramid = dict(length=32, levels=3, pooling=2, topk=1, keep_first=False)
    index = brute_force.to_tensors(brute_force.select_all(*scores, **pyramid), 32, 3, 2)
    contributions = scatter(torch.ones(1, 1, index[0].shape[2], 1), *index, shape, True).flatten()
    assert contributions[:3].tolist() == [0, 0, 0] and contributions[3:].min() >= 1


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def poisoned_memory():
    """Memory that is allocated and not written holds NaN, so that reading it shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("keep_first", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_poisoned_memory(shape, keep_first, is_causal, poisoned_memory):
    assert torch.empty(3).isnan().all()
    selections, *index = selection(shape, keep_first=keep_first)
    x, out = random(2, 2, shape[0], 3, grad=True), random(2, 2, index[0].shape[2], 3, grad=True)
    found = gather(x, *index, shape), scatter(out, *index, shape, is_causal)
    expected = (
        brute_force.per_head(brute_force.gather, x, selections, shape[2]),
        brute_force.per_head(brute_force.scatter, out, selections, shape[0], shape[2], is_causal),
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    grads = [random(*y.shape) for y in found]
    found, expected = (torch.autograd.grad(y, [x, out], grads) for y in (found, expected))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "turned"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_strided_inputs(dtype, layout):
    shape = SHAPES[0]
    _, *index = selection(shape)

    def strided(x):
        if layout == "transposed":  # as models have it: [B, N, H, D] seen as [B, H, N, D]
            y = x.transpose(1, 2).contiguous().transpose(1, 2)
        elif layout == "turned":
            y = x.transpose(2, 3).contiguous().transpose(2, 3)
        elif layout == "sliced":
            y = torch.cat([x, x], -1)[..., : x.shape[-1]]
        else:
            y = x[:, :1].expand_as(x)
        assert not y.is_contiguous()
        return y

    for function, count in (
        (lambda x: gather(x, *index, shape), shape[0]),
        (lambda x: gather_backward(x, *index, shape), index[0].shape[2]),
        (lambda x: scatter(x, *index, shape, True), index[0].shape[2]),
        (lambda x: scatter_backward(x, *index, shape, True), shape[0]),
    ):
        x = strided(random(2, 4, count, 6).to(dtype))
        assert torch.equal(function(x), function(x.contiguous()))


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, *FLOATS])
def test_bitwise_the_same_twice(dtype, is_causal):
    shape = SHAPES[5]
    _, *index = selection(shape)
    tokens, rows = random(2, 4, shape[0], 6).to(dtype), random(2, 4, index[0].shape[2], 6).to(dtype)
    for function in (
        lambda: gather(tokens, *index, shape),
        lambda: gather_backward(rows, *index, shape),
        lambda: scatter(rows, *index, shape, is_causal),
        lambda: scatter_backward(tokens, *index, shape, is_causal),
    ):
        assert torch.equal(function(), function())


# --- registration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1], SHAPES[6], SHAPES[8]], ids=str)
def test_opcheck(shape, is_causal):
    length, levels, pooling, *_ = shape
    _, *index = selection(shape)
    tokens = random(2, 4, length, 5, dtype=torch.float32, grad=True)
    rows = random(2, 4, index[0].shape[2], 5, dtype=torch.float32, grad=True)
    opcheck = torch.library.opcheck
    opcheck(OPS.gather.default, (tokens, *index, levels, pooling, REVISION))
    opcheck(OPS.gather_backward.default, (rows, *index, length, levels, pooling, REVISION))
    opcheck(OPS.scatter.default, (rows, *index, length, levels, pooling, is_causal, REVISION))
    opcheck(OPS.scatter_backward.default, (tokens, *index, levels, pooling, is_causal, REVISION))


@pytest.mark.parametrize("scorer", ["norm", "dilated"])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[6], SHAPES[8]], ids=str)
def test_opcheck_select(shape, scorer):
    length, levels, pooling, topk, quota = shape
    q, k, v = (random(2, heads, length, 4, dtype=torch.float32, grad=True) for heads in (4, 2, 2))
    arguments = (q, k, v, levels, pooling, topk, quota or 0, True, True, scorer, 4, True, None, REVISION)
    torch.library.opcheck(OPS.select.default, arguments)
