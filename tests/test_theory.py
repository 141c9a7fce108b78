"""The laws of the theory chapters as properties, held against brute force in
float64 and against sympy.
"""

from __future__ import annotations

import numpy as np
import pytest
import sympy as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from dmr.theory import (
    adam_steps,
    additive_inflation,
    basis_moments,
    budget_strength,
    conflict_strength,
    edit_moments,
    horizon,
    horizon_until,
    inflation,
    overlap_strength,
    protected_displacement,
    protection_left,
    rate_match,
    replay_inflation,
    rescaling_inflation,
    step_bound,
    step_norms,
    tradeoff_strength,
    transient_inflation,
)

settings.register_profile(
    "theory", deadline=None, max_examples=60, derandomize=True
)
settings.load_profile("theory")

strengths = st.floats(0, 1)
inner = st.floats(0.01, 0.99)
kappas = st.floats(0, 1)
betas2 = st.floats(0.5, 0.9999)
seeds = st.integers(0, 2**20)


def gradients(
    seed: int, steps: int = 12, out: int = 3, fan_in: int = 6
) -> tuple[np.ndarray, np.ndarray]:
    "Correlated gradients of very different scales, and an orthonormal basis."
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(fan_in, fan_in)) * np.geomspace(1, 1e-2, fan_in)
    basis = np.linalg.qr(rng.normal(size=(fan_in, 1 + seed % fan_in)))[0]
    return (
        rng.normal(size=(steps, out, fan_in)) @ mix
        + rng.normal(size=(out, fan_in)),
        basis,
    )


def brute_force_v(g: np.ndarray, beta2: float) -> np.ndarray:
    "Second moment by its recursion, not by the code under test."
    v = np.zeros(g.shape[1:])
    for x in g:
        v = beta2 * v + (1 - beta2) * x * x
    return v


# -- the law -------------------------------------------------------------------


@given(strengths, kappas)
def test_kappa_law_is_between_its_limits(alpha, kappa):
    R = float(inflation(alpha, kappa))
    assert R >= 1
    # the scalar law is the largest of all
    assert R <= inflation(alpha) * (1 + 1e-12)
    assert np.isclose(inflation(alpha, 0.0), 1.0)
    if alpha < 1:
        assert np.isclose(inflation(alpha, 1.0), 1 / (1 - alpha), rtol=1e-12)


@given(inner, inner, st.floats(1e-3, 0.2))
def test_kappa_law_is_monotone_in_both(alpha, kappa, more):
    here = inflation(alpha, kappa)
    assert inflation(min(1.0, alpha + more), kappa) >= here
    assert inflation(alpha, min(1.0, kappa + more)) >= here


@given(seeds, strengths, betas2)
def test_exact_law_equals_brute_force_per_coordinate(seed, alpha, beta2):
    g, U = gradients(seed)
    removed = g @ U @ U.T
    raw, shared = (
        brute_force_v(g, beta2),
        brute_force_v(g - alpha * removed, beta2),
    )
    kappa, b = edit_moments(
        g, removed, weights=beta2 ** np.arange(len(g))[::-1]
    )
    assert np.allclose(
        inflation(alpha, kappa, b) ** -2.0, shared / raw, atol=1e-10
    )


@given(seeds, strengths, betas2)
def test_pythagoras_over_rows_and_matrices(seed, alpha, beta2):
    g, U = gradients(seed)
    weights = beta2 ** np.arange(len(g))[::-1]
    for over in ((-1,), (-2, -1)):
        kappa, b = edit_moments(g, g @ U @ U.T, over=over, weights=weights)
        assert np.allclose(kappa, b, rtol=1e-9)
        raw = brute_force_v(g, beta2).sum(over)
        shared = brute_force_v(g - alpha * g @ U @ U.T, beta2).sum(over)
        assert np.allclose(
            inflation(alpha, np.minimum(kappa, 1)) ** -2.0,
            shared / raw,
            atol=1e-9,
        )


