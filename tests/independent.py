"""The verdict's numbers, computed a second time: `python tests/independent.py`.

Written from the protocol (`nbs/experiments/01_protocol.ipynb`), and from one
sentence of the chapter on statistics, for the protocol does not say how the
control's curve is interpolated: by a monotone cubic. Reads `results/*.csv` by
`csv` and compares with the tables that the page of verdicts
(`nbs/experiments/12_claims.ipynb`) shows. Shares no code with the package, so
that a mistake in one of them shows as a difference.
"""

import csv
import json
import math
import re
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
PLAIN, SHARED = "vanilla", "shared projection"
FIXED, ADAPTIVE = "fixed decoupled projection", "adaptive decoupled projection"
REPLAY = "replay 0.5 % shared"
HALF_A_UNIT = 0.00051  # the page rounds to three digits
csv.field_size_limit(1 << 27)


def quantile(df, p=0.975):
    "Of Student's t: its density summed by trapezoids, turned by bisection."
    log_c = math.lgamma((df + 1) / 2) - math.lgamma(df / 2)
    c = math.exp(log_c) / math.sqrt(df * math.pi)

    def above(x):
        t = np.linspace(0, x, 20_001)
        y = c * (1 + t**2 / df) ** (-(df + 1) / 2)
        return 0.5 + float(np.sum(y[1:] + y[:-1]) * x / 40_000) - p

    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if above(middle) > 0 else (middle, high)
    return low


def interval(values):
    "Mean and its 95 % interval over seeds."
    x = np.array([v for v in values if v is not None], dtype=float)
    half = quantile(len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x))
    return x.mean(), x.mean() - half, x.mean() + half


def read(study):
    "Finished runs: arm -> rate -> seed -> (forgetting, learning, final)."
    runs = {}
    with open(ROOT / "results" / f"{study}.csv", newline="") as file:
        for row in csv.DictReader(file):
            if row["status"] != "ok":
                continue
            L = np.array(json.loads(row["loss_matrix"]), dtype=float)
            T = len(L)
            lost = [L[-1, j] - L[j : T - 1, j].min() for j in range(T - 1)]
            measured = (np.mean(lost), np.mean(np.diag(L)), np.mean(L[-1]))
            kept = ("forgetting", "learning_accuracy", "final_average")
            for name, x in zip(kept, measured):
                assert abs(float(row[name]) - x) < 1e-5, (row["run_id"], name)
            at = runs.setdefault(row["arm"], {}).setdefault(
                float(row["lr"]), {}
            )
            at[int(row["seed"])] = measured
    return runs


def slopes(h, d):
    "Of a monotone cubic at its knots, by Fritsch and Butland (1984)."
    if len(d) == 1:
        return [d[0], d[0]]

    def end(h0, h1, d0, d1):
        m = ((2 * h0 + h1) * d0 - h0 * d1) / (h0 + h1)
        if m * d0 <= 0:
            return 0.0
        return 3 * d0 if d0 * d1 <= 0 and abs(m) > 3 * abs(d0) else m

    inner = []
    for k in range(1, len(d)):
        a, b = 2 * h[k] + h[k - 1], h[k] + 2 * h[k - 1]
        turns = d[k - 1] * d[k] <= 0
        inner.append(0.0 if turns else (a + b) / (a / d[k - 1] + b / d[k]))
    first = end(h[0], h[1], d[0], d[1])
    return [first, *inner, end(h[-1], h[-2], d[-1], d[-2])]


def control(runs, seed, learning):
    "Plain Adam's forgetting where it learns so much; None: out of reach."
    curve = sorted(
        (rate, at[seed][1], at[seed][0]) for rate, at in runs[PLAIN].items()
    )
    best = min(range(len(curve)), key=lambda i: curve[i][1])
    branch = curve[: best + 1]  # from the smallest rate to the best
    x, y = np.array([p[1:] for p in branch[::-1]]).T
    h = np.diff(x)
    if len(x) < 2 or (h <= 0).any() or not x[0] <= learning <= x[-1]:
        return None
    m = slopes(h, np.diff(y) / h)
    k = min(int(np.searchsorted(x, learning, "right")) - 1, len(h) - 1)
    t = (learning - x[k]) / h[k]
    return (
        (1 + 2 * t) * (1 - t) ** 2 * y[k]
        + t * (1 - t) ** 2 * h[k] * m[k]
        + t**2 * (3 - 2 * t) * y[k + 1]
        + t**2 * (t - 1) * h[k] * m[k + 1]
    )


