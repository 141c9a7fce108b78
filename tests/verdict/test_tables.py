"""Tables held against their plans, and what the study files promise."""

import csv
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import simulated

from dmr.reporting.arms import base_rate
from dmr.studies.study import find_project, read_study
from dmr.verdict.answers import (
    ADAPTIVE,
    DISPLACED,
    FIXED,
    MAIN,
    REPLAY_DECOUPLED,
    SHARED,
    STUDIES,
)
from dmr.verdict.drawings import draw_domains, draw_growth, draw_plane
from dmr.verdict.pages import final_table
from dmr.verdict.planes import at_equal_learning
from dmr.verdict.tables import compare, curves, evidence, read_table

ROOT = Path(__file__).parents[2]


@pytest.fixture
def project(tmp_path):
    folder = tmp_path / "nbs/experiments/studies"
    folder.mkdir(parents=True)
    for source in (ROOT / "nbs/experiments/studies").glob("*.yaml"):
        shutil.copy(source, folder)
    shutil.copy(ROOT / "nbs/experiments/continual_lm.ipynb", folder.parent)
    return find_project(tmp_path)


def write(project, study, rows):
    project.results.mkdir(exist_ok=True)
    columns = sorted({k for r in rows for k in r})
    with open(project.results / f"{study}.csv", "w", newline="") as f:
        out = csv.DictWriter(f, columns, restval="")
        out.writeheader()
        out.writerows(rows)


def test_tables_are_held_against_their_plans(project):
    assert str(read_table("nothing", project)) == "nothing: no study file"
    assert "no runs yet" in str(read_table("eight", project))
    plan = read_study(project.studies / "eight.yaml")
    row = dict(
        status="ok",
        forgetting="0.5",
        final_average="2.5",
        wall_s="20",
        loss_matrix="[[2.0,5],[2.5,2.0]]",
        loss_columns='["a","b"]',
    )
    cells, new = plan.cells, {"code": "new"}
    rows = [dict(row, run_id=c.slug, cell=c.hash, **new) for c in cells[:3]]
    rows += [
        dict(row, run_id="old", cell=cells[3].hash, code="old"),
        dict(row, run_id="stranger", cell="not planned", **new),
        dict(
            run_id="bad",
            cell=cells[4].hash,
            status="failed",
            error="ValueError: NaN",
            **new,
        ),
        dict(run_id="not a number", cell=cells[5].hash, status="ok", **new),
        dict(run_id="later", cell=cells[6].hash, status="missing", **new),
    ]
    write(project, "eight", rows)
    table = read_table("eight", project)
    assert (len(table.rows), table.planned) == (3, len(cells))
    assert (len(table.lost), table.left_out) == (2, 1)
    assert (
        str(table)
        == f"eight: 3 of {len(cells)} runs, 2 failed, 1 by other code left out"
    )
    assert table.nominal == {"": cells[0].parameters["lr"] * 4}
    assert sum(table.failed.values()) == 2 and table.seconds == 60
    assert [r["status"] for r in table.lost] == ["failed", "ok"]
    assert [r["error"] for r in table.lost] == ["ValueError: NaN", ""]
    # what counts as run is neither of other code nor missing
    open_ = [c.arm for c in (cells[3], *cells[6:])]
    assert table.to_come == {a: open_.count(a) for a in open_}


@pytest.mark.parametrize("study", STUDIES)
def test_every_study_of_the_protocol_has_its_arms_and_a_nominal_rate(
    study, project
):
    plan = read_study(project.studies / f"{study}.yaml")
    arms = {c.arm for c in plan.cells}
    table = read_table(study, project)
    assert table.planned == len(plan.cells) and not table.rows
    if study in ("eight", "sixteen"):
        assert set(MAIN) <= arms
    if study == "overlap":
        rho = {p.removeprefix("rho ") for p in table.nominal}
        assert rho == {"0", "0.25", "0.5", "0.75", "0.95"}
    # vanilla stands at the nominal rate in every part: without it nothing can
    # be compared
    plain = {
        (c.part, c.parameters["lr"]) for c in plan.cells if c.arm == "vanilla"
    }
    for c in plan.cells:
        assert (c.part, table.nominal[c.part]) in plain


def test_tuning_seeds_are_used_nowhere_else(project):
    seeds = {
        study: {
            c.seed for c in read_study(project.studies / f"{study}.yaml").cells
        }
        for study in STUDIES
    }
    tuned = seeds.pop("tuning")
    assert all(not tuned & other for other in seeds.values())


