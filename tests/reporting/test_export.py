"""A study in a tracker: everything arrives, once, and is read back as it was.

MLflow and trackio ask for older versions of pinned packages, so each tracker is
tested where somebody has installed it.
"""

import json
import math
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from dmr.cli import main
from dmr.reporting.export import (
    TARGETS,
    export_study,
    exported_runs,
    from_text,
    to_text,
)
from dmr.studies.plan import make_plan
from dmr.studies.study import find_project, find_study
from dmr.studies.table import read_rows, row_key

ROOT = Path(__file__).parents[2]
PROJECT = find_project(ROOT)
pytestmark = pytest.mark.filterwarnings("ignore")


def runs_of(study):
    plan = make_plan(find_study(study, PROJECT), PROJECT, load=False)
    return exported_runs(plan, "any")


def few():
    "One run of each kind: every arm's first, of a study with lists in stages."
    first = {}
    for run in [*runs_of("tuning"), *runs_of("lora")]:
        first.setdefault(run.facts["arm"], run)
    return list(first.values())


def plain(run):
    "What was exported, to compare."
    curves = {k: dict(c) for k, c in run.curves.items()}
    return dict(run.parameters), dict(run.facts), dict(run.metrics), curves


def numbers_in(value):
    "How many finite numbers a JSON value holds."
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return sum(map(numbers_in, value))
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return int(number and math.isfinite(value))


@pytest.mark.parametrize("study", ["tuning", "lora", "conflict"])
def test_every_number_of_the_table_is_a_metric_or_a_point(study):
    rows = read_rows(PROJECT.results / f"{study}.csv")
    done = {row_key(r): r for r in rows if r["status"] == "ok"}
    runs = runs_of(study)
    assert len({r.key for r in runs}) == len(runs) == len(done)
    for run in runs:
        about = [run.facts.get(k) for k in ("cell", "stream_hash", "code")]
        row = done[tuple(str(x or "") for x in about)]
        for k, text in row.items():
            if text and k in run.metrics:
                assert float(text) == run.metrics[k]
            elif text and k in run.facts:
                assert text == run.facts[k]
            elif text and k in run.parameters and text[0] not in "[{":
                kept = run.parameters[k]
                joined = kept if isinstance(kept, list) else [kept]
                assert text == ",".join(map(str, joined))
            else:
                packed = k in ("loss_matrix", "loss_untrained", "stage_values")
                assert not text or packed or text[0] in "[{"
        stages = json.loads(row["stage_values"])
        stages.pop("stage")
        want = [json.loads(row[k] or "[]") for k in row if k == "loss_matrix"]
        want += [json.loads(row["loss_untrained"] or "[]"), stages]
        assert numbers_in(want) == sum(map(len, run.curves.values()))


@pytest.mark.parametrize(
    "value",
    [None, True, 0, 1.5, 1e-8, "", "1", "null", "adamw", "NaN", [1, "a"], {}],
)
def test_a_parameter_as_text_keeps_its_type(value):
    again = from_text(to_text(value))
    assert (again, type(again)) == (value, type(value))


def finish(here, nth):
    "Put a result into the folder of a run; returns the plan with it."
    import tiny

    study = find_study("tiny", here)
    plan = make_plan(study, here)
    loss = dict(stage=0, domain=0, trained_domain="a", eval_domain="a")
    loss |= dict(loss=1.23456789012, loss_se=0.01)
    stages = [dict(stage=0, steps=7, worst=math.inf)]
    made = dict(records=[loss], stages=stages, metrics=dict(y=1.0))
    tiny.finish(plan, plan.runs[nth], result=made)
    return make_plan(study, here)


def test_folders_have_finer_curves_than_the_table(tmp_path):
    from tiny import project

    here = project(tmp_path, "arms: {a: {lr: 0.25}}\nseeds: [0, 1]\n")
    (run,) = exported_runs(finish(here, 0))  # the other has no result
    assert run.curves["loss/a"] == {1: 1.23456789012}
    assert run.curves["loss_se/a"] == {1: 0.01}
    assert "stage/worst" not in run.curves
    assert json.loads(run.facts["stage/worst"]) == {"1": math.inf}
    assert run.metrics["y"] == 1.0


def test_from_the_command_line(tmp_path, monkeypatch, capsys):
    from tiny import project

    here = project(tmp_path, "arms: {a: {lr: 0.25}}\nseeds: [0, 1]\n")
    finish(here, 0)
    template = here.root / "nbs/experiments/tiny.ipynb"  # then other code
    template.write_text(template.read_text().replace("(0.5)", "(0.6)"))
    finish(here, 1)
    monkeypatch.chdir(tmp_path)
    for code, seeds in (("current", [1]), ("any", [0, 1])):
        assert main(["export", "tiny", "--to", "json", "--code", code]) == 0
        said = capsys.readouterr().out
        assert said.startswith(f"tiny: {len(seeds)} runs written; ")
        runs = json.loads(Path("tiny.json").read_text())
        assert [run["parameters"]["seed"] for run in runs] == seeds
    empty = ["--runs", str(tmp_path / "empty")]
    assert main(["export", "tiny", "--to", "json", *empty]) == 2
    assert "dmr export: no run of 'tiny' has" in capsys.readouterr().err


def test_what_cannot_be_exported_is_refused(tmp_path, monkeypatch):
    from tiny import project

    monkeypatch.chdir(tmp_path)
    here = project(tmp_path, "seeds: [0]\n")
    study = find_study("tiny", here)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="dmr batch tiny"):
        export_study(study, "json", here)
    with pytest.raises(ValueError, match="trackio, mlflow, wandb, json"):
        export_study(study, "tensorboard", here)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("to", ["trackio", "mlflow", "wandb"])