class Study:
    "What the page says of one study, seed by seed."

    def __init__(self, name, nominal):
        self.runs, self.nominal = read(name), nominal
        self.seeds = sorted(self.runs[PLAIN][nominal])

    def point(self, arm, seed, rate=None):
        return self.runs[arm][rate or self.nominal][seed]

    def saved(self, arm, seed):
        "Forgetting minus the control's at equal learning."
        forgetting, learning, _ = self.point(arm, seed)
        matched = control(self.runs, seed, learning)
        return None if matched is None else forgetting - matched

    def ratio(self, arm):
        "Forgetting over plain Adam's: at the same rate, at equal learning."
        nominal, matched = [], []
        for s in self.seeds:
            forgetting = self.point(arm, s)[0]
            nominal.append(forgetting / self.point(PLAIN, s)[0])
            saved = self.saved(arm, s)
            if saved is not None:
                matched.append(forgetting / (forgetting - saved))
        return interval(nominal), interval(matched)

    def minus(self, arm, other):
        "Forgetting of one arm minus another's, in both ways."
        nominal, matched = [], []
        for s in self.seeds:
            nominal.append(self.point(arm, s)[0] - self.point(other, s)[0])
            a, b = self.saved(arm, s), self.saved(other, s)
            if a is not None and b is not None:
                matched.append(a - b)
        return interval(nominal), interval(matched)

    def final(self, arm):
        "Mean final average, and its difference to plain Adam's."
        here = [self.point(arm, s)[2] for s in self.seeds]
        plain = [self.point(PLAIN, s)[2] for s in self.seeds]
        return np.mean(here), interval(np.subtract(here, plain))


def shown():
    "Rows of the Markdown tables on the page of verdicts."
    page = ROOT / "nbs/experiments/12_claims.ipynb"
    for cell in json.loads(page.read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", ()):
            text = output.get("data", {}).get("text/markdown", "")
            for line in "".join(text).splitlines():
                if line.startswith("| "):
                    yield [c.strip() for c in line.strip("|").split("|")]


def numbers(cell):
    "The numbers of a cell such as -0.129 [-0.159, -0.100] (n=10, t)."
    return [float(x) for x in re.findall(r"-?\d+\.\d+", cell)]


def computed(eight, row):
    "What we get for a row of the page: its cells' numbers; None: not ours."
    first = row[0]
    if first in ("C1", "C3"):
        return eight.ratio(SHARED if first == "C1" else FIXED), row[3:5]
    if first in ("C2", "C4"):
        pair = (REPLAY, SHARED) if first == "C2" else (ADAPTIVE, REPLAY)
        return eight.minus(*pair), row[3:5]
    if " − " in first and len(row) == 4:
        arm, _, other = first.partition(" − ")
        if arm in eight.runs and other in eight.runs:
            return eight.minus(arm, other), row[2:4]
    if first in eight.runs and len(row) == 5 and row[1] == "10":
        mean, difference = eight.final(first)
        if abs(mean - numbers(row[2])[0]) < 0.1:  # a row of final averages
            return ((mean,), difference), row[2:4]
    return None


def main():
    "Compare, print what differs, and say how much was compared."
    eight, compared, wrong = Study("eight", 5e-4), 0, []
    rows = 0
    for row in shown():
        if (found := computed(eight, row)) is None:
            continue
        rows += 1
        for ours, cell in zip(*found):
            theirs = numbers(cell)
            if cell in ("", "–"):
                continue
            for a, b in zip(ours, theirs, strict=True):
                compared += 1
                if not abs(a - b) <= HALF_A_UNIT:
                    wrong.append(f"{row[0]}: {a:.4f} here, {b} on the page")
    print("\n".join(wrong + [f"{compared} numbers in {rows} rows compared"]))
    return bool(wrong) or rows < 30


if __name__ == "__main__":
    sys.exit(main())
