"The first rules in other regimes, on tables made by hand."

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import simulated

from dmr.studies.study import find_project, read_study
from dmr.verdict.answers import DISPLACED, FIXED, REPLAY, SHARED
from dmr.verdict.regimes import (
    AUTHORS,
    AUTHORS_SMALL,
    FIRST_PAGE,
    WITHOUT_PAST,
    by_part,
    by_strength,
    c1_by_strength,
    c4_of_authors,
    first_page,
    joined,
    past_counts,
    strength_name,
)
from dmr.verdict.rules import verdict_c1, verdict_c3
from dmr.verdict.tables import Table, read_table, runs

ROOT = Path(__file__).parents[2]
STRENGTHS = (0.5, 0.9, 1.0)
#: What shared projection forgets at each strength, in units of plain training.
COLLAPSE = {0.5: 0.98, 0.9: 0.7}


def edit(arm, alpha, ratio, seeds=10, **more):
    "Runs of one arm at one strength, at the study's nominal rate."
    made = simulated.table({arm: ratio}, seeds, **more)
    for r in made.rows:
        if r["arm"] == arm:
            p = {**r["parameters"], "alpha": alpha}
            yield {**r, "parameters": p}


def strengths(ratios=COLLAPSE, arm=SHARED, seeds=10, **more):
    rows = [
        r for a, x in ratios.items() for r in edit(arm, a, x, seeds, **more)
    ]
    return simulated.whole(rows, "dose", {"": 1e-3})


def plain(seeds=10, **more):
    "A study of another nominal rate that holds the plain runs."
    made = simulated.table({}, seeds, **more)
    return simulated.whole(made.rows, "merging", {"": 2e-3})


def test_plain_runs_of_the_same_regime_join_and_others_do_not():
    dose = strengths(seeds=3)
    merging = plain(5)
    both = joined(dose, merging)
    found = [(a, rate) for a, rate, _ in runs(both)]
    # the nominal rate is that of the study that is asked, 1e-3, not 2e-3
    assert found.count(("vanilla", 1.0)) == 3 == found.count(("vanilla", 2.0))
    assert len(both.rows) == len(dose.rows) + 3 * 5
    for other in ({"steps": 450}, {"beta2": 0.99}, {"sampling": "epoch"}):
        assert joined(dose, plain(5, **other)).rows == dose.rows
    # no other arm comes along
    more = strengths({0.5: 1.0}, DISPLACED, seeds=3)
    assert joined(dose, more).rows == dose.rows
    name = strength_name(DISPLACED, 0.5)
    assert len(joined(dose, by_strength(more), [name]).rows) == 9


def test_a_failed_plain_run_joins_as_failed():
    dose, merging = strengths(seeds=3), plain(3)
    gone = [r for r in merging.rows if r["seed"] == 0]
    short = replace(
        merging,
        rows=tuple(r for r in merging.rows if r["seed"]),
        lost=tuple({**r, "status": "failed"} for r in gone),
    )
    both = joined(dose, short)
    assert len(both.lost) == 5 and both.failed == {"vanilla": 5}


def test_studies_of_several_parts_are_not_joined():
    two = simulated.whole(
        [*edit(SHARED, 0.5, 1.0, part="a"), *edit(SHARED, 0.5, 1.0, part="b")]
    )
    with pytest.raises(ValueError, match="parts a, b"):
        joined(two, plain())


def test_c1_has_a_verdict_for_each_strength():
    found = c1_by_strength(joined(strengths(), plain()), STRENGTHS)
    words = {a: v and v.verdict for a, v in found.items()}
    assert words == {0.5: "holds", 0.9: "does not hold", 1.0: None}
    assert found[0.5].n == 10
    # each is read from its own rows
    ratio = found[0.9].parts["nominal"].interval.estimate
    assert ratio == pytest.approx(0.7, abs=0.02)
    # without plain runs nothing is said
    assert not any(c1_by_strength(strengths(), STRENGTHS).values())


def test_the_horizon_counts_for_adam_only():
    short = joined(strengths(beta2=0.99), plain(beta2=0.99))  # H = 1.5
    words = lambda *h: c1_by_strength(short, [0.5], *h)[0.5].verdict
    assert words() == "not testable here" and words(0) == "holds"


