"""The strength of every step against its formula in float64: alone, and as the
router carries it out.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dmr

torch.set_num_threads(1)
settings.register_profile(
    "strength", deadline=None, max_examples=60, derandomize=True, database=None
)
settings.load_profile("strength")
fractions = st.floats(0.0, 1.0)


def schedule(signals, alpha_max, beta, initial=None):
    """α_t = clip(α_max (1 - s̄_t), 0, α_max), s̄_t = β s̄_{t-1} + (1 - β) s_t,
    in Python's own numbers.
    """
    average = signals[0] if initial is None else initial
    for s in signals:
        average = beta * average + (1 - beta) * s
        yield min(max(alpha_max * (1 - average), 0.0), alpha_max)


def run(strength, signals, dtype=torch.float64):
    return [
        float(strength.update(torch.tensor(s, dtype=dtype))) for s in signals
    ]


@given(
    signals=st.lists(fractions, min_size=1, max_size=12),
    alpha_max=fractions,
    beta=st.floats(0.0, 0.99),
    initial=st.none() | fractions,
)
def test_the_overlap_schedule_is_its_formula(signals, alpha_max, beta, initial):
    expected = list(schedule(signals, alpha_max, beta, initial))
    assert run(
        dmr.OverlapAware(alpha_max, beta, initial), signals
    ) == pytest.approx(expected, rel=0, abs=1e-12)
    single = run(
        dmr.OverlapAware(alpha_max, beta, initial), signals, torch.float32
    )
    assert single == pytest.approx(expected, rel=0, abs=5e-6)
    assert all(0.0 <= alpha <= alpha_max + 1e-6 for alpha in single)


@given(
    s=fractions,
    start=fractions,
    beta=st.floats(0.0, 0.99),
    alpha_max=fractions,
    steps=st.integers(1, 60),
)
def test_a_steady_overlap_is_approached_geometrically(
    s, start, beta, alpha_max, steps
):
    "s̄_t = s + β^t (s̄_0 - s): the closed form of the recursion."
    got = run(dmr.OverlapAware(alpha_max, beta, initial=start), [s] * steps)[-1]
    assert got == pytest.approx(
        alpha_max * (1 - (s + beta**steps * (start - s))), rel=0, abs=1e-12
    )


def test_the_ends_of_the_schedule():
    # nothing in common: full strength, from the first step
    assert run(dmr.OverlapAware(0.8), [0.0] * 3) == [0.8] * 3
    # everything in common: none
    assert run(dmr.OverlapAware(0.8), [1.0] * 3) == [0.0] * 3
    assert run(dmr.OverlapAware(0.0), [0.3] * 3) == [0.0] * 3
    # no memory: today's signal
    assert run(
        dmr.OverlapAware(0.8, beta=0.0), [0.25, 1.0, 0.0]
    ) == pytest.approx([0.6, 0.0, 0.8])
    # a start at full strength
    assert run(
        dmr.OverlapAware(0.8, beta=0.5, initial=0.0), [1.0, 1.0]
    ) == pytest.approx([0.4, 0.2])
    # a start at none
    assert run(
        dmr.OverlapAware(0.8, beta=0.5, initial=1.0), [0.0, 0.0]
    ) == pytest.approx([0.4, 0.6])
    # the first signal, then 9 : 1
    assert run(dmr.OverlapAware(0.8, beta=0.9), [0.5, 1.0])[1] == pytest.approx(
        0.8 * (1 - 0.55)
    )
    # a signal beyond its range counts as its end
    assert run(dmr.OverlapAware(0.8, beta=0.5), [2.0, 0.0]) == pytest.approx(
        [0.0, 0.4]
    )
    assert run(dmr.OverlapAware(0.8, beta=0.5), [0.5, -1.0]) == pytest.approx(
        [0.4, 0.6]
    )


def test_nothing_protected_is_no_strength_and_no_signal():
    strength = dmr.OverlapAware(0.8, beta=0.9)
    assert strength.update(None) == 0.0 and strength.average is None
    strength.update(torch.tensor(0.5))
    before = strength.average.clone()
    assert strength.update(None) == 0.0 and torch.equal(
        strength.average, before
    )


def test_the_average_is_the_state():
    strength = dmr.OverlapAware(0.8, beta=0.9)
    assert strength.state_dict() == {"average": None}
    run(strength, [0.2, 0.7, 0.4])
    other = dmr.OverlapAware(0.8, beta=0.9)
    other.load_state_dict(strength.state_dict())
    assert run(strength, [0.9, 0.1]) == run(other, [0.9, 0.1])
    other.load_state_dict({"average": None})
    # afresh: the first signal starts it
    assert run(other, [0.25])[0] == pytest.approx(0.6)


# -- in a router ---------------------------------------------------------------


def two_layers(seed=0):
    """Layers whose gradients differ in size a hundredfold, so that a ratio of
    sums is no mean of ratios.
    """
    torch.manual_seed(seed)
    model = nn.ModuleDict(
        {
            "a": nn.Linear(8, 5, bias=False),
            "b": nn.Linear(6, 4, bias=False),
            "free": nn.Linear(6, 4),
        }
    ).double()
    draw = lambda n, r, s: (
        torch.linalg.qr(
            torch.randn(
                n,
                r,
                generator=torch.Generator().manual_seed(s),
                dtype=torch.float64,
            )
        ).Q
    )
    return model, {"a.weight": draw(8, 3, 1), "b.weight": draw(6, 2, 2)}


def set_gradients(model, step):
    generator = torch.Generator().manual_seed(step)
    size = {"a.weight": 1.0, "b.weight": 1e-2}
    for name, p in model.named_parameters():
        p.grad = size.get(name, 10.0) * (
            torch.randn(p.shape, generator=generator, dtype=p.dtype) + 0.3
        )


@pytest.mark.parametrize("routing", dmr.ROUTINGS)
@pytest.mark.parametrize("importance", [None, 2.0])
def test_a_router_carries_out_the_schedule_on_the_share_of_energy(
    routing, importance
):
    """s = Σ‖gU‖² / Σ‖g‖² over the protected tensors, without importance; and
    each step is made at that strength.
    """
    model, bases = two_layers()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, betas=(0.9, 0.95))
    projection = dmr.Projection(bases=bases, importance=importance)
    router = dmr.MomentRouter(
        model, optimizer, projection, routing, dmr.OverlapAware(0.8, beta=0.7)
    )
    projection.energies["a.weight"] = torch.tensor(
        [4.0, 1.0, 0.25], dtype=torch.float64
    )
    projection._refresh()
    lam = {
        n: torch.ones(U.shape[1], dtype=torch.float64) for n, U in bases.items()
    }
    if importance:
        lam["a.weight"] = torch.tensor(
            [1.0, 3 * 1 / (2 * 1 + 2), 3 * 0.5 / (2 * 0.5 + 2)],
            dtype=torch.float64,
        )
    W = {n: model.get_parameter(n).detach().clone() for n in bases}
    m, v = ({n: torch.zeros_like(w) for n, w in W.items()} for _ in range(2))
    signals = []
    for t in range(1, 9):
        set_gradients(model, t)
        g = {n: model.get_parameter(n).grad.clone() for n in bases}
        inside = sum((g[n] @ bases[n]).square().sum() for n in bases)
        signals.append(
            float(inside / sum(x.square().sum() for x in g.values()))
        )
        alpha = list(schedule(signals, 0.8, 0.7))[-1]
        optimizer.step()
        assert router.last["overlap"] == pytest.approx(signals[-1], rel=1e-12)
        assert router.last["alpha"] == pytest.approx(alpha, rel=1e-12)
        for n, U in bases.items():
            P = U @ torch.diag(lam[n]) @ U.T
            edited = g[n] - alpha * g[n] @ P
            to_m = edited if routing in ("shared", "decoupled") else g[n]
            to_v = edited if routing in ("shared", "denominator") else g[n]
            m[n], v[n] = 0.9 * m[n] + 0.1 * to_m, 0.95 * v[n] + 0.05 * to_v**2
            u = m[n] / (1 - 0.9**t) / ((v[n] / (1 - 0.95**t)).sqrt() + 1e-8)
            W[n] = W[n] - 1e-2 * (
                u - alpha * u @ P if routing == "displacement" else u
            )
    for n, w in W.items():
        torch.testing.assert_close(
            model.get_parameter(n).detach(), w, rtol=1e-10, atol=1e-12
        )


def stepping(model, optimizer, router):
    "A function that takes steps: the overlap and the strength of each."
    draw = torch.Generator().manual_seed(1)

    def train(n):
        seen = []
        for _ in range(n):
            g = torch.randn(4, 6, generator=draw, dtype=torch.float64)
            model.weight.grad = g
            optimizer.step()
            seen.append((router.last.get("overlap"), router.last.get("alpha")))
        return seen

    return train


def test_the_average_starts_with_the_first_basis_and_runs_on_over_boundaries():
    torch.manual_seed(0)
    model = nn.Linear(6, 4, bias=False).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    strength = dmr.OverlapAware(0.8, beta=0.9)
    router = dmr.MomentRouter(
        model, optimizer, dmr.Projection(rank=1, every=1), strength=strength
    )
    train = stepping(model, optimizer, router)
    signals = lambda n: [signal for signal, _ in train(n)]
    assert signals(3) == [None] * 3 and strength.average is None
    router.consolidate()
    found = signals(4)
    router.consolidate()
    found += signals(3)
    assert router.last["alpha"] == pytest.approx(
        list(schedule(found, 0.8, 0.9))[-1], rel=1e-12
    )


def test_a_restart_goes_back_to_the_start_at_every_boundary():
    """As the source does it: s̄ is 0 at the first step of each domain; what is
    saved in the middle of one goes on there.
    """
    torch.manual_seed(0)
    model = nn.Linear(6, 4, bias=False).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    fresh = lambda: dmr.OverlapAware(0.8, 0.9, initial=0.0, restart=True)
    strength = fresh()
    router = dmr.MomentRouter(
        model, optimizer, dmr.Projection(rank=1, every=1), strength=strength
    )
    train = stepping(model, optimizer, router)
    train(3)
    for n in (4, 3, 1):
        router.consolidate()
        signals, alphas = zip(*train(n))
        expected = list(schedule(signals, 0.8, 0.9, initial=0.0))
        assert alphas == pytest.approx(expected, rel=1e-12)
    other = fresh()
    other.load_state_dict(strength.state_dict())
    assert run(other, [0.9, 0.1]) == run(strength, [0.9, 0.1])
    for each in (strength, other):
        each.end_domain()
    assert run(other, [0.5]) == run(strength, [0.5]) == [0.8 * (1 - 0.05)]
    with pytest.raises(ValueError, match="restart=True needs a value"):
        dmr.OverlapAware(restart=True)


def test_a_fixed_strength_asks_for_no_overlap():
    model, bases = two_layers()
    optimizer = torch.optim.Adam(model.parameters())
    router = dmr.MomentRouter(
        model, optimizer, dmr.Projection(bases=bases), strength=0.25
    )
    set_gradients(model, 0)
    optimizer.step()
    assert router.last == {"alpha": 0.25}
