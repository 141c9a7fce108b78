"""Claims answered from tables with known answers: each word reached, missing
and short tables, failed arms.
"""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import simulated

from dmr.studies.study import Project
from dmr.verdict.answers import (
    ADAPTIVE,
    FIXED,
    NOT_RUN,
    REPLAY,
    SHARED,
    answer_claims,
    judged,
    read_answers,
    read_inflation,
)
from dmr.verdict.drawings import (
    draw_age,
    draw_domains,
    draw_growth,
    draw_plane,
)
from dmr.verdict.pages import advice, claim_box, verdict_table
from dmr.verdict.rules import CLAIMS, FAILS, HOLDS, UNDECIDED, UNTESTABLE
from dmr.verdict.tables import Table, compare

ROOT = Path(__file__).parents[2]
ARMS = simulated.ARMS
SIXTEEN = [f"d{i:02}" for i in range(16)]
FAMILIES = (
    "EWC additive",
    "EWC rescaling",
    "SI additive",
    "SI rescaling",
    "replay 0.5 %",
)
NAN = "ValueError: the gradient of 'w' has NaN or infinite values"
PAIRS = {
    f"{family} {routing}": ratio
    for family in FAMILIES
    for routing, ratio in (("shared", 1.0), ("decoupled", 0.6))
}


def answer(claim, *tables):
    "The deciding answer to a claim from some tables."
    answers = answer_claims({t.study: t for t in tables})
    return next(a for a in answers if a.claim == claim and a.decides)


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
    found = answer(claim, simulated.table({**ARMS, **arms}))
    assert found.verdict.verdict == expected


def test_a_short_horizon_is_not_testable_and_three_seeds_decide_nothing():
    short = simulated.table(ARMS, beta2=0.999)
    few = simulated.table(ARMS, seeds=3)
    for table, word in ((short, UNTESTABLE), (few, UNDECIDED)):
        for claim in ("C1", "C2", "C3", "C4"):
            assert answer(claim, table).verdict.verdict == word


def overlapping(signal):
    "A study of overlap whose measured signal is a function of ρ."
    rows, nominal = [], {}
    for rho, ratio in ((0.0, 0.7), (0.5, 0.85), (0.95, 1.0)):
        part = f"rho {rho:g}"
        t = simulated.table({SHARED: ratio}, seeds=5, part=part)
        rows += [{**r, "overlap_mean": signal(rho)} for r in t.rows]
        nominal |= t.nominal
    return simulated.whole(rows, "overlap", nominal)


def test_overlap_and_families():
    assert answer("C10", overlapping(lambda rho: rho)).word == HOLDS
    conflict = simulated.table(PAIRS, seeds=5, study="conflict")
    assert answer("C7", conflict).verdict.verdict == HOLDS


def test_c10_is_not_testable_where_rho_does_not_move_the_overlap():
    table = overlapping(lambda rho: 0.5 + 0.02 * rho)
    c10 = answer("C10", table)
    assert c10.word == UNTESTABLE
    box = claim_box("C10", [c10], {"overlap": table})
    assert "  - the measured overlap lies between 0.500 and 0.519" in box
    assert f"**{UNTESTABLE}**" in verdict_table([c10])
    unknown = answer("C10", overlapping(lambda rho: ""))
    assert unknown.word == UNTESTABLE


@pytest.mark.parametrize(
    ("status", "error", "seeds", "word"),
    [
        ("failed", NAN, 5, "undecided at n = 5"),
        ("failed", NAN, 6, FAILS),
        ("failed", "ValueError: the path integral is not finite", 6, FAILS),
        ("failed", "FloatingPointError: diverged", 6, FAILS),
        ("ok", "", 6, FAILS),  # it ended, but without a number
        ("failed", "TypeError: '>' not supported", 6, NOT_RUN),
        ("failed", "KeyError: 'finance'", 6, NOT_RUN),  # neither nan nor inf
        ("timeout", "", 6, NOT_RUN),  # says nothing of the arm
        ("out-of-memory", NAN, 6, NOT_RUN),
    ],
)
def test_an_arm_of_which_every_run_diverged_has_failed(
    status, error, seeds, word
):
    "Diverged runs are ended runs: the table is complete, and they count."
    gone = "EWC additive decoupled"
    whole = simulated.table(PAIRS, seeds=seeds, study="conflict")
    rows = tuple(r for r in whole.rows if r["arm"] != gone)
    lost = tuple(
        {**r, "status": status, "error": error}
        for r in whole.rows
        if r["arm"] == gone
    )
    table = replace(whole, rows=rows, lost=lost)
    c7 = answer("C7", table)
    assert table.complete and c7.word == word
    if word != NOT_RUN:
        assert f"above 0 in {seeds} of {seeds} seeds" in str(c7.verdict)
    lacking = replace(table, lost=())
    assert not lacking.complete and answer("C7", lacking).word == NOT_RUN