def test_every_study_takes_the_settings_of_eight():
    """What the protocol says: an arm is the same everywhere, but for both
    replays of `conflict` and the rank in small adapters.
    """
    project = find_project(ROOT)
    keys = (
        "modification",
        "routing",
        "strength",
        "alpha",
        "fraction",
        "interpolate",
        "rank",
    )
    settings = lambda p: {k: p.get(k) for k in keys}
    eight = {
        c.arm: settings(c.parameters)
        for c in read_study(project.studies / "eight.yaml").cells
    }
    differ = {}
    for study in (
        "sixteen",
        "corners",
        "overlap",
        "conflict",
        "confirm",
        "longer",
        "small",
        "backbones",
        "lora",
    ):
        cells = [
            c
            for c in read_study(project.studies / f"{study}.yaml").cells
            if c.arm in eight
        ]
        assert {c.arm for c in cells}, study
        for c in cells:
            theirs = settings(c.parameters)
            for key in [k for k in keys if theirs[k] != eight[c.arm][k]]:
                differ.setdefault((study, key), set()).add(c.arm)
    projections = {SHARED, FIXED, ADAPTIVE, DISPLACED}
    assert differ == {
        ("conflict", "alpha"): {REPLAY_DECOUPLED},
        ("lora", "rank"): projections,
    }


def test_flagged_domains_do_not_count():
    def forget_b(row, L):  # alone, far more, under shared routing
        if row["arm"] == SHARED:
            L[:] = [[2.0, 5, 5], [2.5, 2.0, 5], [2.5, 9.0, 2.0]]

    study = simulated.change(simulated.table({SHARED: 1.0}), forget_b)
    every, without = evidence(study), evidence(study, without=["b"])
    assert min(every.nominal(SHARED).values()) > 3
    assert max(without.nominal(SHARED).values()) == pytest.approx(0.5)


def test_an_arm_is_a_value_with_fields():
    both = f"{SHARED} + interpolation 0.3"
    names = [SHARED, both, "interpolation 0.3", "control: second batch"]
    arms = simulated.table(dict.fromkeys(names, 1.0), seeds=1).arms
    assert [n for n, a in arms.items() if a.composed] == [both]
    assert [n for n, a in arms.items() if a.control] == names[-1:]
    assert arms["vanilla"].fields.plain and not arms[both].fields.plain


@pytest.mark.parametrize("study", ["merging", "merging_long"])
def test_settings_of_one_arm_at_one_rate_are_told_apart(study):
    """The study files with a made-up number for every run: interpolation has
    several weights at one rate. Lines, tables and figures know each.
    """
    plan = read_study(find_project(ROOT).studies / f"{study}.yaml")
    rows = []
    for c in plan.cells:
        p = c.parameters
        rate = (p["lr"] / 2e-3) ** 0.5 * (p["interpolate"] or 1.0)
        noise = 0.01 * ((7 * c.seed + len(c.arm)) % 5)
        about = {"arm": c.arm, "seed": c.seed, "parameters": p}
        domains = ("a", "b", "c")
        lost, learned = 0.5 * rate + noise, 2.2 - 0.2 * rate
        rows.append(simulated.row(lost, learned, domains, **about))
    nominal = {"": base_rate(c.parameters for c in plan.cells)}
    table = simulated.whole(rows, study, nominal)
    weights = {c.parameters["interpolate"] for c in plan.cells} - {None}
    names = {f"interpolation, interpolate {w:g}" for w in weights}
    found = curves(table)
    assert len(names) > 1 and names <= set(found)
    assert "interpolation" not in found and "Fisher merge 0.7" in found
    for w in weights:
        at = found[f"interpolation, interpolate {w:g}"]
        r = next(r for r in rows if r["parameters"]["interpolate"] == w)
        mine = at[r["parameters"]["lr"] / nominal[""]][r["seed"]]
        assert mine.forgetting == pytest.approx(r["forgetting"])
    at_nominal = {a for a in names if 1.0 in found[a]}
    lines = {x.name for x in compare(table)}
    assert at_nominal <= lines and "vanilla" not in lines
    text = final_table(table)
    assert all(a in text for a in at_nominal)
    for draw in (draw_plane, draw_growth, draw_domains):
        fig, alt = draw(table)
        assert fig.axes and alt
    assert at_equal_learning(table, "")
    # what ran once at a rate keeps its name, and a run twice is still an error
    plain = simulated.table({SHARED: 1.0})
    assert plain.scanned == {} and set(plain.arms) == {"vanilla", SHARED}
    with pytest.raises(ValueError, match="two runs of seed"):
        curves(replace(table, rows=(*table.rows, table.rows[-1])))
