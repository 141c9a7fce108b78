"""Properties that hold for any shape, rank, strength and data: hypothesis looks
for a counterexample.
"""

from contextlib import nullcontext

import pytest
import torch
from conftest import basis
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dmr
from dmr.methods.projection import project
from dmr.methods.subspace import Sketch, grow
from dmr.routing.modification import Dense, LowRank, add_all

torch.set_num_threads(1)
settings.register_profile(
    "dmr", deadline=None, max_examples=25, derandomize=True, database=None
)
settings.load_profile("dmr")

ROUTINGS = ["shared", "decoupled", "denominator", "displacement"]
sizes, seeds, alphas = (
    st.integers(1, 12),
    st.integers(0, 10_000),
    st.floats(0.0, 1.0),
)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def draw(*shape, seed, dtype=torch.float64):
    return torch.randn(
        *shape,
        generator=torch.Generator().manual_seed(seed),
        dtype=torch.float64,
    ).to(dtype)


@given(out=sizes, fan_in=sizes, r=sizes, seed=seeds, alpha=alphas)
def test_projection_is_idempotent_and_conserves_energy(
    out, fan_in, r, seed, alpha
):
    g, U = draw(out, fan_in, seed=seed), basis(fan_in, r, seed + 1)
    free = project(g, U)
    torch.testing.assert_close(project(free, U), free)
    torch.testing.assert_close(
        free.square().sum() + (g @ U).square().sum(), g.square().sum()
    )
    torch.testing.assert_close(
        project(g, U, alpha=alpha) @ U, (1 - alpha) * g @ U
    )
    torch.testing.assert_close(
        project(g, U, alpha=alpha), (1 - alpha) * g + alpha * free
    )


def reference(W, grads, P, routing, alpha, lr, betas, eps):
    "Adam in float64 with a dense projector."
    m, v = torch.zeros_like(W), torch.zeros_like(W)
    for t, g in enumerate(grads, 1):
        edited = g - alpha * g @ P
        to_m = edited if routing in ("shared", "decoupled") else g
        to_v = edited if routing in ("shared", "denominator") else g
        m, v = (
            betas[0] * m + (1 - betas[0]) * to_m,
            betas[1] * v + (1 - betas[1]) * to_v**2,
        )
        u = m / (1 - betas[0] ** t) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
        W = W - lr * (u - alpha * u @ P if routing == "displacement" else u)
    return W


