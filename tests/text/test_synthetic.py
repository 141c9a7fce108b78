"""Synthetic streams: the overlap is exact and the floor is the floor."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmr.text import synthetic
from dmr.text.load import load_stream


def test_a_transition_that_never_happens_costs_nothing_unless_it_does():
    never = synthetic.MarkovSource(
        np.array([[0.0, 1.0], [0.5, 0.5]]),
        np.array([97, 98], np.uint8),
        np.zeros(2, bool),
    )
    always = synthetic.MarkovSource(
        np.full((2, 2), 0.5), never.symbols, never.shared
    )
    # two thirds of the time in the second state
    assert synthetic.entropy_floor(never) == pytest.approx(2 / 3 * np.log(2))
    assert (
        synthetic.cross_entropy(never, always) == pytest.approx(np.log(2))
        and synthetic.cross_entropy(always, never) == np.inf
    )


@given(
    st.integers(0, 3), st.integers(2, 6), st.integers(0, 100), st.integers(1, 2)
)
@settings(max_examples=25, deadline=None)
def test_overlap_is_exact(quarters, domains, seed, order):
    rho = quarters / 4 if quarters < 3 else 1.0
    sources = synthetic.markov_sources(
        rho, domains, seed, states=12, order=order
    )
    floors = [synthetic.entropy_floor(source) for source in sources]
    assert max(floors) - min(floors) < 1e-9
    for a, p in enumerate(sources):
        assert p.order == order
        assert np.allclose(synthetic.stationary(p), 12.0**-order)
        for q in sources[:a]:
            same = (p.rows == q.rows).all(1)
            assert same.mean() == rho and (same == p.shared).all()
            assert synthetic.cross_entropy(p, q) >= floors[a] - 1e-9


def test_own_symbols_never_meet():
    stream = load_stream("synthetic:rho=0,symbols=own,states=32", cap=5000)
    seen = [set(domain.train.tolist()) for domain in stream]
    assert len(stream) == 8 and not any(
        a & b for i, a in enumerate(seen) for b in seen[:i]
    )


def test_synthetic_text_meets_its_floor():
    for domain, source in zip(
        load_stream(
            "synthetic:rho=0.5,domains=2,states=20,seed=7", cap=200_000
        ),
        synthetic.markov_sources(0.5, 2, 7, states=20),
    ):
        text = domain.test.numpy().astype(int) - 32
        loss = -np.log(source.rows[text[:-1], text[1:]])
        assert (
            abs(loss.mean() - domain.meta["entropy_floor"])
            < 4 * loss.std() / len(loss) ** 0.5
        )
        counts = np.bincount(text, minlength=20) / len(text)
        assert np.abs(counts - 0.05).max() < 0.01  # uniform, as constructed
