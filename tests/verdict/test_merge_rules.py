"""The rules for a merge at their edges: failed runs, short rows, rivals that
have not run, and rows that stand twice in a table.
"""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats

from dmr.reporting.statistics import Point
from dmr.verdict.merging import (
    best_row,
    closes,
    ends_below,
    finals,
    forgets_share,
    interpolation_curve,
    judge_merge,
    pick,
)
from dmr.verdict.tables import Table

ROOT = Path(__file__).parents[2]
NAN = math.nan
SFA = "averaging during training (SFA)"
EQUAL = "replay 0.5 % shared, equal evaluations"
#: arm -> forgetting, learning accuracy, final average; weight of interpolation
MEANS = {
    ("vanilla", None): (0.40, 2.10, 2.60),
    ("interpolation", 0.7): (0.30, 2.20, 2.50),
    ("interpolation", 0.5): (0.20, 2.30, 2.52),
    ("merge", None): (0.05, 2.25, 2.25),
    ("EWC", None): (0.30, 2.20, 2.50),
    (SFA, None): (0.20, 2.30, 2.49),
    ("replay 0.5 % shared", None): (0.10, 2.10, 2.20),
    (EQUAL, None): (0.10, 2.20, 2.30),
    ("joint training", None): (0.00, 2.10, 2.10),
}
SHARES = {"replay": 0.85, "joint training": 0.75}


def made(arm, seed, weight=None, moved=0.0, lr=2e-3):
    "A finished run of an arm, its numbers moved a little."
    f, a, end = MEANS[arm, weight]
    parameters = {"lr": lr} | ({"interpolate": weight} if weight else {})
    return {
        "arm": arm,
        "seed": seed,
        "parameters": parameters,
        "forgetting": f + moved,
        "learning_accuracy": a,
        "final_average": end + moved,
    }


def table(failed=(), absent=(), seeds=10, error="Killed"):
    """A whole study; `failed`: (arm, seed) of runs without numbers, with their
    error; `absent`: arms that have not run.
    """
    rng = np.random.default_rng(1)
    rows = [
        made(arm, s, weight, 0.01 * rng.normal())
        for s in range(seeds)
        for arm, weight in MEANS
        if arm not in absent
    ]
    gone = lambda r: (r["arm"], r["seed"]) in failed
    lost = [
        {k: r[k] for k in ("arm", "seed", "parameters")}
        | {"status": "failed", "error": error}
        for r in rows
        if gone(r)
    ]
    kept = tuple(r for r in rows if not gone(r))
    return Table("made up", planned=len(rows), rows=kept, lost=tuple(lost))


def judge(table, arm="merge", share=SHARES):
    return {f.rule: f for f in judge_merge(table, arm, share)}


def outcomes(table):
    return [f.outcome for f in judge_merge(table, "merge", SHARES)]


def test_whole_tables_have_no_gaps():
    found = judge(table())
    assert {f.gaps for f in found.values()} == {""}
    assert [f.outcome for f in found.values()][:4] == ["holds"] * 4


def test_a_failed_run_stays_a_seed_without_numbers():
    rows = pick(table(failed=[("merge", 3)]), "merge", lr=2e-3)
    assert len(rows) == 10 and math.isnan(finals(rows)[3])
    assert math.isfinite(finals(rows)[2])


@pytest.mark.parametrize(("lost", "enough"), [(1, True), (2, True), (3, False)])
def test_four_seeds_in_five_must_have_numbers(lost, enough):
    "8 of 10 are enough, 7 are not; and failures are counted in words."
    found = judge(table(failed=[("merge", s) for s in range(lost)]))
    plain = list(found.values())
    words = {f.outcome for f in plain[1:]}
    assert (words == {"too few seeds"}) == (not enough)
    assert (plain[0].outcome == "holds") == enough
    assert plain[0].outcome in ("holds", "not comparable")
    for f in plain:
        assert f"failed runs of the arm: {lost}" in f.gaps
    for f in plain[1:]:
        assert f"{10 - lost} of 10 seeds count" in f.gaps


def test_an_arm_of_which_every_run_failed_was_run():
    found = judge(table(failed=[("merge", s) for s in range(10)]))
    words = {f.outcome for f in found.values()}
    assert words == {"not comparable", "too few seeds"}
    assert all("of the arm: 10" in f.gaps for f in found.values())


