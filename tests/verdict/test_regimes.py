"The first rules in other regimes, on tables made by hand."

from dataclasses import replace

import pytest
import simulated

from dmr.verdict.answers import DISPLACED, FIXED, REPLAY, SHARED
from dmr.verdict.regimes import (
    AUTHORS,
    FIRST_PAGE,
    by_strength,
    c1_by_strength,
    c3_by_part,
    c4_of_authors,
    first_page,
    joined,
    strength_name,
)
from dmr.verdict.tables import Table, runs

STRENGTHS = (0.5, 0.9, 1.0)
#: What shared projection forgets at each strength, in units of plain training.
COLLAPSE = {0.5: 0.98, 0.9: 0.7}


def edit(arm, alpha, ratio, seeds=10, **more):
    "Runs of one arm at one strength, at the study's nominal rate."
    made = simulated.table({arm: ratio}, seeds, **more)
    for r in made.rows:
        if r["arm"] == arm:
            p = {**r["parameters"], "alpha": alpha}
            yield {**r, "parameters": p}


def strengths(ratios=COLLAPSE, arm=SHARED, seeds=10, **more):
    rows = [
        r for a, x in ratios.items() for r in edit(arm, a, x, seeds, **more)
    ]
    return simulated.whole(rows, "dose", {"": 1e-3})


def plain(seeds=10, **more):
    "A study of another nominal rate that holds the plain runs."
    made = simulated.table({}, seeds, **more)
    return simulated.whole(made.rows, "merging", {"": 2e-3})


def test_plain_runs_of_the_same_regime_join_and_others_do_not():
    dose = strengths(seeds=3)
    merging = plain(5)
    both = joined(dose, merging)
    found = [(a, rate) for a, rate, _ in runs(both)]
    # the nominal rate is that of the study that is asked, 1e-3, not 2e-3
    assert found.count(("vanilla", 1.0)) == 3 == found.count(("vanilla", 2.0))
    assert len(both.rows) == len(dose.rows) + 3 * 5
    for other in ({"steps": 450}, {"beta2": 0.99}, {"sampling": "epoch"}):
        assert joined(dose, plain(5, **other)).rows == dose.rows
    # no other arm comes along
    more = strengths({0.5: 1.0}, DISPLACED, seeds=3)
    assert joined(dose, more).rows == dose.rows
    name = strength_name(DISPLACED, 0.5)
    assert len(joined(dose, by_strength(more), [name]).rows) == 9


def test_a_failed_plain_run_joins_as_failed():
    dose, merging = strengths(seeds=3), plain(3)
    gone = [r for r in merging.rows if r["seed"] == 0]
    short = replace(
        merging,
        rows=tuple(r for r in merging.rows if r["seed"]),
        lost=tuple({**r, "status": "failed"} for r in gone),
    )
    both = joined(dose, short)
    assert len(both.lost) == 5 and both.failed == {"vanilla": 5}


def test_studies_of_several_parts_are_not_joined():
    two = simulated.whole(
        [*edit(SHARED, 0.5, 1.0, part="a"), *edit(SHARED, 0.5, 1.0, part="b")]
    )
    with pytest.raises(ValueError, match="parts a, b"):
        joined(two, plain())


def test_c1_has_a_verdict_for_each_strength():
    found = c1_by_strength(joined(strengths(), plain()), STRENGTHS)
    words = {a: v and v.verdict for a, v in found.items()}
    assert words == {0.5: "holds", 0.9: "does not hold", 1.0: None}
    assert found[0.5].n == 10
    # each is read from its own rows
    ratio = found[0.9].parts["nominal"].interval.estimate
    assert ratio == pytest.approx(0.7, abs=0.02)
    # without plain runs nothing is said
    assert not any(c1_by_strength(strengths(), STRENGTHS).values())


def test_the_horizon_counts_for_adam_only():
    short = joined(strengths(beta2=0.99), plain(beta2=0.99))  # H = 1.5
    words = lambda *h: c1_by_strength(short, [0.5], *h)[0.5].verdict  # noqa: E731
    assert words() == "not testable here" and words(0) == "holds"


def test_c3_is_asked_in_each_part():
    worse = simulated.table({FIXED: 1.2}, part="beta2 0.95")
    better = simulated.table(
        {FIXED: 0.6}, part="beta2 0.99", steps=750, beta2=0.99
    )
    rates = {"beta2 0.95": 1e-3, "beta2 0.99": 1e-3, "empty": 1e-3}
    both = simulated.whole([*worse.rows, *better.rows], "memory", rates)
    found = {k: v and v.verdict for k, v in c3_by_part(both).items()}
    assert found == {
        "beta2 0.95": "holds",
        "beta2 0.99": "does not hold",
        "empty": None,
    }


