"""Batches: kill -9 anywhere, two at once, stop, budget, and a cluster with a
worker that dies. Nothing lost, nothing counted twice.
"""

import asyncio
import json
import random
import shutil
import signal
import time
from collections import Counter
from dataclasses import replace
from itertools import accumulate
from types import SimpleNamespace

import psutil
import pytest
from cluster import Cluster
from tiny import EMIT, PARAMETERS, dmr, finish, processes, project, wait_for

from dmr.studies import batch
from dmr.studies.batch import (
    BatchResult,
    Refused,
    bring_back,
    clock,
    need_devices,
    preflight,
    run_batch,
)
from dmr.studies.mirror import pull, push_missing
from dmr.studies.plan import make_plan
from dmr.studies.run import FAILED, KILLED, OK
from dmr.studies.study import read_study
from dmr.studies.table import read_rows
from dmr.studies.template import write_template

STAGES = "seeds: 0..{}\ndefaults: {{mode: stages}}\nlimits: {{wall: 5 min}}\n"


def check_complete(folders, n):
    "Every run is done once, with one row, from whole stages."
    study = read_study(folders.studies / "tiny.yaml")
    plan = make_plan(study, folders)
    assert plan.counts() == {OK: n}
    rows = read_rows(folders.results / "tiny.csv")
    assert Counter(r["seed"] for r in rows) == Counter(
        {str(p.cell.seed): 1 for p in plan.runs}
    )
    assert {r["stages"] for r in rows} == {"4"}
    assert all(p.run.result["metrics"]["stages"] == 4 for p in plan.runs)


def traced(root):
    "Lets the runs of a project write its journal and be found by its folder."
    journal = str(root / "journal.txt")
    return dict(DMR_TEST_JOURNAL=journal, DMR_TEST_ROOT=str(root))


def journal_of(root):
    return [
        line.split() for line in (root / "journal.txt").read_text().splitlines()
    ]


def test_durations():
    assert [clock(s) for s in (0.4, 59, 150, 7200)] == [
        "0 s",
        "59 s",
        "2 min 30 s",
        "2 h 00 min",
    ]


def test_a_batch_that_cannot_work_is_refused(tmp_path, monkeypatch):
    plan = make_plan(
        read_study(project(tmp_path, "seeds: [0, 1]\n").studies / "tiny.yaml"),
        project(tmp_path, "seeds: [0, 1]\n"),
    )
    preflight(plan, 2)
    with pytest.raises(Refused, match="make room"):
        preflight(plan, 10**12)
    monkeypatch.setattr("dmr.studies.batch.RUN_MEMORY", 1e18)
    with pytest.raises(Refused, match="one run needs about"):
        preflight(plan, 2)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        Refused, match="papermill, ipykernel, psutil not installed"
    ):
        preflight(plan, 2)


def test_a_device_that_is_not_there_is_refused_before_any_run(
    tmp_path, monkeypatch
):
    made = project(tmp_path, "seeds: [0, 1]\n")
    plan = make_plan(read_study(made.studies / "tiny.yaml"), made)
    need_devices(plan.runs)
    for p in plan.runs[:1]:
        p.cell.parameters["device"] = "cuda:0"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(
        Refused, match="1 of 2 runs name device='cuda:0'.*-p device cpu"
    ):
        need_devices(plan.runs)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    need_devices(plan.runs)


def test_files_from_elsewhere_come_with_the_marker_last(tmp_path, monkeypatch):
    import zlib

    written = []
    monkeypatch.setattr(
        "dmr.studies.batch.write_atomic",
        lambda path, data: written.append(path.name),
    )
    bring_back(
        tmp_path,
        {
            n: zlib.compress(b"{}")
            for n in (
                "done.json",
                "result.json",
                "output.ipynb",
                "stranger.txt",
            )
        },
    )
    assert written == ["output.ipynb", "result.json", "done.json"]


