"""One run: it ends in a state that can be trusted, whatever is done to its
processes.
"""

import asyncio
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest
from tiny import BODY, EMIT, PARAMETERS, wait_for

from dmr.files import is_locked, read_json, write_atomic
from dmr.studies.run import (
    FAILED,
    KILLED,
    OK,
    OUT_OF_MEMORY,
    TIMEOUT,
    Limits,
    Run,
    clear_leftovers,
    kernel_manager,
    launch,
    prepare_run,
    start,
)
from dmr.studies.template import write_template


@pytest.fixture
def make(tmp_path, monkeypatch):
    "Prepares a run of the tiny template."
    monkeypatch.setenv("DMR_TEST_JOURNAL", str(tmp_path / "journal.txt"))
    template = write_template(tmp_path / "tiny.ipynb", PARAMETERS, BODY, EMIT)

    def made(
        name: str = "run", limits: Limits | None = None, **parameters
    ) -> Run:
        return prepare_run(
            tmp_path / "runs" / name,
            template,
            parameters,
            dict(id="a.b"),
            limits,
            checkpoint=True,
        )

    return made


def alive(run: Run) -> bool:
    "Whether the run's kernel lives."
    kernel = (read_json(run.folder / "state.json") or {}).get("kernel") or {}
    return (
        bool(kernel)
        and psutil.pid_exists(kernel["pid"])
        and psutil.Process(kernel["pid"]).status() != psutil.STATUS_ZOMBIE
    )


def kernel_of(run: Run) -> int:
    return wait_for(
        lambda: (
            (read_json(run.folder / "state.json") or {}).get("kernel") or {}
        ).get("pid")
    )


def test_a_finished_run(make):
    run = make(lr=0.2)
    began = time.monotonic()
    outcome = launch(run.folder)
    assert outcome["state"] == OK, outcome
    assert run.result["metrics"] == {"loss": 2.0, "stages": 0}
    assert (
        outcome["wall_s"] <= time.monotonic() - began
        and outcome["peak_memory"] > 1e7
    )
    assert launch(run.folder)["attempts"] == 1, "a finished run was made again"
    notebook = json.loads((run.folder / "output.ipynb").read_text())
    assert all(
        c["execution_count"]
        for c in notebook["cells"]
        if c["cell_type"] == "code"
    )
    assert (
        not (run.folder / "checkpoint").exists()
        and not (run.folder / "running.ipynb").exists()
    )


def test_the_marker_alone_is_not_trusted(make):
    run = make()
    (run.folder / "output.ipynb").write_text("{}")
    (run.folder / "result.json").write_text("{}")
    assert run.done is None and run.state()["state"] == "waiting"
    (run.folder / "done.json").write_text('{"sha256": "something else"}')
    assert run.done is None
    (run.folder / "done.json").write_text('{"sha2')
    assert run.done is None


@pytest.mark.parametrize("lost", ["done.json", "result.json"])
def test_a_finished_run_that_lost_its_result_is_made_again(make, lost):
    run = make(lr=0.2)
    assert launch(run.folder)["state"] == OK
    (run.folder / lost).unlink()
    assert run.state()["state"] == KILLED and run.result is None
    assert (
        launch(run.folder)["state"] == OK
        and run.result["metrics"]["loss"] == 2.0
    )


@pytest.mark.parametrize(
    "left",
    [
        dict(state="running", pid=2**22 + 1, host="elsewhere", attempts=2),
        dict(state="killed", attempts=1),
    ],
)
def test_a_dead_run_says_killed(make, left):
    run = make()
    write_atomic(run.folder / "state.json", json.dumps(left))
    assert run.state()["state"] == KILLED
    assert clear_leftovers(run) == left["attempts"]


def test_a_kernel_is_ended_without_an_interrupt():
    """Jupyter interrupts a kernel before it asks it to end, and one that has
    just run its last cell complains of that where everybody reads it.
    """
    sent, pids = [], []
    scratch = Path(tempfile.mkdtemp(dir="/tmp"))  # a short path
    kind = kernel_manager(scratch, pids.append, stopping=lambda: None)

    class Noted(kind):
        async def _async_signal_kernel(self, number):
            sent.append(number)
            await super()._async_signal_kernel(number)

    async def live():
        manager = Noted()
        await manager.start_kernel()
        await manager.interrupt_kernel()
        assert sent == [signal.SIGINT]  # who asks for one gets it
        await manager.shutdown_kernel()

    asyncio.run(live())
    shutil.rmtree(scratch)
    assert sent.count(signal.SIGINT) == 1
    assert not psutil.pid_exists(pids[0])


def test_clearing_leaves_strangers_alone(make):
    "A process id that the system gave to somebody else is no leftover of ours."
    run = make()
    stranger = subprocess.Popen(["sleep", "60"])
    try:
        import platform

        state = dict(
            state="running",
            host=platform.node(),
            kernel=dict(
                pid=stranger.pid,
                began=psutil.Process(stranger.pid).create_time() - 50,
            ),
        )
        write_atomic(run.folder / "state.json", json.dumps(state))
        clear_leftovers(run)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode, limits, state, error",
    [
        ("raise", None, FAILED, "FloatingPointError: diverged at lr=0.001"),
        ("die", None, KILLED, "the kernel died"),
        (
            "hang",
            Limits(wall_s=20),
            TIMEOUT,
            "took longer than its limit of 20 s",
        ),
        (
            "greedy",
            Limits(memory_bytes=900_000_000),
            OUT_OF_MEMORY,
            "more than its limit of 900 MB",
        ),
    ],
)
def test_each_way_to_fail(make, mode, limits, state, error):
    run = make(limits=limits, mode=mode)
    outcome = launch(run.folder)
    assert outcome["state"] == state and error in outcome["error"]
    assert not run.done and not alive(run)
    assert (run.folder / "failed.ipynb").exists() and not (
        run.folder / "output.ipynb"
    ).exists()
    if mode == "raise":
        assert any(
            "raise FloatingPointError" in line for line in outcome["traceback"]
        )