def test_a_run_that_broke_for_another_reason_is_missing_beside_diverged_ones():
    gone = "EWC additive decoupled"
    whole = simulated.table(PAIRS, seeds=7, study="conflict")
    lost = tuple(
        {**r, "status": "failed", "error": "TypeError" if r["seed"] else NAN}
        for r in whole.rows
        if r["arm"] == gone and r["seed"] < 2
    )
    rows = tuple(
        r for r in whole.rows if r["arm"] != gone or r["seed"] not in (0, 1)
    )
    c7 = answer("C7", replace(whole, rows=rows, lost=lost)).verdict
    text = str(c7.parts["penalty, EWC additive"])
    assert "above 0 in 1 of 6 seeds, below in 5" in text
    assert "(1 missing)" in text and c7.n == 6


def best_inside(table):
    "The same, and plain training ends lowest at the rate in the middle."
    middle = lambda r: r["arm"] == "vanilla" and r["parameters"]["lr"] == 1e-3
    rows = [{**r, "final_average": 2.0} if middle(r) else r for r in table.rows]
    return simulated.whole(rows, table.study, table.nominal)


def test_c8_is_undecided_while_plain_training_is_best_at_its_smallest_rate():
    arms = {SHARED: 1.0, ADAPTIVE: 0.5, REPLAY: 0.8}
    table = simulated.table(arms, seeds=5, study="lora")
    found = answer("C8", table).verdict
    assert (found.verdict, found.n) == (UNDECIDED, 5)
    assert "smallest rate that ran" in found.reasons[0]
    assert answer("C8", best_inside(table)).verdict.verdict == HOLDS


def test_c8_is_drawn_without_arms_of_two_seeds():
    """Arms that the study runs on two seeds are shown, but neither decide nor
    lower n; replay, on five, is a rival.
    """
    arms = {SHARED: 1.0, FIXED: 1.2, ADAPTIVE: 0.5, REPLAY: 0.8}
    table = best_inside(simulated.table(arms, seeds=5, study="lora"))
    rows = [r for r in table.rows if r["arm"] != FIXED or r["seed"] < 2]

    def c8(rows):
        lora = simulated.whole(rows, "lora", table.nominal)
        return answer("C8", lora).verdict

    assert (c8(rows).verdict, c8(rows).n) == (HOLDS, 5)
    better = simulated.table({REPLAY: 0.3}, seeds=5, study="lora").rows
    others = [r for r in rows if r["arm"] != REPLAY]
    rival = [r for r in better if r["arm"] == REPLAY]
    assert c8([*others, *rival]).verdict == FAILS


def test_nothing_there_is_not_yet_run():
    answers = answer_claims({})
    assert {a.word for a in answers} == {NOT_RUN}
    assert {a.claim for a in answers} == set(CLAIMS)
    for claim in CLAIMS:
        assert NOT_RUN in claim_box(claim, answers, {})
    assert verdict_table(answers).count(NOT_RUN) == len(CLAIMS)
    empty = Table("eight", "", 430)
    assert "no runs yet" in advice(empty) and compare(empty) == []
    for draw in (draw_plane, draw_age, draw_growth, draw_domains):
        assert draw(empty) is None