@given(seeds, strengths)
def test_importance_breaks_pythagoras_one_way(seed, alpha):
    g, U = gradients(seed)
    lam = np.random.default_rng(seed).uniform(0, 1, U.shape[1])
    A = (U * lam) @ U.T
    cov = np.einsum("toi,toj->ij", g, g)
    kappa, b = basis_moments(cov, U, lam, whole=True)
    assert b >= kappa - 1e-12
    measured = ((g - alpha * g @ A) ** 2).sum() / (g**2).sum()
    assert np.isclose(inflation(alpha, kappa, b) ** -2.0, measured, rtol=1e-9)
    kappa_i, b_i = basis_moments(cov, U, lam)
    assert np.allclose(
        inflation(alpha, kappa_i, b_i) ** -2.0,
        ((g - alpha * g @ A) ** 2).sum((0, 1)) / (g**2).sum((0, 1)),
    )


@given(seeds, inner)
def test_deflation_exactly_where_alpha_kappa_exceeds_twice_b(seed, alpha):
    g, U = gradients(seed)
    kappa, b = edit_moments(g, g @ U @ U.T)
    gap = alpha * kappa - 2 * b
    clear = np.abs(gap) > 1e-9
    assert np.array_equal(
        (inflation(alpha, kappa, b) < 1)[clear], (gap > 0)[clear]
    )


@given(strengths, kappas, st.floats(1e-12, 1e3), st.floats(1e-12, 1.0))
def test_eps_only_dampens_inflation(alpha, kappa, rms, eps):
    with_eps = inflation(alpha, kappa, eps=eps, rms=rms)
    assert 1 - 1e-12 <= with_eps <= inflation(alpha, kappa) * (1 + 1e-12)


def test_inflation_is_vectorised_and_broadcasts():
    R = inflation(np.linspace(0, 0.9, 4)[:, None], np.linspace(0, 1, 3))
    assert R.shape == (4, 3)
    assert np.array_equal(R[2], [inflation(0.6, k) for k in (0, 0.5, 1)])
    assert inflation(1.0) == np.inf


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": -0.1}, "alpha"),
        ({"alpha": 1.1}, "alpha"),
        ({"alpha": [0.5, np.nan]}, "alpha"),
        ({"alpha": 0.5, "kappa": -1e-3}, "kappa"),
        ({"alpha": 0.5, "kappa": 1.01}, "pass its b"),
        ({"alpha": 0.5, "kappa": np.nan}, "kappa"),
        ({"alpha": 0.5, "kappa": 0.5, "b": np.inf}, "b="),
        ({"alpha": 1.0, "kappa": 0.1, "b": 0.9}, "negative"),
        ({"alpha": 0.5, "eps": -1.0}, "eps"),
        ({"alpha": 0.5, "rms": 0.0}, "rms"),
    ],
)
def test_inflation_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        inflation(**arguments)


def test_kappa_above_one_is_fine_with_b():
    assert np.isclose(inflation(0.5, 4.0, 0.5), (1 - 0.5 + 1.0) ** -0.5)


# -- time ----------------------------------------------------------------------


@given(seeds, inner, betas2, st.integers(1, 25), st.integers(0, 25))
def test_transient_equals_brute_force(seed, alpha, beta2, steps, before):
    "Constant squares make the expectation exact, so the law must be too."
    rng = np.random.default_rng(seed)
    old, U = rng.uniform(0.1, 3), np.linalg.qr(rng.normal(size=(5, 2)))[0]
    row = rng.normal(size=5)
    after = row - alpha * row @ U @ U.T
    kappa, b = edit_moments(row[None], (row @ U @ U.T)[None])
    g = np.concatenate(
        [np.tile(np.sqrt(old) * row, (before, 1)), np.tile(row, (steps, 1))]
    )
    edited = np.concatenate([g[:before], np.tile(after, (steps, 1))])
    measured = brute_force_v(edited, beta2) / brute_force_v(g, beta2)
    predicted = transient_inflation(
        steps, beta2, alpha, kappa, b, before=before, old=old
    )
    assert np.allclose(predicted**-2.0, measured, rtol=1e-7, atol=1e-12)


