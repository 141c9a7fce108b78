"""The rules for a merge against a computation that shares no code with them:
on the committed table, and on whole tables that are made up from it.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from dmr.studies.study import find_project, read_study
from dmr.verdict.merging import judge_merge
from dmr.verdict.tables import Table, read_table

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))
import independent_merging as second  # noqa: E402

NAME, GOAL = "merging_long", "joint training"
NUMBERS = "final_average", "forgetting", "learning_accuracy"
CELLS = read_study(find_project(TESTS).studies / f"{NAME}.yaml").cells
ROWS = second.read(TESTS.parent / "results" / f"{NAME}.csv")
DEFAULT = second.ARMS[-1]


def setting(arm, given):
    weight = given["interpolate"] or None
    return arm, float(given["lr"]), weight and float(weight)


def compared(rows, table, goal=GOAL, arm_of_goal=GOAL, share=0.75):
    "Outcomes of both for each judged arm; their numbers must agree."
    for arm in second.ARMS:
        ours = second.findings(rows, table.study, arm, arm_of_goal, share)
        theirs = judge_merge(table, arm, {goal: share})
        for (word, ends), f in zip(ours, theirs, strict=True):
            assert word == f.outcome, (arm, str(f))
            i = f.interval
            shown = i and (i.estimate, i.low, i.high)
            assert (ends is None) == (shown is None), (arm, str(f))
            if ends:
                assert np.allclose(ends, shown, atol=1e-6), (arm, str(f))
            yield arm, f.rule, word


def whole(shift=None, fate=None):
    """A table of all planned runs, as rows of a file and as a Table: matrices
    of the first finished run with noise; `shift`: arm -> what is added to its
    last losses; `fate`: (arm, seed) -> an error, or None for no run.
    """
    first = {}
    for r in ROWS:
        found = json.loads(r["loss_matrix"] or "null")
        if found:
            first.setdefault(setting(r["arm"], r), np.array(found))
    rng, rows, kept, lost, noise = np.random.default_rng(0), [], [], [], {}
    for c in CELLS:
        at = noise.setdefault(c.seed, 0.02 * rng.normal(size=(8, 8)))
        L = first[setting(c.arm, c.parameters)] + at
        L = L + 0.01 * rng.normal(size=(8, 8))
        L[-1, :-1] += (shift or {}).get(c.arm, 0.0)
        L = L.round(6)
        error = (fate or {}).get((c.arm, c.seed), "")
        if error is None:
            continue
        down = [L[-1, j] - L[j:-1, j].min() for j in range(7)]
        means = L[-1].mean(), np.mean(down), np.diag(L).mean()
        about = {"arm": c.arm, "seed": c.seed}
        about |= {"status": "failed" if error else "ok", "error": error}
        row = {k: c.parameters[k] for k in ("lr", "interpolate")}
        row |= about | {"run_id": c.slug, "loss_matrix": json.dumps(L.tolist())}
        rows.append(row | dict(zip(NUMBERS, means)))
        run = about | {"parameters": c.parameters}
        if error:
            lost.append(run)
        else:
            kept.append(run | dict(zip(NUMBERS, means)))
    seeds = tuple(dict.fromkeys(c.seed for c in CELLS))
    return rows, Table(
        NAME,
        planned=len(CELLS),
        rows=tuple(kept),
        lost=tuple(lost),
        seeds=seeds,
    )


@pytest.mark.parametrize(
    ("study", "asked"),
    [
        (NAME, (GOAL, GOAL, 0.75)),
        ("merging_confirm", (GOAL, GOAL, 0.75)),
        ("merging", ("replay", second.REPLAY, 0.85)),
    ],
)
def test_the_committed_table_says_the_same_twice(study, asked):
    file = TESTS.parent / "results" / f"{study}.csv"
    rows = second.read(file) if file.exists() else []
    assert len(list(compared(rows, read_table(study), *asked))) == 28


def test_the_page_shows_the_same_means(monkeypatch):
    page = TESTS.parent / "nbs/experiments/17_evidence.ipynb"
    cells = json.loads(page.read_text("utf-8"))["cells"]
    (code,) = (s for c in cells if "def means(" in (s := "".join(c["source"])))
    shown = []
    names = {
        "read_table": read_table,
        "markdown_table": lambda head, lines: lines,
        "Markdown": lambda x: x,
        "display": shown.append,
    }
    (body,) = re.findall(r"^def means.*?(?=^for study)", code, re.S | re.M)
    exec(body, names)
    names["means"](NAME)
    theirs = {line[0]: line[1:] for line in shown[-1]}
    ours = {}
    for (arm, lr, weight), x in second.means(ROWS, NAME).items():
        name = f"{arm}, lr {lr:g}" + (f", weight {weight:g}" if weight else "")
        ours[name] = [*(f"{v:.3f}" for v in x[:3]), str(x[3])]
    assert ours == theirs and len(ours) >= 22


def test_a_whole_table_says_the_same_twice():
    """The arms are moved so that every rule holds for one and fails for
    another.
    """
    moved = dict(zip(second.ARMS, (-0.15, 0.0, 0.1, 0.3)))
    found = list(compared(*whole(moved)))
    rules = {rule for _, rule, _ in found}
    assert len(rules) == 7
    assert {(rule, word) for _, rule, word in found} == {
        (rule, word) for rule in rules for word in ("holds", "fails")
    }


@pytest.mark.parametrize("absent", ["EWC", ""])
def test_a_damaged_table_says_the_same_twice(absent):
    "Failed and diverged runs, a curve that lacks a weight, no rival."
    nan, killed = "ValueError: the loss is NaN", "Killed"
    a, b, c, d = second.ARMS
    fate = {(a, 1100): nan}
    fate |= {(b, s): nan for s in range(1100, 1105)}
    fate |= {(c, s): killed for s in (1101, 1102, 1103)}
    fate |= {(d, 1106): killed, (d, 1107): nan}
    fate |= {("interpolation", 1108): killed, ("vanilla", 1109): nan}
    fate |= {(absent, s): None for s in range(1100, 1110)}
    found = list(compared(*whole({a: -0.15}, fate)))
    words = {arm: {w for x, _, w in found if x == arm} for arm in second.ARMS}
    early = "preliminary: " * bool(absent)
    assert f"{early}holds" in words[a] and f"{early}fails" in words[b]
    assert not {"holds", f"{early}holds"} & words[b]
    assert {"not comparable", "too few seeds"} <= words[c]
    assert ("not complete" in words[a]) == bool(absent)


def test_it_would_notice_a_number():
    rows, table = whole()
    rows = [
        r | {"error": "Killed", "status": "failed"}
        if (r["arm"], r["seed"]) == (DEFAULT, 1103)
        else r
        for r in rows
    ]
    with pytest.raises(AssertionError, match="default"):
        list(compared(rows, table))
    assert second.means(rows, NAME)[DEFAULT, 2e-3, None][3] == 9


def test_it_shares_no_code_with_the_package():
    text = Path(second.__file__).read_text("utf-8")
    assert "dmr" not in text
