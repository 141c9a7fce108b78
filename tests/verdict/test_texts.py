"""What the story and the home page say of the evidence, against the tables
that it is read from.
"""

import json
import re
from collections import Counter
from pathlib import Path

from test_zoo import cases

from dmr.verdict.answers import ends_at_the_edge, read_answers
from dmr.verdict.merging import judge_merge
from dmr.verdict.regimes import WITHOUT_PAST
from dmr.verdict.rules import FAILS, HOLDS, UNTESTABLE
from dmr.verdict.stories import HELD_BACK
from dmr.verdict.tables import read_table, setting_name

ROOT = Path(__file__).parents[2]
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")


def text(page):
    "A page's prose and code, without its outputs, in one line."
    cells = json.loads((ROOT / "nbs" / page).read_text())["cells"]
    return " ".join(" ".join("".join(c["source"]) for c in cells).split())


def test_every_page_that_counts_the_claims_counts_them_right():
    words = Counter(
        a.word.split(" at ")[0] for a in read_answers()[1] if a.decides
    )
    assert sum(words.values()) == 10
    n = {k: NUMBERS[words[k]] for k in (HOLDS, FAILS, "undecided", UNTESTABLE)}
    pattern = re.compile(
        rf"{n[HOLDS]} holds(\]\([^)]*\)| here)?, {n[FAILS]} do not,"
        rf" {n['undecided']} (is|are) undecided,( and)? {n[UNTESTABLE]}"
        r"( is)? not testable"
    )
    pages = ("index.ipynb", "why/15_results.ipynb", "why/16_verdict.ipynb")
    for page in pages:
        assert pattern.search(text(page)), page
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert pattern.search(readme)


def kept(arm, held_back):
    "Cases of the stories in which an arm kept to both margins, and all cases."
    found = [
        case["kept"]
        for (story, _), case in cases(arm).items()
        if (story in HELD_BACK) == held_back
    ]
    return sum(found), len(found)


def test_what_is_said_of_the_stories():
    merge, step = "merge 0.8, keep 0.5", "projection, displacement 0.5"
    assert kept(merge, False) == (30, 30) and kept(merge, True) == (8, 9)
    for page in ("why/12_repair.ipynb", "why/16_verdict.ipynb"):
        assert "eight of nine cases" in text(page)
    (a, n), (b, m) = kept(step, False), kept(step, True)
    said = f"{a + b} of {n + m} cases"
    for page in ("why/11_two_lines.ipynb", "routing/08_router.ipynb"):
        assert said in text(page), page


def test_a_long_stream_gets_the_settings_that_were_explored():
    said = text("why/16_verdict.ipynb")
    assert "consolidation=dmr.FisherMerge(0.7, keep=1.0)" in said
    assert 'routing="displacement", strength=0.9' in said
    table = read_table("explore_merging")
    arm = "displacement projection + Fisher merge 0.7, 450 steps"
    p = next(r["parameters"] for r in table.rows if r["arm"] == arm)
    assert (p["routing"], p["alpha"], p["rank"]) == ("displacement", 0.9, 6)
    assert p["merge"] == {"weight": 0.7}
    ends = {}
    for r in table.rows:
        if r["arm"].endswith(", 450 steps") and "replay" not in r["arm"]:
            ends.setdefault(r["arm"], []).append(r["final_average"])
    assert min(ends, key=lambda a: sum(ends[a]) / len(ends[a])) == arm


def test_the_rate_is_asked_about_first():
    said = text("why/16_verdict.ipynb")
    asked = ('("ask", "rate"', '("one", "compare"', '("text", "replay"')
    place = [said.index(x) for x in asked]
    assert place == sorted(place) and '"ask"' in said[: place[0]]


def test_nothing_is_advised_for_adapters_while_the_smallest_rate_is_the_best():
    assert ends_at_the_edge(read_table("lora"))
    assert "No method has been shown to help" in text("why/16_verdict.ipynb")
    assert "advises nothing but to try smaller rates" in text(
        "experiments/11_adapters.ipynb"
    )