@given(inner, kappas, betas2, st.integers(0, 10**5))
def test_transient_lies_between_its_start_and_the_law(
    alpha, kappa, beta2, steps
):
    R = float(transient_inflation(steps, beta2, alpha, kappa))
    assert 1 - 1e-12 <= R <= inflation(alpha, kappa) * (1 + 1e-12)
    assert np.isclose(transient_inflation(0, beta2, alpha, kappa), 1.0)
    assert np.isclose(
        transient_inflation(10**8, beta2, alpha, kappa), inflation(alpha, kappa)
    )
    assert np.isclose(
        transient_inflation(steps, beta2, alpha, kappa, state="reset"),
        inflation(alpha, kappa),
    )
    assert transient_inflation(steps + 10, beta2, alpha, kappa) >= R - 1e-12


@given(inner, kappas, st.floats(0.05, 5))
def test_only_the_horizon_matters_for_long_memories(alpha, kappa, H):
    R = [
        float(transient_inflation(H / (1 - beta2), beta2, alpha, kappa))
        for beta2 in (0.9999, 0.99999)
    ]
    assert np.isclose(*R, rtol=2e-3)


@given(inner, kappas, inner)
def test_horizon_until_inverts_the_transient(alpha, kappa, left):
    H = float(horizon_until(alpha, kappa, left=left))
    if np.isfinite(H):
        beta2 = 1 - 1e-6
        n = -H / np.log(beta2)  # β2ⁿ = e^(−H)
        p = protection_left(alpha, transient_inflation(n, beta2, alpha, kappa))
        assert np.isclose(p, left, atol=1e-6)
    else:
        assert protection_left(alpha, inflation(alpha, kappa)) >= left - 1e-9


@given(
    inner,
    st.floats(0.9, 0.999),
    st.integers(1, 60),
    st.integers(1, 60),
    st.sampled_from(["shared", "decoupled"]),
)
def test_displacement_equals_a_simulated_domain(
    alpha, beta2, steps, before, routing
):
    first = np.concatenate([np.ones(before), np.full(steps, 1 - alpha)])
    second = first if routing == "shared" else np.ones(before + steps)
    moved = adam_steps(first, second, (0.9, beta2)).u[before:].mean()
    assert np.isclose(
        protected_displacement(
            steps, beta2, alpha, routing=routing, before=before
        ),
        moved,
        rtol=1e-9,
    )


@given(inner, st.floats(0, 0.5))
def test_half_of_the_protection_is_never_lost_below_half_the_energy(
    alpha, kappa
):
    assert horizon_until(alpha, kappa) == np.inf
    assert protection_left(alpha, inflation(alpha, kappa)) > 0.5


def test_time_law_symbolically():
    beta, n, v0, v, q = sp.symbols("beta n v0 v q", positive=True)
    closed = beta**n * v0 + (1 - beta**n) * q * v
    # one step of Adam's recursion on the closed form
    step = beta * closed + (1 - beta) * q * v
    assert (
        sp.simplify(
            step - (beta ** (n + 1) * v0 + (1 - beta ** (n + 1)) * q * v)
        )
        == 0
    )
    assert closed.subs(n, 0) == v0
    alpha, left = sp.symbols("alpha ell", positive=True)
    c = ((1 - alpha) / (1 - alpha * left)) ** 2
    # the time law at e^(−H) = (c−q)/(1−q)
    R_squared = 1 / (q + (1 - q) * (c - q) / (1 - q))
    # is where p = ell
    assert sp.simplify(R_squared - ((1 - alpha * left) / (1 - alpha)) ** 2) == 0


def test_transients_checked_independently():
    kept = [
        protected_displacement(150, beta2, 0.9, before=150)
        for beta2 in (0.999, 0.99, 0.95)
    ]
    assert np.allclose(kept, [0.18, 0.22, 0.65], atol=0.02)
    assert np.isclose(
        protected_displacement(150, 0.99, 0.9, state="reset"), 1.0
    )


