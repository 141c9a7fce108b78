"""The second protocol's numbers, a second time: independent of the package.

Written from `nbs/experiments/17_evidence.ipynb` and from what the first
protocol says of a run, of metrics and of failed runs; planned rows and seeds
are read from the study's file. `python tests/independent_merging.py` prints
what it finds in `results/`; the tests compare it with what the page's own
code says.
"""

import csv
import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import yaml
from independent import cdf, on_curve, quantile

ROOT = Path(__file__).resolve().parents[1]
STUDIES = ROOT / "nbs/experiments/studies"
RATE = 2e-3  # a merge is judged at the rate in the file's `defaults`
RIVALS = "interpolation", "averaging during training (SFA)", "EWC"
REPLAY = "replay 0.5 % shared"
EQUAL = f"{REPLAY}, equal evaluations"
MARGIN, LEVEL = 0.02, 0.05


class Study:
    "Numbers by setting (arm, rate, weight), then seed; None: it failed."

    def __init__(self, rows, name):
        plan = yaml.safe_load((STUDIES / f"{name}.yaml").read_text("utf-8"))
        first, last = map(int, plan["seeds"].split(".."))
        self.seeds, self.runs = range(first, last + 1), {}
        for arm, given in plan["arms"].items():
            grid = {"lr": [plan["defaults"]["lr"]], **given.get("grid", {})}
            names = "lr", "interpolate"
            values = [grid.get(n, [None]) for n in names]
            for lr, weight in itertools.product(*values):
                self.runs[arm, float(lr), weight] = {}
        for r in rows:
            if r["status"] == "missing":
                continue  # not run yet
            weight = float(r["interpolate"]) if r["interpolate"] else None
            at = self.runs[r["arm"], float(r["lr"]), weight]
            assert int(r["seed"]) not in at, r["run_id"]
            at[int(r["seed"])] = measured(r)
        done = sum(map(len, self.runs.values()))
        self.complete = done == len(self.runs) * len(self.seeds)
        self.enough = max(4, math.ceil(0.8 * len(self.seeds)))

    def settings(self, arm):
        return [s for s in self.runs if s[0] == arm]

    def value(self, setting, k):
        "Seed -> number: 0 forgetting, 1 learning accuracy, 2 final average."
        runs = self.runs[setting].items()
        return {s: m[k] for s, m in runs if m and math.isfinite(m[k])}

    def judged(self, arm, k):
        "Of the judged arm: a run that diverged counts as infinite."
        runs = self.runs[arm, RATE, None].items()
        return {s: m[k] for s, m in runs if m}

    def best(self, arm):
        """Final averages of the setting with the lowest mean on the seeds that
        all have, of the settings with numbers in four planned seeds in five.
        """
        rows = [self.value(s, 2) for s in self.settings(arm)]
        rows = [r for r in rows if len(r) >= self.enough]
        if not rows:
            return {}
        common = set.intersection(*map(set, rows))
        return min(rows, key=lambda r: np.mean([r[s] for s in common]))

    def ran(self, arm):
        return any(self.runs[s] for s in self.settings(arm))

    def said(self, holds):
        word = "holds" if holds else "fails"
        return word if self.complete else f"preliminary: {word}"


class Asked:
    """What is asked to lie below 0, by seed; infinite where the arm diverged,
    whatever the other side did there.
    """

    def __init__(self, d, mine):
        d = d | {s: x for s, x in mine.items() if math.isinf(x)}
        self.n, self.values = len(d), list(d.values())
        self.x = np.array([v for v in self.values if math.isfinite(v)])

    @property
    def mean(self):
        return self.x.mean()

    def half(self):
        "Of the 95 % interval of the mean."
        error = self.x.std(ddof=1) / math.sqrt(len(self.x))
        return quantile(len(self.x) - 1) * error

    def ends(self, more=0.0):
        "Mean and interval, of what is asked plus a constant."
        if len(self.x) < 2:
            return None
        mean, half = self.mean + more, self.half()
        return mean, mean - half, mean + half

    def p(self):
        "Two-sided, of Student's test."
        if len(self.x) < 2:
            return 1.0
        error = self.half() / quantile(len(self.x) - 1)
        return 2 * (1 - cdf(abs(self.mean) / error, len(self.x) - 1))

    def signs(self):
        "If a run diverged: does the two-sided sign test agree?"
        if len(self.x) == self.n:
            return True
        below = sum(v < 0 for v in self.values)
        above = sum(v > 0 for v in self.values)
        n = below + above
        tail = sum(math.comb(n, i) for i in range(above + 1))
        return below > above and 2 * tail / 2**n < LEVEL

    def holds(self):
        ends = self.ends()
        return bool(ends and ends[2] < 0 and self.signs())


def measured(r):
    "Of a run; None: it failed; infinite: with a value that is not finite."
    if r["status"] != "ok":
        lost = re.search(r"\bnan\b|not finite", r["error"], re.IGNORECASE)
        return (math.inf,) * 3 if lost else None
    L = np.array(json.loads(r["loss_matrix"]), dtype=float)
    T = len(L)
    lost = [L[-1, j] - L[j : T - 1, j].min() for j in range(T - 1)]
    means = np.mean(lost), np.mean(np.diag(L)), np.mean(L[-1])
    # The matrix is rounded to six digits, its means are not.
    kept = ("forgetting", "learning_accuracy", "final_average")
    for name, x in zip(kept, means):
        assert abs(float(r[name]) - x) < 2e-6, (r["run_id"], name)
    return tuple(float(r[name]) for name in kept)


def minus(a, b):
    return {s: a[s] - b[s] for s in a.keys() & b.keys()}


