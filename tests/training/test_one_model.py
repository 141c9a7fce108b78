"""A base learns one new domain: what is measured, and what an arm changes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import fits_its_template

import dmr.training.one_model as one
from dmr.methods.consolidation import FisherMerge
from dmr.studies.table import tidy_run
from dmr.training.base import base_config, make_base
from dmr.training.model import next_byte_loss
from dmr.training.one_model import ONE_LIMITS, OneConfig, OneRun, one_model

torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "nbs/experiments/pretrained.ipynb"
BASE = {
    "stream": "synthetic:rho=0.5,domains=5",
    "domains": ["markov0", "markov1"],
    "cap": 20_000,
    "size": "nano",
    "context": 16,
    "batch": 8,
    "steps": 60,
    "written": 600,
}
TINY = OneConfig(
    base=BASE,
    stream=BASE["stream"],
    domains=["markov2", "markov0", "markov1", "markov3"],
    cap=20_000,
    batch=4,
    steps=20,
    protect_windows=16,
    sample=["markov0"],
    rank=4,
    eval_windows=8,
)
ARMS = {
    "plain": {},
    "protected": {"protect": "both", "way_back": True, "points": 4},
    "SFA": {"average": 0.5},
    "L2": {"l2": 0.1},
    "KL": {"kl": 1.0},
    "rehearsal": {"rehearse": "known", "rehearsed": 0.3},
    "self rehearsal": {"rehearse": "self", "rehearsed": 0.3},
    "sample": {"modification": "projection", "protect": "sample"},
    "self": {"modification": "projection", "protect": "self"},
    "random": {"sampling": "random"},
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    make_base(base_config(BASE), folder, progress=False)
    return folder


@pytest.fixture(scope="module")
def results(cache):
    run = lambda arm: one_model(replace(TINY, **ARMS[arm]), False, cache)
    return {arm: run(arm) for arm in ARMS}


def losses(result):
    return [r["loss"] for r in result["records"]]


def test_every_arm_differs_from_plain_and_begins_at_the_base(results):
    plain = losses(results["plain"])
    for arm, result in results.items():
        assert losses(result)[:4] == plain[:4]
        same = losses(result) == plain
        assert same == (arm in ("plain", "protected")), arm


def test_the_numbers_of_a_run(results):
    m, own = results["plain"]["metrics"], losses(results["plain"])
    (new, *before), (after, *later) = own[:4], own[4:]
    lost = [b - a for a, b in zip(before, later)]
    assert m["learned"] == pytest.approx(new - after)
    assert m["lost"] == m["forgetting"] == pytest.approx(sum(lost[:2]) / 2)
    assert m["lost_sample"] == pytest.approx(lost[0])
    assert m["lost_rest"] == pytest.approx(lost[1])
    assert m["lost_unseen"] == pytest.approx(lost[2])
    assert m["learned"] > 0.1 and m["kl_known"] > 0
    assert m["accuracy_known"] != m["accuracy_known_before"]


def test_what_comes_after_a_training(results):
    points = results["protected"]["metrics"]["measured"]
    kinds = [p["kind"] for p in points]
    assert kinds[:13] == ["training"] * 4 + ["average"] * 9
    assert kinds[13:] == ["merge by sample"] * 4 + ["merge by self"] * 4
    assert [p["at"] for p in points[:4]] == [0.25, 0.5, 0.75, 1.0]
    last = losses(results["plain"])[4:]
    assert points[3]["losses"] == pytest.approx(last, abs=1e-6)
    by_sample, by_self = points[13:17], points[17:]
    assert by_sample[1]["losses"] != by_self[1]["losses"]
    kl = [p["kl"] for p in points[4:13]]
    assert kl == sorted(kl)


def test_a_merge_is_the_one_of_the_package(cache):
    "The same base, sample and steps through the router's own FisherMerge."
    config = replace(TINY, protect="sample", weights=[0.7])
    mine = OneRun(config, cache)
    shown = one.shown_windows(config, mine.base, mine.stream, "sample")
    theirs = OneRun(replace(config, protect="none"), cache)
    router = one.MomentRouter(
        theirs.model,
        theirs.optimizer,
        consolidation=FisherMerge(0.7, keep=1.0, samples=config.batch),
    )
    loss = lambda batch: next_byte_loss(theirs.model, batch)
    router.protect(shown, loss, progress=False)
    for run in (mine, theirs):
        run.train(False)
    router.consolidate()
    mine.after()
    merged = theirs.held.measure(theirs.model)
    for name, found in mine.points[-1]["texts"].items():
        assert found["loss"] == pytest.approx(merged[name]["loss"], abs=1e-5)
    router.close()


def test_new_text_is_read_once(cache):
    run = OneRun(TINY, cache)
    starts = run.starts.flatten()
    assert len(starts.unique()) == 80 and not (starts % 16).any()
    assert int(starts.max()) + 17 <= len(run.text)
    with pytest.raises(ValueError, match="pass steps<=312"):
        OneRun(replace(TINY, steps=400), cache)


def test_rehearsed_windows_are_what_they_say(cache):
    known = OneRun(replace(TINY, rehearse="known", rehearsed=1.0), cache)
    text = b"".join(bytes(known.stream[k].train) for k in BASE["domains"])
    assert all(bytes(w) in text for w in known.batch())
    own = OneRun(replace(TINY, rehearse="self", rehearsed=1.0), cache)
    written = [bytes(w) for w in own.base.written]
    assert all(bytes(w) in written for w in own.batch())
    none = OneRun(replace(TINY, rehearse="self", rehearsed=0.0), cache)
    assert torch.equal(none.batch(), OneRun(TINY, cache).batch())


def test_no_sample_is_held_out_text(cache):
    run = OneRun(TINY, cache)
    train = bytes(run.stream["markov0"].train)
    shown = one.shown_windows(TINY, run.base, run.stream, "sample")
    assert all(bytes(w) in train for batch in shown for w in batch)
    written = one.shown_windows(TINY, run.base, run.stream, "self")
    own = [bytes(w) for w in run.base.written]
    assert all(bytes(w) in own for batch in written for w in batch)


@pytest.mark.parametrize(
    "arm", ["protected", "self", "SFA", "self rehearsal", "KL"]
)
def test_a_run_goes_on_bit_for_bit(arm, results, cache, tmp_path):
    config = replace(TINY, **ARMS[arm] | {"points": 10})
    whole = one_model(config, False, cache)
    config = replace(config, checkpoint=str(tmp_path))
    first = OneRun(config, cache)
    step, taken = first.train_step, []

    def stopping():
        if len(taken) == 13:
            raise KeyboardInterrupt
        taken.append(1)
        return step()

    first.train_step = stopping
    with pytest.raises(KeyboardInterrupt):
        first.train(False)
    if first.router is not None:
        first.router.close()
    again = OneRun(config, cache)
    again.restore()
    assert again.step == 10
    again = one_model(config, False, cache)
    assert losses(again) == losses(whole)
    assert again["metrics"]["measured"] == whole["metrics"]["measured"]
    with pytest.raises(ValueError, match="is of a run with lr="):
        one_model(replace(config, lr=0.5), False, cache)


@pytest.mark.parametrize("every, step", [(200, 0), (8, 8)])
def test_few_points_are_kept_too(every, step, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(one, "_SAVE_EVERY", every)
    config = replace(TINY, checkpoint=str(tmp_path))  # one point, at the end
    first = OneRun(config, cache)
    taken = first.train_step

    def stopping():
        if first.step == 13:
            raise KeyboardInterrupt
        return taken()

    first.train_step = stopping
    with pytest.raises(KeyboardInterrupt):
        first.train(False)
    again = OneRun(config, cache)
    again.restore()
    assert again.step == step
    again.train(False)
    done = OneRun(config, cache)
    done.restore()
    assert done.step == TINY.steps and done.points == again.points
    whole = one_model(TINY, False, cache)
    assert losses(one_model(config, False, cache)) == losses(whole)


def test_a_base_that_was_not_made_or_is_another_is_refused(cache, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"make_base\(config\)"):
        one_model(TINY, False, tmp_path)
    other = replace(TINY, base=BASE | {"seed": 1})
    with pytest.raises(FileNotFoundError, match="is not in"):
        one_model(other, False, cache)


def test_a_row_of_the_table(results):
    row = tidy_run(results["protected"])
    assert row["forgetting"] == results["protected"]["metrics"]["lost"]
    assert row["measured"].startswith('[{"accuracy"')
    own = results["protected"]["identity"]["base_weights"]
    assert row["identity_base_weights"] == own
    text = results["protected"]["identity"]["base_written"]
    assert row["identity_base_written"] == text != own


def test_the_template_takes_the_parameters_of_a_run():
    fits_its_template(OneConfig, ONE_LIMITS, TEMPLATE)


@pytest.mark.timeout(300)
def test_the_template_runs_under_bare_papermill(cache, tmp_path, monkeypatch):
    papermill = pytest.importorskip("papermill")
    import nbformat

    monkeypatch.setenv("DMR_CACHE", str(cache))
    wanted = ("base", "stream", "domains", "cap", "batch", "steps", "sample")
    parameters = {k: getattr(TINY, k) for k in (*wanted, "eval_windows")}
    out = tmp_path / "out.ipynb"
    papermill.execute_notebook(
        str(TEMPLATE), str(out), parameters, progress_bar=False
    )
    found = [
        o.data["application/vnd.dmr.result+json"]
        for c in nbformat.read(out, 4).cells
        if c.cell_type == "code"
        for o in c.outputs
        if "application/vnd.dmr.result+json" in o.get("data", {})
    ]
    assert len(found) == 1
    assert {k: found[0]["parameters"][k] for k in parameters} == parameters
    assert len(found[0]["metrics"]["measured"]) == 1