def test_a_rule_is_asked_in_each_part():
    worse = simulated.table({FIXED: 1.2}, part="beta2 0.95")
    better = simulated.table(
        {FIXED: 0.6}, part="beta2 0.99", steps=750, beta2=0.99
    )
    rates = {"beta2 0.95": 1e-3, "beta2 0.99": 1e-3, "empty": 1e-3}
    both = simulated.whole([*worse.rows, *better.rows], "memory", rates)
    words = lambda rule: {
        k: v and v.verdict for k, v in by_part(both, rule, FIXED).items()
    }
    assert words(verdict_c3) == {
        "beta2 0.95": "holds",
        "beta2 0.99": "does not hold",
        "empty": None,
    }
    assert words(verdict_c1)["beta2 0.95"] == "does not hold"


@pytest.mark.parametrize(
    "ratio, rival, verdict",
    [
        (0.4, 0.8, "holds"),
        (0.7, 0.5, "does not hold"),
        (0.7, 0.7, "undecided at n"),
    ],
)
def test_c4_of_the_preprints_arm(ratio, rival, verdict):
    authors = simulated.table(
        {AUTHORS: ratio, AUTHORS_SMALL: ratio - 0.2, "its shared form": 0.9}
    )
    rows = [r for r in authors.rows if r["arm"] != "vanilla"]
    authors = simulated.whole(rows, "authors", {"": 1e-3})
    merging = plain()
    assert c4_of_authors(authors, Table("dose"), Table("merging")) is None
    every = [
        r
        for arm, best in ((SHARED, 0.9), (FIXED, 0.85), (DISPLACED, rival))
        for alpha in (0.3, 0.5, 0.9)
        for r in edit(arm, alpha, 0.1 if alpha == 0.3 else best)
    ]
    dose = simulated.whole(every, "dose", {"": 1e-3})
    found = c4_of_authors(authors, dose, merging)
    assert (found.verdict, found.n) == (verdict, 10)
    # strengths that are no rivals stay out, and none is missing
    assert "0.3" not in str(found) and "not yet" not in str(found)
    # without a rival it cannot have won; that it has lost stays known
    less = "undecided at n" if verdict == "holds" else verdict
    for arm in (DISPLACED, SHARED):
        gone = lambda r: r["arm"] == arm and r["seed"] > 6  # noqa: B023
        few = [r for r in every if not gone(r)]
        found = c4_of_authors(authors, replace(dose, rows=tuple(few)), merging)
        assert found.verdict == less
        assert f"not yet among the rivals: {arm}, α 0.5" in str(found)
    without = c4_of_authors(authors, Table("dose"), merging)
    assert "not yet among the rivals" in str(without)
    assert without.verdict != "holds"
    early = replace(authors, planned=authors.planned + 10)
    found = c4_of_authors(early, dose, merging)
    assert found.verdict == less and "30 of 40 runs" in str(found)


def ends(arm, final, seeds=5, lr=1e-3, status=None):
    "Runs that end at a loss."
    kinds = {
        "vanilla": {},
        "interpolation": {"interpolate": 0.5},
        SHARED: {"modification": "projection"},
        DISPLACED: {"modification": "projection"},
        REPLAY: {"modification": "replay"},
    }
    merge = {"consolidation": "fisher", "merge": {"weight": 0.7}}
    p = {"modification": "none", "lr": lr} | kinds.get(arm, merge)
    for seed in range(seeds):
        noise = 0.01 * ((seed * 7 + len(arm)) % 5 - 2)
        row = simulated.row(0.2, 2.0, arm=arm, seed=seed, parameters=p)
        row |= {"final_average": final + noise, "status": status}
        yield row


ENDS = {
    SHARED: 2.45,
    DISPLACED: 2.4,
    "interpolation": 2.35,
    "Fisher merge 0.7": 2.2,
    f"{DISPLACED} + Fisher merge 0.7": 2.15,
    REPLAY: 2.1,
}


def larger(finals=ENDS, seeds=5):
    rows = [
        *ends("vanilla", 2.9, seeds, 5e-4),
        *ends("vanilla", 2.5, seeds, 2.5e-4),
    ]
    rows += [r for arm, x in finals.items() for r in ends(arm, x, seeds)]
    return simulated.whole(rows, "larger", {"": 5e-4})


