"""Verdicts from tables with known answers: each word reached, missing and short
tables, flagged domains, versions apart.
"""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dmr.reporting.statistics import CLAIMS, FAILS, HOLDS, UNDECIDED, UNTESTABLE
from dmr.studies.study import find_project, read_study
from dmr.verdict.rules import (
    ADAPTIVE,
    DISPLACED,
    FIXED,
    INTERPOLATION,
    MAIN,
    NOT_RUN,
    REFUTED,
    REPLAY,
    REPLAY_DECOUPLED,
    SHARED,
    STUDIES,
    Table,
    advice,
    answer_claims,
    claim_box,
    compare,
    comparison_table,
    draw_domains,
    draw_growth,
    draw_heat,
    draw_parts,
    draw_plane,
    evidence,
    final_table,
    growth_table,
    judged,
    pair_table,
    read_inflation,
    read_table,
    recipe,
    simulated_table,
    verdict_table,
)

ROOT = Path(__file__).parents[2]
ARMS = {
    SHARED: 1.0,
    FIXED: 1.2,
    ADAPTIVE: 0.5,
    DISPLACED: 0.9,
    REPLAY: 0.7,
    REPLAY_DECOUPLED: 0.8,
    INTERPOLATION: 0.75,
}


def words(**arms):
    table = simulated_table({**ARMS, **arms})
    return {
        a.claim: a.verdict.verdict if a.verdict else NOT_RUN
        for a in answer_claims({"eight": table})
        if a.study == "eight"
    }


@pytest.mark.parametrize(
    ("claim", "arms", "expected"),
    [
        ("C1", {SHARED: 1.0}, HOLDS),
        ("C1", {SHARED: 0.7}, FAILS),
        ("C1", {SHARED: 0.9}, UNDECIDED),
        ("C2", {REPLAY: 0.7}, HOLDS),
        ("C2", {REPLAY: 1.2}, FAILS),
        ("C3", {FIXED: 1.2}, HOLDS),
        ("C3", {FIXED: 0.8}, FAILS),
        ("C4", {ADAPTIVE: 0.5}, HOLDS),
        ("C4", {ADAPTIVE: 0.9}, FAILS),
        ("C4", {ADAPTIVE: 0.7, REPLAY: 0.7}, UNDECIDED),
    ],
)
def test_each_verdict_is_reached(claim, arms, expected):
    assert words(**arms)[claim] == expected


def test_a_short_horizon_is_not_testable_and_three_seeds_decide_nothing():
    short = simulated_table(ARMS, beta2=0.999)
    assert {
        a.verdict.verdict
        for a in answer_claims({"eight": short})
        if a.study == "eight"
    } == {UNTESTABLE}
    few = simulated_table(ARMS, seeds=3)
    assert {
        a.verdict.verdict
        for a in answer_claims({"eight": few})
        if a.study == "eight"
    } == {UNDECIDED}


def test_growth_overlap_and_families():
    domains = [f"d{i:02}" for i in range(16)]
    sixteen = simulated_table(ARMS, seeds=5, study="sixteen", domains=domains)
    c5 = next(a for a in answer_claims({"sixteen": sixteen}) if a.claim == "C5")
    # a lead that does not grow
    assert c5.verdict is not None and c5.verdict.verdict in (UNDECIDED, FAILS)
    rows, nominal = [], {}
    for rho, ratio in ((0.0, 0.7), (0.5, 0.85), (0.95, 1.0)):
        t = simulated_table(
            {SHARED: ratio}, seeds=5, study="overlap", part=f"rho {rho:g}"
        )
        rows += t.rows
        nominal |= t.nominal
    c10 = next(
        a
        for a in answer_claims(
            {
                "overlap": Table(
                    "overlap", "", len(rows), tuple(rows), nominal=nominal
                )
            }
        )
        if a.claim == "C10"
    )
    assert c10.verdict.verdict == HOLDS
    pairs = {
        f"{f} {r}": x
        for f in (
            "EWC additive",
            "EWC rescaling",
            "SI additive",
            "SI rescaling",
            "replay 0.5 %",
        )
        for r, x in (("shared", 1.0), ("decoupled", 0.6))
    }
    c7 = next(
        a
        for a in answer_claims(
            {"conflict": simulated_table(pairs, seeds=5, study="conflict")}
        )
        if a.claim == "C7"
    )
    assert c7.verdict.verdict == HOLDS


