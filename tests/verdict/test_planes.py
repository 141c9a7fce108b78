"""Methods against the learning-rate control, on tables made by hand."""

import pandas as pd
import pytest

from dmr.verdict.planes import (
    compare,
    control,
    draw_planes,
    finding,
    points,
    read_families,
    readable,
)

COLUMNS = dict(
    optimizer="adamw",
    state="kept",
    interpolate=None,
    freeze_after=None,
    second_batch=0,
    joint=False,
    warmup=0,
    decay="none",
)


def run(
    arm,
    seed,
    learning,
    forgetting,
    modification="none",
    routing="decoupled",
    lr=1e-3,
    status="ok",
    **more,
):
    row = dict(
        arm=arm,
        seed=seed,
        learning_accuracy=learning,
        forgetting=forgetting,
        modification=modification,
        routing=routing,
    )
    return {**COLUMNS, **row, "lr": lr, "status": status, **more}


def plain(seed, optimizer="adamw"):
    """A control whose forgetting is 2 - learning accuracy, a straight line: the
    rates learn to 1.0, 0.8, 0.6.
    """
    return [
        run("vanilla", seed, la, 2 - la, lr=lr, optimizer=optimizer)
        for lr, la in ((5e-4, 1.0), (1e-3, 0.8), (2e-3, 0.6))
    ]


@pytest.fixture
def table():
    rows = [*plain(0), *plain(1), *plain(0, "sgd"), *plain(9001)]
    # on the line 1.3: 0.2 and 0.1 below
    rows += [run("ewc", s, 0.7, 1.1 + 0.1 * s, "ewc", "shared") for s in (0, 1)]
    rows += [
        run("ewc", s, None, None, "ewc", "decoupled", status="failed")
        for s in (0, 1)
    ]
    rows += [
        run("ewc", 0, 0.9, 1.2, "ewc", "denominator"),
        run("ewc", 1, None, None, "ewc", "denominator", status="failed"),
    ]
    rows += [
        run("interpolation", 0, 0.8, 0.1, interpolate=0.5),
        run("warm", 0, 0.8, 0.1, warmup=10),
        run("joint", 0, 0.8, 0.1, joint=True),
    ]
    # finished with a loss that is not a number
    rows += [run("ewc", 2, None, None, "ewc", "decoupled")]
    rows += [run("later", 0, None, None, "ewc", "shared", status="missing")]
    return rows


def read(table, tmp_path, **options):
    pd.DataFrame(table).to_csv(tmp_path / "t.csv", index=False)
    return read_families(tmp_path / "t.csv", **options)


def test_only_plain_training_is_the_control(table, tmp_path):
    rows = read(table, tmp_path)
    curve = control(rows, ("adamw", "kept"))
    assert list(curve) == [5e-4, 1e-3, 2e-3]
    # neither interpolation, warm-up, joint, SGD nor seed 9001
    assert all(sorted(seeds) == [0, 1] for seeds in curve.values())
    assert curve[1e-3][0] == (0.8, 1.2)
    assert sorted(
        control(read(table, tmp_path, tuning=10_000), ("adamw", "kept"))[1e-3]
    ) == [0, 1, 9001]
    assert (
        list(control(rows, ("sgd", "kept"))[1e-3]) == [0]
        and control(rows, ("sgd", "reset")) == {}
    )


def test_differences_to_the_control_and_failures_are_counted(table, tmp_path):
    lines = compare(read(table, tmp_path), ["ewc"]).set_index("routing")
    shared, decoupled, denominator = (
        lines.loc[r] for r in ("shared", "decoupled", "denominator")
    )
    assert (shared.seeds, shared.failed, shared.comparable) == (2, 0, 2)
    assert shared.against_control == pytest.approx(
        -0.15
    ) and shared.forgetting == pytest.approx(1.15)
    assert bool(shared.native) and not decoupled.native
    assert (
        (decoupled.seeds, decoupled.failed) == (0, 3)
        and pd.isna(decoupled.forgetting)
        and decoupled.note == "no run finished"
    )
    assert (denominator.seeds, denominator.failed) == (
        1,
        1,
    ) and denominator.against_control == pytest.approx(0.1)
    assert (
        finding(lines)
        == "1 of 3 arms forget less than the learning rate would, 1 failed"
    )


def test_a_readable_table(table, tmp_path):
    shown = readable(compare(read(table, tmp_path), ["ewc"])).set_index(
        "routing"
    )
    assert shown.loc["shared (native)"].tolist() == [
        "AdamW",
        "2 of 2",
        "0.700",
        "1.150",
        "-0.150",
        "",
    ]
    assert shown.loc["decoupled"].tolist() == [
        "AdamW",
        "0 of 3",
        "",
        "",
        "",
        "no run finished",
    ]


def test_the_figure_names_what_failed(table, tmp_path):
    table.append(run("ewc", 0, 52.9, 79.3, "ewc", "displacement"))
    fig, alt = draw_planes(read(table, tmp_path), ["ewc"])
    (ax,) = [a for a in fig.axes if a.get_visible()]
    assert ax.get_ylim()[1] < 2
    assert (
        ax.get_title()
        == "ewc: AdamW\nfailed: decoupled; worse than guessing: displacement"
    )
    assert (
        "ewc decoupled (AdamW) failed" in alt
        and "ewc shared (AdamW) 1.150 at 0.700" in alt
    )


def test_what_is_not_one_arm_is_refused(table, tmp_path):
    rows = read(table, tmp_path)
    with pytest.raises(ValueError, match="seed 0 has two runs"):
        points(rows[(rows.arm == "vanilla") & (rows.optimizer == "adamw")])
    with pytest.raises(ValueError, match="no finished run of si"):
        draw_planes(rows, ["si"])
    assert (
        read_families(tmp_path / "none.csv").empty
        and compare(read_families(tmp_path / "t.csv")[:0], ["ewc"]).empty
    )