def test_seeds_that_other_arms_ran_count_too():
    "Half of the arm's seeds are not there yet: no rule speaks."
    whole = table()
    rows = [r for r in whole.rows if r["arm"] != "merge" or r["seed"] < 5]
    words = outcomes(Table("made up", rows=tuple(rows)))
    assert set(words) == {"not comparable", "too few seeds"}


def test_a_rivals_failures_count_against_the_comparison():
    found = judge(table(failed=[("EWC", s) for s in range(4)]))
    ewc = found["ends below EWC"]
    assert ewc.outcome == "too few seeds"
    assert "failed runs of EWC: 4" in ewc.gaps
    other = found["ends below interpolation"]
    assert other.outcome == "not complete"
    assert "EWC has too few seeds" in other.gaps


def test_a_failed_weight_takes_its_seed_from_the_curve():
    t = table(failed=[("interpolation", 0)])
    curve = interpolation_curve(t)
    assert set(curve) == {0.5, 0.7, 1.0} and math.isnan(
        curve[0.5][0].forgetting
    )
    half = judge(t)["half of the rival's forgetting at equal learning"]
    assert half.interval.n == 9 and "1 of 10 seeds" in half.gaps


def test_one_lost_run_does_not_save_the_arm_from_its_hardest_rival():
    "At 9 of 10 seeds a row is still the rival's best; at 7 it is none."
    arm = {s: 2.4 + 0.001 * (s % 3) for s in range(10)}
    hard = {s: 2.3 + 0.001 * (s % 2) for s in range(10)}
    soft = {s: 2.6 + 0.001 * (s % 4) for s in range(10)}
    asked = lambda n: ends_below(
        arm,
        {"EWC": {"hard": hard | dict.fromkeys(range(n), NAN), "soft": soft}},
    )[0]
    for lost in (0, 1, 2):
        found = asked(lost)
        assert found.outcome == "fails" and "against hard" in found.note
    assert asked(3).outcome == "holds"
    assert asked(3).gaps == "EWC at hard: 3 failed"
    few = {s: x for s, x in hard.items() if s < 7}
    (found,) = ends_below(arm, {"EWC": {"hard": few, "soft": soft}})
    assert found.gaps == "EWC at hard: 3 not run"


def test_best_rows_are_compared_on_the_seeds_that_they_share():
    "A row that lost its two hardest seeds is not better for it."
    a = {s: 2.0 + 0.1 * s for s in range(10)}
    b = {s: x + 0.05 for s, x in a.items() if s < 8}
    assert np.mean(list(b.values())) < np.mean(list(a.values()))
    assert best_row({"b": b, "a": a}) == "a"
    # of what is planned: a short study has no row yet, and takes the longest
    short = {s: a[s] for s in range(4)}
    assert best_row({"short": short, "b": b}, range(20)) == "b"


def test_the_share_of_a_gap_is_asked_of_the_best_row_too():
    plain = {s: 2.6 + 0.01 * (s % 3) for s in range(10)}
    better = {s: 2.4 + 0.01 * (s % 2) for s in range(1, 10)}
    goal = {s: 2.1 + 0.01 * (s % 4) for s in range(10)}
    arm = {s: 2.3 for s in range(10)}
    found = closes(arm, {"a": plain, "b": better}, {"": goal}, 0.5, "replay")
    assert found.note == "from b to " and found.outcome == "fails"


@pytest.mark.parametrize(("lost", "outcome"), [(1, "holds"), (2, "fails")])
def test_a_diverged_run_of_the_arm_is_a_failure(lost, outcome):
    "By signs one of ten is borne (p .021), two are not (p .109)."
    gone = [("merge", s) for s in range(lost)]
    share = {"replay": 0.5, "joint training": 0.4}
    killed = judge(table(failed=gone), share=share)
    diverged = judge(table(failed=gone, error="the loss is nan"), share=share)
    asked = [r for r, f in killed.items() if f.outcome == "holds"]
    assert len(asked) >= 6 and any("closes" in r for r in asked)
    for rule in asked:
        assert diverged[rule].outcome == outcome, rule
        assert f"diverged runs of the arm: {lost}" in diverged[rule].gaps
        assert "by signs" not in killed[rule].gaps
    # what fails anyway is not saved by it, and a rival's helps nobody
    for rule in killed.keys() - set(asked):
        assert diverged[rule].outcome == killed[rule].outcome
    rival = judge(table(failed=[("EWC", 0)], error="the loss is nan"))
    assert "by signs" not in rival["ends below EWC"].gaps