def test_an_arm_of_which_every_run_failed_is_said_to_have_failed():
    """Diverged runs are ended runs: the table is complete, the family stays
    open, and the box says why.
    """
    arms = {f"{f} {r}": x for f in ("EWC additive", "EWC rescaling", "SI additive", "SI rescaling", "replay 0.5 %")
            for r, x in (("shared", 1.0), ("decoupled", 0.6))}  # fmt: skip
    whole = simulated_table(arms, seeds=5, study="conflict")
    rows = tuple(r for r in whole.rows if r["arm"] != "EWC additive decoupled")
    table = replace(
        whole, rows=rows, failed=5, failed_seeds={"EWC additive decoupled": 5}
    )
    assert table.complete
    c7 = next(a for a in answer_claims({"conflict": table}) if a.claim == "C7")
    assert (
        c7.word == "undecided at n = 5"
        and "EWC additive decoupled: all 5 runs ended in an error"
        in str(c7.verdict)
    )
    lacking = replace(table, failed=0, failed_seeds={})
    c7 = next(
        a for a in answer_claims({"conflict": lacking}) if a.claim == "C7"
    )
    assert not lacking.complete and c7.word == NOT_RUN


def test_c8_is_drawn_without_arms_of_two_seeds():
    """Arms that the study runs on two seeds are shown, but neither decide nor
    lower n; replay, on five, is a rival.
    """
    table = simulated_table(
        {SHARED: 1.0, FIXED: 1.2, ADAPTIVE: 0.5, REPLAY: 0.8},
        seeds=5,
        study="lora",
    )
    rows = [r for r in table.rows if r["arm"] != FIXED or r["seed"] < 2]

    def c8(rows):
        answers = answer_claims(
            {
                "lora": Table(
                    "lora", "", len(rows), tuple(rows), nominal=table.nominal
                )
            }
        )
        return next(a for a in answers if a.claim == "C8")

    assert (c8(rows).verdict.verdict, c8(rows).verdict.n) == (HOLDS, 5)
    better = simulated_table({REPLAY: 0.3}, seeds=5, study="lora").rows
    assert (
        c8(
            [r for r in rows if r["arm"] != REPLAY]
            + [r for r in better if r["arm"] == REPLAY]
        ).verdict.verdict
        == FAILS
    )


def test_nothing_there_is_not_yet_run():
    answers = answer_claims({})
    assert {a.word for a in answers} == {NOT_RUN} and {
        a.claim for a in answers
    } == set(CLAIMS)
    for claim in CLAIMS:
        assert NOT_RUN in claim_box(claim, answers, {})
    assert verdict_table(answers).count(NOT_RUN) == len(CLAIMS)
    empty = Table("eight", "", 430)
    assert "no runs yet" in advice(empty) and compare(empty) == []
    assert [
        draw(empty)
        for draw in (draw_plane, draw_heat, draw_growth, draw_domains)
    ] == [None] * 4


@pytest.mark.parametrize("kept", [1, 3, 6, 13, 40])
def test_a_short_table_never_fails_and_is_preliminary(kept):
    full = simulated_table(ARMS)
    short = Table(
        "eight", "", full.planned, full.rows[:kept], nominal=full.nominal
    )
    answers = answer_claims({"eight": short})
    for a in answers:
        assert a.verdict is None or a.note.startswith("preliminary")
    text = (
        claim_box("C1", answers, {"eight": short})
        + verdict_table(answers)
        + advice(short)
    )
    assert f"{kept} of {full.planned} runs" in text
    for draw in (draw_plane, draw_heat, draw_growth, draw_domains):
        draw(short)