def test_protection_left_ends():
    assert protection_left(0.4, 1.0) == 1.0
    assert np.isclose(protection_left(0.4, 1 / 0.6), 0.0)
    assert protection_left(1.0, np.inf) == 1.0


# -- families ------------------------------------------------------------------


@given(strengths, kappas)
def test_rescaling_is_cancelled(strength, omega):
    if strength * omega < 1:
        assert np.isclose(
            rescaling_inflation(strength, omega),
            1 / (1 - strength * omega),
            rtol=1e-9,
        )


@given(seeds, strengths)
def test_replay_law_on_samples(seed, rho):
    rng = np.random.default_rng(seed)
    mu, mu_r, c = rng.normal(size=2).tolist() + [rng.uniform(-1, 1)]
    x, y = rng.normal(size=(2, 64))
    x, y = (x - x.mean()) / x.std(), y - y.mean()
    y -= x * (x @ y) / (x @ x)
    y /= y.std()  # x and y now have exact moments
    g, g_r = mu + x, mu_r + c * x + np.sqrt(1 - c**2) * y
    measured = (
        ((1 - rho) * g + rho * g_r) @ ((1 - rho) * g + rho * g_r) / (g @ g)
    )
    assert np.isclose(
        replay_inflation(rho, mu, mu_r, correlation=c) ** -2.0,
        measured,
        rtol=1e-6,
        atol=1e-9,
    )
    pull = additive_inflation(mu_r, mu, pull_sd=1.0, correlation=c) ** -2.0
    assert np.isclose(
        pull, (g + g_r) @ (g + g_r) / (g @ g), rtol=1e-6, atol=1e-9
    )


def test_replay_and_pull_checked_independently():
    assert np.isclose(replay_inflation(0.5), np.sqrt(2))
    assert np.isclose(replay_inflation(0.5, 1.0), 1.15, atol=5e-3)
    assert np.isclose(additive_inflation(1.5), 0.555, atol=1e-3)


def test_families_are_one_law_symbolically():
    a, kappa, b = sp.symbols("alpha kappa b")
    g, d = sp.symbols("g d")
    square = (
        sp.expand((g - a * d) ** 2 / g**2)
        .subs({d**2: kappa * g**2})
        .subs(d, b * g)
    )
    assert sp.simplify(square - (1 - 2 * a * b + a**2 * kappa)) == 0
    assert (
        sp.simplify(
            (1 - 2 * a * b + a**2 * kappa).subs(b, kappa)
            - (1 - a * (2 - a) * kappa)
        )
        == 0
    )
    assert (
        sp.simplify((1 - a * (2 - a) * kappa).subs(kappa, 1) - (1 - a) ** 2)
        == 0
    )


# -- steps ---------------------------------------------------------------------


@given(seeds, inner, betas2)
def test_shared_is_decoupled_with_rate_R(seed, alpha, beta2):
    g, U = gradients(seed)
    edited = g - alpha * g @ U @ U.T
    shared, decoupled, raw = (
        adam_steps(x, y, (0.9, beta2), eps=1e-3)
        for x, y in ((edited, edited), (edited, g), (g, g))
    )
    R = (np.sqrt(raw.v_hat) + 1e-3) / (np.sqrt(shared.v_hat) + 1e-3)
    assert np.allclose(shared.u, R * decoupled.u, rtol=1e-9, atol=1e-12)


@given(seeds, inner, betas2)
def test_axes_shared_is_vanilla_and_decoupled_damps(seed, alpha, beta2):
    g, _ = gradients(seed)
    scale = np.array([1 - alpha, 1, 1 - alpha, 1, 1, 1])
    vanilla = adam_steps(g, g, (0.9, beta2)).u
    assert np.allclose(
        adam_steps(g * scale, g * scale, (0.9, beta2)).u, vanilla, rtol=1e-7
    )
    assert np.allclose(
        adam_steps(g * scale, g, (0.9, beta2)).u, vanilla * scale, rtol=1e-9
    )