def test_the_first_pages_statements_on_a_larger_model():
    found = first_page(larger())
    assert [f.rule for f in found] == list(FIRST_PAGE)
    assert {f.outcome for f in found} == {"holds"}
    # against plain training at its better rate
    assert found[0].interval.estimate == pytest.approx(2.2 - 2.5, abs=0.02)
    assert "lr 0.00025" in found[0].note
    # equal ends are no gain
    equal = ENDS | {f"{DISPLACED} + Fisher merge 0.7": 2.2}
    words = {f.rule: f.outcome for f in first_page(larger(equal))}
    assert words.pop("a projection improves a merge") == "fails"
    assert set(words.values()) == {"holds"}
    assert {f.outcome for f in first_page(larger(seeds=3))} == {"too few seeds"}
    assert {f.outcome for f in first_page(Table("larger"))} == {"no runs"}


def test_a_past_counts_where_a_basis_without_one_ends_higher():
    long = larger()
    current, random = WITHOUT_PAST
    rows = [*ends(current, 2.3), *ends(random, 2.3)]
    controls = simulated.whole(rows, "merging_controls", {"": 1e-3})
    found = past_counts(controls, long)
    assert [f.outcome for f in found] == ["holds", "holds"]
    assert found[0].interval.estimate == pytest.approx(-0.15, abs=0.02)
    # damping that remembers nothing does as well
    rows = [*ends(current, 2.15), *ends(random, 2.3)]
    controls = simulated.whole(rows, "merging_controls", {"": 1e-3})
    assert [f.outcome for f in past_counts(controls, long)] == [
        "fails",
        "holds",
    ]
    # a control that has not run keeps the other from holding
    half = replace(controls, rows=controls.rows[5:], planned=10)
    words = [f.outcome for f in past_counts(half, long)]
    assert words == ["no runs", "not complete"]
    nothing = past_counts(Table("merging_controls"), long)
    assert {f.outcome for f in nothing} == {"no runs"}


def test_a_statement_is_preliminary_before_the_last_run():
    "Four of five planned seeds: it leans, and does not hold yet."
    early = replace(larger(seeds=4), planned=45, seeds=tuple(range(5)))
    words = {f.outcome for f in first_page(early)}
    assert words == {"preliminary: holds"}
    few = replace(early, seeds=tuple(range(6)))
    assert {f.outcome for f in first_page(few)} == {"too few seeds"}


def test_interpolation_counts_at_its_better_weight():
    "Two weights at one rate are two rows, and the better one is the rival."
    rows = list(larger().rows)
    for r in ends("interpolation", 2.1):
        p = r["parameters"] | {"interpolate": 0.3}
        rows.append(r | {"parameters": p})
    found = first_page(simulated.whole(rows, "larger", {"": 5e-4}))
    one = next(f for f in found if "interpolation" in f.rule)
    assert one.outcome == "fails" and "weight 0.3" in one.note


def test_the_larger_model_has_a_lower_rate_and_a_second_weight():
    cells = read_study(ROOT / "nbs/experiments/studies/larger.yaml").cells
    of = lambda arm, key: {c.parameters[key] for c in cells if c.arm == arm}
    assert of("vanilla", "lr") == {1.25e-4, 2.5e-4, 5e-4}
    assert of("interpolation", "interpolate") == {0.3, 0.5}
    assert len(cells) == 50


def test_a_failed_run_leaves_a_statement_open():
    whole = larger()
    gone = [r for r in whole.rows if (r["arm"], r["seed"]) == (REPLAY, 0)]
    rows = tuple(r for r in whole.rows if r not in gone)
    short = replace(whole, rows=rows, lost=tuple(gone))
    words = {f.rule: f.outcome for f in first_page(short)}
    assert words.pop("0.5 % of the text ends below plain training") == (
        "not complete"
    )
    assert set(words.values()) == {"holds"}


def test_what_has_not_run_counts_in_the_correction():
    """One comparison with p between .01 and .05: alone it would hold; among
    five, four of them not run, it does not.
    """
    rows = [*ends("vanilla", 2.5, lr=5e-4), *ends(REPLAY, 2.4)]
    apart = (-0.06, 0.06, -0.02, 0.05, -0.03)
    for r, other, d in zip(rows[5:], rows[:5], apart, strict=True):
        r["final_average"] = other["final_average"] - 0.1 + d
    few = simulated.whole(rows, "larger", {"": 5e-4})
    (last,) = [f for f in first_page(few) if f.interval]
    assert last.interval.high < 0 and last.outcome == "fails"


