"""The third protocol's numbers, a second time: independent of the package.

Written from the words of `nbs/experiments/18_third_protocol.ipynb`, and from
what the first two protocols say of curves, intervals and failed runs. It
prints what tuning chooses and what the rules say of `pretrained.csv`:

    python tests/independent_pretrained.py [folder with the tables]

Where the words leave a choice, it is the one below. Those marked * were made
another way at first, and changed to the package's when the two were compared.

- A curve is a monotone cubic from the base to the point that learned most.
  Beyond its ends, or where on that branch a point is lacking or learned no
  more than the one before*, a seed is not comparable.
- The base is a point of every curve: the rate 0, the step 0, the weight 0.
  Averages and SFA end in plain training, which is their weight 1.
- A lower rate is one curve, SFA another; early stopping and averages are one
  at each rate. Every curve may be the rival, or leave.
- A rival leaves because its runs are missing, failed ones too, where with
  them it could be comparable in four seeds in five.
- The curve of a projection without a merge is the line from the base to the
  end of its training*.
- Of answers with the same word the weakest has the largest mean d*.
"""

import csv
import json
import math
import re
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.stats import t

ROOT = Path(__file__).resolve().parents[1]
PLAN = ROOT / "nbs/experiments/studies/pretrained.yaml"
STUDY, TUNING = "pretrained", "tuning_pretrained"
SEEDS, TUNED = range(1300, 1305), [9301]
PLANNED = 130  # runs: thirteen rows, five seeds, near and far
ENDED = "ok", "failed", "timeout", "out-of-memory"
NOT_FINITE = r"\b(nan|inf|infinity|(not|non)[ -]finite)\b"
PARTS = "near", "far"
RATES = 1e-4, 3e-4, 1e-3, 2e-3
USUAL = 1e-3
POINTS = tuple(k / 10 for k in range(1, 11))
WEIGHTS = 0.3, 0.5, 0.7, 0.9
BASE = 0.0, (0.0, 0.0)  # a knob at which nothing is learned or lost
SFA = "averaging during training (SFA)"
AVERAGES = 0.5, 0.8
KNOBS = {  # what the rows of an arm differ in
    "plain": ("lr",),
    "projection by self": ("lr", "rank"),
    "projection by sample": ("lr", "rank"),
    SFA: ("average",),
    "L2 to the start": ("l2",),
    "KL to the start": ("kl",),
    "self-written replay": ("rehearsed",),
    "replay": ("rehearsed",),
}
OTHERS = "L2 to the start", "KL to the start", "self-written replay"

# One of ours: the arm that is trained, and what is read from its rows.
Method = namedtuple("Method", "name arm kind")
METHODS = [
    Method(
        f"projection by {by} + Fisher merge by {by}",
        f"projection by {by}",
        f"merge by {by}",
    )
    for by in ("self", "sample")
]
METHODS += [Method(m.arm, m.arm, None) for m in METHODS]
METHODS += [
    Method(f"Fisher merge by {by}", "plain", f"merge by {by}")
    for by in ("self", "sample")
]
JUDGED = METHODS[0]
Setting = namedtuple("Setting", "knobs weight")

Answer = namedtuple(
    "Answer", "word learned lost rival theirs d low high n left"
)
# From the weakest: a rule over several holds if all of them do.
WORDS = "fails", "not comparable", "not complete", "holds"


class Table:
    "Runs by part, arm and knobs, then seed; of a run its points by kind."

    def __init__(self, rows, seeds):
        self.seeds, self.need = seeds, math.ceil(0.8 * len(seeds))
        self.runs, self.bases, self.done = {}, set(), 0
        for r in rows:
            if r["status"] not in ENDED:
                continue  # not run yet
            knobs = tuple(float(r[k] or "nan") for k in KNOBS[r["arm"]])
            at = self.runs.setdefault((r["part"], r["arm"], *knobs), {})
            assert int(r["seed"]) not in at, r["run_id"]
            at[int(r["seed"])] = points(r)
            self.done += 1
            if r["status"] == "ok":
                names = "base", "base_weights", "base_written"
                self.bases.add(tuple(r[f"identity_{n}"] for n in names))

    def knobs(self, arm):
        "Settings that have run, of both parts."
        return sorted({k[2:] for k in self.runs if k[1] == arm})

    def run(self, part, arm, knobs, seed):
        return self.runs.get((part, arm, *knobs), {}).get(seed)

    def point(self, part, arm, knobs, seed, kind="training", at=1.0):
        "What was learned and lost; None: no numbers; or lost infinitely."
        run = self.run(part, arm, knobs, seed)
        if run == "diverged":
            return math.inf, math.inf
        return run.get((kind, at)) if run else None

    def number(self, *at, **more):
        "The same of a rival: a run that diverged has no numbers."
        p = self.point(*at, **more)
        return p if p and all(map(math.isfinite, p)) else None


