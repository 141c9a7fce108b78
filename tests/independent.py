"""The verdict's numbers, computed a second time: `python tests/independent.py`.

Written from the protocol (`nbs/experiments/01_protocol.ipynb`), and from one
sentence of the chapter on statistics, for the protocol does not say how the
control's curve is interpolated: by a monotone cubic. Reads `results/*.csv` by
`csv` and compares with the tables and sentences that the page of verdicts
(`nbs/experiments/12_claims.ipynb`) shows. Shares no code with the package, so
that a mistake in one of them shows as a difference.
"""

import csv
import functools
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
csv.field_size_limit(1 << 27)


def cdf(x, df):
    "Of Student's t: its density summed by trapezoids."
    log_c = math.lgamma((df + 1) / 2) - math.lgamma(df / 2)
    c = math.exp(log_c) / math.sqrt(df * math.pi)
    t = np.linspace(0, x, 20_001)
    y = c * (1 + t**2 / df) ** (-(df + 1) / 2)
    return 0.5 + float(np.sum(y[1:] + y[:-1]) * x / 40_000)


@functools.cache
def quantile(df, p=0.975):
    "Its inverse, by bisection."
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if cdf(middle, df) > p else (middle, high)
    return low


def interval(values):
    "Mean and its 95 % interval over seeds."
    x = np.array([v for v in values if v is not None], dtype=float)
    half = quantile(len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x))
    return x.mean(), x.mean() - half, x.mean() + half


def rows_of(study, part=""):
    "The rows of a study's table, or of one part of it."
    with open(ROOT / "results" / f"{study}.csv", newline="") as file:
        return [r for r in csv.DictReader(file) if part in ("", r["part"])]


def read(study, part="", only=lambda row: True):
    "Finished runs: arm -> rate -> seed -> (forgetting, learning, final)."
    runs = {}
    for row in rows_of(study, part):
        if row["status"] != "ok" or not only(row):
            continue
        L = np.array(json.loads(row["loss_matrix"]), dtype=float)
        T = len(L)
        lost = [L[-1, j] - L[j : T - 1, j].min() for j in range(T - 1)]
        measured = (np.mean(lost), np.mean(np.diag(L)), np.mean(L[-1]))
        kept = ("forgetting", "learning_accuracy", "final_average")
        for name, x in zip(kept, measured):
            assert abs(float(row[name]) - x) < 1e-5, (row["run_id"], name)
        at = runs.setdefault(row["arm"], {}).setdefault(float(row["lr"]), {})
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
    curve = [(rate, *at[seed][1::-1]) for rate, at in runs[PLAIN].items()]
    return on_curve(curve, learning)


def on_curve(curve, learning):
    "Of (knob, learning, forgetting): forgetting at a learning accuracy."
    curve = sorted(curve)
    best = min(range(len(curve)), key=lambda i: curve[i][1])
    branch = curve[: best + 1]  # from the smallest knob to the best
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

    def __init__(self, runs, nominal):
        self.runs, self.nominal = runs, nominal
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
        return interval(nominal), interval(matched) if matched else None

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


