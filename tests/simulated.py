"""Results with known answers: to see what a rule says about them."""

import json

import numpy as np

from dmr.reporting.statistics import Point
from dmr.verdict.answers import (
    ADAPTIVE,
    DISPLACED,
    FIXED,
    INTERPOLATION,
    REPLAY,
    REPLAY_DECOUPLED,
    SHARED,
)
from dmr.verdict.rules import Evidence
from dmr.verdict.tables import Table

#: The main arms, with what they forget in units of vanilla's.
ARMS = {
    SHARED: 1.0,
    FIXED: 1.2,
    ADAPTIVE: 0.5,
    DISPLACED: 0.9,
    REPLAY: 0.7,
    REPLAY_DECOUPLED: 0.8,
    INTERPOLATION: 0.75,
}


def truth(a):
    "A made-up law: forgetting as a function of learning accuracy (a loss)."
    return 0.2 + 0.5 * np.exp(-4 * (a - 2.0))


RATES = {0.25: 2.5, 0.5: 2.35, 0.75: 2.25, 1.0: 2.18, 1.5: 2.1}


def control(n=10, turn=True):
    "Plain training over rates, on the law."
    arms = {
        r: {s: Point(a + 0.01 * s, truth(a)) for s in range(n)}
        for r, a in RATES.items()
    }
    if turn:  # beyond the optimum: learns less and forgets more
        arms[2.0] = {s: Point(2.16 + 0.01 * s, 0.95) for s in range(n)}
    return arms


def evidence(
    factors, n=10, noise=0.02, seed=0, H=7.5, state="kept", a=2.18, drop=()
):
    """Arms that forget factor × the control's forgetting at their own learning
    accuracy; a seed in `drop` failed.
    """
    rng = np.random.default_rng(seed)
    moved = lambda factor: truth(a) * factor * (1 + noise * rng.normal())
    arms = {
        name: {
            s: Point(a + 0.01 * s, moved(factor))
            for s in range(n)
            if s not in drop
        }
        for name, factor in factors.items()
    }
    return Evidence(arms, control(n), H, state)


def row(forgetting, learning_accuracy, domains=("a", "b", "c"), **about):
    """A table's row with given forgetting and learning accuracy, the same on
    every domain; `about`: part, arm, seed, parameters.
    """
    n = len(domains)
    a, f = learning_accuracy, forgetting
    loss = lambda i, j: a + f * (j < i) if j <= i else 5.0
    L = [[loss(i, j) for j in range(n)] for i in range(n)]
    return {
        "loss_matrix": json.dumps(L),
        "loss_columns": json.dumps(list(domains)),
        "forgetting": forgetting,
        "learning_accuracy": learning_accuracy,
        "final_average": learning_accuracy + forgetting * (n - 1) / n,
        "part": "",
        **about,
    }


def edit_of(arm):
    "Parameters that a simulated arm differs in."
    edit = "replay" if "replay" in arm else "projection"
    return {
        "modification": "none" if arm.startswith("interpolation") else edit,
        "interpolate": 0.3 if "interpolation" in arm else None,
    }


def table(
    arms,  # arm -> forgetting in units of vanilla's at equal learning accuracy
    seeds=10,
    noise=0.01,  # sd of forgetting over runs, nats
    study="eight",
    part="",
    domains=("a", "b", "c"),
    **parameters,  # of all runs, such as beta2=0.999
):
    """A finished study with known answers. Vanilla learns better and forgets
    more the larger its rate.
    """
    rng, rows = np.random.default_rng(0), []
    base = {
        "modification": "none",
        "lr": 1e-3,
        "steps": 150,
        "beta2": 0.95,
        "state": "kept",
        "optimizer": "adamw",
        **parameters,
    }
    for seed in range(seeds):
        for rate in (0.25, 0.5, 1.0, 1.5, 2.0):
            f = 0.5 * rate**0.5 + rng.normal(0, noise)
            a = 2.2 - 0.2 * rate**0.5
            p = {**base, "modification": "none", "lr": 1e-3 * rate}
            at = {"part": part, "arm": "vanilla", "seed": seed}
            rows.append(row(f, a, domains, **at, parameters=p))
        for arm, ratio in arms.items():
            f = 0.5 * ratio + rng.normal(0, noise)
            p = {**base, **edit_of(arm)}
            at = {"part": part, "arm": arm, "seed": seed}
            rows.append(row(f, 2.0, domains, **at, parameters=p))
    return whole(rows, study, {part: 1e-3})


def whole(rows, study="eight", nominal=None, **more):
    "A complete table of these rows."
    rows = tuple(rows)
    return Table(
        study, "simulated", len(rows), rows, nominal=nominal or {}, **more
    )


def change(table, by):
    "The rows of a table with their loss matrices changed by `by(row, L)`."
    rows = []
    for r in table.rows:
        L = np.array(json.loads(r["loss_matrix"]))
        by(r, L)
        rows.append({**r, "loss_matrix": json.dumps(L.tolist())})
    return whole(rows, table.study, table.nominal)
