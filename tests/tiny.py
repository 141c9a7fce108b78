"""Tiny projects for the engine's tests: a template of a few lines and a study
made of it.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

from dmr.studies.template import read_template, write_template
from dmr.training.limits import read_range

PARAMETERS = """\
lr = 1e-3                          # learning rate, (0, inf)
# what the run does
mode = "plain"                     # {plain, raise, die, hang, greedy, stages}
seed = 0                           # [0, inf)
arm = ""                           # a label
checkpoint: "Optional[str]" = None  # folder, set by the engine
"""
BODY = """\
import os, signal, time
from pathlib import Path
print("mode", mode, flush=True)
if mode == "raise":
    raise FloatingPointError(f"diverged at lr={lr}")
if mode == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if mode == "hang":
    time.sleep(600)
if mode == "greedy":
    heap = []
    for _ in range(30):  # no more: on a busy machine the watch may come late
        heap.append(bytearray(60_000_000)); time.sleep(0.05)
    time.sleep(600)
done = []
# four stages of half a second; each leaves a checkpoint and a line in a journal
if mode == "stages":
    kept = Path(checkpoint) / "done.txt"
    done = kept.read_text().split() if kept.exists() else []
    for stage in range(len(done), 4):
        with open(os.environ["DMR_TEST_JOURNAL"], "a") as f:
            f.write(f"{arm}-{seed} {stage} {os.getpid()}\\n")
        time.sleep(0.5)
        done.append(str(stage))
        part = kept.with_suffix(".tmp"); part.write_text(" ".join(done))
        os.replace(part, kept)
"""
EMIT = """\
from IPython.display import display
metrics = dict(loss=lr * 10 + seed, stages=len(done))
result = dict(schema=1, metrics=metrics)
display({"application/vnd.dmr.result+json": result}, raw=True)
"""


def project(
    root: Path,
    study: str,
    name: str = "tiny",
    cells: tuple[str, ...] = (PARAMETERS, BODY, EMIT),
):
    "A project folder with one template and one study; returns its folders."
    from dmr.studies.study import find_project

    (root / "nbs/experiments/studies").mkdir(parents=True, exist_ok=True)
    write_template(root / "nbs/experiments/tiny.ipynb", *cells)
    (root / f"nbs/experiments/studies/{name}.yaml").write_text(
        "template: ../tiny.ipynb\n" + study
    )
    return find_project(root)


def finish(plan, *planned, result=None):
    """Leave runs of a plan, all of them where none is named, as if they had
    been made; returns the last.
    """
    from dmr.studies.plan import prepare_planned

    result = {"metrics": {"loss": 1.0}} if result is None else result
    text = json.dumps(result)
    hashes = [hashlib.sha256(t.encode()).hexdigest() for t in (text, "{}")]
    for p in planned or plan.runs:
        run = prepare_planned(p, plan)
        marker = dict(id=p.identity.id, sha256=hashes[0], wall_s=1.0)
        marker["files"] = {"output.ipynb": hashes[1]}
        state = dict(state="ok", attempts=1)
        (run.folder / "result.json").write_text(text)
        (run.folder / "output.ipynb").write_text("{}")
        (run.folder / "done.json").write_text(json.dumps(marker))
        (run.folder / "state.json").write_text(json.dumps(state))
    return run


def filled(rows):
    "Rows without their empty cells."
    return [{k: v for k, v in row.items() if v} for row in rows]


def dmr(root: Path, *argv: str, **env: str) -> subprocess.Popen:
    "The command line in a process of its own, as a user starts it."
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from dmr.cli import main; sys.exit(main())",
            *argv,
        ],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **env},
        start_new_session=True,
    )


def wait_for(what, seconds: float = 60.0):
    "Wait until `what()` is true; returns its value, or fails."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := what():
            return value
        time.sleep(0.05)
    raise AssertionError(f"waited {seconds} s in vain")


def processes(root: Path) -> list[str]:
    """Command lines of live processes that belong to a project, or to the
    folder of a run: supervisors, kernels, and what these started.
    """
    import psutil

    found = []
    for p in psutil.process_iter(["cmdline", "status", "environ"]):
        line = " ".join(p.info["cmdline"] or ())
        env = p.info["environ"] or {}
        marks = env.get("DMR_TEST_ROOT"), env.get("DMR_RUN")
        if p.info["status"] != psutil.STATUS_ZOMBIE and (
            str(root) in line or str(root) in marks
        ):
            found.append(line)
    return found


SENTENCES = {
    "prose": b"it was the best of times, it was the worst of times. ",
    "code": b"def f(x):\n    return [y**2 for y in x if y > 0]\n",
    "table": b"1.00;2.50;3.75;0.25;9.99\n7.10;0.02;4.40;8.80;1.23\n",
}


def repeated_sentences(noise: float = 0.0):  # share of random bytes
    "A stream of three domains, each of one sentence over and over."
    import torch

    from dmr.text.load import Domain, Stream
    from dmr.training.config import generator_for

    domains = []
    for name, sentence in SENTENCES.items():
        text = torch.tensor(list(sentence * 120), dtype=torch.uint8)
        where = torch.rand(text.shape, generator=generator_for(1, name)) < noise
        other = torch.randint(
            0,
            256,
            text.shape,
            dtype=torch.uint8,
            generator=generator_for(0, name),
        )
        text = torch.where(where, other, text)
        domains.append(Domain(name, text[:-900].clone(), text[-900:].clone()))
    return Stream("sentences", domains)


def fits_its_template(kind, limits, path):
    "Fail where a template declares a parameter as its configuration does not."
    declared, usual = read_template(path).parameters, kind()
    assert list(declared) == [f.name for f in fields(kind)]
    for f in fields(kind):
        p = declared[f.name]
        assert p.default == getattr(usual, f.name), f.name
        assert set(p.types) == set(str(f.type).split(" | ")), f.name
        allowed = read_range(limits.get(f.name, ""))
        assert (p.interval, p.choices) == allowed, f.name
