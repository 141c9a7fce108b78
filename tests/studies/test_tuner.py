"""A study that a sampler tunes: ordinary runs, the same ones after an
interruption, and a choice near the whole grid's.
"""

import math
from pathlib import Path

import pytest
from tiny import BODY, PARAMETERS, finish, project

from dmr.studies.plan import make_plan
from dmr.studies.study import find_project, find_study, read_study
from dmr.studies.table import read_rows
from dmr.studies.tuner import (
    Tuner,
    chosen,
    run_tuned,
    scores_of,
    settings_of,
    share_runs,
)

GRID = """\
seeds: [0, 1]
arms:
  a: {grid: {lr: [0.25, 0.5, 1, 2, 4, 8]}}
  b: {grid: {lr: [0.5, 1, 2, 4, 8, 16]}, mode: plain}
"""
SCORED = """\
from IPython.display import display
import math
if lr == 8 and arm == "a":
    raise FloatingPointError("diverged")
score = 2 + 0.1 * math.log2(lr) ** 2 + 0.01 * seed
metrics = dict(final_average=score, forgetting=0.1)
display({"application/vnd.dmr.result+json": dict(metrics=metrics)}, raw=True)
"""


def tiny_study(tmp_path, emit=SCORED, grid=GRID):
    here = project(tmp_path, grid, cells=(PARAMETERS, BODY, emit))
    return here, find_study("tiny", here)


def score(cell):
    "A score without a run: lowest at a rate of 1; 8 fails."
    lr = cell.varied["lr"]
    if lr == 8:
        return None
    return 2 + 0.1 * math.log2(lr) ** 2 + 0.01 * cell.seed


def play(tuner, scores=()):
    scores = dict(scores)
    while todo := tuner.ask(scores):
        scores |= {c.hash: score(c) for c in todo}
    return scores


def test_runs_are_shared_out_and_too_few_are_refused(tmp_path):
    _, study = tiny_study(tmp_path)
    arms = {}
    for c in study.cells:
        arms.setdefault(c.arm, []).append(c)
    assert [len(settings_of(c)) for c in arms.values()] == [6, 6]
    for most in (4, 11, 24, 99):
        given = share_runs(arms, most)
        assert sum(given.values()) == min(most, 24)
        assert max(given.values()) - min(given.values()) <= 1
    with pytest.raises(ValueError, match="--trials 3: 2 arms need at least 4"):
        share_runs(arms, 3)


def test_optuna_is_named_with_its_extra(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "optuna", None)
    _, study = tiny_study(tmp_path)
    with pytest.raises(ModuleNotFoundError, match=r"moment-routing\[tuner\]"):
        Tuner(study, 8)


def test_an_interrupted_tuning_goes_on_as_it_would_have(tmp_path):
    pytest.importorskip("optuna")
    _, study = tiny_study(tmp_path)
    whole, other = Tuner(study, 12), Tuner(study, 12, seed=1)
    scores = play(whole)
    asked = [c.hash for c in whole.asked]
    assert len(set(asked)) == len(asked) <= 12
    assert len({c.hash for c in study.cells} & set(asked)) == len(asked)
    for n in range(len(asked)):
        told = {h: scores[h] for h in sorted(asked[:n])}
        resumed = Tuner(study, 12)
        assert play(resumed, told) == scores, n
        assert {c.hash for c in resumed.asked} == set(asked)
    play(other)
    assert {c.hash for c in other.asked} != set(asked)


def test_enough_trials_are_the_whole_grid(tmp_path):
    pytest.importorskip("optuna")
    _, study = tiny_study(tmp_path)
    tuner = Tuner(study, 24)
    scores = play(tuner)
    # a setting that failed on the first seed does not get the second one
    assert len(scores) == 24 - 2