def points(r):
    "Of a run: (kind, at) -> learned, lost; None: failed."
    if r["status"] != "ok":
        lost = re.search(NOT_FINITE, r["error"], re.IGNORECASE)
        return "diverged" if lost else None
    at = json.loads(r["loss_columns"]).index
    before = np.array(json.loads(r["loss_untrained"]), dtype=float)
    new, known = at(r["domains"].split(",")[0]), r["known"].split(",")
    known, out = [at(name) for name in known], {}
    for m in json.loads(r["measured"]):
        change = np.array(m["losses"], dtype=float) - before
        lost = change[known].mean()
        if not (np.isfinite(change[new]) and np.isfinite(lost)):
            lost = math.inf
        out[m["kind"], round(m["at"], 3)] = float(-change[new]), float(lost)
    # Losses are rounded to six digits, the columns beside them are not.
    for name, x in zip(("learned", "lost"), out["training", 1.0]):
        assert abs(float(r[name]) - x) < 2e-6, (r["run_id"], name)
    return out


def on_curve(curve, learned):
    "Of (knob, (learned, lost)): what was lost where so much was learned."
    curve = sorted(curve, key=lambda p: p[0])
    there = [(k, p) for k, p in curve if p]
    best = max(there, key=lambda p: p[1][0])[0]
    branch = [p for k, p in curve if k <= best]
    if None in branch or len(branch) < 2 or not math.isfinite(learned):
        return None
    x, y = np.transpose(branch)
    if (np.diff(x) <= 0).any() or not x[0] <= learned <= x[-1]:
        return None
    return float(PchipInterpolator(x, y)(learned))


def rivals(table, part, seed):
    "Name -> curve, of the four rivals that the first rule asks for."
    plain = lambda lr, *at: table.number(part, "plain", (lr,), seed, *at)
    sfa = [(w, table.number(part, SFA, (w,), seed)) for w in AVERAGES]
    curves = {
        "a lower rate": [(lr, plain(lr)) for lr in RATES],
        "SFA": [*sfa, (1.0, plain(USUAL))],
    }
    for lr in RATES:
        stops = [(k, plain(lr, "training", k)) for k in POINTS]
        averages = [(k, plain(lr, "average", k)) for k in POINTS[:-1]]
        curves[f"early stopping at {lr:g}"] = stops
        curves[f"averages at {lr:g}"] = [*averages, (1.0, plain(lr))]
    return {name: [BASE, *curve] for name, curve in curves.items()}


def ours(table, part, method, setting):
    "Seed -> learned, lost; infinite where the run diverged."
    kind, at = ("training", 1.0)
    if method.kind and setting.weight < 1:
        kind, at = method.kind, setting.weight
    found = {
        s: table.point(part, method.arm, setting.knobs, s, kind, at)
        for s in table.seeds
    }
    return {s: p for s, p in found.items() if p}


def our_curve(table, part, method, knobs, seed):
    "From the base over the weights of the merge to the end of training."
    at = part, method.arm, knobs, seed
    weights = WEIGHTS if method.kind else ()
    merges = [(w, table.number(*at, method.kind, w)) for w in weights]
    return [BASE, *merges, (1.0, table.number(*at))]


def signs(values):
    "If a run diverged: does the two-sided sign test agree at 5 %?"
    if all(map(math.isfinite, values)):
        return True
    below = sum(v < 0 for v in values)
    above = sum(v > 0 for v in values)
    n = below + above
    tail = sum(math.comb(n, i) for i in range(above + 1))
    return below > above and 2 * tail / 2**n < 0.05


def interval(values):
    "Mean and its 95 % interval over seeds, of finite values."
    x = np.array([v for v in values if math.isfinite(v)])
    if len(x) < 2:
        return (float(x.mean()) if len(x) else math.nan), math.nan, math.nan
    half = t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x))
    return float(x.mean()), float(x.mean() - half), float(x.mean() + half)


def clear(lost):
    "More than five standard errors?"
    if len(lost) < 2:
        return False
    return np.mean(lost) > 5 * np.std(lost, ddof=1) / math.sqrt(len(lost))


def answer(table, pairs, diverged, word=None, rival="", left=()):
    """Of seed -> (learned, ours lost, theirs): numbers, and the word unless it
    is known.
    """
    learned, lost, theirs = np.array(list(pairs.values())).T
    d = [*(lost - theirs / 2), *([math.inf] * len(diverged))]
    mean, low, high = interval(d)
    if word is None and not clear(theirs):
        word = "not comparable"
    if word is None:
        word = "holds" if high < 0 and signs(d) else "fails"
        if table.done < PLANNED:
            word = f"preliminary: {word}"
    means = map(float, (learned.mean(), lost.mean()))
    of = rival, float(theirs.mean()), mean, low, high, len(d), tuple(left)
    return Answer(word, *means, *of)