def half(study, arm):
    "Rule 1."
    y, x = study.judged(arm, 0), study.judged(arm, 1)
    settings = study.settings("interpolation")
    curve = {s[2]: s for s in settings if s[1] == RATE and study.runs[s]}
    if not curve:
        return "no runs", None
    curve[1.0] = "vanilla", RATE, None
    at = {w: (study.value(s, 1), study.value(s, 0)) for w, s in curve.items()}
    theirs = {}
    for s in x:
        points = [(w, a[s], f[s]) for w, (a, f) in at.items() if s in a]
        if not points or math.isinf(x[s]):
            continue
        best = min(points, key=lambda p: p[1])[0]
        if any(w < best and s not in at[w][0] for w in at):
            continue
        found = on_curve(points, x[s])
        if found is not None:
            theirs[s] = found
    asked = Asked({s: y[s] - f / 2 for s, f in theirs.items()}, y)
    if asked.n < study.enough:
        return "not comparable", None
    z = np.array(list(theirs.values()))
    if len(z) > 1 and z.mean() <= 5 * z.std(ddof=1) / math.sqrt(len(z)):
        return "not comparable", None
    return study.said(asked.holds()), asked.ends()


def below(study, arm):
    "Rule 2: a finding for each rival."
    mine, asked = study.judged(arm, 2), {}
    for rival in RIVALS:
        asked[rival] = Asked(minus(mine, study.best(rival)), mine)
    tested = [r for r in RIVALS if asked[r].n >= study.enough and study.best(r)]
    p = {r: asked[r].p() if r in tested else 1.0 for r in RIVALS}
    # Holm: the smallest p at a third of the level, and so on
    going, sure = True, set()
    for rank, rival in enumerate(sorted(RIVALS, key=p.get)):
        going = going and p[rival] < LEVEL / (3 - rank)
        sure |= {rival} if going else set()
    for rival in RIVALS:
        one = asked[rival]
        if rival not in tested:
            yield "too few seeds" if study.ran(rival) else "no runs", None
        elif one.holds() and len(tested) < 3:
            yield "not complete", one.ends()
        else:
            yield study.said(one.holds() and rival in sure), one.ends()


def way(study, arm, goal, share):
    "Rule 3: a share of the way from plain to the goal, with Fieller's ends."
    if not study.ran("vanilla") or not study.ran(goal):
        return "no runs", None
    plain, there = study.best("vanilla"), study.best(goal)
    mine = study.judged(arm, 2)
    to, away = minus(plain, mine), minus(plain, there)
    seeds = [s for s in to.keys() & away.keys() if math.isfinite(to[s])]
    asked = Asked({s: share * away[s] - to[s] for s in seeds}, mine)
    if asked.n < study.enough or not away:
        return "too few seeds", None
    diverged, n = len(seeds) < asked.n, len(seeds)
    ends = None
    if n > 1:
        a, b = (np.array([x[s] for s in seeds]) for x in (to, away))
        t2 = quantile(n - 1) ** 2
        (vaa, vab), (_, vbb) = np.cov(a, b) / n
        # (mean a − r · mean b)² ≤ t² · var(a − r b), a quadratic in r
        A = b.mean() ** 2 - t2 * vbb
        B = a.mean() * b.mean() - t2 * vab
        C = a.mean() ** 2 - t2 * vaa
        if A > 0 and b.mean() > 0:
            root = math.sqrt(B**2 - A * C)
            ends = a.mean() / b.mean(), (B - root) / A, (B + root) / A
    if ends is None and not diverged:
        return "not comparable", None  # the gap is not clear of zero
    reached = bool(ends and ends[1] >= share and asked.signs())
    return study.said(reached), ends


def above(study, arm, rival):
    "Rule 4: at most a margin above it."
    if not study.ran(rival):
        return "no runs", None
    mine, there = study.judged(arm, 2), study.best(rival)
    d = {s: x - MARGIN for s, x in minus(mine, there).items()}
    asked = Asked(d, mine)
    if asked.n < study.enough or not there:
        return "too few seeds", None
    return study.said(asked.holds()), asked.ends(MARGIN)


def findings(rows, name, arm, goal, share):
    "Outcome, and estimate with its two ends, of the rules in their order."
    study = Study(rows, name)
    if not study.runs[arm, RATE, None]:
        return [("no runs", None)] * 7
    return [
        half(study, arm),
        *below(study, arm),
        way(study, arm, goal, share),
        above(study, arm, EQUAL),
        above(study, arm, REPLAY),
    ]


def means(rows, name):
    "Of every row: final average, forgetting, learning accuracy, runs."
    study, out = Study(rows, name), {}
    for setting in study.runs:
        x = [study.value(setting, k) for k in (2, 0, 1)]
        if x[0]:
            of = [float(np.mean(list(v.values()))) for v in x]
            out[setting] = (*of, len(x[0]))
    return out


def read(path):
    csv.field_size_limit(1 << 27)
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


ARMS = (
    "displacement projection + Fisher merge 0.7",
    "shared projection + Fisher merge 0.7",
    "Fisher merge 0.7",
    "Fisher merge 0.8, keep 0.5 (the default)",
)


def main():
    far = ("merging_long", "merging_confirm", "merging_text16")
    asked = [(name, "joint training", 0.75) for name in far]
    for name, goal, share in [*asked, ("merging", REPLAY, 0.85)]:
        path = ROOT / "results" / f"{name}.csv"
        rows = read(path) if path.exists() else []
        for setting, x in means(rows, name).items():
            print(setting, *(f"{v:.4f}" for v in x[:3]), x[3])
        for arm in ARMS:
            print(arm, *findings(rows, name, arm, goal, share), sep="\n  ")


if __name__ == "__main__":
    main()