def test_a_tracker_that_is_missing_is_named_with_its_extra(to, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, to, None)
    with pytest.raises(ModuleNotFoundError, match=rf"moment-routing\[{to}\]"):
        TARGETS[to]("tuning", [])


def twice(to, runs):
    "Export half of the runs, then all, then all again."
    half = len(runs) // 2
    assert TARGETS[to]("tuning", runs[:half])[0] == half
    assert TARGETS[to]("tuning", runs)[0] == len(runs) - half
    assert TARGETS[to]("tuning", runs)[0] == 0


def test_json_holds_everything(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = few()
    for _ in range(2):
        TARGETS["json"]("tuning", runs)
    again = json.loads(Path("tuning.json").read_text())
    assert [r["key"] for r in again] == [r.key for r in runs]
    for r, run in zip(again, runs):
        points = r["curves"].items()
        r["curves"] = {k: {int(s): x for s, x in c.items()} for k, c in points}
        kinds = ("parameters", "facts", "metrics", "curves")
        assert tuple(r[k] for k in kinds) == plain(run)


@pytest.mark.slow
def test_mlflow_gives_back_what_it_got(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    runs, client = few(), mlflow.MlflowClient()
    at = client.create_experiment("tuning")
    tags = {"dmr.key": runs[0].key}  # cut off: begun, and never finished
    cut = client.create_run(at, run_name="cut", tags=tags).info.run_id
    client.log_metric(cut, "final_average", 1.0)
    twice("mlflow", runs)
    found = list(client.search_runs([at]))
    assert len(found) == len(runs)
    by_key = {r.data.tags["dmr.key"]: r for r in found}
    for run in runs:
        r = by_key[run.key]
        assert r.info.run_name == run.name
        history = {
            k: client.get_metric_history(r.info.run_id, k)
            for k in r.data.metrics
        }
        facts = mlflow.artifacts.load_dict(f"{r.info.artifact_uri}/facts.json")
        points = {k: {m.step: m.value for m in h} for k, h in history.items()}
        again = (
            {k: from_text(v) for k, v in r.data.params.items()},
            facts,
            {k: points.pop(k)[0] for k in run.metrics},
            points,
        )
        assert again == plain(run)


@pytest.mark.slow
def test_mlflow_takes_any_name(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    names = {"loss/c++": {1: 1.0}, "loss/notes (1)": {1: 2.0}}
    (run,) = few()[:1]
    twice("mlflow", [replace(run, curves=names)])
    client = mlflow.MlflowClient()
    at = client.get_experiment_by_name("tuning").experiment_id
    (found,) = client.search_runs([at])
    assert found.data.metrics["loss/c_2b__2b_"] == 1.0
    at = f"{found.info.artifact_uri}/facts.json"
    written = mlflow.artifacts.load_dict(at)["names"]
    assert set(written.values()) == set(names)


@pytest.mark.slow
def test_trackio_gives_back_what_it_got(tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    for module in (trackio, trackio.utils, trackio.sqlite_storage):
        if hasattr(module, "TRACKIO_DIR"):
            monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path)
    runs = few()
    twice("trackio", runs)
    found = list(trackio.Api().runs("tuning"))
    assert len(found) == len(runs)
    by_key = {r.config["dmr_key"]: r for r in found}
    for run in runs:
        r = by_key[run.key]
        rows = SQLiteStorage.get_logs("tuning", r.name, run_id=r.id)
        metrics, points = {}, {}
        for row in rows:
            for k, x in row.items():
                if k in run.metrics:
                    metrics[k] = x
                elif k not in ("step", "timestamp"):
                    points.setdefault(k, {})[row["step"]] = x
        facts = {
            k.removeprefix("dmr_"): v
            for k, v in r.config.items()
            if k.startswith("dmr_") and k != "dmr_key"
        }
        parameters = {k: r.config[k] for k in run.parameters}
        assert (parameters, facts, metrics, points) == plain(run)


def records_in(path):
    """The records of an offline file of W&B: a head of 7 bytes, then blocks of
    32 kB with pieces (checksum, length, kind) that make whole records.
    """
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # full, or the last piece
            yield whole
            whole = b""


def read_offline(path):
    "What an offline file of W&B holds: config, summary, history."
    from wandb.proto.wandb_internal_pb2 import Record

    name = lambda item: item.key or "/".join(item.nested_key)
    config, summary, points = {}, {}, {}
    for data in records_in(path):
        record = Record()
        record.ParseFromString(data)
        for item in record.run.config.update:
            config[name(item)] = json.loads(item.value_json)
        for item in record.summary.update:
            summary[name(item)] = json.loads(item.value_json)
        row = {
            name(item): json.loads(item.value_json)
            for item in record.history.item
        }
        for k in row:
            if not k.startswith("_"):
                points.setdefault(k, {})[row["_step"]] = row[k]
    return config, summary, points


@pytest.mark.slow
def test_wandb_gives_back_what_it_got(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    runs = few()[:4]
    twice("wandb", runs)
    found = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(found) == len(runs)
    by_key = {p.stem.removeprefix("run-"): p for p in found}
    for run in runs:
        config, summary, points = read_offline(by_key[run.key])
        parameters = {k: config[k] for k in run.parameters}
        metrics = {k: summary[k] for k in run.metrics}
        assert (parameters, config["dmr"], metrics, points) == plain(run)