@pytest.mark.parametrize(
    "ratio, rival, verdict",
    [
        (0.4, 0.8, "holds"),
        (0.7, 0.5, "does not hold"),
        (0.7, 0.7, "undecided at n"),
    ],
)
def test_c4_of_the_preprints_arm(ratio, rival, verdict):
    authors = simulated.table({AUTHORS: ratio, "its shared form": 0.9})
    rows = [r for r in authors.rows if r["arm"] != "vanilla"]
    authors = simulated.whole(rows, "authors", {"": 1e-3})
    merging = plain()
    assert c4_of_authors(authors, Table("dose"), Table("merging")) is None
    every = [
        r
        for arm, best in ((SHARED, 0.9), (FIXED, 0.85), (DISPLACED, rival))
        for alpha in (0.3, 0.5, 0.9)
        for r in edit(arm, alpha, 0.1 if alpha == 0.3 else best)
    ]
    dose = simulated.whole(every, "dose", {"": 1e-3})
    found = c4_of_authors(authors, dose, merging)
    assert (found.verdict, found.n) == (verdict, 10)
    # strengths that are no rivals stay out, and none is missing
    assert "0.3" not in str(found) and "not yet" not in str(found)
    without = c4_of_authors(authors, Table("dose"), merging)
    assert "not yet among the rivals" in str(without)


def ends(arm, final, seeds=5, lr=1e-3, status=None):
    "Runs that end at a loss."
    kinds = {
        "vanilla": {},
        "interpolation": {"interpolate": 0.5},
        SHARED: {"modification": "projection"},
        DISPLACED: {"modification": "projection"},
        REPLAY: {"modification": "replay"},
    }
    merge = {"consolidation": "fisher", "merge": {"weight": 0.7}}
    p = {"modification": "none", "lr": lr} | kinds.get(arm, merge)
    for seed in range(seeds):
        noise = 0.01 * ((seed * 7 + len(arm)) % 5 - 2)
        row = simulated.row(0.2, 2.0, arm=arm, seed=seed, parameters=p)
        row |= {"final_average": final + noise, "status": status}
        yield row


ENDS = {
    SHARED: 2.45,
    DISPLACED: 2.4,
    "interpolation": 2.35,
    "Fisher merge 0.7": 2.2,
    f"{DISPLACED} + Fisher merge 0.7": 2.15,
    REPLAY: 2.1,
}


def larger(finals=ENDS, seeds=5):
    rows = [
        *ends("vanilla", 2.9, seeds, 5e-4),
        *ends("vanilla", 2.5, seeds, 2.5e-4),
    ]
    rows += [r for arm, x in finals.items() for r in ends(arm, x, seeds)]
    return simulated.whole(rows, "larger", {"": 5e-4})


def test_the_first_pages_statements_on_a_larger_model():
    found = first_page(larger())
    assert [f.rule for f in found] == list(FIRST_PAGE)
    assert {f.outcome for f in found} == {"holds"}
    # against plain training at its better rate
    assert found[0].interval.estimate == pytest.approx(2.2 - 2.5, abs=0.02)
    assert "lr 0.00025" in found[0].note
    # equal ends are no gain
    equal = ENDS | {f"{DISPLACED} + Fisher merge 0.7": 2.2}
    words = {f.rule: f.outcome for f in first_page(larger(equal))}
    assert words.pop("a projection improves a merge") == "fails"
    assert set(words.values()) == {"holds"}
    assert {f.outcome for f in first_page(larger(seeds=3))} == {"too few seeds"}
    assert {f.outcome for f in first_page(Table("larger"))} == {"no runs"}


def test_a_failed_run_leaves_a_statement_open():
    whole = larger()
    gone = [r for r in whole.rows if (r["arm"], r["seed"]) == (REPLAY, 0)]
    rows = tuple(r for r in whole.rows if r not in gone)
    short = replace(whole, rows=rows, lost=tuple(gone))
    words = {f.rule: f.outcome for f in first_page(short)}
    assert words.pop("0.5 % of the text ends below plain training") == (
        "not complete"
    )
    assert set(words.values()) == {"holds"}


def test_what_has_not_run_counts_in_the_correction():
    """One comparison with p between .01 and .05: alone it would hold; among
    five, four of them not run, it does not.
    """
    rows = [*ends("vanilla", 2.5, lr=5e-4), *ends(REPLAY, 2.4)]
    apart = (-0.06, 0.06, -0.02, 0.05, -0.03)
    for r, other, d in zip(rows[5:], rows[:5], apart, strict=True):
        r["final_average"] = other["final_average"] - 0.1 + d
    few = simulated.whole(rows, "larger", {"": 5e-4})
    (last,) = [f for f in first_page(few) if f.interval]
    assert last.interval.high < 0 and last.outcome == "fails"