@given(seeds, st.floats(0.0, 0.95), st.floats(0.91, 0.999))
def test_step_bound_holds_and_is_reached(seed, beta1, beta2):
    betas = (beta1, beta2)
    if beta1**2 >= 0.99 * beta2:
        return
    g, _ = gradients(seed, steps=30)
    u = adam_steps(g, betas=betas).u
    bounds = np.array([step_bound(betas, t + 1) for t in range(len(g))])
    assert (np.abs(u) <= bounds[:, None, None] * (1 + 1e-9)).all()
    worst = (beta1 / beta2) ** np.arange(30)[::-1]
    assert np.isclose(
        adam_steps(worst, betas=betas).u[-1], bounds[-1], rtol=1e-6
    )


def test_step_bounds_checked_independently():
    assert np.isclose(step_bound((0.9, 0.999)), 7.27, atol=5e-3)
    assert np.isclose(step_bound((0.9, 0.95)), 1.165, atol=5e-4)


@given(seeds, inner)
def test_step_norms_are_traces(seed, alpha):
    rng = np.random.default_rng(seed)
    scales, U = (
        np.geomspace(1, 1e-2, 10),
        np.linalg.qr(rng.normal(size=(10, 3)))[0],
    )
    c = 0.1 / 1.9
    vanilla = step_norms(scales**2, U, alpha, "vanilla", rows=4)
    assert np.isclose(vanilla[0], np.sqrt(c * 40)) and np.isclose(
        vanilla[1], np.sqrt(c * 4 * 3)
    )
    # v normalises every coordinate
    assert np.isclose(
        step_norms(scales**2, U, alpha, "shared", rows=4)[0], vanilla[0]
    )
    assert np.isclose(
        step_norms(scales**2, U, alpha, "displacement", rows=4)[1],
        (1 - alpha) * vanilla[1],
    )
    kappa, b = basis_moments(scales**2, U)
    leak = np.sqrt(c * 4 * np.sum(inflation(alpha, kappa, b) ** -2.0))
    assert np.isclose(
        step_norms(scales**2, U, alpha, "decoupled", rows=4)[0], leak
    )


def test_leak_checked_independently():
    """16 × 64, scales 1 to 1e-2, r = 8: the page's basis is one of many, its
    figures lie in their range.
    """
    scales = np.geomspace(1, 1e-2, 64)
    bases = [
        np.linalg.qr(np.random.default_rng(s).normal(size=(64, 8)))[0]
        for s in range(60)
    ]
    page = {
        ("vanilla", 0.5): (7.3, 2.5),
        ("decoupled", 0.5): (16.0, 8.5),
        ("decoupled", 1.0): (29.5, 18.2),
        ("displacement", 0.5): (7.0, 1.3),
    }
    for (routing, alpha), (u, inside) in page.items():
        norms = np.array(
            [step_norms(scales**2, Q, alpha, routing, rows=16) for Q in bases]
        )
        for column, figure in zip(norms.T, (u, inside)):
            assert column.min() - 0.1 <= figure <= column.max() + 0.1


@given(seeds)
def test_rate_match_is_least_squares(seed):
    rng = np.random.default_rng(seed)
    R, energy = rng.uniform(0.2, 4, 9), rng.uniform(0, 1, 9)
    c, cosine = rate_match(R, energy)
    error = lambda k: np.sum((k * R - 1) ** 2 * energy)
    assert error(c) <= min(error(0.99 * c), error(1.01 * c))
    assert 0 < cosine <= 1 + 1e-12


# -- strengths -----------------------------------------------------------------


@given(kappas, strengths)
def test_overlap_schedule_removes_at_most_a_quarter(s, alpha_max):
    alpha = overlap_strength(s, alpha_max)
    assert 0 <= alpha <= alpha_max
    assert alpha * s <= alpha_max / 4 + 1e-12