def test_the_repair_is_told_as_its_study_found_it():
    table = read_table("merging_long")
    arms = {
        "step": "displacement projection + Fisher merge 0.7",
        "alone": "Fisher merge 0.7",
        "default": "Fisher merge 0.8, keep 0.5 (the default)",
    }
    found = {
        k: {f.rule: f for f in judge_merge(table, a, {"joint training": 0.75})}
        for k, a in arms.items()
    }
    at = lambda k, words: next(f for r, f in found[k].items() if words in r)
    page, repair = text("why/16_verdict.ipynb"), text("why/12_repair.ipynb")
    study, log = (
        text("experiments/17_evidence.ipynb"),
        (ROOT / "CHANGELOG.md").read_text(),
    )

    def said(i, digits=2):
        return f"{-i.estimate:.{digits}f} [{-i.high:.{digits}f}," + (
            f" {-i.low:.{digits}f}]"
        )

    assert said(at("step", "below interpolation").interval) in page
    assert said(at("step", "its best").interval) in page
    assert said(at("default", "below interpolation").interval) in page
    assert said(at("step", "below interpolation").interval, 3) in log
    assert said(at("step", "its best").interval, 3) in log
    share = at("step", "joint training")
    assert share.outcome == "fails"
    for words in (repair, study):
        assert f"{share.interval.estimate:.2f}" in words
        assert f"{share.interval.low:.2f}" in words
    half = at("step", "half")
    assert half.outcome == "not comparable"
    rival, error = map(float, re.findall(r"\d\.\d+", half.note))
    assert f"{rival / error:.1f} " in repair and f"{rival:.2f}" in repair
    outcomes = [f.outcome for f in found["step"].values()]
    assert sorted(set(outcomes)) == ["fails", "holds", "not comparable"]
    assert len(outcomes) - outcomes.count("holds") == 2  # "two of its rules"
    for rule in ("its best", "equal evaluations"):  # level, not below
        alone = at("alone", rule)
        assert alone.outcome == "fails" and abs(alone.interval.estimate) < 0.01
    for words in ("plain averaging", "averaging during training", "EWC"):
        assert words in study
    for rule in ("interpolation", "averaging during training", "EWC"):
        assert at("default", f"below {rule}").outcome == "holds"
        assert at("step", f"below {rule}").outcome == "holds"


def test_what_held_on_domains_that_no_choice_had_seen():
    found = {
        f.rule: f
        for f in judge_merge(
            read_table("merging_confirm"),
            "displacement projection + Fisher merge 0.7",
            {"joint training": 0.75},
        )
    }
    words = [f.outcome for f in found.values()]
    assert words.count("holds") == 6 and words.count("fails") == 1
    assert "six of the seven rules" in text("experiments/17_evidence.ipynb")
    half, share = (
        next(f for r, f in found.items() if w in r) for w in ("half", "joint")
    )
    rival, ours = re.findall(r"\d\.\d+", half.note)
    for page in ("experiments/17_evidence.ipynb", "why/12_repair.ipynb"):
        said = text(page)
        assert f"{float(rival):.2f}" in said and f"{float(ours):.2f}" in said
        assert f"{share.interval.estimate:.2f}" in said
        assert f"{share.interval.low:.2f}" in said


def test_hard_orders_have_c_plus_plus_early():
    place, merged, plain = {}, {}, {}
    for r in read_table("merging_long").rows:
        domains = r["identity_domains"]
        names = domains.split(",") if isinstance(domains, str) else domains
        place[r["seed"]] = names.index("cpp") + 1
        if r["arm"] == "displacement projection + Fisher merge 0.7":
            merged[r["seed"]] = r["forgetting"]
        if r["arm"] == "vanilla" and r["parameters"]["lr"] == 2e-3:
            plain[r["seed"]] = r["forgetting"]
    hard = {s for s, x in place.items() if x < 6}
    assert hard == {1103, 1104, 1109} and {place[s] for s in hard} == {1, 4}
    said = text("experiments/17_evidence.ipynb")
    for seeds, words in (
        (hard, ("0.82 to 1.05", "0.11 to 0.20")),
        (set(place) - hard, ("0.60 to 0.91", "0.04 to 0.07")),
    ):
        for values, w in zip((plain, merged), words):
            found = [values[s] for s in seeds]
            assert f"{min(found):.2f} to {max(found):.2f}" == w and w in said


def test_no_setting_brings_the_judged_arm_further():
    table, ends = read_table("tuning_long"), {}
    assert table.complete
    for r in table.rows:
        name = setting_name(table, r)
        ends.setdefault(name, []).append(r["final_average"])
    mean = {name: sum(x) / len(x) for name, x in ends.items()}
    apart = ("as judged", "vanilla", "joint training")
    above = sorted(
        x - mean["as judged"] for k, x in mean.items() if k not in apart
    )
    assert len(above) == 9 and -0.01 < above[0] < 0 < above[1]
    said = text("experiments/17_evidence.ipynb")
    assert f"{above[1]:.3f} to {above[-1]:.3f} above" in said


def test_the_pasts_basis_ends_lowest_in_every_order():
    controls, long = map(read_table, ("merging_controls", "merging_long"))
    ends = {}
    for r in (*controls.rows, *long.rows):
        if r["parameters"]["lr"] == 2e-3:
            ends.setdefault(r["arm"], {})[r["seed"]] = r["final_average"]
    past = ends["displacement projection + Fisher merge 0.7"]
    for name in WITHOUT_PAST:
        assert len(ends[name]) == 10
        assert all(past[s] < x for s, x in ends[name].items())
    assert "in each of the ten orders" in text("experiments/17_evidence.ipynb")