# -- the study files -----------------------------------------------------------


def numbers(c):
    "A made-up run: plain training learns and forgets more at a larger rate."
    p, here = c.parameters, c.seed % 7 / 500
    rate = p["lr"] / {"muon32": 1e-2, "lion": 1.6e-4}.get(p["optimizer"], 5e-4)
    lost, learned = 0.5 * rate**0.5 + here, 2.2 - 0.2 * rate**0.5
    if c.arm != "vanilla":
        lost, learned = 0.3 + here + 0.1 * p["alpha"], 2.03
    return simulated.row(lost, learned) | {
        "cell": c.hash,
        "run_id": f"{c.slug}-{c.hash}",
        "code": "one",
        "status": "ok",
        "overlap_mean": 0.77,
        "protected_step_norm": 1.0,
        "alpha_mean": p["alpha"],
        "wall_s": 20,
    }


@pytest.fixture
def finished(tmp_path):
    "The real study files, with a made-up number for every run."
    home = tmp_path / "nbs/experiments"
    shutil.copytree(ROOT / "nbs/experiments/studies", home / "studies")
    for template in (ROOT / "nbs/experiments").glob("[a-z]*.ipynb"):
        shutil.copy(template, home)
    project = find_project(tmp_path)
    project.results.mkdir()
    for study in (
        "merging",
        "merging_long",
        "merging_controls",
        "dose",
        "authors",
        "muon",
        "lion",
        "memory",
        "memory_long",
        "larger",
    ):
        cells = read_study(project.studies / f"{study}.yaml").cells
        rows = [numbers(c) for c in cells]
        with open(project.results / f"{study}.csv", "w", newline="") as f:
            out = csv.DictWriter(f, list(rows[0]))
            out.writeheader()
            out.writerows(rows)
    return project


def test_every_rule_finds_its_arms_in_the_study_files(finished):
    of = lambda study: read_table(study, finished)
    merging, dose = of("merging"), of("dose")
    assert of("larger").seeds == (1800, 1801, 1802, 1803, 1804)
    assert of("larger").complete
    doses = c1_by_strength(
        joined(dose, merging), (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
    )
    assert all(
        v.n == 10 and v.parts["matched"].interval for v in doses.values()
    )
    for study, n in (("muon", 10), ("lion", 5)):
        found = c1_by_strength(of(study), (0.5, 0.9, 1.0), 0)
        assert {v.n for v in found.values()} == {n}
        assert all(v.parts["matched"].interval for v in found.values())
    parts = {"memory": 5, "memory_long": 3}
    for study, n in parts.items():
        for rule, arm in (
            (verdict_c1, SHARED),
            (verdict_c3, FIXED),
            (verdict_c3, f"{FIXED}, clamped"),
        ):
            found = by_part(of(study), rule, arm)
            assert len(found) == (2 if n == 5 else 1)
            for v in found.values():
                # the same horizon everywhere, reached
                assert v.n == n and v.decides
                assert v.parts["matched"].interval
    for arm in (AUTHORS, AUTHORS_SMALL):
        v = c4_of_authors(of("authors"), dose, merging, arm)
        assert v.n == 10 and "not yet" not in str(v)
    assert not [f for f in first_page(of("larger")) if f.outcome == "no runs"]


def test_the_page_of_the_protocol_says_what_is_there(finished, monkeypatch):
    "Its last section on finished runs, cell by cell."
    import IPython.display

    page = json.loads((ROOT / "nbs/experiments/17_evidence.ipynb").read_text())
    said: list[str] = []
    show = lambda x: said.append(x.data)
    monkeypatch.setattr(IPython.display, "display", show)
    monkeypatch.chdir(finished.root)
    names = {}
    exec(
        "from IPython.display import Markdown, display\n"
        "from dmr.verdict.pages import markdown_table\n"
        "from dmr.verdict.tables import read_table\n",
        names,
    )
    for cell in page["cells"]:
        if cell["cell_type"] == "code" and cell["id"].startswith("c0b17"):
            exec("".join(cell["source"]), names)
    text = "\n".join(said)
    assert "no runs yet" not in text and "180 of 180 runs" in text
    assert len([x for x in said if x.startswith("| ")]) == 12
