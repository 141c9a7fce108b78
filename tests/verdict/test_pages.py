"""What the pages say of tables with known answers: boxes, tables, advice and
recipes.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import simulated

from dmr.studies.study import find_project, read_study
from dmr.verdict.answers import (
    ADAPTIVE,
    DISPLACED,
    FIXED,
    INTERPOLATION,
    MAIN,
    REPLAY,
    SHARED,
    answer_claims,
)
from dmr.verdict.pages import (
    advice,
    claim_box,
    comparison_table,
    final_table,
    growth_table,
    pair_table,
    recipe,
    recorded_left,
    verdict_table,
)
from dmr.verdict.rules import CLAIMS
from dmr.verdict.tables import Table, compare, evidence

ROOT = Path(__file__).parents[2]
ARMS = simulated.ARMS


def test_every_box_says_what_would_refute_the_claim_and_links_its_table():
    tables = {"eight": simulated.table(ARMS)}
    answers = answer_claims(tables)
    boxes = {c: claim_box(c, answers, tables) for c in CLAIMS}
    for claim, box in boxes.items():
        assert CLAIMS[claim].refuted in box
        assert box.count("<div") == box.count("</div>") == 1
    assert 'data-verdict="holds">' in boxes["C1"]
    assert 'data-verdict="not yet run">' in boxes["C5"]
    link = "[`eight`](../../results/eight.csv)"
    assert link in boxes["C1"]
    assert "(../../results/sixteen.csv)" not in boxes["C5"]
    assert verdict_table(answers, tables).count(link) == 5


def test_at_a_glance_ratios_and_differences_stand_apart():
    tables = {"eight": simulated.table(ARMS)}
    ratios, nats, many = verdict_table(answer_claims(tables), tables).split(
        "\n\n**"
    )
    claims = lambda text: [
        line.split(" | ")[0].strip("| ")
        for line in text.splitlines()
        if line.startswith("| C")
    ]
    assert claims(ratios) == ["C1", "C3", "C10"] and "ratio" in ratios
    assert claims(nats) == ["C2", "C4", "C5"] and nats.startswith("Diff")
    assert claims(many) == ["C6", "C7", "C8", "C9"]
    assert "| nominal | matched |" in ratios and "| nominal | matched |" in nats
    assert "nominal" not in many


def test_the_advice_names_what_the_seeds_do_not_tell_apart():
    clear = advice(simulated.table({**ARMS, ADAPTIVE: 0.5}))
    assert clear.startswith(f"**{ADAPTIVE}** lies best")
    # above the control
    assert f"| {REPLAY} |" in clear and f"| {FIXED} |" not in clear
    assert "do not tell" not in clear
    close = advice(simulated.table({**ARMS, ADAPTIVE: 0.7, REPLAY: 0.7}))
    assert (
        f"do not tell {ADAPTIVE} apart from {REPLAY}" in close
        or f"do not tell {REPLAY} apart from {ADAPTIVE}" in close
    )
    worse = simulated.table({ADAPTIVE: 1.1, SHARED: 1.3})
    assert "use plain AdamW" in advice(worse)


def test_arm_against_arm_is_paired_and_says_how_many_seeds_are_comparable():
    arms = {SHARED: 0.8, ADAPTIVE: 0.5}
    table = simulated.table(arms, seeds=6, noise=0.001)
    pairs = ((ADAPTIVE, SHARED), (SHARED, "vanilla"), (SHARED, "absent"))
    _, _, first, second = pair_table(evidence(table), *pairs).splitlines()
    numbers = lambda line: [
        float(cell.split(" [")[0]) for cell in line.strip("| ").split(" | ")[2:]
    ]
    assert first.startswith(f"| {ADAPTIVE} − {SHARED} | 6 | ")
    assert "n=" not in first  # the column says it
    assert numbers(first) == pytest.approx([-0.15] * 2, abs=0.003)
    assert second.startswith(f"| {SHARED} − vanilla | 6 | ")
    # vanilla lies on its own curve
    assert numbers(second) == pytest.approx([-0.1] * 2, abs=0.003)

    def slow(row, L):
        if row["arm"] == SHARED and row["seed"] < 2:
            L[np.diag_indices(3)] = 9.0

    found = evidence(simulated.change(table, slow))
    text = pair_table(found, (ADAPTIVE, SHARED))
    assert "| 4 of 6 seeds comparable |" in text


def test_growth_is_taken_within_the_runs():
    def lose(row, L):
        if row["arm"] == SHARED:
            L[2, :2] += 0.3  # after the third domain it has lost more

    arms = {SHARED: 0.6, ADAPTIVE: 0.5}
    table = simulated.change(simulated.table(arms, seeds=5, noise=0.0), lose)
    early, late = evidence(table, stage=2), evidence(table, stage=3)
    _, _, first, second = growth_table(early, late).splitlines()
    assert first.startswith(f"| {ADAPTIVE} | 5 | -0.250")
    assert "| 0.000 [0.000, 0.000]" in first
    assert second.startswith(f"| {SHARED} | 5 | -0.200")
    assert "| 0.300 [0.300, 0.300] |" in second


@pytest.mark.parametrize("arm", [*MAIN, f"{SHARED} + {INTERPOLATION}"])
def test_a_recipe_runs_and_does_what_the_arm_did(arm):
    import torch

    import dmr

    plan = read_study(find_project(ROOT).studies / "eight.yaml")
    p = next(c.parameters for c in plan.cells if c.arm == arm)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 2)
    )
    batch = (torch.randn(6, 4), torch.randint(0, 2, (6,)))
    loss_fn = lambda b: torch.nn.functional.cross_entropy(model(b[0]), b[1])
    names = {
        "torch": torch,
        "dmr": dmr,
        "model": model,
        "loss_fn": loss_fn,
        "batch": batch,
        "total": 6,
    }
    lines = recipe(p).splitlines()
    starts = [line.startswith("router.") for line in lines]
    first = starts.index(True)
    set_up, loop = lines[:first], lines[first:]
    exec("\n".join(set_up), names)
    for _ in range(2):
        for line in loop[:-1]:
            exec(line, names)
        loss_fn(batch).backward()
        names["optimizer"].step()
        exec(loop[-1], names)
    router, betas = names["router"], names["optimizer"].defaults["betas"]
    assert router.domains == 2 and betas == (p["beta1"], p["beta2"])
    if p["modification"] != "none":
        assert router.routing == p["routing"]
        assert f"{p['alpha']:g}" in repr(router)


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
    arms = {**ARMS, ADAPTIVE: 0.9, REPLAY: 0.3}
    text = advice(simulated.table(arms, **about))
    assert text.startswith(f"**{REPLAY}** lies best")
    assert "dmr.ReplayMix" in text.split("Where no text")[0]
    # the least of the others
    assert f"Where no text may be kept, **{INTERPOLATION}** lies best" in text


def test_advice_says_what_is_not_told_apart_from_the_best_without_text():
    arms = {REPLAY: 0.3, FIXED: 0.6, DISPLACED: 0.6, SHARED: 0.8}
    text = advice(simulated.table(arms))
    without = text.partition("Where no text may be kept")[2]
    best, close = FIXED, DISPLACED
    if f"**{FIXED}**" not in without:
        best, close = close, best
    assert f"**{best}** lies best" in without
    assert f"do not tell {best} apart from {close} (difference " in without
    assert SHARED not in without.partition("\n\n")[0]


def test_final_averages_by_hand():
    table = simulated.table({SHARED: 0.5}, seeds=6, noise=1e-9)
    _, _, first, second = final_table(table).splitlines()
    # three domains, vanilla forgets 0.5 at 2.0: 2.0 + 0.5 · 2/3; at a quarter
    # of the rate 0.25 at 2.1
    mean, gap = f"{2 + 0.25 * 2 / 3:.3f}", "-0.167 [-0.167, -0.167]"
    assert first == f"| {SHARED} | 6 | {mean} | {gap} | – |"
    mean, lowest = f"{2 + 0.5 * 2 / 3:.3f}", f"{2.1 + 0.25 * 2 / 3:.3f}"
    assert second == f"| vanilla | 6 | {mean} |  | {lowest} at 0.00025 |"
    assert final_table(Table("eight")) == "No runs yet."


def test_versions_and_hours_say_what_there_is():
    table = simulated.table({SHARED: 0.5}, seeds=2)
    rows = [
        {
            **r,
            "code": "new" if r["seed"] else "old",
            "parameters": {**r["parameters"], "device": "cuda"},
        }
        for r in table.rows
    ]
    box = lambda tables: claim_box("C1", answer_claims(tables), tables)
    text = box({"eight": replace(table, rows=tuple(rows), code="new")})
    assert "`new` (6 runs)" in text and "`old` (6 runs)" in text
    assert "hours of runs, 12 of them on a GPU" in text
    assert "core hours" in box({"eight": table})


def test_the_comparison_names_n_once_and_puts_controls_last():
    table = simulated.table(
        {"control: random basis": 0.5, SHARED: 0.8}, seeds=6
    )
    lines = comparison_table(compare(table)).splitlines()
    assert lines[2].startswith(f"| {SHARED} | 6 | -0.09")
    assert lines[3].startswith("| control: random basis | 6 | -0.2")
    assert "n=" not in lines[2] + lines[3]
    assert len({line.count("|") for line in lines}) == 1
    rows = [r for r in table.rows if (r["arm"], r["seed"]) != (SHARED, 0)]
    short = compare(simulated.whole(rows, nominal=table.nominal))
    # what the column cannot say stays in the cell
    assert "1 missing" in comparison_table(short)


def test_the_recorded_share_is_of_plain_adams_step():
    """The weakest edit, at strength 0.2, leaves 0.8 of plain Adam's protected
    norm; another arm's is held against that.
    """

    def row(arm, seed, norm, alpha):
        given = {"lr": 1e-3, "modification": "projection"}
        return {
            "arm": arm,
            "seed": seed,
            "part": "",
            "parameters": given,
            "protected_step_norm": norm,
            "alpha_mean": alpha,
        }

    rows = [row("weak", s, 8.0 + (-1) ** s, 0.2) for s in range(4)]
    rows += [row("strong", s, 3.0, 0.9) for s in range(4)]
    table = Table("made up", rows=tuple(rows), nominal={"": 1e-3})
    left = recorded_left(table, "strong", "weak", weakest="weak")
    assert left == pytest.approx({"strong": 0.3, "weak": 0.8})


def test_a_run_that_stands_twice_is_named():
    whole = simulated.table(ARMS)
    extra = next(r for r in whole.rows if r["arm"] == FIXED)
    twice = replace(whole, rows=(*whole.rows, extra))
    said = rf"'{FIXED}' at lr .* two runs of seed {extra['seed']} in eight"
    for read in (final_table, evidence, compare):
        with pytest.raises(ValueError, match=said):
            read(twice)
