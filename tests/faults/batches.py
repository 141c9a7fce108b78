"""Faults of a study: files damaged at rest, processes ended while a batch is
at work, texts changed, and a cluster taken apart.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster import Cluster
from damage import TIMES, Verdict, damage, kill_at, timeless
from tiny import SENTENCES, dmr, filled, processes, project

FILES = (
    "result.json",
    "output.ipynb",
    "done.json",
    "state.json",
    "run.json",
    "plan.json",
    "streams.json",
)
#: The template of the study: training for real, with checkpoints.
CELLS = (
    """\
stream = ""                         # a folder with a text per domain
cap = 3000                          # bytes a domain, [10, inf)
steps = 20                          # [1, inf)
lr = 5e-3                           # (0, inf)
seed = 0                            # [0, inf)
checkpoint: "Optional[str]" = None  # folder, set by the engine
""",
    """\
import torch
from dmr.text.load import load_stream
from dmr.training.config import Config
from dmr.training.loop import train_stream
torch.set_num_threads(1)
text = load_stream(stream, cap=cap)
config = Config(
    stream=stream, cap=cap, steps=steps, lr=lr, seed=seed, context=16, batch=4,
    eval_windows=8, checkpoint=checkpoint,
)
result = train_stream(config, text, progress=False)
""",
    """\