def test_verdicts_without_flagged_domains():
    table = simulated_table({SHARED: 1.0})
    rows = []
    for r in table.rows:  # domain b alone forgets far more under shared routing
        L = (
            [
                [2.0, 5, 5],
                [2.5, 2.0, 5],
                [2.5, 9.0 if r["arm"] == SHARED else 2.5, 2.0],
            ]
            if r["arm"] == SHARED
            else None
        )
        rows.append({**r, "loss_matrix": str(L)} if L else r)
    table = Table("eight", "", len(rows), tuple(rows), nominal=table.nominal)
    every, without = evidence(table), evidence(table, without=["b"])
    assert min(every.nominal(SHARED).values()) > 3 and max(
        without.nominal(SHARED).values()
    ) == pytest.approx(0.5)


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
    with open(project.results / f"{study}.csv", "w", newline="") as f:
        out = csv.DictWriter(
            f, sorted({k for r in rows for k in r}), restval=""
        )
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
    rows = [
        dict(row, run_id=c.slug, cell=c.hash, code="new")
        for c in plan.cells[:3]
    ]
    rows += [
        dict(row, run_id="old", cell=plan.cells[3].hash, code="old"),
        dict(row, run_id="stranger", cell="not planned", code="new"),
        dict(
            run_id="bad", cell=plan.cells[4].hash, code="new", status="failed"
        ),
    ]
    write(project, "eight", rows)
    table = read_table("eight", project)
    assert (len(table.rows), table.failed, table.left_out, table.planned) == (
        3,
        1,
        1,
        len(plan.cells),
    )
    assert (
        str(table)
        == f"eight: 3 of {len(plan.cells)} runs, 1 failed, 1 by other code"
        " left out"
    )
    assert table.nominal == {"": plan.cells[0].parameters["lr"] * 4}


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
        assert {p.removeprefix("rho ") for p in table.nominal} == {
            "0",
            "0.25",
            "0.5",
            "0.75",
            "0.95",
        }
    # vanilla stands at the nominal rate in every part: without it nothing can
    # be compared
    for c in plan.cells:
        assert any(
            v.part == c.part
            and v.arm == "vanilla"
            and v.parameters["lr"] == table.nominal[c.part]
            for v in plan.cells
        )


def test_tuning_seeds_are_used_nowhere_else(project):
    seeds = {
        study: {
            c.seed for c in read_study(project.studies / f"{study}.yaml").cells
        }
        for study in STUDIES
    }
    tuned = seeds.pop("tuning")
    assert all(not tuned & other for other in seeds.values())


def with_matrix(table, change):
    "The rows of a table with their loss matrices changed by `change(row, L)`."
    rows = []
    for r in table.rows:
        L = np.array(json.loads(r["loss_matrix"]))
        change(r, L)
        rows.append({**r, "loss_matrix": json.dumps(L.tolist())})
    return Table(
        table.study, table.title, len(rows), tuple(rows), nominal=table.nominal
    )


@pytest.mark.parametrize(
    ("late", "expected"), [(-0.2, HOLDS), (0.2, FAILS), (0.0, UNDECIDED)]
)
def test_c5_reads_growth_within_the_runs(late, expected):
    """The adaptive arm leads by 0.1 nats at stage 8; what it loses in the
    second half decides.
    """
    rng = np.random.default_rng(1)

    def change(row, L):
        if row["arm"] == ADAPTIVE:
            L[15, :15] += late + rng.normal(0, 0.03)

    arms = {**ARMS, SHARED: 1.0, ADAPTIVE: 0.8}
    table = simulated_table(
        arms, seeds=5, study="sixteen", domains=[f"d{i:02}" for i in range(16)]
    )
    (c5,) = [
        a
        for a in answer_claims({"sixteen": with_matrix(table, change)})
        if a.claim == "C5"
    ]
    assert c5.verdict.verdict == expected, c5.verdict


@pytest.mark.parametrize(
    ("error", "expected"), [(0.02, HOLDS), (0.3, FAILS), (0.08, UNDECIDED)]
)
def test_c6_reads_its_table(project, error, expected):
    """Rows as the live chapter writes them; rows of other betas and earlier
    steps do not count.
    """
    rng = np.random.default_rng(0)
    rows = []
    for alpha in (0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95):
        for seed in range(5):
            for beta2, step, off in (
                (0.95, 150, error),
                (0.95, 75, 9.0),
                (0.999, 150, 9.0),
            ):
                for _ in range(4):
                    R = (1 - off + 0.02 * rng.normal()) / (1 - alpha)
                    rows.append(
                        dict(
                            alpha=alpha,
                            seed=seed,
                            beta2=beta2,
                            step=step,
                            H=7.5,
                            R_U=9.0,
                            R_U_last=R,
                        )
                    )
    write(project, "inflation_live_text8", rows)
    ratios, horizon, source = read_inflation(project)
    assert (
        source == "inflation_live_text8" and horizon == 7.5 and len(ratios) == 8
    )
    (c6,) = [
        a for a in answer_claims({}, ratios, horizon, source) if a.claim == "C6"
    ]
    assert c6.verdict.verdict == expected
    assert (
        "[`inflation_live_text8`](../../results/inflation_live_text8.csv)"
        in claim_box("C6", [c6], {})
    )