def nothing(word, left=()):
    return Answer(word, *[math.nan] * 2, "", *[math.nan] * 4, 0, tuple(left))


def first(table, part, method, setting):
    "Rule 1: half of what the rival lost, the lower envelope of four."
    mine = ours(table, part, method, setting)
    diverged = [s for s, p in mine.items() if math.isinf(p[1])]
    found, lacking = {}, {}
    for s in table.seeds:
        for name, curve in rivals(table, part, s).items():
            at, no = found.setdefault(name, {}), lacking.setdefault(name, [])
            y = on_curve(curve, mine[s][0]) if s in mine else None
            if y is not None:
                at[s] = y
            elif any(p is None for _, p in curve):
                no.append(s)
    n = {name: len(at) + len(diverged) for name, at in found.items()}
    stay = [name for name in found if n[name] >= table.need]
    left = [name for name in found if name not in stay]
    word = None
    if any(n[x] + len(lacking[x]) >= table.need for x in left):
        word = "not complete"
    elif not stay:
        word = "not comparable"
    # While runs are to come: those with most seeds, to have numbers to show.
    stay = stay or [x for x in found if n[x] == max(n.values())]
    common = set.intersection(*(set(found[x]) for x in stay))
    if not common:
        return nothing(word or "not comparable", left)
    mean = lambda name: np.mean([found[name][s] for s in common])
    best = min(stay, key=mean)
    pairs = {s: (*mine[s], y) for s, y in found[best].items()}
    return answer(table, pairs, diverged, word, best, left)


def second(table, part, method, setting):
    "Rule 2: the same against each of three, at the learning of its row."
    mine = ours(table, part, method, Setting(setting.knobs, 1.0))
    diverged = [s for s, p in mine.items() if math.isinf(p[1])]
    for arm in OTHERS:
        rows = table.knobs(arm)
        assert len(rows) < 2, rows
        pairs, lacking = {}, 0
        for s in set(table.seeds) - set(diverged):
            p = table.number(part, arm, rows[0], s) if rows else None
            lacking += p is None
            if p is None or s not in mine:
                continue
            curve = our_curve(table, part, method, setting.knobs, s)
            y = on_curve(curve, p[0])
            if y is not None:
                pairs[s] = p[0], y, p[1]
        word, n = None, len(pairs) + len(diverged)
        if n < table.need:
            more = n + lacking >= table.need
            word = "not complete" if more else "not comparable"
        if pairs:
            yield answer(table, pairs, diverged, word, arm)
        else:
            yield nothing(word or "not comparable")._replace(rival=arm)


def weakest(answers):
    "Of several: what keeps a rule that asks for all of them from holding."

    def strength(a):
        d = math.inf if math.isnan(a.d) else a.d
        return WORDS.index(a.word.removeprefix("preliminary: ")), -d

    return min(answers, key=strength)


def choices(tuning, method, only=None):
    "Setting -> mean d over near and far, infinite if not comparable."
    out = {}
    for knobs in [only] if only else tuning.knobs(method.arm):
        for weight in WEIGHTS if method.kind else (1.0,):
            setting = Setting(knobs, weight)
            d = [first(tuning, part, method, setting).d for part in PARTS]
            out[setting] = math.inf if np.isnan(d).any() else np.mean(d)
    return out


def chosen(tuning):
    """Method -> setting; rank and rate of every projection are those of the
    method that decides.
    """
    out, knobs = {}, None
    for method in METHODS:
        mine = method.arm != "plain"
        d = choices(tuning, method, knobs if mine else None)
        out[method] = min(d, key=d.get)
        knobs = knobs or out[method].knobs
    return out


def rival_choice(tuning, arm):
    "Loses least of those that learn nine tenths of plain's, in both parts."
    seed, lost = tuning.seeds[0], {}
    for knobs in tuning.knobs(arm):
        at = [tuning.number(p, arm, knobs, seed) for p in PARTS]
        plain = [tuning.number(p, "plain", (USUAL,), seed) for p in PARTS]
        if all(a and a[0] >= 0.9 * b[0] for a, b in zip(at, plain)):
            lost[knobs] = np.mean([a[1] for a in at])
    return min(lost, key=lost.get)


def in_the_plan(arm):
    "Values of a line of the study's file that is marked as tuned."
    text = PLAN.read_text("utf-8")
    (line,) = re.findall(rf'^  "?{re.escape(arm)}"?: (.*)# tuned', text, re.M)
    found = [re.search(rf"\b{k}: ([\d.e-]+)", line)[1] for k in KNOBS[arm]]
    return tuple(map(float, found))


