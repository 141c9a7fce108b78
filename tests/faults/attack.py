"""Faults with a seed, thrown at a tiny real study: files damaged at rest,
checkpoints damaged between two attempts, processes killed, texts changed.

Each fault starts from the same undisturbed run and ends in a verdict:

    healed    every result stands, bit for bit as undisturbed, timings apart
    noticed   what does not stand is named, and is made again
    lost      a result is gone without a word
    wrong     a result counts that differs from the undisturbed one
    crashed   an error that does not say which file it is about

`make faults` throws all of them and prints the table; the slow tests a few.
"""

import argparse
import csv
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny import SENTENCES, dmr, processes, project, repeated_sentences

VERDICTS = ("healed", "noticed", "lost", "wrong", "crashed")
HOW = ("flip", "cut", "empty", "lost", "shape")
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
import os, torch
from dmr.text.load import load_stream
from dmr.training.config import Config
from dmr.training.loop import train_stream
torch.set_num_threads(1)
text = load_stream(stream, cap=cap)
config = Config(
    stream=stream, cap=cap, steps=steps, lr=lr, seed=seed, context=16, batch=4,
    eval_windows=8, checkpoint=checkpoint,
)
with open(os.environ["DMR_TEST_JOURNAL"], "a") as f:
    f.write(f"{seed}\\n")
result = train_stream(config, text, progress=False)
""",
    """\