@pytest.mark.parametrize("lost", [3, 9, 10])
def test_an_arm_that_diverges_often_fails(lost):
    "It has not too few seeds: a diverged run is a number."
    gone = [("merge", s) for s in range(lost)]
    found = judge(table(failed=gone, error="the loss is nan"))
    assert {f.outcome for f in found.values()} == {"fails"}
    assert all(
        f"diverged runs of the arm: {lost}" in str(f) for f in found.values()
    )
    # whatever a rival did in those seeds, but a rival needs its own numbers
    for n, word in ((2, "fails"), (3, "too few seeds")):
        more = [*gone, *(("EWC", s) for s in range(n))]
        ewc = judge(table(failed=more, error="the loss is nan"))
        assert ewc["ends below EWC"].outcome == word


def test_what_fails_by_signs_fails_without_the_other_rivals():
    gone = [("merge", 0), ("merge", 1)]
    found = judge(table(failed=gone, absent=["EWC"], error="the loss is nan"))
    assert found["ends below EWC"].outcome == "no runs"
    assert found["ends below interpolation"].outcome == "fails"


def test_too_few_seeds_show_no_share():
    found = judge(table(failed=[("merge", s) for s in range(3)]))
    assert {f.interval for f in found.values()} == {None}


def test_nothing_holds_before_the_last_run():
    whole = table()
    early = replace(whole, planned=whole.planned + 1)
    for rule, f in judge(early).items():
        assert f.outcome == f"preliminary: {judge(whole)[rule].outcome}"
    # planned seeds of which no run has ended are missing all the same
    more = replace(early, seeds=tuple(range(20)))
    words = {f.outcome for f in judge(more).values()}
    assert words == {"too few seeds", "not comparable"}


def test_the_best_row_is_one_of_four_seeds_in_five():
    whole = {s: 2.5 for s in range(10)}
    assert best_row({"a": whole, "lucky": {0: 1.0, 1: 1.0}}) == "a"
    broken = {s: NAN if s > 1 else 1.0 for s in range(10)}
    assert best_row({"broken": broken, "a": whole}) == "a"
    assert best_row({"a": whole, "b": {s: 2.4 for s in whole}}) == "b"
    assert best_row({"broken": {0: NAN}, "none": {}}) is None
    assert best_row({}) is None


def test_holm_counts_rivals_that_have_not_run():
    "The smallest of three p-values is three times itself, at any time."
    arm = {s: 2.0 + 0.01 * s for s in range(10)}
    rival = {s: x + 0.045 + 0.055 * (-1) ** s for s, x in arm.items()}
    raw = stats.ttest_rel(list(arm.values()), list(rival.values())).pvalue
    assert 0.05 / 3 < raw < 0.05  # alone it is enough; of three it is not
    (alone,) = ends_below(arm, {"x": {"": rival}})
    assert alone.outcome == "holds"
    first, *rest = ends_below(arm, {"x": {"": rival}, "EWC": {}, "SI": {}})
    assert f"Holm's p {3 * raw:.2g}" in first.note
    assert first.outcome == "not complete"
    assert first.gaps == "EWC has no runs, SI has no runs"
    assert [f.outcome for f in rest] == ["no runs", "no runs"]


def test_a_rule_that_fails_fails_without_the_other_rivals():
    arm = {s: 2.0 + 0.01 * s for s in range(10)}
    below = {s: x - 0.05 - 0.001 * (s % 3) for s, x in arm.items()}
    found = ends_below(arm, {"x": {"": below}, "EWC": {}})
    assert found[0].outcome == "fails"
    assert {f.outcome for f in ends_below({}, {"x": {"": below}})} == {
        "no runs"
    }


def test_a_study_without_ewc_is_not_complete():
    found = judge(table(absent=["EWC"]))
    assert found["ends below EWC"].outcome == "no runs"
    assert found["ends below interpolation"].outcome == "not complete"
    assert "EWC has no runs" in str(found["ends below interpolation"])