def moonshot(study, settings):
    "Both rules for the first method, on both domains."
    out = []
    for part in PARTS:
        at = study, part, JUDGED, settings[JUDGED]
        out += [first(*at), weakest(second(*at))]
    return weakest(out).word, out


def ratios(table, settings):
    "Part, weight and the first rule's numbers, at every weight."
    knobs = settings[JUDGED].knobs
    for part in PARTS:
        for w in (*WEIGHTS, 1.0):
            found = first(table, part, JUDGED, Setting(knobs, w))
            yield part, w, found, found.lost / found.theirs


def differences(table, settings, method):
    "Part, weight, and ours minus the best rival's with its interval."
    for part in PARTS:
        for w in WEIGHTS:
            setting = Setting(settings[method].knobs, w)
            rival = first(table, part, method, setting).rival
            mine, found = ours(table, part, method, setting), []
            for s, (learned, lost) in mine.items():
                y = on_curve(rivals(table, part, s)[rival], learned)
                found += [lost - y] * (y is not None)
            yield part, w, *interval(found)


def read(path):
    csv.field_size_limit(1 << 27)
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def named(method, setting):
    knobs = zip(KNOBS[method.arm], setting.knobs)
    weight = [("weight", setting.weight)] if method.kind else []
    return ", ".join(f"{k} {v:g}" for k, v in [*knobs, *weight])


def shown(a):
    "An answer in one line."
    if not a.n:
        return f"{a.word}; no seed beside {a.rival or 'a rival'}"
    numbers = f"learned {a.learned:.4f}, lost {a.lost:.4f}"
    ends = "" if math.isnan(a.low) else f" [{a.low:+.4f}, {a.high:+.4f}]"
    d = f"d {a.d:+.4f}{ends}"
    against = f"{a.rival or 'no rival'} lost {a.theirs:.4f}"
    every = len(a.left) == 2 + 2 * len(RATES)
    left = "every rival" if every else ", ".join(a.left)
    left = f"; left: {left}" if left else ""
    return f"{a.word}; {numbers}; {against}; {d}; {a.n} seeds{left}"


def tell_tuning(tuning, settings):
    print("What tuning chooses: the lowest mean d over near and far")
    for method, setting in settings.items():
        free = choices(tuning, method)
        print(f"  {method.name}: {named(method, setting)}")
        print(f"    mean d {free[setting]:+.5f}")
        for s, d in sorted(free.items(), key=lambda x: x[1])[:3]:
            print(f"      of all settings: {named(method, s)}: {d:+.5f}")
        for part in PARTS:
            a = first(tuning, part, method, setting)
            print(f"    {part}: {shown(a._replace(word='one seed'))}")
    for arm in (METHODS[0].arm, METHODS[1].arm):
        same = in_the_plan(arm) == settings[JUDGED].knobs
        print(f"  {arm}, in the study's file: {'same' if same else 'OTHER'}")
    for arm in OTHERS:
        best = rival_choice(tuning, arm)
        same = "same" if in_the_plan(arm) == best else "OTHER"
        print(f"  {arm}: {best[0]:g}, in the study's file: {same}")


def tell_rules(study, settings):
    for part in PARTS:
        for method, setting in settings.items():
            print(f"{part}, {method.name} ({named(method, setting)})")
            print(f"  first: {shown(first(study, part, method, setting))}")
            three = list(second(study, part, method, setting))
            for a in three:
                print(f"  second: {shown(a)}")
            worst = weakest(three)
            print(f"  second, the weakest: {worst.word}, {worst.rival}")
    word, four = moonshot(study, settings)
    print(f"moonshot: {word}, of {', '.join(a.word for a in four)}")


def tell_ratios(name, table, settings):
    print(f"At every weight of the merge, {name}")
    for part, w, a, ratio in ratios(table, settings):
        of = f"{a.rival} lost {a.theirs:.4f}; ratio {ratio:.3f}; {a.n} seeds"
        print(f"  {part} {w}: {a.learned:.4f}, lost {a.lost:.4f}; {of}")


def main(folder=ROOT / "results"):
    "Print the choices, the rules and the ratios; true if bases differ."
    tables = (STUDY, SEEDS), (TUNING, TUNED)
    study, tuning = (
        Table(read(Path(folder) / f"{name}.csv"), seeds)
        for name, seeds in tables
    )
    print(f"{study.done} of {PLANNED} runs, {tuning.done} of tuning")
    if len(study.bases | tuning.bases) > 1:
        print("refused: the tables have more than one base")
        return True
    settings = chosen(tuning)
    tell_tuning(tuning, settings)
    tell_rules(study, settings)
    tell_ratios(STUDY, study, settings)
    tell_ratios(TUNING, tuning, settings)
    return False


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