@pytest.mark.parametrize("routing", ROUTINGS)
@given(
    out=sizes,
    fan_in=sizes,
    r=sizes,
    seed=seeds,
    alpha=alphas,
    beta1=st.sampled_from([0.0, 0.01, 0.5, 0.9]),
    beta2=st.sampled_from([0.9, 0.99, 0.999]),
    fused=st.booleans(),
    check=st.booleans(),
)
def test_a_routing_is_its_float64_reference(
    routing, out, fan_in, r, seed, alpha, beta1, beta2, fused, check
):
    layer = nn.Linear(fan_in, out, bias=False, dtype=torch.float64)
    U, start = basis(fan_in, r, seed), layer.weight.detach().clone()
    optimizer = torch.optim.Adam(
        layer.parameters(), lr=1e-2, betas=(beta1, beta2), eps=1e-3, fused=fused
    )
    with (
        pytest.warns(UserWarning, match="spans all")
        if U.shape[1] == fan_in
        else nullcontext()
    ):
        dmr.MomentRouter(
            layer,
            optimizer,
            dmr.Projection(bases={"weight": U}),
            routing,
            alpha,
            check_finite=check,
        )
    grads = [draw(out, fan_in, seed=seed + 10 + t) for t in range(5)]
    for g in grads:
        layer.weight.grad = g.clone()
        optimizer.step()
        torch.testing.assert_close(layer.weight.grad, g, rtol=1e-12, atol=1e-13)
    expected = reference(
        start, grads, U @ U.T, routing, alpha, 1e-2, (beta1, beta2), 1e-3
    )
    torch.testing.assert_close(
        layer.weight.detach(), expected, rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("dtype", DTYPES)
@given(out=sizes, fan_in=st.integers(2, 12), r=sizes, seed=seeds, alpha=alphas)
def test_the_corrected_moment_follows_float64_within_the_types_rounding(
    dtype, out, fan_in, r, seed, alpha
):
    layer = nn.Linear(fan_in, out, bias=False).to(dtype)
    U = basis(fan_in, min(r, fan_in - 1), seed)
    optimizer = torch.optim.AdamW(
        layer.parameters(), lr=1e-3, betas=(0.9, 0.99)
    )
    dmr.MomentRouter(
        layer,
        optimizer,
        dmr.Projection(bases={"weight": U}),
        "decoupled",
        alpha,
    )
    m = torch.zeros(out, fan_in, dtype=torch.float64)
    for t in range(3):
        layer.weight.grad = draw(out, fan_in, seed=seed + t, dtype=dtype)
        g = layer.weight.grad.double()
        optimizer.step()
        m = 0.9 * m + 0.1 * (g - alpha * g @ U @ U.T)
    got = optimizer.state[layer.weight]["exp_avg"].double()
    tolerance = 20 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-12
    # relative to the size of a gradient's share in m
    assert (got - m).norm() <= tolerance * max(m.norm().item(), 0.3)
    assert optimizer.state[layer.weight]["exp_avg"].dtype == dtype


@given(
    shape=st.sampled_from([(4, 6), (4, 3, 2), (4, 2, 3, 1), (4, 2, 1, 1, 3)]),
    r=st.integers(1, 6),
    seed=seeds,
    alpha=alphas,
)
def test_low_rank_edits_of_any_shape_equal_their_dense_form(
    shape, r, seed, alpha
):
    x = draw(*shape, seed=seed)
    fan_in = x[0].numel()
    edit = LowRank(
        draw(4, min(r, fan_in), seed=seed + 1), basis(fan_in, r, seed + 2)
    )
    expected = x - alpha * edit.dense(x)
    for how in (edit, Dense(edit.dense(x))):
        y = x.clone()
        how.add_to(y, -alpha)
        torch.testing.assert_close(y, expected)


@given(
    shapes=st.lists(
        st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=12
    ),
    r=st.integers(1, 3),
    seed=seeds,
    on_device=st.booleans(),
)
def test_stacking_small_products_changes_nothing(shapes, r, seed, on_device):
    edits, onto, scales = {}, {}, {}
    factors = (
        [
            torch.tensor(0.3, dtype=torch.float64),
            torch.tensor(-1.2, dtype=torch.float64),
        ]
        if on_device
        else [0.3, -1.2]
    )
    for i, (out, fan_in) in enumerate(shapes):
        name = str(i)
        U = basis(fan_in, r, seed + i)
        edits[name], onto[name] = (
            LowRank(draw(out, U.shape[1], seed=seed + 50 + i), U),
            draw(out, fan_in, seed=seed + 99 + i),
        )
        scales[name] = factors[i % 2]
    expected = {
        name: x + float(scales[name]) * edits[name].dense(x)
        for name, x in onto.items()
    }
    add_all(edits, onto, scales)
    for name, x in onto.items():
        torch.testing.assert_close(x, expected[name])


@given(
    shapes=st.lists(
        st.tuples(st.integers(1, 40), st.just(0)), min_size=1, max_size=5
    ),
    dim=st.integers(2, 60),
    size=st.integers(1, 20),
    decay=st.floats(0.0, 2.0),
    seed=seeds,
    data=st.data(),
)
def test_a_sketch_never_overstates_is_bounded_and_merges_in_any_order(
    shapes, dim, size, decay, seed, data
):
    scale = torch.arange(1, dim + 1, dtype=torch.float64) ** -decay
    parts = [
        draw(n, dim, seed=seed + i) * scale for i, (n, _) in enumerate(shapes)
    ]
    A = torch.cat(parts)
    sketches = []
    for part in parts:
        sketches.append(Sketch(dim, size, dtype=torch.float64))
        sketches[-1].update(part)
    merged, again = (
        Sketch(dim, size, dtype=torch.float64),
        Sketch(dim, size, dtype=torch.float64),
    )
    for i in data.draw(st.permutations(range(len(parts)))):
        merged.merge(sketches[i])
    again.update(A)
    S = A.T @ A
    error = torch.linalg.eigvalsh(S - merged.second_moment())
    whole = S.trace()
    # nothing is credited that was not there
    assert error.min() >= -1e-7 * whole
    # and nothing lost beyond what the sketch says
    assert error.max() <= merged.gap() + 1e-7 * whole
    # any order, any split: the same sums
    torch.testing.assert_close(merged.sums, again.sums)
    torch.testing.assert_close(merged.energy, whole)
    if len(A) <= 2 * merged.size or merged.exact:
        assert merged.gap() <= 1e-6 * whole  # few rows: all of them


@given(
    fan_in=st.integers(2, 24),
    ranks=st.lists(st.integers(1, 8), min_size=1, max_size=5),
    cap=st.integers(1, 24),
    seed=seeds,
)
def test_a_subspace_grows_orthonormal_below_its_cap_and_says_its_loss(
    fan_in, ranks, cap, seed
):
    U, energy, seen = (
        torch.zeros(fan_in, 0, dtype=torch.float64),
        torch.zeros(0, dtype=torch.float64),
        [],
    )
    for i, rank in enumerate(ranks):
        B = (
            draw(3 * fan_in, min(rank, fan_in), seed=seed + i)
            @ basis(fan_in, rank, seed + 100 + i).T
        )
        before = [
            ((b @ U).square().sum() / b.square().sum()).item() for b in seen
        ]
        step = grow(U, energy, B, rank=rank, max_rank=cap)
        assert step.U.shape[1] <= min(cap, fan_in) and step.added <= rank
        torch.testing.assert_close(
            step.U.T @ step.U,
            torch.eye(step.U.shape[1], dtype=torch.float64),
            rtol=0,
            atol=1e-9,
        )
        if step.U.shape[1] == U.shape[1] + step.added:  # below the cap
            assert step.lost == 0.0
            after = [
                ((b @ step.U).square().sum() / b.square().sum()).item()
                for b in seen
            ]
            assert all(a >= b - 1e-9 for a, b in zip(after, before))
        else:
            assert 0.0 <= step.lost < 1.0
        U, energy = step.U, step.energy
        seen.append(B)


@given(fan_in=st.integers(3, 20), seed=seeds, threshold=st.floats(0.05, 0.999))
def test_the_sketch_finds_what_the_exact_decomposition_finds_on_small_data(
    fan_in, seed, threshold
):
    B = draw(50, fan_in, seed=seed) * torch.logspace(
        0, -2, fan_in, dtype=torch.float64
    )
    # just narrow enough to be exact, or just not
    sketch = Sketch(fan_in, max(fan_in // 4, 1), dtype=torch.float64)
    sketch.update(B)
    empty, none = (
        torch.zeros(fan_in, 0, dtype=torch.float64),
        torch.zeros(0, dtype=torch.float64),
    )
    exact, found = (
        grow(
            empty,
            none,
            root,
            threshold=threshold,
            total=float(B.square().sum()),
        )
        for root in (B, sketch.root())
    )
    if sketch.exact:
        assert exact.added == found.added
        overlap = torch.linalg.svdvals(exact.U.T @ found.U)
        torch.testing.assert_close(
            overlap, torch.ones_like(overlap), rtol=0, atol=1e-6
        )
    else:
        share = (B @ found.U).square().sum() / B.square().sum()
        best = (
            torch.linalg.svdvals(B)[: found.U.shape[1]].square().sum()
            / B.square().sum()
        )
        assert share >= 0.75 * best


@given(
    bad=st.sampled_from([float("nan"), float("inf"), float("-inf")]),
    i=st.integers(0, 4),
    j=st.integers(0, 7),
    r=st.integers(1, 8),
    axis=st.booleans(),
    routing=st.sampled_from(ROUTINGS),
    measured=st.booleans(),
    before=st.integers(0, 2),
)
def test_a_non_finite_entry_is_found_wherever_it_hides(
    bad, i, j, r, axis, routing, measured, before
):
    """Also outside the protected directions, where a basis has zeros: the
    products with it, or their squares, are the witness.
    """
    layer = nn.Linear(8, 5, bias=False)
    U = torch.eye(8)[:, :r] if axis else basis(8, r, 3).float()
    optimizer = torch.optim.Adam(layer.parameters())
    with (
        pytest.warns(UserWarning, match="spans all")
        if r == 8
        else nullcontext()
    ):
        dmr.MomentRouter(
            layer,
            optimizer,
            dmr.Projection(bases={"weight": U}),
            routing,
            dmr.OverlapAware(0.5) if measured else 0.5,
        )
    layer.weight.grad = torch.ones(5, 8)
    for _ in range(before):
        optimizer.step()
    steps = (
        {key: x.clone() for key, x in optimizer.state[layer.weight].items()}
        if before
        else {}
    )
    layer.weight.grad[i, j] = bad
    for _ in range(2):  # nothing of a refused step stays behind
        with pytest.raises(
            ValueError, match="'weight' has NaN or infinite values"
        ):
            optimizer.step()
    assert {
        key: x.tolist() for key, x in optimizer.state[layer.weight].items()
    } == {key: x.tolist() for key, x in steps.items()}


@given(seed=seeds, scale=st.floats(0.01, 100.0), beta=st.floats(0.0, 0.99))
def test_the_overlap_is_a_share_blind_to_scale(seed, scale, beta):
    layer = nn.Linear(9, 4, bias=False, dtype=torch.float64)
    U, g = basis(9, 3, seed), draw(4, 9, seed=seed + 1)
    strength = dmr.OverlapAware(0.7, beta=beta)
    optimizer = torch.optim.Adam(layer.parameters())
    router = dmr.MomentRouter(
        layer, optimizer, dmr.Projection(bases={"weight": U}), strength=strength
    )
    seen = []
    for factor in (1.0, scale):
        layer.weight.grad = factor * g
        optimizer.step()
        seen.append(router.last["overlap"])
        assert 0.0 <= router.last["alpha"] <= 0.7
    share = ((g @ U).square().sum() / g.square().sum()).item()
    assert seen == pytest.approx([share, share], rel=1e-9)
