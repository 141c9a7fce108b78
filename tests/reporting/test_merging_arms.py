"""A merge by curvature is an arm of its own in labels, fields and pictures."""

import pytest

from dmr.reporting.arms import base_rate, read_arm
from dmr.reporting.figures import PALETTE
from dmr.studies.table import arm_label, boundary_weights

FISHER = {"consolidation": "fisher", "merge": {"weight": 0.7}, "lr": 1e-3}


@pytest.mark.parametrize(
    "given, weights, label",
    [
        ({}, (None, None), "vanilla"),
        ({"interpolate": 0.3}, (0.3, None), "interpolation 0.3"),
        (
            {"consolidation": "interpolate", "merge": {"weight": 0.3}},
            (0.3, None),
            "interpolation 0.3",
        ),
        ({"consolidation": "fisher"}, (None, 0.5), "Fisher merge 0.5"),
        (FISHER, (None, 0.7), "Fisher merge 0.7"),
        (
            FISHER | {"merge": '{"weight": 0.7}'},
            (None, 0.7),
            "Fisher merge 0.7",
        ),
        ({"consolidation": float("nan")}, (None, None), "vanilla"),
        (
            FISHER | {"modification": "projection", "routing": "displacement"},
            (None, 0.7),
            "displacement projection + Fisher merge 0.7",
        ),
        (
            {"consolidation": "interpolate", "merge": {"weight": 0.8}}
            | {"merges": 4},
            (0.8, None),
            "SFA 0.8 4 a domain",
        ),
        (
            FISHER | {"merges": 2, "after_merge": "first"},
            (None, 0.7),
            "Fisher merge 0.7 2 a domain first moment cleared",
        ),
        (
            FISHER
            | {"consolidation": "fisher_variant"}
            | {"merge": '{"curvature": "seen", "weight": 0.7}'},
            (None, 0.7),
            "Fisher merge 0.7 curvature seen",
        ),
        (
            {"consolidation": "fisher_variant", "merge": {"rise": 0.1}},
            (None, 0.5),
            "Fisher merge giving back 0.1",
        ),
        ({"consolidation": "regmean"}, (None, 0.5), "RegMean 0.5"),
        (
            {"consolidation": "kfac", "merge": {"only": ["blocks.*"]}},
            (None, 0.5),
            "K-FAC merge 0.5 only ['blocks.*']",
        ),
        (
            {"modification": "ewc", "routing": "shared"}
            | {"options": {"uniform": True}},
            (None, None),
            "shared L2 to the start",
        ),
    ],
)
def test_labels(given, weights, label):
    assert boundary_weights(given) == weights
    assert arm_label(given) == label


def test_a_merge_is_no_control():
    alone, plain = read_arm(FISHER), read_arm({"lr": 1e-3})
    assert plain.plain and not alone.plain
    assert alone.style["color"] != plain.style["color"]
    assert alone.style["marker"] != plain.style["marker"]
    both = FISHER | {"modification": "projection", "routing": "displacement"}
    assert read_arm(both).style["color"] == PALETTE["displacement"]
    # it counts for the base rate like other methods
    assert base_rate([FISHER, {"lr": 1.0}, {"lr": 1.0}]) == 1e-3
