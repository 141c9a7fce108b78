"""A language model's merge beside its controls, against numbers by hand."""

import json
from pathlib import Path

import pytest

from dmr.studies.study import read_study
from dmr.training.language_model import GENERAL
from dmr.verdict.language import (
    beside,
    controls,
    dose,
    dose_rate,
    draw_dose,
    ends,
    said,
)
from dmr.verdict.tables import Table, read_table

STUDIES = Path(__file__).parents[2] / "nbs/experiments/studies"


def point(kind, at, learned, lost, rate=0.1, lora=None):
    low, high = lost - 0.02, lost + 0.02  # the texts differ, their mean counts
    changes = {"new": -learned, **dict(zip(GENERAL, (low, high)))}
    about = {"kind": kind, "at": at, "rate": rate, "lora": lora}
    return {
        **about,
        "changes": changes,
        "method": "merge" if lora is None else "none",
    }


def title(fig):
    "Of the one figure, wherever the theme of the moment puts it."
    (ax,) = fig.axes
    return ax.get_title() or ax.get_title("left")


def row(seed, *points, steps=10):
    told = json.dumps([*points])
    return {
        "seed": seed,
        "measured": told,
        "parameters": {"steps": steps, "method": "merge"},
    }


TRAINED = (
    point("training", 1.0, 0.4, 0.4),
    point("training", 0.5, 0.2, 0.1),
    point("average", 0.5, 0.3, 0.1),
    point("end", 1.0, 0.3, 0.05),
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
    assert [x for x, _ in ways["plain, at other rates"]] == [0.1, 0.4]
    assert ends(row(0, *TRAINED)) == {"0.1": pytest.approx((0.3, 0.05))}


def test_the_difference_is_read_where_a_control_learned_as_much():
    found = beside([row(0, *TRAINED)], "0.1")
    rounded = lambda x: x if isinstance(x, str) else round(x, 9)
    d = {k: rounded(x) for k, (x,) in found.items()}
    assert d["plain, lr 0.1, averaged back"] == -0.05
    assert d["plain, lr 0.1, stopped early"] == -0.2
    # between (0.1, 0.02) and (0.4, 0.4), two thirds of the way
    assert d["plain, at other rates"] == round(0.05 - (0.02 + 0.38 * 2 / 3), 9)
    assert d["adapters, at other rates"] == "learned less"


def test_no_control_is_read_between_a_rate_and_no_training():
    low = row(0, *TRAINED, point("end", 1.0, 0.05, 0.01, 0.05))
    found = beside([low], "0.05")
    assert found["plain, at other rates"] == ["learned more"]
    # on the way to the first look, which did begin at the start
    early = found["plain, lr 0.1, stopped early"]
    assert early == [pytest.approx(0.01 - 0.1 / 4)]


def test_a_merge_of_another_row_stands_beside_its_own_seed():
    other = row(1, point("end", 1.0, 0.2, 0.3))
    rows = [row(1, *TRAINED), row(0, *TRAINED)]
    found = beside(rows, "0.1", {1: other})
    early = found["plain, lr 0.1, stopped early"]
    assert early == ["no run", pytest.approx(0.2)]  # seeds 0 and 1
    assert {*beside(rows, "0.5")["plain, at other rates"]} == {"no run"}


def test_what_diverged_keeps_its_place():
    lost = point("diverged", 1.0, 0.0, 0.0)
    lost["changes"] = {}
    adapters = {**lost, "rate": 1.0, "lora": 8}
    rows = [row(0, *TRAINED), row(1, lost), row(2, *TRAINED[:-1], adapters)]
    assert ends(rows[1]) == {"0.1": None}
    found = beside(rows, "0.1")
    first = found["plain, lr 0.1, averaged back"]
    assert first == [-0.05, "the method diverged", first[0]]
    assert found["adapters, lr 1, averaged back"][1:] == ["no run", "diverged"]
    learned = row(0, *TRAINED[:3], point("end", 1.0, -0.1, 0.0))
    assert {x for (x,) in beside([learned], "0.1").values()} == {
        "the method learned nothing"
    }


def test_every_seed_is_said_and_no_mean_of_a_part():
    assert said([0.1, -0.3]) == "-0.100 (+0.100, -0.300)"
    assert said([0.1, "diverged", -0.3]) == "+0.100, diverged, -0.300"
    assert said([0.25]) == "+0.250"


def test_the_dose_is_what_plain_training_lost_on_its_way():
    more = row(1, point("training", 1.0, 0.4, 0.6), steps=10)
    found = dose([row(0, *TRAINED), more])
    assert list(found) == ["0.05", "0.1"]  # the adapters' rate is none
    assert found["0.1"] == pytest.approx({0: 0.0, 5: 0.1, 10: 0.5})
    fig, told = draw_dose(found)
    assert told.endswith("lr 0.05: +0.020; lr 0.1: +0.500.")
    (ax,) = fig.axes
    assert "at 0.1 loses\n0.50 bits" in title(fig)
    assert [x.get_text() for x in ax.texts] == ["lr 0.05", "lr 0.1"]


def test_the_rate_of_the_study_is_the_smallest_that_loses_enough():
    at = lambda *ends: {f"{k}": {0: 0.0, 9: x} for k, x in enumerate(ends)}
    assert dose_rate(at(0.05, 0.06, 0.9)) == "1"
    assert dose_rate(at(0.01, 0.02, 0.05)) == "2"
    diverged = point("diverged", 1.0, 0.0, 0.0, 0.2)
    found = dose([row(0, *TRAINED[:4], {**diverged, "changes": {}})])
    assert found["0.2"] == {0: 0.0, 10: float("inf")}
    assert dose_rate({"0.05": {9: 0.0}, "0.2": found["0.2"]}) == "0.2"
    assert title(draw_dose(found)[0]).startswith("Plain")


@pytest.mark.parametrize("arm", ["merge by sample", "merge by self"])
def test_the_study_has_the_rate_that_its_tuning_gives(arm):
    (lr,) = {
        c.parameters["lr"]
        for c in read_study(STUDIES / "language_model.yaml").cells
        if c.arm == arm
    }
    tuning = read_table("tuning_language_model")
    level = read_table("language_model")
    assert not level.rows or tuning.complete
    if tuning.rows:
        assert f"{lr:.2g}" == dose_rate(dose(tuning.rows))


def test_the_page_shows_each_arm_beside_the_controls_of_its_seed(monkeypatch):
    page = STUDIES.parent / "18_third_protocol.ipynb"
    (cell,) = (
        "".join(c["source"])
        for c in json.loads(page.read_text())["cells"]
        if c["cell_type"] == "code" and "level.rows" in "".join(c["source"])
    )
    arm = lambda name, *rows: [r | {"arm": name} for r in rows]
    rows = arm("merge by sample", row(0, *TRAINED), row(1, *TRAINED))
    projected = point("end", 1.0, 0.3, 0.01) | {"method": "merge+projection"}
    other = row(0, projected)
    other["parameters"] |= {"method": "merge+projection"}
    rows += arm("projection and merge by self", other)
    lost = ({"arm": "merge by self", "seed": 2, "error": "it diverged"},)
    shown = []
    monkeypatch.setattr(
        "IPython.display.display", lambda x: shown.append(x.data)
    )
    space: dict = {}
    exec("from IPython.display import Markdown, display", space)
    exec("from dmr.verdict.language import beside, ends, said", space)
    exec("from dmr.verdict.pages import markdown_table", space)
    level = Table("language_model", rows=tuple(rows), lost=lost)
    exec(cell, space | {"level": level})
    assert shown[0] == "Failed: merge by self, seed 2: it diverged."
    assert shown[1].startswith("**Merge by sample, rate 0.1**")
    assert (
        "| plain, lr 0.1, averaged back | -0.050 (-0.050, -0.050)" in shown[1]
    )
    assert shown[2].startswith("**Projection and merge by self, rate 0.1**")
    assert "| plain, lr 0.1, averaged back | -0.090, no run" in shown[2]