def texts():
    "The Markdown that the page of verdicts shows."
    page = ROOT / "nbs/experiments/12_claims.ipynb"
    for cell in json.loads(page.read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", ()):
            yield "".join(output.get("data", {}).get("text/markdown", ""))


def shown():
    "Rows of its tables."
    for text in texts():
        for line in text.splitlines():
            if line.startswith("| "):
                yield [c.strip() for c in line.strip("|").split("|")]


def numbers(cell):
    "The numbers of a cell such as -0.129 [-0.159, -0.100] (n=10, t)."
    return [float(x) for x in re.findall(r"-?\d+\.\d+", cell)]


def computed(eight, clean, row):
    "What we get for a row of the page: its cells' numbers; None: not ours."
    first = row[0]
    if first in ("C1", "C3"):
        return eight.ratio(SHARED if first == "C1" else FIXED), row[3:5]
    if first == "C10":
        return clean.ratio(SHARED)[:1], row[3:4]
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
    if re.fullmatch(r"0\.\d|1", first) and len(row) == 4:  # C1 by strength
        return by_strength(float(first)), row[2:4]
    return None


def by_strength(alpha):
    "C1 at one strength of `dose`, whose plain runs are those of `merging`."
    at = lambda r: r["arm"] == SHARED and float(r["alpha"]) == alpha
    plain = read("merging", only=lambda r: r["arm"] == PLAIN)
    return Study({**plain, **read("dose", only=at)}, 5e-4).ratio(SHARED)


def overlaps():
    "Smallest and largest overlap over ρ of shared projection, and the range."
    by_part = {}
    for r in rows_of("overlap"):
        if r["arm"] == SHARED:
            by_part.setdefault(r["part"], []).append(float(r["overlap_mean"]))
    means = [np.mean(v) for v in by_part.values()]
    return min(means), max(means), max(means) - min(means)


def sentences(eight):
    "Pattern of a sentence -> what its numbers must be."
    out = {
        r"between (\d\.\d+) and (\d\.\d+) at every ρ; its range,"
        r" (\d\.\d+)": overlaps()
    }
    for arm, routing in ((FIXED, "decoupled"), (SHARED, "shared")):
        basis = eight.minus(f"control: current basis, {routing}", PLAIN)
        whole = eight.minus(arm, PLAIN)
        shares = [a[0] / b[0] for a, b in zip(basis, whole)]
        pattern = rf"(\d+)% of {arm}'s gain at equal learning \((\d+)%"
        out[pattern] = tuple(100 * x for x in shares[::-1])
    for family in ("EWC additive", "SI additive"):
        runs = rows_of("conflict")
        # another error than of a value that is not finite: a missing run
        lost = {
            r["seed"]
            for r in runs
            if r["arm"] == f"{family} decoupled"
            and not r["forgetting"]
            and ("NaN" in r["error"] or "not finite" in r["error"])
        }
        ended = {(r["arm"], r["seed"]) for r in runs if r["forgetting"]}
        alive = {s for arm, s in ended if arm == f"{family} shared"}
        known = {s for arm, s in ended if arm == f"{family} decoupled"} | lost
        n = len(lost & alive)
        odds = min(1, 2 * 0.5**n)  # of so many signs that all agree
        name = f"nominal: {family} decoupled − {family} shared"
        pattern = rf"{name}: above 0 in (\d+) of (\d+) seeds.*?p=(\d\.\d+)"
        out[pattern] = (n, len(known & alive), odds)
    kept = [
        json.loads(r["stage_values"])
        for r in rows_of("eight")
        if r["arm"] == REPLAY
    ]
    windows = kept[0]["replay_windows"][0]
    trained = 8 * kept[0]["steps"][0]
    pattern = r"is (\d+) windows, as many as (\d+)% of the ([\d,]+) windows"
    out[pattern] = (windows, 100 * windows / trained, trained)
    return out


def read_aloud(eight):
    "The sentences of the page that we know, with our numbers and theirs."
    page = "\n".join(texts())
    for pattern, ours in sentences(eight).items():
        found = re.search(pattern, page)
        if found is None:
            yield pattern, ours, None
            continue
        given = [x.replace(",", "") for x in found.groups()]
        yield pattern, ours, given


def tolerance(number):
    "Half a unit of the last digit that is shown."
    _, _, digits = number.partition(".")
    return 0.51 * 10.0 ** -len(digits)


def main():
    "Compare, print what differs, and say how much was compared."
    eight, compared, wrong = Study(read("eight"), 5e-4), 0, []
    clean = Study(read("overlap", "rho 0"), 1e-3)
    rows = told = 0
    for row in shown():
        if (found := computed(eight, clean, row)) is None:
            continue
        rows += 1
        for ours, cell in zip(*found):
            theirs = re.findall(r"-?\d+\.\d+", cell)
            if cell in ("", "–"):
                continue
            for a, b in zip(ours, theirs, strict=True):
                compared += 1
                if not abs(a - float(b)) <= tolerance(b):
                    wrong.append(f"{row[0]}: {a:.4f} here, {b} on the page")
    for pattern, ours, theirs in read_aloud(eight):
        told += 1
        if theirs is None:
            wrong.append(f"the page has no sentence {pattern!r}")
            continue
        for a, b in zip(ours, theirs, strict=True):
            compared += 1
            if not abs(a - float(b)) <= tolerance(b):
                wrong.append(f"{pattern}: {a:.4f} here, {b} on the page")
    said = f"{compared} numbers in {rows} rows and {told} sentences compared"
    print("\n".join([*wrong, said]))
    return bool(wrong) or rows < 43


if __name__ == "__main__":
    sys.exit(main())