def test_exit_codes_of_a_batch(tmp_path):
    folders = project(tmp_path, "seeds: [0, 1]\n")
    plan = make_plan(read_study(folders.studies / "tiny.yaml"), folders)
    a, b = (p.name for p in plan.runs)

    def code(first, second, interrupted=""):
        return BatchResult(
            plan, {a: dict(state=first), b: dict(state=second)}, interrupted
        ).exit_code

    assert (
        code(OK, OK),
        code(OK, FAILED),
        code(OK, KILLED),
        code(OK, KILLED, "stopped"),
    ) == (0, 1, 1, 3)
    assert BatchResult(plan, {a: dict(state=OK)}).exit_code == 3
    # a failure does not hide that runs are left
    assert BatchResult(plan, {a: dict(state=FAILED)}).exit_code == 3
    assert code(FAILED, KILLED, "stopped") == 3


@pytest.mark.slow
def test_a_batch_and_its_failures(tmp_path):
    folders = project(
        tmp_path, "arms: {good: {}, raises: {mode: raise}, dies: {mode: die}}\n"
    )
    batch = run_batch(
        read_study(folders.studies / "tiny.yaml"),
        folders,
        workers=2,
        how="quiet",
    )
    assert {p.cell.arm: s["state"] for p, s in batch.failed} == {
        "raises": FAILED,
        "dies": KILLED,
    } and batch.exit_code == 1
    tries = {
        o["run"].partition("-")[0]: o.get("attempts")
        for o in batch.outcomes.values()
    }
    assert tries == {
        "good": 1,
        "raises": 1,
        "dies": 3,
    }, "only infrastructure failures are tried again"
    rows = {r["arm"]: r for r in read_rows(folders.results / "tiny.csv")}
    assert set(rows) == {"good", "raises"} and rows["raises"][
        "error"
    ].startswith("FloatingPointError")
    again = run_batch(
        read_study(folders.studies / "tiny.yaml"), folders, how="quiet"
    )
    assert [n.partition("-")[0] for n in again.outcomes] == ["dies"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_kill_9_of_anything_at_any_time(tmp_path, seed):
    """Driver, supervisors and kernels are killed at random moments, again and
    again; then the batch is let finish.
    """
    folders, rng = project(tmp_path, STAGES.format(3)), random.Random(seed)
    env = traced(tmp_path)
    for i in range(5):
        batch = dmr(
            tmp_path, "batch", "tiny", "--workers", "2", "--quiet", **env
        )
        time.sleep(rng.uniform(1, 12))
        victims = [
            p
            for p in psutil.process_iter(["environ"])
            if (p.info["environ"] or {}).get("DMR_TEST_ROOT") == str(tmp_path)
        ]
        driver_too = i % 2 == 0
        for p in (
            victims
            if rng.random() < 0.5
            else rng.sample(victims, min(2, len(victims)))
        ):
            if driver_too or p.pid != batch.pid:
                try:
                    p.send_signal(signal.SIGKILL)
                except psutil.NoSuchProcess:
                    pass
        batch.kill()
        batch.communicate()
    last = dmr(tmp_path, "batch", "tiny", "--workers", "2", **env)
    out, _ = last.communicate(timeout=300)
    assert last.returncode == 0, out
    check_complete(folders, 4)
    wait_for(lambda: not processes(tmp_path), 60)


@pytest.mark.slow
def test_two_batches_on_one_folder(tmp_path):
    folders = project(tmp_path, STAGES.format(4))
    env = traced(tmp_path)
    both = [
        dmr(tmp_path, "batch", "tiny", "--workers", "2", **env)
        for _ in range(2)
    ]
    said = [b.communicate(timeout=300)[0] for b in both]
    assert [b.returncode for b in both] == [0, 0], said
    check_complete(folders, 5)
    assert Counter(
        (run, stage) for run, stage, _ in journal_of(tmp_path)
    ) == Counter({(f"-{s}", str(k)): 1 for s in range(5) for k in range(4)})


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_everything_resumable(tmp_path, number):
    folders = project(tmp_path, STAGES.format(2))
    env = traced(tmp_path)
    batch = dmr(tmp_path, "batch", "tiny", "--workers", "2", **env)
    wait_for(
        lambda: (
            (tmp_path / "journal.txt").exists()
            and len(journal_of(tmp_path)) >= 3
        )
    )
    batch.send_signal(number)
    out, _ = batch.communicate(timeout=120)
    assert batch.returncode == 3 and signal.Signals(number).name in out
    wait_for(lambda: not processes(tmp_path), 60)
    status = dmr(tmp_path, "status", "tiny", "--json")
    states = Counter(
        r["state"] for r in json.loads(status.communicate()[0])["tiny"]
    )
    assert set(states) <= {OK, KILLED, "waiting"} and states[KILLED] >= 1
    again = dmr(tmp_path, "batch", "tiny", **env)
    assert again.communicate(timeout=200) and again.returncode == 0
    check_complete(folders, 3)
    twice = [
        k
        for k, n in Counter(
            (run, stage) for run, stage, _ in journal_of(tmp_path)
        ).items()
        if n > 1
    ]
    assert len(twice) <= 2, (
        "at most the stage at work of each run is made again"
    )


@pytest.mark.slow
def test_status_after_the_driver_died(tmp_path):
    project(tmp_path, "defaults: {mode: hang}\nseeds: [0, 1]\n")
    batch = dmr(
        tmp_path, "batch", "tiny", "--workers", "1", DMR_TEST_ROOT=str(tmp_path)
    )
    wait_for(
        lambda: any(
            "mode hang" in log.read_text()
            for log in tmp_path.glob("runs/tiny/*/log.txt")
        )
    )
    at_work = dmr(tmp_path, "status", "tiny").communicate()[0]
    assert "1 running, 1 waiting" in at_work
    batch.kill()
    batch.communicate()
    wait_for(lambda: not processes(tmp_path), 60)
    assert (
        "1 killed, 1 waiting"
        in dmr(tmp_path, "status", "tiny").communicate()[0]
    )
    assert "mode hang" in dmr(tmp_path, "tail", "seed-0").communicate()[0]


@pytest.mark.slow
def test_code_that_changes_under_a_batch_stops_it(tmp_path):
    from tiny import BODY, EMIT, PARAMETERS

    folders = project(tmp_path, STAGES.format(3))
    env = traced(tmp_path)
    batch = dmr(tmp_path, "batch", "tiny", "--workers", "1", **env)
    wait_for(lambda: (tmp_path / "journal.txt").exists())
    write_template(
        tmp_path / "nbs/experiments/tiny.ipynb",
        PARAMETERS,
        BODY,
        EMIT.replace("lr * 10", "lr * 20"),
    )
    out, _ = batch.communicate(timeout=120)
    said = "the code is not the one that was planned: template: 1 code cell"
    assert batch.returncode == 3 and said in out
    assert not read_rows(folders.results / "tiny.csv")


@pytest.mark.slow
def test_a_study_in_pieces(tmp_path):
    folders = project(tmp_path, STAGES.format(3) + "estimate: 5 s\n")
    env = traced(tmp_path)
    codes = []
    for _ in range(8):
        piece = dmr(
            tmp_path,
            "batch",
            "tiny",
            "--workers",
            "1",
            "--budget-hours",
            str(25 / 3600),
            **env,
        )
        piece.communicate(timeout=120)
        codes.append(piece.returncode)
        if codes[-1] == 0:
            break
    assert codes[-1] == 0 and set(codes[:-1]) <= {3}, codes
    check_complete(folders, 4)


@pytest.mark.slow
def test_a_cluster_with_a_worker_killed(tmp_path):
    """Scheduler and workers in processes of their own; a worker dies with a run
    in it; every run is made once.
    """
    folders = project(tmp_path, STAGES.format(5))
    env = traced(tmp_path)
    with Cluster(tmp_path / "cluster", env) as cluster:
        batch = dmr(
            tmp_path, "batch", "tiny", "--scheduler", cluster.tcp, **env
        )
        wait_for(
            lambda: (
                (tmp_path / "journal.txt").exists()
                and len(journal_of(tmp_path)) >= 3
            ),
            120,
        )
        cluster.workers[0].kill()
        out, _ = batch.communicate(timeout=400)
        assert batch.returncode == 0, out
        check_complete(folders, 6)
    wait_for(lambda: not processes(tmp_path), 60)


def wait_there(folder, spec):
    "A run of the cluster's that takes its time."
    time.sleep(3)
    return dict(run="r", state=OK), {}


@pytest.fixture
def cluster(monkeypatch):
    "An executor on a cluster inside this process."
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr(batch, "_launch_there", wait_there)
    with distributed.LocalCluster(
        n_workers=1,
        threads_per_worker=2,
        processes=False,
        dashboard_address=None,
    ) as made:
        yield batch._DaskExecutor(made.scheduler_address)


def test_a_stopped_batch_waits_for_no_run_of_the_cluster(cluster, tmp_path):
    assert cluster.slots() == 2
    future = cluster.start_run(tmp_path)
    assert not future.done()
    begun = time.monotonic()
    cluster.stop()
    assert future.result(10)["state"] == KILLED
    assert time.monotonic() - begun < 2.5
    cluster.stop()  # twice, and on a client that is closed
    cluster.shutdown()
    cluster.stop()


def test_while_a_scheduler_is_called_again_nothing_is_handed_out(cluster):
    cluster.client.close()
    with pytest.raises(ConnectionError, match="does not answer any more"):
        cluster.slots()
    cluster.client = SimpleNamespace(status="connecting")
    assert cluster.slots() == 0


@pytest.mark.parametrize("late", [OSError, asyncio.TimeoutError])
def test_a_scheduler_that_does_not_answer_gets_no_run(
    cluster, late, monkeypatch
):
    client, asked = cluster.client, []

    def sync(ask, callback_timeout, **more):
        asked.append(callback_timeout)
        raise late

    monkeypatch.setattr(client, "sync", sync)
    assert cluster.slots() == 0 and asked == [10]
    monkeypatch.undo()
    assert cluster.slots() == 2
    cluster.shutdown()


def test_a_batch_whose_cluster_is_gone_ends_as_a_stopped_one(
    tmp_path, monkeypatch
):
    class Gone(batch._LocalExecutor):
        def slots(self):
            raise ConnectionError("the dask scheduler does not answer any more")

    monkeypatch.setattr(batch, "_LocalExecutor", Gone)
    folders = project(tmp_path, "seeds: 0..1\n")
    study = read_study(folders.studies / "tiny.yaml")
    done = run_batch(study, folders, workers=1, how="quiet")
    assert done.exit_code == 3
    assert "does not answer any more; start it again" in done.interrupted


#: A run that waits, for so many seconds at most, until another runs beside it.
TOGETHER = """\
import os, time
from pathlib import Path
journal = Path(os.environ["DMR_TEST_JOURNAL"])
def note(word):
    with open(journal, "a") as f:
        f.write(f"{word} {seed}\\n")
def at_work():
    said = journal.read_text()
    return said.count("begins") - said.count("ends")
note("begins")
until = time.monotonic() + float(os.environ["DMR_TEST_WAIT"])
while at_work() < 2 and time.monotonic() < until:
    time.sleep(0.05)
time.sleep(0.2)
note("ends")
done = []
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers, wait", [(1, "1"), (2, "30")])
def test_as_many_runs_at_a_time_as_there_are_workers(
    tmp_path, monkeypatch, workers, wait
):
    for name, value in (traced(tmp_path) | {"DMR_TEST_WAIT": wait}).items():
        monkeypatch.setenv(name, value)
    folders = project(
        tmp_path, "seeds: 0..3\n", cells=(PARAMETERS, TOGETHER, EMIT)
    )
    study = read_study(folders.studies / "tiny.yaml")
    done = run_batch(study, folders, workers=workers, how="quiet")
    words = [word for word, _ in journal_of(tmp_path)]
    at_work = accumulate(1 if word == "begins" else -1 for word in words)
    assert done.exit_code == 0 and len(words) == 8
    assert max(at_work) == workers, words


def test_a_scheduler_that_does_not_answer_leaves_nothing_behind(
    tmp_path, monkeypatch
):
    def silent(address):
        raise ConnectionError(f"no dask scheduler answers at {address}")

    monkeypatch.setattr(batch, "_DaskExecutor", silent)
    folders = project(tmp_path, "seeds: [0]\n")
    study = read_study(folders.studies / "tiny.yaml")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConnectionError, match="no dask scheduler answers"):
        run_batch(study, folders, scheduler="tcp://127.0.0.1:1", how="quiet")
    assert sorted(tmp_path.rglob("*")) == before


def test_what_a_summary_says_to_type_is_the_study_that_failed(tmp_path):
    folders = project(tmp_path, "seeds: [0]\n")
    other = tmp_path / "tiny.yaml"
    other.write_text(
        (folders.studies / "tiny.yaml")
        .read_text()
        .replace("../", "nbs/experiments/")
    )
    study = read_study(other, dict(lr=0.5))
    plan = make_plan(study, folders)
    done = BatchResult(plan, {p.name: dict(state=FAILED) for p in plan.runs})
    again = f"again: dmr batch {other} -p lr 0.5 --retry-failed"
    assert again in done.summary()


def test_a_copy_gets_all_that_it_lacks(tmp_path, capsys):
    folders = project(tmp_path, "seeds: [0, 1]\n")
    study = read_study(folders.studies / "tiny.yaml")
    finish(make_plan(study, folders))  # without a copy
    (tmp_path / "file").write_text("in the way")
    for _ in range(2):  # a place that cannot be reached
        done = run_batch(study, folders, mirror=str(tmp_path / "file/copy"))
        assert "could not be copied" in done.summary() and done.exit_code == 1
    copy = tmp_path / "copy"
    done = run_batch(study, folders, mirror=str(copy))
    assert done.exit_code == 0 and "copied: 2" in capsys.readouterr().out
    kept = sorted(p for p in copy.rglob("*") if p.is_file())
    names = ["done.json", "output.ipynb", "result.json", "run.json"]
    assert [p.name for p in kept] == names * 2
    times = [p.stat().st_mtime_ns for p in kept]
    run_batch(study, folders, mirror=str(copy), how="quiet")
    assert [p.stat().st_mtime_ns for p in kept] == times  # no need to
    kept[1].unlink()
    run_batch(study, folders, mirror=str(copy), how="quiet")
    assert kept[1].exists()


@pytest.mark.parametrize("lost", ["output.ipynb", "result.json"])
def test_a_damaged_copy_does_not_stop_the_others(tmp_path, lost):
    folders = project(tmp_path, "seeds: [0, 1]\n")
    study = read_study(folders.studies / "tiny.yaml")
    plan = make_plan(study, folders)
    finish(plan)
    made = make_plan(study, folders)
    assert push_missing(made, str(tmp_path / "copy")) == 2
    damaged = tmp_path / "copy/tiny" / plan.runs[0].name / lost
    empty = replace(
        folders, runs=tmp_path / "runs2", results=tmp_path / "results2"
    )
    for damage in (lambda: damaged.write_text("{}[]"), damaged.unlink):
        damage()
        shutil.rmtree(empty.runs, ignore_errors=True)
        with pytest.warns(UserWarning, match="is passed over"):
            assert pull(make_plan(study, empty), str(tmp_path / "copy")) == 1
    assert make_plan(study, empty).counts() == {OK: 1, "waiting": 1}