@given(kappas, st.floats(0, 2), st.floats(0, 100))
def test_harm_strengths(s, budget, harm):
    alpha = float(budget_strength(s, budget))
    assert 0 <= alpha <= 1
    assert (1 - alpha) ** 2 * s <= budget + 1e-9
    assert alpha == 0 or np.isclose((1 - alpha) ** 2 * s, budget)
    grid = np.linspace(0, 1, 201)
    cost = -(1 - grid * 0.5) + 0.5 * harm * (1 - grid) ** 2 * 0.5
    assert abs(grid[cost.argmin()] - tradeoff_strength(harm)) <= 0.0051


@given(st.floats(-5, 5), st.floats(-5, 5))
def test_conflict_strength_is_the_smallest_safe_one(total, inside):
    alpha = float(conflict_strength(total, inside))
    assert 0 <= alpha <= 1
    if total >= 0:
        assert alpha == 0
    elif inside <= total:
        assert np.isclose(total - alpha * inside, 0, atol=1e-9)
    elif inside < 0:
        assert alpha == 1


# -- errors --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: adam_steps(np.ones((3, 2)), np.ones((4, 2))),
            "same number of steps",
        ),
        (lambda: adam_steps(np.ones(3), betas=(1.0, 0.9)), "betas"),
        (lambda: adam_steps(np.ones(3), eps=-1), "eps"),
        (lambda: edit_moments(np.ones((3, 2)), np.ones((3, 3))), "one shape"),
        (
            lambda: edit_moments(np.zeros((3, 2)), np.ones((3, 2))),
            "zero gradient",
        ),
        (
            lambda: edit_moments(
                np.ones((3, 2)), np.ones((3, 2)), weights=np.ones(2)
            ),
            "one weight for each",
        ),
        (lambda: basis_moments(np.ones(3), np.ones((3, 1))), "orthonormal"),
        (lambda: basis_moments(np.ones(4), np.eye(3)), r"\(fan_in, r\)"),
        (
            lambda: basis_moments(np.ones(3), np.eye(3), importance=[1, 2, 0]),
            "importance",
        ),
        (
            lambda: transient_inflation(1, 0.9, 0.5, state="warm"),
            "'kept' or 'reset'",
        ),
        (lambda: transient_inflation(1, 0.9, 0.5, start=0.0), "start"),
        (lambda: horizon(-1, 0.9), "steps"),
        (lambda: horizon(1, 1.0), "beta2"),
        (lambda: horizon_until(1.0), "alpha"),
        (lambda: horizon_until(0.5, left=1.0), "left"),
        (lambda: protected_displacement(0, 0.9, 0.5), "at least one step"),
        (
            lambda: protected_displacement(5, 0.9, 0.5, routing="denominator"),
            "routing",
        ),
        (lambda: protection_left(0.5, -1.0), "inflation"),
        (lambda: rescaling_inflation(0.5, -0.1), "importance"),
        (lambda: replay_inflation(2.0), "alpha"),
        (lambda: replay_inflation(0.5, sd=-1.0), "standard deviations"),
        (lambda: additive_inflation(1.0, mean=0.0, sd=0.0), "always zero"),
        (lambda: step_bound((0.99, 0.9)), "β1² < β2"),
        (
            lambda: step_norms(np.ones(3), np.eye(3)[:, :1], 0.5, "sideways"),
            "routing",
        ),
        (
            lambda: step_norms(
                np.array([1.0, 0.0]), np.eye(2)[:, :1], 0.5, "vanilla"
            ),
            "zero second moment in 1",
        ),
        (
            lambda: step_norms(np.ones(2), np.eye(2)[:, :1], 1.0, "shared"),
            "no second moment under shared",
        ),
        (lambda: overlap_strength(1.5), "overlap"),
        (lambda: budget_strength(0.5, -1), "budget"),
        (lambda: tradeoff_strength(-0.1), "harm"),
        (lambda: conflict_strength(np.nan, 0.0), "NaN"),
        (lambda: rate_match([1.0], [-1.0]), "energy"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
