"""Faults of what training leaves behind: checkpoints of a run, a router's
file, a Trainer's folder, and what `dmr finetune` writes.
"""

import copy
import hashlib
import json
import os
import random
import shutil
import signal
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from damage import Verdict, damage, ended, forked, timeless
from tiny import SENTENCES, repeated_sentences

STATES = ("state.pt", "state.previous.pt", "both")


def damage_states(
    folder: Path, how: str, which: str, rng: random.Random
) -> None:
    "Damage the last checkpoint in a folder, the one before, or both."
    hit = STATES[:2] if which == "both" else (which,)
    for name in hit:
        damage(folder / name, how, rng)


class Scratch:
    "A folder that lives as long as what is in it is needed."

    def __init__(self) -> None:
        self.kept = tempfile.TemporaryDirectory()
        self.folder = Path(self.kept.name)


# -- a run of a study ----------------------------------------------------------


class Interrupted(Scratch):
    "A run of two stages out of three, and the result of the whole."

    def __init__(self, kind: str):
        from dmr.training.config import Config
        from dmr.training.loop import ContinualRun, train_stream

        super().__init__()
        self.stream = repeated_sentences()
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
        made = self.made(str(self.folder))
        run = begun(made, self.stream, progress=False)
        run.run_stage()
        run.run_stage()

    def made(self, folder: str | None):
        return self.config(**self.given, checkpoint=folder)

    def go(self, folder: str | None = None) -> dict[str, Any]:
        made = self.made(folder)
        return json.loads(
            json.dumps(self.train(made, self.stream, progress=False))
        )


def in_checkpoint(
    begun: Interrupted, fault: str, rng: random.Random
) -> Verdict:
    "Damage checkpoints, go on, and compare with the run in one piece."
    how, which = fault.split()
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(begun.folder, folder, dirs_exist_ok=True)
        damage_states(Path(folder), how, which, rng)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = timeless(begun.go(folder))
        if result != begun.expected:
            return "wrong", "another result than in one piece"
        told = [str(w.message) for w in caught if ".damaged" in str(w.message)]
        return "healed", "; ".join(told)


def killed_run(begun: Interrupted, fault: str, rng: random.Random) -> Verdict:
    "Let a run die before one of its writes, go on, and compare."
    with tempfile.TemporaryDirectory() as folder:
        inside, once = Path(folder) / "run", Path(folder) / "once"
        inside.mkdir()
        # a stage makes three: a part, and two changes of names
        die = (rng.randint(1, 8), str(inside), str(once))
        code = ended(forked(lambda: begun.go(str(inside)), die))
        if code != -signal.SIGKILL:
            raise RuntimeError(f"the run ended by itself: {code}")
        result = timeless(begun.go(str(inside)))
        same = result == begun.expected
        return ("healed" if same else "wrong"), ""


# -- a router's file -----------------------------------------------------------