@pytest.mark.slow
def test_a_cell_that_runs_out_of_memory_says_so(make):
    run = make()
    too_much = "bytearray(10**18)"
    write_template(run.spec["template"], PARAMETERS, too_much, EMIT)
    assert launch(run.folder)["state"] == OUT_OF_MEMORY


@pytest.mark.slow
@pytest.mark.parametrize("at", ["start", "kernel", "stage"])
@pytest.mark.parametrize("victim", ["supervisor", "kernel"])
def test_kill_9_at_every_stage(make, tmp_path, victim, at):
    """After kill -9 of either process nothing counts as done, no process stays,
    and the next attempt goes on from the checkpoint.
    """
    run = make(mode="stages")
    journal = tmp_path / "journal.txt"
    process = start(run.folder)
    if at == "start" and victim == "supervisor":
        wait_for(lambda: (run.folder / "state.json").exists())
    else:
        kernel = kernel_of(run)
        if at == "stage":
            wait_for(lambda: (run.folder / "checkpoint/done.txt").exists())
    os.kill(process.pid if victim == "supervisor" else kernel, signal.SIGKILL)
    process.wait(60)
    assert run.done is None and run.state()["state"] == KILLED
    outcome = launch(run.folder)
    assert outcome["state"] == OK and outcome["attempts"] == 2
    assert run.result["metrics"]["stages"] == 4
    assert not alive(run)
    stages = [line.split()[1] for line in journal.read_text().splitlines()]
    if at == "stage":
        assert stages.count("0") == 1, (
            "a stage before the checkpoint was made twice"
        )
    assert sorted(set(stages)) == ["0", "1", "2", "3"]


@pytest.mark.slow
def test_sigterm_leaves_it_resumable(make):
    run = make(mode="stages")
    process = start(run.folder)
    wait_for(lambda: (run.folder / "checkpoint/done.txt").exists())
    process.terminate()
    assert process.wait(60) == 1
    state = run.state()
    assert state["state"] == KILLED and "SIGTERM" in state["error"]
    assert (run.folder / "checkpoint/done.txt").exists() and not alive(run)
    assert launch(run.folder)["state"] == OK


@pytest.mark.slow
def test_a_run_ends_with_its_parent(make):
    run = make(mode="hang")
    code = "import sys; from dmr.studies.run import launch; launch(sys.argv[1])"
    parent = subprocess.Popen([sys.executable, "-c", code, str(run.folder)])
    kernel = kernel_of(run)
    parent.kill()
    parent.wait()
    wait_for(
        lambda: (
            not psutil.pid_exists(kernel) and not is_locked(run.folder / "lock")
        ),
        60,
    )
    assert "batch that started this run died" in run.state()["error"]


@pytest.mark.slow
def test_two_at_once_make_it_once(make, tmp_path):
    run, outcomes = make(mode="stages"), []
    threads = [
        threading.Thread(
            target=lambda: outcomes.append(launch(run.folder)["state"])
        )
        for _ in range(3)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert OK in outcomes and set(outcomes) <= {OK, "busy"}
    assert len((tmp_path / "journal.txt").read_text().splitlines()) == 4


@pytest.mark.slow
def test_full_disk(make):
    """No room for the notebook: nothing counts as done; with room again, the
    next attempt succeeds.
    """
    run = make(mode="stages")

    def small() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY)
        )

    code = (
        "import sys; from dmr.studies.run import launch;"
        " print(launch(sys.argv[1])['state'])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(run.folder)],
        preexec_fn=small,
        capture_output=True,
        text=True,
    )
    assert out.stdout.split() == [KILLED], out
    assert run.done is None and not alive(run)
    assert launch(run.folder)["state"] == OK


@pytest.mark.slow
def test_ten_at_once_all_succeed_and_leave_nothing(make):
    "Kernels beside each other do not collide, and their sockets go away."
    import tempfile

    before = set(Path(tempfile.gettempdir()).glob("dmr-*"))
    runs = [make(f"r{i}", seed=i) for i in range(10)]
    outcomes = {}
    threads = [
        threading.Thread(
            target=lambda r=r: outcomes.update(
                {r.folder.name: launch(r.folder)["state"]}
            )
        )
        for r in runs
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert list(outcomes.values()) == [OK] * 10
    assert [r.result["metrics"]["loss"] for r in runs] == [
        0.01 + i for i in range(10)
    ]
    mine = {read_json(r.folder / "state.json")["scratch"] for r in runs}
    assert not [p for p in mine if Path(p).exists()], before


@pytest.mark.slow
def test_overhead_is_small(make):
    "Beyond the notebook itself a run costs less than 5 s of processor time."

    def spent() -> float:
        u = resource.getrusage(resource.RUSAGE_CHILDREN)
        return u.ru_utime + u.ru_stime

    before = spent()
    assert launch(make().folder)["state"] == OK
    assert spent() - before < 5