from IPython.display import display
display({"application/vnd.dmr.result+json": result}, raw=True)
""",
)
#: A word of the command line of each part of a batch.
PARTS = {
    "driver": "from dmr.cli import main",
    "supervisor": "supervise",
    "kernel": "ipykernel",
}
#: Seconds after which a batch that has not ended counts as stuck.
PATIENCE = 240


# -- the study, undisturbed ----------------------------------------------------


class Ground:
    "The undisturbed study: its folders, and the results that must come out."

    def __init__(self, root: Path, seeds: int = 2):
        self.root = root
        texts = root / "texts"
        texts.mkdir(parents=True)
        for i, (name, sentence) in enumerate(SENTENCES.items()):
            noise = random.Random(i)
            words = sentence.decode().split()
            text = (" ".join(noise.choices(words, k=9)) for _ in range(200))
            (texts / f"{name}.txt").write_text("\n".join(text))
        study = f"seeds: 0..{seeds - 1}\n"
        study += f"defaults: {{stream: {texts}}}\n"
        self.texts, self.folders = texts, project(root, study, cells=CELLS)
        self.n = seeds
        self.env = dict(
            DMR_TEST_ROOT=str(root),
            DMR_CACHE=str(root / "cache"),
        )
        os.environ["DMR_CACHE"] = self.env["DMR_CACHE"]

    def batch(self, at: Path, *more: str, **env: str) -> subprocess.Popen:
        "`dmr batch`, with its runs and its table in a folder."
        where = ("--runs", str(at / "runs"), "--results", str(at / "results"))
        given = ("batch", "tiny", *where, "--quiet", *more)
        return dmr(self.root, *given, **{**self.env, **env})

    def make(self) -> None:
        "Make the study once, and keep what came out."
        self.made = self.root / "made"
        begun = time.monotonic()
        out, _ = (made := self.batch(self.made)).communicate()
        assert made.returncode == 0, out
        self.seconds = time.monotonic() - begun
        self.expected = self.results(self.made)
        self.rows = self.table(self.made)
        assert len(self.expected) == len(self.rows) == self.n
        self.status = self.said(self.made)

    def project(self, at: Path, table: bool = False):
        "The project with its runs in a folder; with its table only if asked."
        results = at / "results" if table else at / "none"
        return replace(self.folders, runs=at / "runs", results=results)

    def plan(self, at: Path):
        "What is there of the study, by the folders of its runs alone."
        from dmr.studies.plan import make_plan
        from dmr.studies.study import read_study

        study = read_study(self.folders.studies / "tiny.yaml")
        return make_plan(study, self.project(at))

    def results(self, at: Path) -> dict[str, Any]:
        "Cell -> result, of the runs that count as done."
        done = (p for p in self.plan(at).runs if p.state["state"] == "ok")
        return {p.cell.hash: timeless(p.run.result) for p in done}

    def table(self, at: Path) -> list[dict[str, Any]]:
        "The rows of the table, without times and surroundings."
        from dmr.studies.table import read_rows

        apart = (*TIMES, "finished", "peak_memory", "attempts", "checksum")
        rows = []
        for row in read_rows(at / "results/tiny.csv"):
            row["stage_values"] = timeless(json.loads(row["stage_values"]))
            kept = (k for k in row if not k.startswith("environment_"))
            rows.append({k: row[k] for k in kept if k not in apart})
        return sorted(rows, key=lambda row: row["cell"])

    def said(self, at: Path) -> list[tuple[str, str]]:
        "What `dmr status` says."
        from dmr.studies.plan import status

        found = status("tiny", self.project(at))
        return [(r["run"], r["label"]) for r in found]


# -- files at rest -------------------------------------------------------------


def judge_rest(ground: Ground, at: Path, file: str) -> Verdict:
    "What becomes of a study one of whose files was damaged at rest."
    from dmr.studies.plan import prepare_planned

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        told = []
        try:
            if ground.said(at) != ground.status:
                return "wrong", "status tells of other runs"
        except FileNotFoundError as e:
            told.append(str(e))
        plan = ground.plan(at)
        verdict = "healed"
        for p in plan.runs:  # as a batch goes through them
            run = prepare_planned(p, plan)
            state = run.state()
            if state["state"] == "ok":
                if timeless(run.result) != ground.expected[p.cell.hash]:
                    return "wrong", f"{run.folder.name} differs"
                continue
            told.append(str(state.get("error")))
            verdict = "noticed"
    told += [str(w.message) for w in caught]
    named = any(file in line for line in told)
    kept = named or verdict == "healed"
    return (verdict if kept else "lost"), "; ".join(told)


def at_rest(ground: Ground, fault: str, rng: random.Random) -> Verdict:
    "Damage one file of a finished study."
    how, file = fault.split()
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder) / "runs"
        shutil.copytree(ground.made / "runs", runs)
        if file == "streams.json":
            at = runs / file
        elif file == "plan.json":
            at = runs / "tiny" / file
        else:
            at = rng.choice(sorted(runs.glob(f"tiny/*/{file}")))
        damage(at, how, rng)
        return judge_rest(ground, Path(folder), file)


# -- tables at rest ------------------------------------------------------------

TABLES = ("tiny.csv", "tiny.code.json")


def judge_table(ground: Ground, at: Path, file: str) -> Verdict:
    "What becomes of a study whose table, or record of code, was damaged."
    from dmr.studies.batch import _book_earlier
    from dmr.studies.plan import make_plan
    from dmr.studies.study import read_study
    from dmr.studies.table import check_rows, read_rows

    table, whole = at / "results/tiny.csv", ground.made / "results/tiny.csv"
    known, name = read_rows(whole), lambda row: row["run_id"]
    project = ground.project(at, table=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        study = read_study(ground.folders.studies / "tiny.yaml")
        plan = make_plan(study, project)
        left = check_rows(table).rows
        if any(row not in filled(known) for row in filled(left)):
            return "wrong", "a row that nobody wrote"
        done = plan.counts().get("ok", 0)
        if (project.runs / "tiny").exists():
            if done < ground.n:
                return "lost", f"{done} runs count"
            _book_earlier(plan)  # as a batch does
            if sorted(read_rows(table), key=name) != sorted(known, key=name):
                return "lost", "the table is not as it was"
    told = "; ".join(str(w.message) for w in caught)
    if done == ground.n:
        return ("noticed" if file in told else "healed"), told
    return ("noticed" if file in told else "lost"), told


def at_table(ground: Ground, fault: str, rng: random.Random) -> Verdict:
    "Damage the table of a finished study, with its run folders or without."
    how, file, *alone = fault.split()
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        shutil.copytree(ground.made / "results", at / "results")
        if not alone:
            shutil.copytree(ground.made / "runs", at / "runs")
        damage(at / "results" / file, how, rng)
        return judge_table(ground, at, file)


# -- a batch at work -----------------------------------------------------------


def end_of(driver: subprocess.Popen) -> str:
    "Wait for a batch; what it said. TimeoutError, ended, where it is stuck."
    try:
        return driver.communicate(timeout=PATIENCE)[0]
    except subprocess.TimeoutExpired:
        driver.kill()
        out = driver.communicate()[0]
        raise TimeoutError(f"a batch hangs: {out[-300:]}") from None


def again(ground: Ground, at: Path, before: str) -> Verdict:
    "Start a disturbed batch again, and compare with the undisturbed one."
    last = ground.batch(at)
    out = end_of(last)
    verdict = "healed"
    if last.returncode == 1 and "--retry-failed" in out:
        verdict = "noticed"
        last = ground.batch(at, "--retry-failed")
        out = end_of(last)
    if last.returncode != 0:
        return "lost", f"exit code {last.returncode}: {out[-300:]}"
    end = time.monotonic() + 60
    while processes(ground.root) and time.monotonic() < end:
        time.sleep(0.2)
    if left := processes(ground.root):
        return "wrong", f"still at work: {left}"
    return judge_live(ground, at, verdict, before)


def judge_live(ground: Ground, at: Path, verdict: str, before: str) -> Verdict:
    "Compare runs and table of a batch that is done with the undisturbed one."
    if '/dmr/cli.py", line' in before and "KeyboardInterrupt" not in before:
        return "crashed", before[-300:]
    rows, found = ground.table(at), ground.results(at)
    count = Counter(row["cell"] for row in rows)
    if twice := [cell for cell, n in count.items() if n > 1]:
        return "doubled", f"two rows of {twice}"
    if len(rows) < ground.n or len(found) < ground.n:
        return "lost", f"{len(rows)} rows and {len(found)} results"
    if found != ground.expected:
        return "wrong", "another result"
    for row, known in zip(rows, ground.rows):
        if other := [k for k in {**row, **known} if row.get(k) != known.get(k)]:
            return "wrong", f"another row: {other}"
    return verdict, before[-300:]


@contextmanager
def a_folder():
    "A folder of a batch; what is at work in it may still write at its end."
    folder = tempfile.mkdtemp(prefix="dmr-fault-")
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def parts_of(ground: Ground, victim: str) -> list[Any]:
    "The processes of a batch that are meant by a word."
    import psutil

    found = []
    for p in psutil.process_iter(["environ", "cmdline"]):
        mine = (p.info["environ"] or {}).get("DMR_TEST_ROOT")
        line = " ".join(p.info["cmdline"] or ())
        if mine == str(ground.root):
            if victim == "all" or PARTS[victim] in line:
                found.append(p)
    return found


def begun(driver: subprocess.Popen, at: Path) -> None:
    "Wait until a batch has begun its first run."
    while driver.poll() is None and not list(at.glob("runs/*/*/lock")):
        time.sleep(0.05)


def in_batch(ground: Ground, fault: str, rng: random.Random) -> Verdict:
    "Send a signal to a part of a batch at some moment."
    import psutil

    name, victim = fault.split()
    with a_folder() as at:
        driver = ground.batch(at)
        if victim == "driver":
            time.sleep(rng.uniform(0, 0.3))
        begun(driver, at)
        time.sleep(rng.uniform(0, 0.7) * ground.seconds)
        for p in parts_of(ground, victim):
            if psutil.pid_exists(p.pid):
                p.send_signal(signal.Signals[f"SIG{name}"])
        return again(ground, at, end_of(driver))


def at_write(ground: Ground, victim: str, rng: random.Random) -> Verdict:
    "Let a part of a batch die just before one of its writes."
    with a_folder() as at, a_folder() as beside:
        if not hasattr(ground, "writes"):
            ground.writes = {}
        if victim not in ground.writes:  # how many there are, undisturbed
            tally = beside / "tally"
            env = kill_at(PARTS[victim], 0, at, tally)
            end_of(ground.batch(at, "--workers", "1", **env))
            runs = 1 if victim == "driver" else ground.n
            ground.writes[victim] = tally.stat().st_size // runs
            shutil.rmtree(at)
            at.mkdir()
        n, once = rng.randint(1, ground.writes[victim]), beside / "once"
        env = kill_at(PARTS[victim], n, at, once)
        said = end_of(ground.batch(at, **env))
        if not once.exists():
            raise RuntimeError(f"{victim} made fewer than {n} writes: {said}")
        return again(ground, at, said)


def in_text(ground: Ground, fault: str, rng: random.Random) -> Verdict:
    "Change a text during a batch, put it back, and compare."
    with a_folder() as at:
        path = rng.choice(sorted(ground.texts.iterdir()))
        old = path.read_bytes()
        driver = ground.batch(at, "--workers", "1")
        try:
            begun(driver, at)
            damage(path, fault, rng)
            out = end_of(driver)
        finally:
            path.write_bytes(old)
        if driver.returncode == 0 and ground.results(at) != ground.expected:
            return "wrong", "a changed text passed"
        return again(ground, at, out)


# -- a cluster -----------------------------------------------------------------

CLUSTER = (
    "scheduler killed",
    "worker killed",
    "worker stopped a while",
    "link of the driver cut a while",
    "link of the driver cut",
    "link of a worker cut a while",
    "link of a worker cut",
    "link of the driver hangs a while",
    "link of a worker hangs a while",
    "driver killed",
    "driver ended by INT",
)


def disturb(cluster: Cluster, driver: Any, fault: str, seconds: float) -> None:
    "Throw a fault at a cluster; what is only for a while ends again."
    link = cluster.driver_link
    if "of a worker" in fault:
        link = cluster.worker_links[0]
    victim = cluster.workers[0]
    if fault == "scheduler killed":
        cluster.scheduler.kill()
    elif fault == "worker killed":
        victim.kill()
    elif fault == "worker stopped a while":
        victim.send_signal(signal.SIGSTOP)
    elif fault == "driver killed":
        driver.kill()
    elif fault == "driver ended by INT":
        driver.send_signal(signal.SIGINT)
    elif "cut" in fault:
        link.cut()
    else:
        link.flows.clear()
    if fault.endswith("a while"):
        time.sleep(seconds)
        victim.send_signal(signal.SIGCONT)
        link.mend()


def in_cluster(ground: Ground, fault: str, rng: random.Random) -> Verdict:
    "Disturb a cluster at some moment, and start the batch again without it."
    with a_folder() as at:
        with Cluster(at / "cluster", ground.env) as cluster:
            address = cluster.driver_link.address
            driver = ground.batch(at, "--scheduler", address)
            begun(driver, at)
            time.sleep(rng.uniform(0, 0.5) * ground.seconds)
            disturb(cluster, driver, fault, rng.uniform(1, 6))
            out = end_of(driver)
        return again(ground, at, out)