class Routed(Scratch):
    "A router in the middle of training, its file, and how it goes on."

    def __init__(self) -> None:
        super().__init__()
        router = self.fresh()
        self.train(router, 0)
        router.consolidate()
        self.train(router, 1)
        self.start = self.state()
        router.save(self.folder / "router.pt")
        router.close()
        again = self.back(self.folder / "router.pt")
        self.go_on(again)
        self.expected = self.print()
        kept = judge_router(self, self.folder / "router.pt")
        assert kept[0] == "healed", kept

    def fresh(self):
        import torch

        import dmr

        torch.manual_seed(0)
        parts = (torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
        self.model = torch.nn.Sequential(*parts)
        self.optimizer = torch.optim.Adam(self.model.parameters(), 1e-2)
        edit = dmr.Projection(rank=2, every=2)
        return dmr.MomentRouter(self.model, self.optimizer, edit)

    def train(self, router: Any, seed: int) -> None:
        import torch

        draw = torch.Generator().manual_seed(seed)
        for _ in range(4):
            self.optimizer.zero_grad()
            x = torch.randn(6, 8, generator=draw)
            self.model(x).square().mean().backward()
            self.optimizer.step()

    def go_on(self, router: Any) -> None:
        "The rest of this domain, and the next one."
        self.train(router, 2)
        router.consolidate()
        self.train(router, 3)
        router.close()

    def state(self) -> Any:
        both = (self.model.state_dict(), self.optimizer.state_dict())
        return copy.deepcopy(both)

    def print(self) -> str:
        from dmr.routing.kept import fingerprint

        return fingerprint(self.state())

    def back(self, path: Path):
        import torch

        import dmr

        parts = (torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
        self.model = torch.nn.Sequential(*parts)
        self.optimizer = torch.optim.Adam(self.model.parameters(), 1e-2)
        self.model.load_state_dict(self.start[0])
        # the optimizer may go on with the very tensors that it is given
        self.optimizer.load_state_dict(copy.deepcopy(self.start[1]))
        return dmr.MomentRouter.load(path, self.model, self.optimizer)


def judge_router(routed: Routed, path: Path) -> Verdict:
    "Load a router's file, go on, and compare."
    try:
        router = routed.back(path)
    except (ValueError, FileNotFoundError) as e:
        return ("noticed" if path.name in str(e) else "crashed"), str(e)
    routed.go_on(router)
    same = routed.print() == routed.expected
    return ("healed" if same else "wrong"), "loaded"


def in_router(routed: Routed, how: str, rng: random.Random) -> Verdict:
    "Damage a router's file and load it, or die while it is written again."
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "router.pt"
        shutil.copy(routed.folder / "router.pt", path)
        if how != "killed":
            damage(path, how, rng)
            return judge_router(routed, path)
        router = routed.back(path)
        die = (rng.randint(1, 3), folder, f"{folder}-once")
        code = ended(forked(lambda: router.save(path), die))
        Path(die[2]).unlink()
        router.close()
        if code != -signal.SIGKILL:
            raise RuntimeError(f"the file was written: {code}")
        verdict, said = judge_router(routed, path)
        previous = path.with_name("router.previous.pt")
        if verdict == "noticed":  # the one before is there
            if judge_router(routed, previous)[0] != "healed":
                return "lost", "no earlier file"
        return verdict, said


# -- a Trainer's folder --------------------------------------------------------

BESIDE = (
    "router.pt",
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "config.json",
)


class Trained(Scratch):
    "A Trainer's checkpoint half-way, and the weights at the end."

    def __init__(self) -> None:
        super().__init__()
        self.expected = self.go(self.folder)

    def go(self, folder: Path, resume: str | None = None) -> str:
        "Train, and return the fingerprint of the weights at the end."
        import torch
        from transformers import TrainingArguments
        from transformers.utils import logging

        from dmr.frameworks.trainer import RoutedTrainer, RouterCallback
        from dmr.methods.projection import Projection
        from dmr.routing.kept import fingerprint
        from dmr.training.pretrained import small_llama

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        model, _ = small_llama(width=16, layers=1, context=32)
        draw = torch.Generator().manual_seed(1)
        rows = torch.randint(0, 257, (16, 12), generator=draw)
        callback = RouterCallback(
            Projection(rank=2, every=2), "decoupled", 0.9, boundaries=[2, 4]
        )
        args = TrainingArguments(
            str(folder),
            max_steps=6,
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
        return fingerprint(model.state_dict())


def resumed(trained: Trained, folder: Path, at: Path) -> Verdict:
    "Resume a Trainer from a checkpoint, and compare."
    try:
        end = trained.go(folder, str(at))
    except Exception as e:
        said, frame = f"{type(e).__name__}: {e}", e.__traceback__
        while frame and frame.tb_next:
            frame = frame.tb_next
        ours = frame and "/dmr/" in frame.tb_frame.f_code.co_filename
        named = any(name in said for name in BESIDE)
        # transformers refuses in its own words
        return ("noticed" if named or not ours else "crashed"), said
    same = end == trained.expected
    return ("healed" if same else "wrong"), "resumed"


def in_trainer(trained: Trained, fault: str, rng: random.Random) -> Verdict:
    "Damage a file in a Trainer's checkpoint, and resume."
    how, name = fault.split()
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(trained.folder, folder, dirs_exist_ok=True)
        at = Path(folder) / "checkpoint-4"
        damage(at / name, how, rng)
        return resumed(trained, Path(folder), at)


def killed_trainer(trained: Trained, fault: str, rng: random.Random) -> Verdict:
    "Let a Trainer die at a write, resume, from further back if need be."
    with tempfile.TemporaryDirectory() as folder:
        inside, once = Path(folder) / "out", Path(folder) / "once"
        inside.mkdir()
        die = (rng.randint(1, 25), str(inside), str(once))
        code = ended(forked(lambda: trained.go(inside), die))
        if code != -signal.SIGKILL:
            raise RuntimeError(f"training ended by itself: {code}")
        found = sorted(inside.glob("checkpoint-*"), reverse=True)
        verdict, said = "healed", ""
        for at in found:
            verdict, said = resumed(trained, inside, at)
            if verdict != "noticed":
                return verdict, said
        # no checkpoint is whole: from the beginning
        same = trained.go(Path(folder) / "new") == trained.expected
        return (verdict if same else "wrong"), said


# -- dmr finetune --------------------------------------------------------------

FOLDER = (
    *STATES,
    "request.json",
    "run.json",
    "result.json",
    "model",
)


class Tuned(Scratch):
    "What `dmr finetune` leaves: half-way, and at the end."

    def __init__(self) -> None:
        from dmr.training.finetune import save_small_llama

        super().__init__()
        save_small_llama(self.folder / "tiny", width=16, layers=1)
        for name, sentence in SENTENCES.items():
            (self.folder / f"{name}.txt").write_bytes(sentence * 60)
        self.done, self.half = self.folder / "done", self.folder / "half"
        begun = time.monotonic()
        self.expected = self.go(self.done)
        self.seconds = time.monotonic() - begun
        assert self.expected["result"]["best"] == 1  # of the two rates
        assert ended(forked(lambda: self.go(self.half, stop=3))) != 0
        assert (self.half / "runs").is_dir(), "nothing was kept"

    def go(self, output: Path, stop: int = 0) -> dict[str, Any]:
        "Fine-tune with a checkpoint a step; `stop`: die at this step."
        from dmr.training import finetune

        finetune.SAVE_EVERY = -1.0
        if stop:
            step = finetune.Training.train_step

            def dying(training: Any) -> float:
                if training.arm.rate > 1e-3 and training.step == stop:
                    os.kill(os.getpid(), signal.SIGKILL)
                return step(training)

            finetune.Training.train_step = dying  # type: ignore
        done = finetune.finetune(
            self.folder / "tiny",
            self.folder / "prose.txt",
            self.folder / "code.txt",
            rates=[1e-4, 3e-3],
            steps=5,
            batch=2,
            length=32,
            windows=2,
            keep_tokens=128,
            looks=2,
            device="cpu",
            output=output,
            progress=False,
        )
        return {"result": timeless(asdict(done)), "model": self.model(output)}

    def model(self, output: Path) -> dict[str, str]:
        "File -> hash of the model that was written."
        digest = lambda p: hashlib.sha256(p.read_bytes()).hexdigest()
        files = (p for p in (output / "model").rglob("*") if p.is_file())
        return {p.name: digest(p) for p in sorted(files)}


def judge_tuned(tuned: Tuned, output: Path) -> Verdict:
    "Ask for the same again, and compare with the undisturbed one."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = tuned.go(output)
        except ValueError as e:
            named = str(output) in str(e)
            return ("noticed" if named else "crashed"), str(e)
    told = "; ".join(str(w.message) for w in caught)
    if found["result"] != tuned.expected["result"]:
        return "wrong", f"another result: {told}"
    if found["model"] != tuned.expected["model"]:
        return "wrong", f"another model: {told}"
    return "healed", told


def at_tuned(tuned: Tuned, fault: str, rng: random.Random) -> Verdict:
    "Damage a file of `dmr finetune`, half-way or at the end."
    how, name = fault.split()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        early = name in STATES or (name != "result.json" and rng.random() < 0.5)
        shutil.copytree(tuned.half if early else tuned.done, output)
        if name in STATES:
            states = next(output.glob("runs/*/state.pt")).parent
            damage_states(states, how, name, rng)
        else:
            where = "model/*" if name == "model" else f"**/{name}"
            damage(rng.choice(sorted(output.glob(where))), how, rng)
        return judge_tuned(tuned, output)


def _ask(tuned: Tuned, output: Path) -> Callable[[], Any]:
    def go() -> None:
        try:
            tuned.go(output)
        except KeyboardInterrupt:
            os._exit(130)

    return go


def killed_tuned(tuned: Tuned, fault: str, rng: random.Random) -> Verdict:
    "End `dmr finetune` by a signal or at a write, and ask for it again."
    with tempfile.TemporaryDirectory() as folder:
        output, once = Path(folder) / "out", Path(folder) / "once"
        go = _ask(tuned, output)
        if fault == "KILL at a write":
            if not hasattr(tuned, "writes"):
                ended(forked(go, (0, str(output), str(once))))
                tuned.writes = once.stat().st_size
                once.unlink()
                shutil.rmtree(output)
            die = (rng.randint(1, tuned.writes), str(output), str(once))
            code = ended(forked(go, die))
            if code != -signal.SIGKILL:
                raise RuntimeError(f"it ended by itself: {code}")
        else:
            child = forked(go)
            time.sleep(rng.uniform(0, 1) * tuned.seconds)
            os.kill(child, signal.Signals[f"SIG{fault}"])
            ended(child)
        return judge_tuned(tuned, output)
