"""Properties of the metrics: against a brute-force reading of the formulas, in
both directions, with gaps.
"""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dmr.training import metrics

finite = st.floats(-20, 20, allow_nan=False)


@st.composite
def matrices(draw):
    stages = draw(st.integers(1, 6))
    domains = draw(st.integers(stages, 7))
    return draw(hnp.arrays(np.float64, (stages, domains), elements=finite))


def brute(L):
    "The definitions, read off word by word with plain loops."
    T = len(L) - 1
    forgetting = [L[T][j] - min(L[i][j] for i in range(j, T)) for j in range(T)]
    backward = [L[j][j] - L[T][j] for j in range(T)]
    mean = lambda x: sum(x) / len(x) if x else math.nan
    return {
        "forgetting": mean(forgetting),
        "learning_accuracy": mean([L[j][j] for j in range(T + 1)]),
        "final_average": mean([L[T][j] for j in range(T + 1)]),
        "backward_transfer": mean(backward),
    }


@settings(max_examples=200, deadline=None)
@given(matrices())
def test_definitions(L):
    got = metrics.summarize(L)
    for name, value in brute(L.tolist()).items():
        assert got[name] == pytest.approx(value, abs=1e-9, nan_ok=True), name


@settings(max_examples=200, deadline=None)
@given(matrices(), st.integers(0, 5))
def test_a_stage_is_the_matrix_cut_there(L, stage):
    if stage >= len(L):
        with pytest.raises(ValueError, match="outside 0"):
            metrics.summarize(L, stage=stage)
        return
    cut, whole = (
        metrics.summarize(L[: stage + 1]),
        metrics.summarize(L, stage=stage),
    )
    assert cut == pytest.approx(whole, nan_ok=True)
    assert metrics.by_stage(L)[stage]["forgetting"] == pytest.approx(
        cut["forgetting"], nan_ok=True
    )


@settings(max_examples=200, deadline=None)
@given(matrices(), hnp.arrays(np.float64, 7, elements=finite))
def test_both_directions(L, reference):
    r = reference[: L.shape[1]]
    down = metrics.summarize(L, r, nats=False)
    up = metrics.summarize(-L, -r, higher_is_better=True)
    # these keep the unit of the matrix
    flipped = {"learning_accuracy", "final_average"}
    for name, value in down.items():
        assert up[name] == pytest.approx(
            -value if name in flipped else value, abs=1e-9, nan_ok=True
        ), name


@settings(max_examples=100, deadline=None)
@given(matrices())
def test_perplexity_is_exp_first_then_the_formulas(L):
    got, ppl = metrics.summarize(L), brute(np.exp(L).tolist())
    for name in ("forgetting", "learning_accuracy", "final_average"):
        assert got[f"{name}_ppl"] == pytest.approx(
            ppl[name], rel=1e-9, abs=1e-9, nan_ok=True
        )
        assert got[f"{name}_bpb"] == pytest.approx(
            got[name] / math.log(2), nan_ok=True
        )


def test_forward_transfer_uses_the_row_before_training():
    L = [[1.0, 4.0, 3.0], [9.0, 1.0, 2.0], [9.0, 9.0, 1.0]]
    assert metrics.forward_transfer(L, [5.0, 5.0, 5.0]) == pytest.approx(
        ((5 - 4) + (5 - 2)) / 2
    )
    assert math.isnan(metrics.summarize(L)["forward_transfer"])
    with pytest.raises(ValueError, match="one value for each of the 3 domains"):
        metrics.forward_transfer(L, 5.0)


@settings(max_examples=100, deadline=None)
@given(matrices(), st.data())
def test_a_gap_is_never_averaged_away(L, data):
    i, j = (
        data.draw(st.integers(0, len(L) - 1)),
        data.draw(st.integers(0, L.shape[1] - 1)),
    )
    holed = L.copy()
    holed[i, j] = math.nan
    T = len(L) - 1
    got = metrics.summarize(holed)
    assert math.isnan(got["final_average"]) == (i == T and j <= T)
    assert math.isnan(got["learning_accuracy"]) == (i == j)
    assert math.isnan(got["forgetting"]) == (T == 0 or (j < T and i >= j))
    # an evaluation skipped half way: the best over the others
    if T and j < T and j < i < T:
        kept = metrics.forgetting_by_domain(holed, skipna=True)[j]
        assert kept == pytest.approx(
            L[T, j] - min(L[k, j] for k in range(j, T) if k != i)
        )


def test_a_run_that_diverged_shows():
    L = np.array([[1.0, 2.0], [np.inf, 1.0]])
    assert (
        metrics.forgetting(L) == np.inf and metrics.final_average(L) == np.inf
    )
    L[0, 0] = np.inf
    with np.errstate(all="raise"):
        assert math.isnan(metrics.forgetting(L))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(0, 2), st.randoms(use_true_random=False))
def test_records_in_any_order_and_any_domain_order(stages, waiting, random):
    names = [f"d{k}" for k in range(stages + waiting)]
    random.shuffle(names)  # training order differs from the names' order
    L = np.arange(stages * len(names), dtype=float).reshape(stages, len(names))
    records = [
        {
            "stage": i,
            "trained_domain": names[i],
            "eval_domain": names[j],
            "loss": L[i, j],
        }
        for i in range(stages)
        for j in range(len(names))
    ]
    records += [
        {"stage": -1, "trained_domain": None, "eval_domain": n, "loss": 5.5 + k}
        for k, n in enumerate(names)
    ]
    random.shuffle(records)
    got = metrics.loss_matrix(records)
    column = [got.domains.index(n) for n in names]
    assert got.domains[:stages] == names[:stages]
    np.testing.assert_array_equal(got.L[:, column], L)
    np.testing.assert_array_equal(
        got.untrained[column], 5.5 + np.arange(len(names))
    )


def test_a_missing_loss_is_a_gap_and_none_too():
    record = {
        "stage": 0,
        "trained_domain": "a",
        "eval_domain": "a",
        "loss": None,
    }
    assert math.isnan(metrics.loss_matrix([record]).L[0, 0])
    two = [
        dict(record, loss=1.0),
        {"stage": 1, "trained_domain": "b", "eval_domain": "b", "loss": 1.0},
    ]
    assert math.isnan(metrics.loss_matrix(two).L[1, 0])


@pytest.mark.parametrize(
    "L, message",
    [
        (np.ones((3, 2)), "transposed"),
        (np.ones(3), r"shape \(3,\)"),
        (np.ones((0, 3)), r"shape \(0, 3\)"),
    ],
)
def test_bad_matrices(L, message):
    for f in (
        metrics.forgetting,
        metrics.learning_accuracy,
        metrics.final_average,
        metrics.backward_transfer,
        metrics.by_domain,
        metrics.summarize,
    ):
        with pytest.raises(ValueError, match=message):
            f(L)


def test_spread():
    got = metrics.spread([3.0, 1.0, math.nan, 2.0])
    assert got == pytest.approx(
        {"min": 1, "q25": 1.5, "median": 2, "q75": 2.5, "max": 3, "sd": 1.0}
    )
    assert math.isnan(metrics.spread([1.0])["sd"])
