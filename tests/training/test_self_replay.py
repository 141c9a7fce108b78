"""Replay of text that the model writes itself, as an arm of a study."""

import pytest
import torch
from tiny import repeated_sentences

import dmr.training.loop as training
from dmr.studies.table import arm_label
from dmr.training.config import Config, check_parameters
from dmr.training.finetuning import FinetuneConfig, FinetuneRun
from dmr.training.loop import ContinualRun, train_stream
from dmr.training.model import SIZES, Size

torch.set_num_threads(1)
STREAM = repeated_sentences(noise=0.05)
SELF = {
    "steps": 8,
    "context": 16,
    "batch": 4,
    "eval_windows": 8,
    "lr": 5e-3,
    "modification": "replay",
    "routing": "shared",
    "fraction": 0.05,
    "memory": "self",
}


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch):
    monkeypatch.setitem(SIZES, "nano", Size(layers=1, width=32, heads=2))


def run(**parameters):
    return ContinualRun(Config(**SELF | parameters), STREAM, progress=False)


def test_as_much_is_written_as_would_be_kept_and_none_of_it_is_text():
    mine, theirs = run(), run(memory=None)
    for r in (mine, theirs):
        r.run()
    domain = bytes(STREAM[0].train.tolist())
    memory = lambda r: r.router.modification.buffer.memory[""]
    assert memory(mine).shape == memory(theirs).shape
    assert memory(mine).dtype == torch.uint8
    found = lambda r: sum(bytes(w.tolist()) in domain for w in memory(r)[:8])
    assert found(theirs) == 8 and found(mine) < 3


def test_until_the_first_boundary_it_is_the_arm_that_keeps_text():
    steps = {}

    class Losses(training.Hook):
        def after_step(self, run, step, loss):
            steps.setdefault(run.config.memory, []).append(float(loss.detach()))

    for memory in (None, "self"):
        config = Config(**SELF | {"memory": memory})
        train_stream(config, STREAM, [Losses()], progress=False)
    mine, theirs = steps["self"], steps[None]
    assert mine[:8] == theirs[:8] and mine[9:] != theirs[9:]


def test_a_resumed_run_writes_the_same(tmp_path):
    whole = run().run()
    first = run(checkpoint=str(tmp_path))
    first.run_stage()
    first.router.close()
    again = run(checkpoint=str(tmp_path)).run()
    losses = lambda r: [x["loss"] for x in r["records"]]
    assert losses(whole) == losses(again)


def test_it_needs_replay():
    with pytest.raises(ValueError, match="needs modification='replay'"):
        check_parameters({"memory": "self"})
    with pytest.raises(ValueError, match="memory='text' is unknown"):
        Config(memory="text")


def test_its_name():
    assert arm_label(SELF) == "self replay 5 % shared"


def test_an_adapted_model_writes_too():
    pytest.importorskip("peft")
    config = FinetuneConfig(
        model="small",
        prior=None,
        **SELF | {"steps": 2, "context": 12, "fraction": 0.02},
        track_step=0,
        eval_bytes=16,
    )
    run = FinetuneRun(config, STREAM, progress=False)
    run.run_stage()
    run.router.close()
    x = run.router.modification.buffer.memory[""]
    assert x.shape[1] == 13 and (x[:, 0] == 256).all()