from IPython.display import display
display({"application/vnd.dmr.result+json": result}, raw=True)
""",
)
#: Entries of a result that differ from one time to the next.
TIMES = ("wall_s", "train_s", "eval_s", "tokens_per_s", "seconds")


def timeless(value: Any) -> Any:
    "A result without its timings, its surroundings and its folder."
    if isinstance(value, dict):
        apart = (*TIMES, "environment", "checkpoint")
        return {k: timeless(v) for k, v in value.items() if k not in apart}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def damage(path: Path, how: str, rng: random.Random) -> None:
    "Damage one file."
    data = bytearray(path.read_bytes())
    if how == "lost":
        return path.unlink()
    if how == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    if how == "cut":
        data = data[: rng.randrange(len(data))]
    if how == "empty":
        data = bytearray()
    if how == "shape":
        others = ("[]", "null", "3", '"text"', "{}", '{"state": []}')
        data = bytearray(rng.choice(others).encode())
    path.write_bytes(data)


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
        study = f"seeds: 0..{seeds - 1}\nrecord: false\n"
        study += f"defaults: {{stream: {texts}}}\n"
        self.texts, self.folders = texts, project(root, study, cells=CELLS)
        self.env = dict(
            DMR_TEST_JOURNAL=str(root / "journal.txt"),
            DMR_TEST_ROOT=str(root),
            DMR_CACHE=str(root / "cache"),
        )
        os.environ["DMR_CACHE"] = self.env["DMR_CACHE"]

    def batch(self, runs: Path, *more: str):
        "`dmr batch` on a folder of runs."
        given = ("batch", "tiny", "--runs", str(runs), "--quiet", *more)
        return dmr(self.root, *given, **self.env)

    def make(self) -> None:
        "Make the study once, and keep what came out."
        out, _ = (made := self.batch(self.folders.runs)).communicate()
        assert made.returncode == 0, out
        self.expected = self.results(self.folders.runs)
        self.status = self.said(self.folders.runs)

    def plan(self, runs: Path):
        from dmr.studies.plan import make_plan
        from dmr.studies.study import read_study

        study = read_study(self.folders.studies / "tiny.yaml")
        return make_plan(study, replace(self.folders, runs=runs))

    def results(self, runs: Path) -> dict[str, Any]:
        "Cell -> result, of the runs that count as done."
        done = (p for p in self.plan(runs).runs if p.state["state"] == "ok")
        return {p.cell.hash: timeless(p.run.result) for p in done}

    def said(self, runs: Path) -> list[tuple[str, str]]:
        "What `dmr status` says."
        from dmr.studies.plan import status

        found = status("tiny", replace(self.folders, runs=runs))
        return [(r["run"], r["label"]) for r in found]


# -- files at rest -------------------------------------------------------------


def judge_rest(ground: Ground, runs: Path, file: str) -> tuple[str, str]:
    "What becomes of a study one of whose files was damaged at rest."
    from dmr.studies.plan import prepare_planned

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        told = []
        try:
            if ground.said(runs) != ground.status:
                return "wrong", "status tells of other runs"
        except FileNotFoundError as e:
            told.append(str(e))
        plan = ground.plan(runs)
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
    return (verdict if named or verdict == "healed" else "lost"), "; ".join(
        told
    )


def at_rest(ground: Ground, rng: random.Random, file: str, how: str):
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder) / "runs"
        shutil.copytree(ground.folders.runs, runs)
        if file == "streams.json":
            at = runs / file
        elif file == "plan.json":
            at = runs / "tiny" / file
        else:
            at = rng.choice(sorted(runs.glob(f"tiny/*/{file}")))
        damage(at, how, rng)
        return judge_rest(ground, runs, file)


# -- checkpoints ---------------------------------------------------------------


class Interrupted:
    "A run of two stages out of three, and the result of the whole."

    def __init__(self, kind: str):
        from dmr.training.config import Config
        from dmr.training.loop import ContinualRun, train_stream

        self.stream = repeated_sentences()
        self.kept = tempfile.TemporaryDirectory()  # as long as this lives
        self.folder = self.kept.name
        given: dict[str, Any] = dict(steps=6, context=16, batch=2, lr=5e-3)
        given |= dict(eval_windows=4, modification="projection", rank=2)
        given |= dict(alpha=0.9, options={"every": 2})
        self.config, self.train = Config, train_stream
        begun: Any = ContinualRun
        if kind == "finetune":
            from dmr.training import finetuning

            given |= dict(model="small", prior=None, eval_bytes=48)
            self.config = finetuning.FinetuneConfig
            self.train = finetuning.finetune_stream
            begun = finetuning.FinetuneRun
        self.given = given
        self.expected = timeless(self.go())
        run = begun(self.made(self.folder), self.stream, progress=False)
        run.run_stage()
        run.run_stage()

    def made(self, folder: str | None):
        return self.config(**self.given, checkpoint=folder)

    def go(self, folder: str | None = None) -> dict[str, Any]:
        made = self.made(folder)
        return json.loads(
            json.dumps(self.train(made, self.stream, progress=False))
        )


def in_checkpoint(begun: Interrupted, rng: random.Random, file: str, how: str):
    "Damage checkpoints, go on, and compare with the run in one piece."
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(begun.folder, folder, dirs_exist_ok=True)
        names = ("state.pt", "state.previous.pt")
        hit = names if file == "both" else [n for n in names if n == file]
        for name in hit:
            damage(Path(folder) / name, how, rng)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = timeless(begun.go(folder))
        if result != begun.expected:
            return "wrong", "another result than in one piece"
        told = [str(w.message) for w in caught if ".damaged" in str(w.message)]
        return "healed", "; ".join(told)


class Trained:
    "A Trainer's checkpoint half-way, and the weights at the end."

    def __init__(self) -> None:
        self.kept = tempfile.TemporaryDirectory()  # as long as this lives
        self.folder = Path(self.kept.name)
        self.expected = self.go(self.folder)

    def go(self, folder: Path, resume: str | None = None):
        import torch
        from transformers import TrainingArguments
        from transformers.utils import logging

        from dmr.frameworks.trainer import RoutedTrainer, RouterCallback
        from dmr.methods.projection import Projection
        from dmr.training.pretrained import small_llama

        logging.set_verbosity_error()
        model, _ = small_llama(width=16, layers=1, context=32)
        draw = torch.Generator().manual_seed(1)
        rows = torch.randint(0, 257, (16, 12), generator=draw)
        callback = RouterCallback(
            Projection(rank=2, every=2), "decoupled", 0.9, boundaries=[2, 4]
        )
        args = TrainingArguments(
            str(folder),
            max_steps=4,
            per_device_train_batch_size=4,
            learning_rate=3e-3,
            save_steps=2,
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            use_cpu=True,
            seed=0,
        )
        trainer = RoutedTrainer(
            model,
            args,
            train_dataset=[{"input_ids": r, "labels": r} for r in rows],
            router=callback,
        )
        trainer.train(resume_from_checkpoint=resume)
        return [p.detach().clone() for p in model.parameters()]


def in_router(trained: Trained, rng: random.Random, how: str):
    "Damage the router's file in a Trainer's checkpoint, and resume."
    import torch

    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(trained.folder, folder, dirs_exist_ok=True)
        at = Path(folder) / "checkpoint-2"
        damage(at / "router.pt", how, rng)
        try:
            end = trained.go(Path(folder), str(at))
        except (ValueError, FileNotFoundError) as e:
            named = "router.pt" in str(e)
            return ("noticed" if named else "crashed"), str(e)
        same = all(map(torch.equal, end, trained.expected))
        return ("healed" if same else "wrong"), "resumed"


# -- a batch at work -----------------------------------------------------------


def in_batch(ground: Ground, rng: random.Random, victim: str):
    "Kill a part of a batch at some moment, start it again, and compare."
    import psutil

    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder) / "runs"
        driver = ground.batch(runs, "--workers", "1")
        time.sleep(rng.uniform(2, 12))
        mine = [
            p
            for p in psutil.process_iter(["environ", "cmdline"])
            if (p.info["environ"] or {}).get("DMR_TEST_ROOT")
            == str(ground.root)
        ]
        words = {"supervisor": "supervise", "kernel": "ipykernel"}
        for p in mine:
            line = " ".join(p.info["cmdline"] or ())
            is_driver = p.pid == driver.pid
            hit = is_driver if victim == "driver" else victim == "all"
            if victim in words:
                hit = words[victim] in line and not is_driver
            if hit and psutil.pid_exists(p.pid):
                p.send_signal(signal.SIGKILL)
        driver.communicate()
        last = ground.batch(runs, "--workers", "1")
        out, _ = last.communicate()
        if last.returncode != 0:
            return "lost", f"exit code {last.returncode}: {out[-300:]}"
        end = time.monotonic() + 60
        while processes(ground.root) and time.monotonic() < end:
            time.sleep(0.2)
        if left := processes(ground.root):
            return "wrong", f"still at work: {left}"
        same = ground.results(runs) == ground.expected
        return ("healed" if same else "wrong"), ""


def in_text(ground: Ground, rng: random.Random):
    "Change a text during a batch, put it back, and compare."
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder) / "runs"
        path = rng.choice(sorted(ground.texts.iterdir()))
        old = path.read_bytes()
        driver = ground.batch(runs, "--workers", "1")
        try:
            while driver.poll() is None and not list(runs.glob("*/*/lock")):
                time.sleep(0.05)
            damage(path, rng.choice(("flip", "cut")), rng)
            out, _ = driver.communicate()
        finally:
            path.write_bytes(old)
        if driver.returncode == 0 and ground.results(runs) != ground.expected:
            return "wrong", "a changed text passed"
        again = ground.batch(runs, "--workers", "1")
        again.communicate()
        same = ground.results(runs) == ground.expected
        return ("healed" if same else "wrong"), out[-300:]


# -- all of them ---------------------------------------------------------------

#: Kind, fault, seed, and the function that throws it.
Fault = tuple[str, str, int, Callable[[random.Random], tuple[str, str]]]


def faults(ground: Ground, rounds: int, live: int) -> Iterator[Fault]:
    "Every kind of fault, `rounds` times at files, `live` times at processes."
    for seed in range(rounds):
        for file in FILES:
            for how in HOW:
                yield (
                    f"{file} at rest",
                    how,
                    seed,
                    lambda r, file=file, how=how: at_rest(ground, r, file, how),
                )
    for kind in ("train", "finetune"):
        begun = Interrupted(kind)
        for seed in range(rounds):
            for file in ("state.pt", "state.previous.pt", "both"):
                for how in ("flip", "cut", "empty", "lost"):
                    yield (
                        f"checkpoint of {kind}",
                        f"{how} {file}",
                        seed,
                        lambda r, b=begun, f=file, h=how: in_checkpoint(
                            b, r, f, h
                        ),
                    )
    trained = Trained()
    for seed in range(rounds):
        for how in ("flip", "cut", "empty", "lost"):
            yield (
                "router in a Trainer's checkpoint",
                how,
                seed,
                lambda r, how=how: in_router(trained, r, how),
            )
    for seed in range(live):
        for victim in ("driver", "supervisor", "kernel", "all"):
            yield (
                "kill -9 in a batch",
                victim,
                seed,
                lambda r, v=victim: in_batch(ground, r, v),
            )
        yield "text changed in a batch", "", seed, lambda r: in_text(ground, r)


def throw(each: Iterator[Fault], say: Callable[[str], None] = print):
    "Throw faults one after the other; a row for each."
    rows = []
    for kind, fault, seed, act in each:
        rng = random.Random(f"{kind} {fault} {seed}")
        try:
            verdict, detail = act(rng)
        except KeyboardInterrupt:  # tell of those that were thrown
            break
        except Exception as e:
            verdict, detail = "crashed", f"{type(e).__name__}: {e}"
        rows.append(dict(kind=kind, fault=fault, seed=seed, verdict=verdict))
        if verdict in ("lost", "wrong", "crashed"):
            say(f"{kind}, {fault}, seed {seed}: {verdict}: {detail}")
    return rows


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    "How many faults of each kind came to which verdict."
    out = []
    for kind in dict.fromkeys(r["kind"] for r in rows):
        n = Counter(r["verdict"] for r in rows if r["kind"] == kind)
        counts = {v: n[v] for v in VERDICTS}
        out.append(dict(kind=kind, faults=sum(n.values()), **counts))
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--live", type=int, default=2)
    parser.add_argument("--out", type=Path, help="a CSV of the table")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="dmr-faults-") as folder:
        ground = Ground(Path(folder) / "project")
        ground.make()
        counts = table(throw(faults(ground, args.rounds, args.live)))
    print(f"{'kind':34}{'faults':>8}", *(f"{v:>9}" for v in VERDICTS))
    for row in counts:
        numbers = (f"{row[v]:>9}" for v in VERDICTS)
        print(f"{row['kind']:34}{row['faults']:>8}", *numbers)
    bad = sum(row[v] for row in counts for v in VERDICTS[2:])
    total = sum(row["faults"] for row in counts)
    print(f"{total} faults; {bad} lost, wrong or crashed")
    if args.out:
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, counts[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(counts)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
