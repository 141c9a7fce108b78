"""A language model's merge beside its controls, against numbers by hand."""

import json

import pytest

from dmr.training.language_model import GENERAL
from dmr.verdict.language import (
    beside,
    controls,
    dose,
    draw_dose,
    merges,
    said,
)


def point(kind, at, learned, lost, rate=0.1, lora=None):
    low, high = lost - 0.02, lost + 0.02  # the texts differ, their mean counts
    changes = {"new": -learned, **dict(zip(GENERAL, (low, high)))}
    about = {"kind": kind, "at": at, "rate": rate, "lora": lora}
    return {**about, "changes": changes}


def row(seed, *points, steps=10):
    told = json.dumps([*points])
    return {"seed": seed, "measured": told, "parameters": {"steps": steps}}


TRAINED = (
    point("training", 1.0, 0.4, 0.4),
    point("training", 0.5, 0.2, 0.1),
    point("average", 0.5, 0.3, 0.1),
    point("merge", 1.0, 0.3, 0.05),
    point("training", 1.0, 0.1, 0.02, 0.05),
    point("training", 1.0, 0.2, 0.0, 1.0, 8),
)


def test_points_become_ways_in_the_order_of_their_places():
    ways = controls(row(0, *TRAINED))
    assert ways["plain, lr 0.1, stopped early"] == [
        (0.0, 0.0),
        pytest.approx((0.2, 0.1)),
        pytest.approx((0.4, 0.4)),
    ]
    by_rate = [x for x, _ in ways["plain, at other rates"]]
    assert by_rate == [0.0, 0.1, 0.4]
    assert merges(row(0, *TRAINED)) == {"0.1": pytest.approx((0.3, 0.05))}


def test_the_difference_is_read_where_a_control_learned_as_much():
    found = beside([row(0, *TRAINED)], "0.1")
    d = {k: None if x == [None] else round(x[0], 9) for k, x in found.items()}
    assert d["plain, lr 0.1, averaged back"] == -0.05
    assert d["plain, lr 0.1, stopped early"] == -0.2
    # between (0.1, 0.02) and (0.4, 0.4), two thirds of the way
    assert d["plain, at other rates"] == round(0.05 - (0.02 + 0.38 * 2 / 3), 9)
    assert d["adapters, at other rates"] is None


def test_a_merge_of_another_row_stands_beside_its_own_seed():
    other = row(1, point("merge", 1.0, 0.2, 0.3))
    rows = [row(1, *TRAINED), row(0, *TRAINED)]
    found = beside(rows, "0.1", {1: other})
    assert found["plain, lr 0.1, stopped early"] == [pytest.approx(0.2)]
    assert beside(rows, "0.5") == {}


def test_every_seed_is_said_and_what_is_not_comparable():
    assert said([0.1, -0.3]) == "-0.100 (+0.100, -0.300)"
    assert said([0.1, None]) == "learned as much in 1 of 2"
    assert said([]) == "learned as much in 0 of 0"


def test_the_dose_is_what_plain_training_lost_on_its_way():
    more = row(1, point("training", 1.0, 0.4, 0.6), steps=10)
    found = dose([row(0, *TRAINED), more])
    assert list(found) == ["0.05", "0.1"]  # the adapters' rate is none
    assert found["0.1"] == pytest.approx({0: 0.0, 5: 0.1, 10: 0.5})
    fig, told = draw_dose(found)
    assert told.endswith("lr 0.05: +0.020; lr 0.1: +0.500.")
    (ax,) = fig.axes
    assert "at 0.1 has lost\n+0.50 bits" in ax.get_title()
    assert len(ax.lines) == 3