def test_the_same_run_twice_is_an_error_that_names_it():
    whole = table()
    twice = lambda row: Table("made up", rows=(*whole.rows, row))
    for arm, weight in (("EWC", None), ("interpolation", 0.7)):
        with pytest.raises(ValueError, match=rf"'{arm}'.*seed 4.*made up"):
            judge(twice(made(arm, 4, weight)))
    with pytest.raises(ValueError, match=r"'merge'.*two runs of seed 4"):
        judge(twice(made("merge", 4)))
    again = {**made("EWC", 4), "status": "failed"}
    with pytest.raises(ValueError, match="two runs of seed 4"):
        judge(Table("made up", rows=whole.rows, lost=(again,)))


def test_a_length_is_asked_for_its_own_share_only():
    long = judge(table(), share={"joint training": 0.6})
    said = [rule for rule in long if "closes" in rule]
    assert said == ["closes 60% of the gap from plain to joint training"]
    assert not [r for r in judge(table(), share={}) if "closes" in r]
    with pytest.raises(ValueError, match="'EWC'"):
        judge(table(), share={"EWC": 0.5})


def test_the_page_passes_the_shares_of_the_protocol():
    "75 % of the way to joint training at 450 steps, 85 % to replay at 150."
    page = json.loads((ROOT / "nbs/experiments/17_evidence.ipynb").read_text())
    code = "\n".join(
        "".join(c["source"]) for c in page["cells"] if c["cell_type"] == "code"
    )
    for study in ("merging_long", "merging_confirm", "merging_text16"):
        assert f'judged("{study}", {{"joint training": 0.75}})' in code
    assert 'judged("merging", {"replay": 0.85})' in code
    assert "judge_merge(table, arm, share)" in code


def test_other_streams_have_the_rows_of_the_length_that_decides():
    studies = ROOT / "nbs/experiments/studies"

    def read(name):
        found = yaml.safe_load((studies / f"{name}.yaml").read_text())
        if domains := found["defaults"].get("domains"):
            found["defaults"]["domains"] = tuple(domains)
        return found

    def rates(arms):
        "Arms without their rates, and the rates."
        arms = copy.deepcopy(arms)
        return arms, {
            a: x.get("grid", {}).pop("lr", []) for a, x in arms.items()
        }

    # as first fixed; the others got more rates where a best lay on an edge
    first = read("merging_text16")
    for name, more in (("merging_confirm", 8), ("merging_long", 4)):
        other = read(name)
        (mine, theirs), (arms, lr) = rates(other["arms"]), rates(first["arms"])
        assert mine == arms
        assert all(set(lr[a]) <= set(theirs[a]) for a in arms)
        assert sum(len(theirs[a]) - len(lr[a]) for a in arms) == more
        assert other["defaults"].items() ^ first["defaults"].items() <= {
            ("stream", "text8"),
            ("stream", "text16"),
            ("domains", ("wikipedia", "manual", "music")),
        }


def test_a_goal_without_numbers_takes_its_seed_from_the_share():
    plain = {s: 2.6 + 0.01 * s for s in range(10)}
    goal = {s: x - 0.4 - 0.01 * (s % 2) for s, x in plain.items()}
    arm = {s: x - 0.3 - 0.01 * (s % 3) for s, x in plain.items()}
    one = closes(arm, {"": plain}, {"": goal | {0: NAN}}, 0.5, "replay")
    assert (one.outcome, one.interval.n) == ("holds", 9)
    assert one.gaps == "9 of 10 seeds count, failed runs of replay: 1"


def test_half_is_asked_of_the_seeds_that_were_seen():
    rival = {
        w: {s: Point(a + 0.01 * s, f) for s in range(10)}
        for w, a, f in ((0.3, 2.4, 0.1), (0.5, 2.3, 0.2), (1.0, 2.1, 0.4))
    }
    arm = {s: Point(2.3 + 0.01 * s, 0.05 + 1e-3 * s) for s in range(10)}
    assert forgets_share(arm, rival).outcome == "holds"
    many = forgets_share(arm, rival, seeds=range(20))
    assert many.outcome == "not comparable" and "10 of 20" in many.gaps
