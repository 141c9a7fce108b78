"""The training loops on a GPU: the losses of the CPU, and fine-tuning."""

import json

import pytest
import torch
from test_training import BASE, STREAM

from dmr.training.loop import Config, train_stream

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU that torch can use"
)


@pytest.mark.parametrize("modification", ["none", "projection", "replay"])
@pytest.mark.filterwarnings("ignore:the basis of")
def test_the_loop_gives_the_losses_of_the_cpu(modification):
    "Two short domains of bytes through `train_stream`, in float64."
    own = {
        "none": {},
        "replay": {"fraction": 0.1},
        "projection": {
            "rank": 4,
            "options": {"every": 2},
            "strength": "overlap",
            "alpha": 0.9,
        },
    }[modification]
    results = [
        train_stream(
            Config(
                **BASE,
                **own,
                modification=modification,
                dtype="float64",
                device=device,
            ),
            STREAM,
            progress=False,
        )
        for device in ("cuda", "cpu")
    ]
    for a, b in zip(*(r["records"] for r in results)):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    assert torch.cuda.get_device_name() in json.dumps(results[0]["environment"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora_rank", [4, None])
def test_fine_tuning(dtype, lora_rank):
    "A small Llama through three domains."
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from test_finetuning import STREAM as SENTENCES

    from dmr.training.finetuning import FinetuneConfig, finetune_stream

    config = FinetuneConfig(
        model="small",
        prior=None,
        context=16,
        batch=2,
        steps=6,
        lr=1e-2,
        eval_windows=4,
        eval_bytes=48,
        track_step=2,
        modification="projection",
        rank=2,
        alpha=0.9,
        options={"every": 2},
        routing="decoupled",
        strength="overlap",
        dtype=dtype,
        lora_rank=lora_rank,
        device="cuda",
    )
    result = finetune_stream(config, SENTENCES, progress=False)
    before, after = (
        sum(r["loss"] for r in result["records"] if r["stage"] == s)
        for s in (-1, 2)
    )
    assert after < before and result["metrics"]["router_bytes"] > 0


@pytest.fixture
def deterministic():
    "Sums are taken in one order, as far as torch can."
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["merge+projection", "replay"])
@pytest.mark.filterwarnings("ignore:.*determinis")
def test_interrupted_and_resumed_equals_undisturbed(
    method, dtype, tmp_path, monkeypatch, deterministic
):
    "`dmr.finetune` on the card, with dropout: its random stream is kept too."
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from test_finetune import numbers, small_case, stop, tuned, weights_in

    from dmr.training.finetune import Training, native_bfloat16

    if dtype == "bfloat16" and not native_bfloat16(torch.device("cuda")):
        pytest.skip("needs a GPU that multiplies in bfloat16")
    small_case(tmp_path)
    how = {"method": method, "dtype": dtype, "device": "cuda"}
    whole = tuned(tmp_path, "whole", **how)
    call = lambda: tuned(tmp_path, "parts", **how)
    stop(monkeypatch, call, lambda training: training.step == 3)
    (arm,) = (tmp_path / "parts/runs").iterdir()
    assert (arm / "state.pt").exists()
    taken, take_up = [], Training.take_up
    monkeypatch.setattr(
        Training,
        "take_up",
        lambda self: (take_up(self), taken.append(self.step))[0],
    )
    parts = call()
    assert taken == [4]  # it did not begin again
    assert numbers(parts) == numbers(whole)
    assert torch.equal(
        weights_in(parts.checkpoint), weights_in(whole.checkpoint)
    )
