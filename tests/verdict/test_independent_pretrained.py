"""The rules for one pretrained model against a computation that shares no code
with them: on the committed tables, and on tables that are made up from one
seed of them.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dmr.verdict import pretrained
from dmr.verdict.pretrained import (
    OURS,
    PARTS,
    at_each_weight,
    chosen,
    judge_pretrained,
    judge_rows,
    moonshot,
    setting_of,
)
from dmr.verdict.tables import read_table

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))
import independent_pretrained as second  # noqa: E402

RESULTS = TESTS.parent / "results"
STUDY, TUNING = (read_table(name) for name in (second.STUDY, second.TUNING))
FILE = second.read(RESULTS / f"{second.STUDY}.csv")
CHOICES = second.Table(
    second.read(RESULTS / f"{second.TUNING}.csv"), second.TUNED
)
SETTINGS = second.chosen(CHOICES)
METHODS = {m.name: m for m in SETTINGS}
SFA, MINE = second.SFA, OURS[0]


@pytest.fixture(autouse=True)
def chosen_once(monkeypatch):
    "Tuning is the same for all tables here."
    known = {}

    def remembered(table, name, among=None):
        key = name, tuple(sorted(among or ()))
        if key not in known:
            known[key] = chosen(table, name, among)
        return known[key]

    monkeypatch.setattr(pretrained, "chosen", remembered)


def compared(table, rows):
    "Words of both by part, method and rule; their numbers must agree."
    again, words = second.Table(rows, second.SEEDS), {}
    for part in PARTS:
        rules = judge_pretrained, judge_rows
        ours = [rule(table, TUNING, part) for rule in rules]
        for name in OURS:
            at = again, part, METHODS[name], SETTINGS[METHODS[name]]
            theirs = second.first(*at), second.weakest(second.second(*at))
            for rule, (found, a) in enumerate(zip(ours, theirs)):
                f, where = found[name], (part, name, rule + 1)
                assert a.word == f.outcome, (where, str(f))
                if i := f.interval:
                    shown = i.estimate, i.low, i.high
                    assert shown == pytest.approx((a.d, a.low, a.high)), where
                words[where] = a.word
    word = second.moonshot(again, SETTINGS)[0]
    assert moonshot(table, TUNING).outcome == word
    return words


def test_tuning_chooses_the_same():
    for name in OURS:
        knobs, weight = SETTINGS[METHODS[name]]
        lr, rank = (*knobs, None)[:2]
        said = f"lr {lr:g}" + (f", rank {rank:g}" if rank else "")
        assert chosen(TUNING, name) == (said, weight), name


@pytest.mark.skipif(len(STUDY.rows) < 130, reason="the study is not complete")
def test_the_committed_table():
    compared(STUDY, FILE)


def test_the_shares_of_the_best_rival():
    again = second.Table(FILE, second.SEEDS)
    knobs = SETTINGS[METHODS[MINE]].knobs
    setting, _ = chosen(TUNING, MINE)
    for part in PARTS:
        found = at_each_weight(STUDY, part, MINE, setting)
        for at, (learned, lost, theirs, *_) in found.items():
            setting_at = second.Setting(knobs, at)
            a = second.first(again, part, METHODS[MINE], setting_at)
            shown = (learned, lost, theirs)
            assert shown == pytest.approx((a.learned, a.lost, a.theirs))
    by_place = {
        (part, at): rest
        for part, at, *rest in second.differences(
            again, SETTINGS, METHODS[MINE]
        )
    }
    for (part, at), interval in by_place.items():
        more = at_each_weight(STUDY, part, MINE, setting)[at].more
        assert interval == pytest.approx([more.estimate, more.low, more.high])


FIRST = [r for r in STUDY.rows if r["seed"] == 1300]
WRITTEN = {r["run_id"]: r for r in FILE}


def scaled(row, of_new, of_known):
    "A row of the file with its changes of the loss times two factors."
    row, before = dict(row), np.array(json.loads(row["loss_untrained"]))
    found = json.loads(row["measured"])
    for point in found:
        change = np.array(point["losses"]) - before
        change *= [of_new] + [of_known] * (len(change) - 1)
        point["losses"] = (before + change).tolist()
    (end,) = (p for p in found if (p["kind"], p["at"]) == ("training", 1.0))
    moved = np.array(end["losses"]) - before
    # known text stands in the places after the new one
    learned, lost = -moved[0], moved[1 : 1 + row["known"].count(",") + 1].mean()
    told = {"learned": str(learned), "lost": str(lost)}
    return row | told | {"measured": json.dumps(found)}


def whole(keep=0.5, **fate):
    """A table of all planned runs from those of one seed, with noise; what a
    projection loses is multiplied by `keep`. `fate`: diverged, failed or
    missing -> part, arm and seeds.
    """
    rng, rows, kept, lost = np.random.default_rng(0), [], [], []
    noise = {s: 1 + 0.005 * rng.normal(size=2) for s in second.SEEDS}
    errors = {"diverged": "the loss is not finite", "failed": "no disk"}
    for seed in second.SEEDS:
        for r in FIRST:
            here = r["part"], r["arm"]
            word = next(
                (
                    w
                    for w, (*at, s) in fate.items()
                    if (*at,) == here and seed in s
                ),
                "",
            )
            if word == "missing":
                continue
            name = f"{'-'.join(here)}-{setting_of(r)}-{seed}"
            about = {"seed": str(seed), "run_id": name}
            if word:
                gone = {"status": "failed", "error": errors[word]}
                rows.append(WRITTEN[r["run_id"]] | about | gone)
                how = {"part": r["part"], "arm": r["arm"], "seed": seed}
                lost.append(how | gone | {"parameters": r["parameters"]})
                continue
            new, known = noise[seed]
            known *= keep if "projection" in r["arm"] else 1
            row = scaled(WRITTEN[r["run_id"]], new, known) | about
            rows.append(row)
            kept.append(r | {"seed": seed, "measured": row["measured"]})
    return replace(STUDY, rows=tuple(kept), lost=tuple(lost)), rows


def test_a_table_in_which_something_holds():
    words = compared(*whole())
    assert words["near", MINE, 1] == words["near", MINE, 2] == "holds"
    assert {*compared(*whole(keep=3)).values()} == {"fails", "not comparable"}


@pytest.mark.parametrize(
    "fate",
    [
        {"failed": ("near", SFA, [1301])},
        {"failed": ("near", SFA, [1301, 1302])},
        {"missing": ("near", SFA, [1301, 1302])},
        {"failed": ("near", "projection by self", [1301, 1302])},
        {"missing": ("near", "KL to the start", [1301, 1302])},
        {"diverged": ("near", "projection by self", [1301])},
        {"diverged": ("near", "projection by self", [1301, 1302])},
    ],
)
def test_failed_diverged_and_missing_runs(fate):
    words = compared(*whole(**fate))
    if "diverged" in fate:  # a rule cannot hold any more
        assert words["near", MINE, 1] == words["near", MINE, 2] == "fails"


def shares(name, knobs=None):
    "Least and largest, as a text would say them."
    again, method = second.Table(FILE, second.SEEDS), METHODS[name]
    knobs = knobs or SETTINGS[method].knobs
    found = [
        second.first(again, part, method, second.Setting(knobs, at))
        for part in PARTS
        for at in second.WEIGHTS
    ]
    of_best = [a.lost / a.theirs for a in found]
    return f"{min(of_best):.2f} to {max(of_best):.2f}"


def text(page):
    cells = json.loads((TESTS.parent / "nbs" / page).read_text())["cells"]
    return " ".join("".join(c["source"]) for c in cells)


def test_the_guide_says_what_the_table_says():
    said = text("guides/00_one_model.ipynb")
    assert f"projection with a merge lost {shares(MINE)} of what the" in said
    assert f"The merge alone lost {shares(OURS[2])} of what the best" in said
    assert f"and {shares(OURS[2], (1e-3,))} at 1e-3" in said


def test_the_page_says_what_the_table_says():
    said, words = text("experiments/18_third_protocol.ipynb"), {}
    again, method = second.Table(FILE, second.SEEDS), METHODS[MINE]
    of_rival = {}
    for part in PARTS:
        at = again, part, method, SETTINGS[method]
        found = [second.first(*at), *second.second(*at)]
        words[part] = [a.word for a in found]
        of_rival[part] = [a.lost / a.theirs for a in found]
    assert f"lost {shares(MINE)} of what the best of the four cheap" in said
    near, far = of_rival["near"], of_rival["far"]
    assert f"reached near ({near[0]:.2f}) and missed far ({far[0]:.2f})" in said
    assert words["near"][0] == "holds" and words["far"][0] == "fails"
    least, most = min(near[1:]), max(near[1:])
    assert f"where it lost {least:.2f} to {most:.2f} of what L2, KL and" in said
    assert "fails" in words["near"][1:] and most < 1
    assert {*words["far"][1:]} == {"not comparable"}
    ends = [
        np.mean([again.number("far", *arm, s) for s in again.seeds], axis=0)
        for arm in (
            ("self-written replay", *again.knobs("self-written replay")),
            (method.arm, SETTINGS[method].knobs),
        )
    ]
    assert f"{ends[0][1]:.3f} against {ends[1][1]:.3f}. So" in said
    assert f"The merge alone lost {shares(OURS[2])} of what the best" in said
    assert f"it lost {shares(OURS[2], (1e-3,))}." in said
    assert "moonshot fails" in said
    assert second.moonshot(again, SETTINGS)[0] == "fails"
    assert not STUDY.lost and "No run failed." in said