@pytest.mark.parametrize(
    ("elsewhere", "expected"), [(0.5, HOLDS), (1.2, FAILS)]
)
def test_c9_needs_every_cell(elsewhere, expected):
    "C4 holds on the main study; one backbone decides."
    eight = simulated_table(ARMS)
    other = simulated_table(
        {**ARMS, ADAPTIVE: elsewhere}, seeds=5, study="backbones", part="RAdam"
    )
    (c9,) = [
        a
        for a in answer_claims({"eight": eight, "backbones": other})
        if a.claim == "C9"
    ]
    assert c9.verdict.verdict == expected and set(c9.verdict.parts) == {
        "eight",
        "backbones RAdam",
    }
    box = claim_box("C9", [c9], {"eight": eight, "backbones": other})
    assert all(
        f"[`{name}`](../../results/{name}.csv), made by `dmr batch {name}`"
        in box
        for name in ("eight", "backbones")
    )
    assert (
        verdict_table([c9], {"eight": eight, "backbones": other}).count(
            "results/"
        )
        == 2
    )


def test_every_claim_says_what_would_refute_it_and_links_its_table():
    tables = {"eight": simulated_table(ARMS)}
    answers = answer_claims(tables)
    assert set(REFUTED) == set(CLAIMS) and len(set(REFUTED.values())) == len(
        CLAIMS
    )
    for claim in CLAIMS:
        assert REFUTED[claim] in claim_box(claim, answers, tables)
    link = "[`eight`](../../results/eight.csv)"
    assert link in claim_box(
        "C1", answers, tables
    ) and "(../../results/sixteen.csv)" not in claim_box("C5", answers, tables)
    assert verdict_table(answers, tables).count(link) == 5


def test_the_advice_names_what_the_seeds_do_not_tell_apart():
    clear = advice(simulated_table({**ARMS, ADAPTIVE: 0.5}))
    assert (
        clear.startswith(f"**{ADAPTIVE}** lies best")
        and "do not tell" not in clear
    )
    # above the control
    assert f"| {REPLAY} |" in clear and f"| {FIXED} |" not in clear
    close = advice(simulated_table({**ARMS, ADAPTIVE: 0.7, REPLAY: 0.7}))
    assert (
        f"do not tell {ADAPTIVE} apart from {REPLAY}" in close
        or f"do not tell {REPLAY} apart from {ADAPTIVE}" in close
    )
    assert "use plain AdamW" in advice(
        simulated_table({ADAPTIVE: 1.1, SHARED: 1.3})
    )


def test_the_figures_use_every_seed():
    def change(row, L):
        # 2.0 to 4.0: mean 3.0 over five seeds
        L[-1, 0] = 2.0 + 0.5 * row["seed"]

    table = with_matrix(
        simulated_table({SHARED: 1.0, ADAPTIVE: 0.5}, seeds=5), change
    )
    fig, alt = draw_heat(table)
    # exp(2) and exp(3)
    assert "vanilla (5 seeds): first domain 7.4, in the end 20.1" in alt
    panel = fig.axes[0].images[0].get_array()
    assert panel[-1, 0] == pytest.approx(np.exp(3.0))
    fig, alt = draw_growth(table)
    # bars for each arm
    assert len(fig.axes[0].containers) == 3 and "(n=5, t)" in alt
    fig, alt = draw_domains(table)
    assert len(fig.axes[0].containers) == 3 and "vanilla a" in alt


def test_arm_against_arm_is_paired_and_says_how_many_seeds_are_comparable():
    table = simulated_table({SHARED: 0.8, ADAPTIVE: 0.5}, seeds=6, noise=0.001)
    text = pair_table(
        evidence(table),
        (ADAPTIVE, SHARED),
        (SHARED, "vanilla"),
        (SHARED, "absent"),
    )
    head, rule, first, second = text.splitlines()
    numbers = lambda line: [
        float(cell.split(" [")[0]) for cell in line.strip("| ").split(" | ")[2:]
    ]
    # the column says it
    assert (
        first.startswith(f"| {ADAPTIVE} − {SHARED} | 6 | ")
        and "n=" not in first
    )
    assert numbers(first) == pytest.approx([-0.15] * 2, abs=0.003)
    assert second.startswith(f"| {SHARED} − vanilla | 6 | ")
    # vanilla lies on its own curve
    assert numbers(second) == pytest.approx([-0.1] * 2, abs=0.003)
    slow = with_matrix(
        table,
        lambda row, L: (
            L.__setitem__(np.diag_indices(3), 9.0)
            if row["arm"] == SHARED and row["seed"] < 2
            else None
        ),
    )
    assert "| 4 of 6 seeds comparable |" in pair_table(
        evidence(slow), (ADAPTIVE, SHARED)
    )