@pytest.mark.parametrize("kept", [1, 3, 6, 13, 40])
def test_a_short_table_never_fails_and_is_preliminary(kept):
    full = simulated.table(ARMS)
    short = replace(full, rows=full.rows[:kept])
    tables = {"eight": short}
    answers = answer_claims(tables)
    for a in answers:
        assert a.verdict is None or a.note.startswith("preliminary")
    box, glance = claim_box("C1", answers, tables), verdict_table(answers)
    assert f"{kept} of {full.planned} runs" in box + glance + advice(short)
    for draw in (draw_plane, draw_age, draw_growth, draw_domains):
        draw(short)


@pytest.mark.parametrize(
    ("late", "expected"), [(-0.2, HOLDS), (0.2, FAILS), (0.0, UNDECIDED)]
)
def test_c5_reads_growth_within_the_runs(late, expected):
    """The adaptive arm leads by 0.1 nats at stage 8; what it loses in the
    second half decides.
    """
    rng = np.random.default_rng(1)

    def lose(row, L):
        if row["arm"] == ADAPTIVE:
            L[15, :15] += late + rng.normal(0, 0.03)

    arms = {**ARMS, SHARED: 1.0, ADAPTIVE: 0.8}
    table = simulated.table(arms, seeds=5, study="sixteen", domains=SIXTEEN)
    c5 = answer("C5", simulated.change(table, lose))
    assert c5.verdict.verdict == expected, c5.verdict


@pytest.mark.parametrize(
    ("error", "expected"), [(0.02, HOLDS), (0.3, FAILS), (0.08, UNDECIDED)]
)
def test_c6_reads_its_table(tmp_path, error, expected):
    """Rows as the live chapter writes them; rows of other betas and earlier
    steps do not count.
    """
    rng = np.random.default_rng(0)
    with open(tmp_path / "inflation_live_text8.csv", "w", newline="") as f:
        out = csv.writer(f)
        names = "alpha seed beta2 step H R_U R_U_last"
        out.writerow(names.split())
        for alpha in (0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95):
            for seed in range(5):
                wrong = (0.95, 75, 9.0), (0.999, 150, 9.0)
                for beta2, step, off in ((0.95, 150, error), *wrong):
                    for _ in range(4):
                        R = (1 - off + 0.02 * rng.normal()) / (1 - alpha)
                        out.writerow([alpha, seed, beta2, step, 7.5, 9.0, R])
    project = Project(*[tmp_path] * 4)
    ratios, horizon, source = read_inflation(project)
    assert (source, horizon) == ("inflation_live_text8", 7.5)
    answers = answer_claims({}, ratios, horizon, source)
    (c6,) = [a for a in answers if a.claim == "C6"]
    assert len(ratios) == 8 and c6.verdict.verdict == expected
    link = "[`inflation_live_text8`](../../results/inflation_live_text8.csv)"
    assert link in claim_box("C6", [c6], {})


@pytest.mark.parametrize(
    ("elsewhere", "expected"), [(0.5, HOLDS), (1.2, FAILS)]
)
def test_c9_needs_every_cell(elsewhere, expected):
    "C4 holds on the main study; one backbone decides."
    eight, arms = simulated.table(ARMS), {**ARMS, ADAPTIVE: elsewhere}
    other = simulated.table(arms, seeds=5, study="backbones", part="RAdam")
    tables = {"eight": eight, "backbones": other}
    c9 = answer("C9", eight, other)
    assert c9.verdict.verdict == expected
    assert set(c9.verdict.parts) == {"eight", "backbones RAdam"}
    box = claim_box("C9", [c9], tables)
    for name in tables:
        link = f"[`{name}`](../../results/{name}.csv)"
        assert f"{link}, made by `dmr batch {name}`" in box
    assert verdict_table([c9], tables).count("results/") == 2


def test_judged_counts_whole_tables_only():
    whole = simulated.table(ARMS)
    short = replace(whole, planned=whole.planned + 1)
    assert judged(answer_claims({"eight": whole})) == ["C1", "C2", "C3", "C4"]
    assert judged(answer_claims({"eight": short})) == []


def test_the_committed_tables_answer_every_claim():
    tables, answers = read_answers()
    assert {a.claim for a in answers} == set(CLAIMS)
    assert all(t.complete for t in tables.values())
    assert NOT_RUN not in {a.word for a in answers}
