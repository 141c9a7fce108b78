"""Methods against the learning-rate control, on tables made by hand."""

import pandas as pd
import pytest
import simulated

from dmr.verdict.planes import (
    against_control,
    draw_routings,
    finding,
    readable,
    routed_arms,
    setting_control,
)

ADAMW, SGD = ("adamw", "kept"), ("sgd", "kept")


def run(arm, seed, learned=None, lost=None, modification="none", **more):
    "A row; without numbers it failed."
    parameters = {
        "modification": modification,
        "routing": "decoupled",
        "lr": 1e-3,
        "optimizer": "adamw",
        "state": "kept",
        **more,
    }
    row = {"part": "", "arm": arm, "seed": seed, "parameters": parameters}
    if learned is None:
        return row
    return {**row, "learning_accuracy": learned, "forgetting": lost}


def plain(seed, optimizer="adamw"):
    """A control whose forgetting is 2 - learning accuracy, a straight line: the
    rates learn to 1.0, 0.8, 0.6.
    """
    return [
        run("vanilla", seed, a, 2 - a, lr=lr, optimizer=optimizer)
        for lr, a in ((5e-4, 1.0), (1e-3, 0.8), (2e-3, 0.6))
    ]


def table(*more):
    ewc = lambda routing, *of: run("ewc", *of, "ewc", routing=routing)
    rows = [*plain(0), *plain(1), *plain(0, "sgd"), *plain(9001)]
    # on the line 1.3: 0.2 and 0.1 below
    rows += [ewc("shared", s, 0.7, 1.1 + 0.1 * s) for s in (0, 1)]
    rows += [ewc("denominator", 0, 0.9, 1.2)]
    rows += [
        run("interpolation", 0, 0.8, 0.1, interpolate=0.5),
        run("warm", 0, 0.8, 0.1, warmup=10),
        run("joint", 0, 0.8, 0.1, joint=True),
    ]
    lost = [ewc("decoupled", s, None, None) for s in (0, 1, 2)]
    lost += [ewc("denominator", 1, None, None)]
    return simulated.whole([*rows, *more], "families", lost=tuple(lost))


def test_only_plain_training_is_the_control():
    curve = setting_control(table(), ADAMW)
    assert list(curve) == [5e-4, 1e-3, 2e-3]
    # neither interpolation, warm-up, joint, SGD nor seed 9001
    assert all(sorted(seeds) == [0, 1] for seeds in curve.values())
    assert curve[1e-3][0] == (0.8, 1.2)
    assert list(setting_control(table(), SGD)[1e-3]) == [0]
    assert setting_control(table(), ("sgd", "reset")) == {}


def test_differences_to_the_control_and_failures_are_counted():
    lines = against_control(table(), ["ewc"]).set_index("routing")
    shared, decoupled, denominator = (
        lines.loc[r] for r in ("shared", "decoupled", "denominator")
    )
    assert (shared.seeds, shared.failed, shared.comparable) == (2, 0, 2)
    assert shared.against_control == pytest.approx(-0.15)
    assert shared.forgetting == pytest.approx(1.15)
    assert bool(shared.native) and not decoupled.native
    assert (decoupled.seeds, decoupled.failed) == (0, 3)
    assert pd.isna(decoupled.forgetting) and decoupled.note == "no run finished"
    assert (denominator.seeds, denominator.failed) == (1, 1)
    assert denominator.against_control == pytest.approx(0.1)
    said = "1 of 3 arms forget less than the learning rate would, 1 failed"
    assert finding(lines) == said


def test_a_readable_table():
    shown = readable(against_control(table(), ["ewc"])).set_index("routing")
    numbers = ["0.700", "1.150", "-0.150"]
    native = shown.loc["shared (native)"].tolist()
    assert native == ["AdamW", "2 of 2", *numbers, ""]
    failed = ["AdamW", "0 of 3", "", "", "", "no run finished"]
    assert shown.loc["decoupled"].tolist() == failed


def test_the_figure_names_what_failed():
    far = run("ewc", 0, 52.9, 79.3, "ewc", routing="displacement")
    fig, alt = draw_routings(table(far), ["ewc"])
    lost, learned = fig.axes
    assert lost.get_xlim()[1] < 2 and learned.get_xlim()[1] < 2
    missing = "failed: decoupled; worse than guessing: displacement"
    (row,) = [t.get_text() for t in lost.texts]
    assert row == f"ewc: AdamW ({missing})"
    dots = [x.get_xdata() for x in lost.lines if x.get_marker() == "o"]
    # shared, its ring, denominator
    assert [float(x[0]) for x in dots] == pytest.approx([1.15, 1.15, 1.2])
    assert "ewc decoupled (AdamW) failed" in alt
    assert "ewc shared (AdamW) 1.150 at 0.700" in alt


def test_what_is_not_one_arm_is_refused():
    again = run("ewc", 0, 0.7, 1.1, "ewc", routing="shared", lr=2e-3)
    with pytest.raises(ValueError, match="seed 0 has two runs of 'ewc'"):
        routed_arms(table(again), ["ewc"])
    with pytest.raises(ValueError, match="no finished run of si"):
        draw_routings(table(), ["si"])
    assert against_control(simulated.whole([]), ["ewc"]).empty
