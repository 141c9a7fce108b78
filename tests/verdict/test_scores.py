"The strip of bars and the picture of all arms say what their tables say."

import json
import statistics

import pytest

pytest.importorskip("matplotlib")
from dmr.verdict.scores import (
    SHOWN,
    at_best,
    bars,
    by_setting,
    draw_forest,
    draw_scores,
    equal_learning,
)
from dmr.verdict.tables import Table, read_table


def row(arm, seed, lr, final, **other):
    "One finished run, as a table holds it."
    given = {"lr": lr, "seed": seed, "size": "nano", "modification": "none"}
    given |= {"steps": 150, "batch": 8, "context": 32} | other
    return {
        "arm": arm,
        "seed": seed,
        "part": "",
        "parameters": given,
        "final_average": final,
        "domains_total": 8,
    }


@pytest.fixture
def table():
    "Plain training at two rates; an arm at two, one of them short of a seed."
    rows = [
        *(row("vanilla", s, 1e-3, 2.0 + s) for s in range(4)),
        *(row("vanilla", s, 2e-3, 2.5 + s) for s in range(4)),
        *(row("arm", s, 1e-3, 1.8 + s, interpolate=0.5) for s in range(4)),
        *(row("arm", s, 2e-3, 1.0, interpolate=0.5) for s in range(1)),
    ]
    return Table("made up", rows=tuple(rows), nominal={"": 1e-3})


def test_settings_differ_in_anything_but_the_seed(table):
    assert [len(at) for at in by_setting(table, "arm")] == [4, 1]
    assert at_best(table, "vanilla", [0, 1]) == {0: 2.0, 1: 3.0}
    with pytest.raises(ValueError, match="'other' in 'made up'"):
        by_setting(table, "other")
    twice = Table("made up", rows=(*table.rows, table.rows[-1]))
    with pytest.raises(ValueError, match="'arm' at lr 0.002 has two runs"):
        by_setting(twice, "arm")


def test_only_seeds_count_that_every_setting_has(table):
    (bar,) = bars(table, {"arm": "words"})
    assert bar.saved.n == 1 and bar.saved.exploratory
    assert bar.saved.estimate == pytest.approx(1.0)
    whole = Table("made up", rows=table.rows[:-1], nominal={"": 1e-3})
    (bar,) = bars(whole, {"arm": "words"})
    assert bar.saved.n == 4
    assert bar.saved.estimate == pytest.approx(0.2)


def test_the_strip_agrees_with_a_plain_reading_of_the_table():
    eight = read_table("eight")
    found = {b.words: b.saved for b in bars(eight, SHOWN["eight"])}
    best = {}
    for arm in ("vanilla", *SHOWN["eight"]):
        means = {}
        for r in eight.rows:
            if r["arm"] == arm:
                lr = r["parameters"]["lr"]
                means.setdefault(lr, []).append(r["final_average"])
        best[arm] = min(map(statistics.mean, means.values()))
    for arm, words in SHOWN["eight"].items():
        gap = best["vanilla"] - best[arm]
        assert found[words].estimate == pytest.approx(gap, abs=1e-9)
    figure, alt = draw_scores({s: read_table(s) for s in SHOWN})
    ax = figure.axes[0]
    title = ax.get_title("left") or ax.get_title()
    first = next(iter(SHOWN))
    free = max(
        b.saved.estimate
        for b in bars(read_table(first), SHOWN[first])
        if not (b.bound or b.arm.keeps_text)
    )
    assert title.endswith(f"{free:.2f}") and f"{free:.3f}" in alt
    assert f"{found['edit the step (displacement)'].estimate:.3f}" in alt
    head = "Another study: 8 domains, 38 kB read of each, 10 seeds"
    assert head in [t.get_text() for t in ax.texts] and head in alt


def test_the_forest_holds_every_arm_once():
    tables = {s: read_table(s) for s in ("eight", "sixteen", "confirm")}
    found = equal_learning(tables)
    figure, alt = draw_forest(tables)
    names = [t.get_text() for t in figure.axes[0].texts]
    known = [a for a, x in found.items() if any(x.values())]
    assert names == [a.removeprefix("control: ") for a in known]
    missing = [a for a in found if a not in known]
    assert f"{len(missing)} arms learned" in figure.axes[0].get_xlabel()
    assert json.dumps(alt).count("not comparable") >= len(missing)
