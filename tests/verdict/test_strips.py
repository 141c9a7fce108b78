"""The ten claims as strips: what is drawn, and where it would have to lie."""

import pytest

from dmr.reporting.statistics import Interval
from dmr.verdict.answers import read_answers
from dmr.verdict.rules import FAILS, HOLDS
from dmr.verdict.strips import (
    MAIN,
    WHERE,
    Line,
    Strip,
    draw_strips,
    read_strips,
)


@pytest.fixture(scope="module")
def strips():
    return {s.claim: s for s in read_strips()}


def inside(claim, i):
    low, high = WHERE[claim]
    return low <= i.low and i.high <= high


def test_a_strip_for_each_claim_with_its_word(strips):
    words = {a.claim: a.word for a in read_answers()[1] if a.decides}
    assert {c: s.word for c, s in strips.items()} == words
    assert all(s.lines for s in strips.values())


def test_where_a_claim_holds_both_marks_lie_in_the_shade(strips):
    for claim in ("C1", "C2", "C3", "C4"):
        strip = strips[claim]
        decides = [x for x in strip.lines if x.label == MAIN]
        line = (decides or strip.lines)[0]
        both = [inside(claim, i) for i in (line.nominal, line.matched)]
        assert all(both) == (strip.word == HOLDS), claim
        assert any(both) == (strip.word == HOLDS), claim  # or far from it


def test_the_first_claim_is_asked_under_muon_too(strips):
    lines = {x.label: x for x in strips["C1"].lines}
    line = lines["Muon, α 0.9"]
    assert inside("C1", line.nominal) and inside("C1", line.matched)
    assert not inside("C1", lines["Muon, α 1"].nominal)


def test_the_first_claim_is_asked_at_each_strength_in_their_order(strips):
    lines = [x for x in strips["C1"].lines if x.label.startswith("Adam")]
    at = [float(x.label.split("α ")[1].split(",")[0]) for x in lines]
    assert at == sorted(at) and at.count(0.9) == 2 and len(at) == 7
    holds = {a for a, x in zip(at, lines) if inside("C1", x.matched)}
    assert holds == {0.1, 0.3, 0.5}


def test_what_is_drawn_is_what_is_there():
    i = Interval(-0.2, -0.3, -0.1, 5)
    made = [
        Strip("C2", HOLDS, (Line("five domains", i, None),)),
        Strip("C7", FAILS, (Line("diverged", None, None), Line("x", i, i))),
        Strip("C9", FAILS, ()),
    ]
    fig, alt = draw_strips(made)
    assert len(fig.axes) == 2  # nothing is drawn of nothing
    assert fig.get_suptitle() == "Of two claims one holds, one does not"
    assert [len(ax.containers) for ax in fig.axes] == [1, 2]
    assert "C2, holds: five domains -0.200 [-0.300, -0.100]" in alt
    assert "runs diverged" in [t.get_text() for t in fig.axes[1].texts]