def test_arms_on_top_of_interpolation_have_a_panel_of_their_own():
    both = f"{SHARED} + {INTERPOLATION}"
    fig, alt = draw_plane(
        simulated_table({SHARED: 0.9, INTERPOLATION: 0.7, both: 0.6})
    )
    above, below = fig.axes
    # vanilla, the edit or the sum, interpolation alone
    assert len(above.containers) == 3 and len(below.containers) == 3
    assert alt.count(both) == 1 and len(fig.legends[0].get_texts()) == 3
    assert len(draw_plane(simulated_table({SHARED: 0.9}))[0].axes) == 1


def test_parts_stand_side_by_side_with_those_that_are_there():
    near, far = (
        evidence(simulated_table({SHARED: 1.0, ADAPTIVE: 0.5}, noise=0.001)),
        evidence(simulated_table({SHARED: 0.6}, noise=0.001)),
    )
    fig, alt = draw_parts(
        {"near": near, "far": far, "later": None},
        label="part",
        title="Near and far",
    )
    for ax in fig.axes:
        shared, adaptive = ax.containers
        assert np.asarray(shared[0].get_ydata()) == pytest.approx(
            [1.0, 0.6], abs=0.01
        )
        assert np.asarray(adaptive[0].get_ydata()) == pytest.approx(
            [0.5], abs=0.01
        )
    assert [t.get_text() for t in fig.axes[1].get_xticklabels()] == [
        "near",
        "far",
    ]
    assert (
        f"{SHARED}, far, at equal learning: 0.6" in alt and "later" not in alt
    )
    assert fig.get_suptitle() == "Near and far"
    assert draw_parts({"later": None}) is None


def test_growth_is_taken_within_the_runs():
    def change(row, L):
        if row["arm"] == SHARED:
            L[2, :2] += 0.3  # after the third domain it has lost more

    table = with_matrix(
        simulated_table({SHARED: 0.6, ADAPTIVE: 0.5}, seeds=5, noise=0.0),
        change,
    )
    head, rule, first, second = growth_table(
        evidence(table, stage=2), evidence(table, stage=3)
    ).splitlines()
    assert (
        first.startswith(f"| {ADAPTIVE} | 5 | -0.250")
        and "| 0.000 [0.000, 0.000]" in first
    )
    assert (
        second.startswith(f"| {SHARED} | 5 | -0.200")
        and "| 0.300 [0.300, 0.300] |" in second
    )


@pytest.mark.parametrize("arm", [*MAIN, f"{SHARED} + {INTERPOLATION}"])
def test_a_recipe_runs_and_does_what_the_arm_did(arm):
    import torch

    import dmr

    cell = next(
        c
        for c in read_study(find_project(ROOT).studies / "eight.yaml").cells
        if c.arm == arm
    )
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 2)
    )
    batch = (torch.randn(6, 4), torch.randint(0, 2, (6,)))
    loss_fn = lambda b: torch.nn.functional.cross_entropy(model(b[0]), b[1])  # noqa: E731
    names = {
        "torch": torch,
        "dmr": dmr,
        "model": model,
        "loss_fn": loss_fn,
        "batch": batch,
        "total": 6,
    }
    lines = recipe(cell.parameters).splitlines()
    first = next(
        i for i, line in enumerate(lines) if line.startswith("router.")
    )
    set_up, loop = lines[:first], lines[first:]
    exec("\n".join(set_up), names)
    for _ in range(2):
        for line in loop[:-1]:
            exec(line, names)
        loss_fn(batch).backward()
        names["optimizer"].step()
        exec(loop[-1], names)
    router, p = names["router"], cell.parameters
    assert router.domains == 2 and names["optimizer"].defaults["betas"] == (
        p["beta1"],
        p["beta2"],
    )
    if p["modification"] != "none":
        assert router.routing == p["routing"] and f"{p['alpha']:g}" in repr(
            router
        )