@pytest.mark.slow
def test_a_tuned_batch_makes_ordinary_runs(tmp_path):
    pytest.importorskip("optuna")
    here, study = tiny_study(tmp_path)
    done = run_tuned(study, here, 6, how="quiet", workers=2)
    states = [s["state"] for _, s in done.states]
    assert len(states) == 6 and set(states) <= {"ok", "failed"}
    plan = make_plan(study, here)
    counts = plan.counts()
    assert counts["ok"] + counts.get("failed", 0) == 6
    rows = read_rows(here.results / "tiny.csv")
    assert len(rows) == 6
    made = {r["run_id"]: r["finished"] for r in rows}
    again = run_tuned(study, here, 6, how="quiet")
    assert not again.outcomes  # everything was there
    rows = read_rows(here.results / "tiny.csv")
    assert {r["run_id"]: r["finished"] for r in rows} == made


@pytest.mark.slow
def test_the_command_says_what_was_chosen(tmp_path, monkeypatch, capsys):
    pytest.importorskip("optuna")
    from dmr.cli import main

    tiny_study(tmp_path, grid="seeds: [0, 1]\ngrid: {lr: [0.5, 1, 2, 4]}\n")
    monkeypatch.chdir(tmp_path)
    tuned = ["batch", "tiny", "--tuner", "optuna", "--quiet"]
    assert main([*tuned, "--trials", "5"]) == 0
    assert "all (5 runs): lr=1: final_average 2.005" in capsys.readouterr().out
    assert main([*tuned, "--trials", "1"]) == 2
    assert "at least 2 runs" in capsys.readouterr().err
    assert main([*tuned, "--retry-failed"]) == 2
    assert "--tuner" in capsys.readouterr().err


@pytest.mark.slow
def test_runs_without_a_score_are_refused(tmp_path):
    pytest.importorskip("optuna")
    emit = SCORED.replace("final_average=score, ", "")
    here, study = tiny_study(tmp_path, emit)
    with pytest.raises(ValueError, match="no 'final_average'"):
        run_tuned(study, here, 4, how="quiet")


def test_a_run_that_diverged_has_no_score_and_ends_nothing(tmp_path):
    here, study = tiny_study(tmp_path)
    plan = make_plan(study, here)
    numbers = (dict(final_average=None, forgetting=1.0), dict(final_average=2))
    for p, metrics in zip(plan.runs, numbers):
        finish(plan, p, result=dict(metrics=metrics))
    first, second = (p.cell.hash for p in plan.runs[:2])
    assert scores_of(make_plan(study, here)) == {first: None, second: 2.0}


@pytest.mark.slow
def test_it_chooses_almost_as_the_whole_grid():
    """Measured over 20 seeds of the sampler: see `nbs/making/04_tuning`. Five
    of them here.
    """
    pytest.importorskip("optuna")
    from dmr.verdict.tuning import replay_tuner

    here = find_project(Path(__file__).parents[2])
    replays = [replay_tuner(60, seed, here) for seed in range(5)]
    above = [x for r in replays for _, x in r.values()]
    assert all(sum(n for n, _ in r.values()) <= 60 for r in replays)
    assert min(above) == 0
    assert sum(x <= 0.01 for x in above) >= 0.85 * len(above)


def test_its_rule_is_the_protocols():
    "On the whole grid, `chosen` says what `dmr report tuning` says."
    from dmr.verdict.tuning import tuning_choices

    here = find_project(Path(__file__).parents[2])
    plan = read_study(here.studies / "tuning.yaml")
    rows = read_rows(here.results / "tuning.csv")
    known = {r["cell"]: float(r["final_average"]) for r in rows}
    _, choices = tuning_choices(here)
    assert len(choices) == 8
    for choice in choices:
        cells = [c for c in plan.cells if c.arm == choice.arm]
        setting, mean = chosen(cells, known)
        assert dict(setting) == dict(choice.setting)
        assert math.isclose(mean, choice.final_average, rel_tol=1e-12)


def test_settings_with_unequal_seeds_get_runs_enough(tmp_path):
    pytest.importorskip("optuna")
    _, study = tiny_study(
        tmp_path,
        grid="grid: {lr: [1, 2]}\nseeds: [0, 1, 2]\n"
        "exclude:\n  - {lr: 1, seed: [1, 2]}\n",
    )
    with pytest.raises(ValueError, match="--trials 2: .* give --trials 3"):
        Tuner(study, 2)
    for most in (3, 4):
        assert len(play(Tuner(study, most))) <= most