def test_advice_names_what_needs_no_text_and_how_to_do_it():
    about = {
        "rank": 6,
        "routing": "shared",
        "strength": "fixed",
        "alpha": 0.5,
        "beta1": 0.9,
        "weight_decay": 0.0,
        "fraction": 0.005,
    }
    table = simulated_table({**ARMS, ADAPTIVE: 0.9, REPLAY: 0.3}, **about)
    rows = [
        (
            {**r, "parameters": {**r["parameters"], "modification": "replay"}}
            if "replay" in r["arm"]
            else r
        )
        for r in table.rows
    ]
    text = advice(
        Table("eight", "", len(rows), tuple(rows), nominal=table.nominal)
    )
    assert (
        text.startswith(f"**{REPLAY}** lies best")
        and "dmr.ReplayMix" in text.split("Where no text")[0]
    )
    # the least of the others
    assert f"Where no text may be kept, **{INTERPOLATION}** lies best" in text


def test_advice_says_what_is_not_told_apart_from_the_best_without_text():
    table = simulated_table(
        {REPLAY: 0.3, FIXED: 0.6, DISPLACED: 0.6, SHARED: 0.8},
        modification="projection",
    )
    rows = [
        (
            {**r, "parameters": {**r["parameters"], "modification": "replay"}}
            if r["arm"] == REPLAY
            else r
        )
        for r in table.rows
    ]
    text = advice(
        Table("eight", "", len(rows), tuple(rows), nominal=table.nominal)
    )
    without = text.partition("Where no text may be kept")[2]
    best, close = (
        (FIXED, DISPLACED) if f"**{FIXED}**" in without else (DISPLACED, FIXED)
    )
    assert (
        f"**{best}** lies best" in without
        and f"do not tell {best} apart from {close} (difference " in without
    )
    assert SHARED not in without.partition("\n\n")[0]


def test_final_averages_by_hand():
    table = simulated_table({SHARED: 0.5}, seeds=6, noise=1e-9)
    lines = final_table(table).splitlines()
    # three domains, vanilla forgets 0.5 at 2.0: 2.0 + 0.5 · 2/3; at a quarter
    # of the rate 0.25 at 2.1
    assert (
        lines[2]
        == f"| {SHARED} | 6 | {2 + 0.25 * 2 / 3:.3f} | -0.167 [-0.167, -0.167]"
        " | – |"
    )
    assert (
        lines[3] == f"| vanilla | 6 | {2 + 0.5 * 2 / 3:.3f} |  |"
        f" {2.1 + 0.25 * 2 / 3:.3f} at 0.00025 |"
    )
    assert final_table(Table("eight")) == "No runs yet."


def test_versions_and_hours_say_what_there_is():
    table = simulated_table({SHARED: 0.5}, seeds=2)
    rows = [
        {
            **r,
            "code": "new" if r["seed"] else "old",
            "parameters": {**r["parameters"], "device": "cuda"},
        }
        for r in table.rows
    ]
    tables = {"eight": replace(table, rows=tuple(rows), code="new")}
    box = claim_box("C1", answer_claims(tables), tables)
    assert (
        "`new` (6 runs)" in box
        and "`old` (6 runs)" in box
        and "hours of runs, 12 of them on a GPU" in box
    )
    assert "core hours" in claim_box(
        "C1", answer_claims({"eight": table}), {"eight": table}
    )


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
    settings = lambda p: {k: p.get(k) for k in keys}  # noqa: E731
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


def test_judged_counts_whole_tables_only():
    whole = simulated_table(ARMS)
    short = Table(
        "eight", "", whole.planned + 1, whole.rows, nominal=whole.nominal
    )
    assert judged(answer_claims({"eight": whole})) == ["C1", "C2", "C3", "C4"]
    assert judged(answer_claims({"eight": short})) == []


def test_the_comparison_names_n_once_and_puts_controls_last():
    table = simulated_table(
        {"control: random basis": 0.5, SHARED: 0.8}, seeds=6
    )
    head, rule, first, second = comparison_table(compare(table)).splitlines()
    assert first.startswith(f"| {SHARED} | 6 | -0.09") and second.startswith(
        "| control: random basis | 6 | -0.2"
    )
    assert "n=" not in first + second and first.count("|") == head.count(
        "|"
    ) == rule.count("|")
    rows = [r for r in table.rows if (r["arm"], r["seed"]) != (SHARED, 0)]
    short = comparison_table(
        compare(
            Table("eight", "", len(rows), tuple(rows), nominal=table.nominal)
        )
    )
    assert "1 missing" in short  # what the column cannot say stays in the cell
