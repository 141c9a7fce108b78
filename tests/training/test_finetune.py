"""One call fine-tunes a saved model, says what it learned and lost, and ends
where it would have ended without an interruption.
"""

import json
import math
import os
import shutil
import signal

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

import torch
from conftest import flat

import dmr
import dmr.training.finetune as finetune_module
from dmr.files import locked
from dmr.routing.router import MomentRouter
from dmr.training.finetune import (
    METHODS,
    Arm,
    Bench,
    Training,
    make_request,
    read_sources,
    save_small_llama,
)
from dmr.training.held_out import copied, trained_weights

NEW = "Rain falls on the sea, and the sea does not rise. "
OLD = "def area(r):\n    return 3.14159 * r * r\n\n"
SMALL = {
    "rates": 3e-3,
    "steps": 6,
    "batch": 2,
    "length": 48,
    "windows": 2,
    "keep_tokens": 384,
    "looks": 2,
    "device": "cpu",
    "progress": False,
}


@pytest.fixture
def made(tmp_path):
    "A folder with a model that drops attention, a new text and an old one."
    save_small_llama(tmp_path / "tiny", width=32)
    path = tmp_path / "tiny/config.json"
    config = json.loads(path.read_text()) | {"attention_dropout": 0.1}
    path.write_text(json.dumps(config))
    (tmp_path / "new.txt").write_text(NEW * 120)
    (tmp_path / "old.txt").write_text(OLD * 120)
    return tmp_path


def tuned(folder, output="out", keep="old.txt", **other):
    if keep not in (None, "self"):
        keep = folder / keep
    given = SMALL | {"output": folder / output} | other
    return dmr.finetune(folder / "tiny", folder / "new.txt", keep, **given)


def weights_in(folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    return flat([*model.state_dict().values()])


def numbers(done):
    "All that a request came to, but for time and place."
    runs = [
        {k: x for k, x in run.items() if k != "seconds"} for run in done.runs
    ]
    return done.texts, runs, done.best, done.prompts


@pytest.mark.parametrize("method", [*METHODS])
def test_interrupted_and_resumed_equals_undisturbed(method, made, monkeypatch):
    whole = tuned(made, "whole", method=method)
    step, handler = Training.train_step, signal.getsignal(signal.SIGINT)

    def interrupted(self):
        loss = step(self)
        if self.step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return loss

    monkeypatch.setattr(Training, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tuned(made, "parts", method=method)
    monkeypatch.undo()
    (arm,) = (made / "parts/runs").iterdir()
    assert (arm / "state.pt").exists() and not (made / "parts/model").exists()
    taken = []
    take_up = Training.take_up
    monkeypatch.setattr(
        Training,
        "take_up",
        lambda self: (take_up(self), taken.append(self.step))[0],
    )
    parts = tuned(made, "parts", method=method)
    assert taken == [4]  # it did not begin again
    assert numbers(parts) == numbers(whole)
    assert torch.equal(
        weights_in(parts.checkpoint), weights_in(whole.checkpoint)
    )
    assert not (arm / "state.pt").exists()
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_second_interruption_is_answered_at_once():
    with finetune_module._after_the_step() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert len(asked) == 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.sigtimedwait([], 0.1)


def test_without_a_past_it_is_plain_adamw(made):
    "The whole training, written out the obvious way."
    done = tuned(made, keep=None, decay="none", warmup=0.0)
    assert done.request["method"] == "none"
    r = make_request(
        made / "tiny",
        made / "new.txt",
        **{k: x for k, x in SMALL.items() if k != "progress"},
        decay="none",
        warmup=0.0,
    )
    bench = Bench(r, read_sources(r), None)
    training = Training(bench, Arm("none", 3e-3), made / "nowhere")
    rows, order = training.train, training.order.tolist()
    training.router.close()
    model = bench.model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0
    )
    torch.manual_seed(finetune_module.seed_for(0, "dropout"))
    for step in range(6):
        batch = rows[order[2 * step : 2 * step + 2]]
        loss = model(input_ids=batch[:, 0], labels=batch[:, 1]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    mine = flat([*model.state_dict().values()])
    torch.testing.assert_close(
        weights_in(done.checkpoint), mine, rtol=0, atol=2e-5
    )


def test_accumulation_and_checkpointing_change_the_memory_alone(made):
    config = made / "tiny/config.json"
    plain = json.loads(config.read_text()) | {"attention_dropout": 0.0}
    config.write_text(json.dumps(plain))
    whole = tuned(made, "whole", batch=4)
    parts = tuned(
        made, "parts", batch=2, accumulation=2, checkpointing=True, keep=None
    )
    whole = tuned(made, "plain", batch=4, keep=None)
    torch.testing.assert_close(
        weights_in(parts.checkpoint),
        weights_in(whole.checkpoint),
        rtol=0,
        atol=1e-4,
    )


def test_the_past_is_shown_with_its_own_number_of_rows(made, monkeypatch):
    "A curvature of one row, whatever the accumulation."
    seen = []
    protect = MomentRouter.protect

    def noted(self, *args, **options):
        seen.append(self.consolidation.samples)
        protect(self, *args, **options)
        seen.append(flat(self.consolidation.past.values()).sum().item())

    monkeypatch.setattr(MomentRouter, "protect", noted)
    tuned(made, "one", accumulation=1)
    tuned(made, "two", accumulation=2)
    assert seen[0] == seen[2] == 2 and seen[1] == seen[3] > 0


def test_the_table_of_the_way_back_ends_where_the_curve_does(made):
    done = tuned(made, keep=None)
    last = done.run["curve"][-1]
    assert last["step"] == 6 and last["change"] == done.run["change"]
    shares = [point["share"] for point in done.run["way_back"]]
    assert shares == [k / 10 for k in range(1, 10)]
    learned = [
        -point["change"]["new"]["nats_per_token"]
        for point in done.run["way_back"]
    ]
    assert 0 < learned[0] < learned[4]


def test_what_the_model_writes_itself_is_a_past(made):
    done = tuned(made, keep="self", method="replay")
    assert done.texts["old"]["role"] == "old"
    assert math.isfinite(done.lost["old"][0])


def test_adapters_are_saved_as_peft_saves_them(made):
    import peft
    from transformers import AutoModelForCausalLM

    done = tuned(made, lora=2, method="merge+projection")
    assert done.request["rates"] == [3e-3]
    assert done.parameters["trained"] < done.parameters["all"] / 4
    base = AutoModelForCausalLM.from_pretrained(made / "tiny")
    adapted = peft.PeftModel.from_pretrained(base, done.checkpoint)
    ids = torch.arange(8)[None]
    changed = adapted(input_ids=ids).logits
    with adapted.disable_adapter():
        assert not torch.allclose(adapted(input_ids=ids).logits, changed)


def test_a_bench_is_put_back_to_where_it_began(made):
    r = make_request(
        made / "tiny",
        made / "new.txt",
        **{k: x for k, x in SMALL.items() if k != "progress"},
    )
    bench = Bench(r, read_sources(r), None)
    before = copied(trained_weights(bench.model))
    training = Training(bench, Arm("none", 3e-3), made / "nowhere")
    training.train_step()
    training.router.close()
    assert not torch.equal(
        flat(before.values()), flat(trained_weights(bench.model).values())
    )
    bench.put_back()
    assert torch.equal(
        flat(before.values()), flat(trained_weights(bench.model).values())
    )


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"rates": 1e30}, "pass a lower one, such as rates=1e.29"),
        ({"rates": math.nan}, "rates=nan must be a number"),
        ({"rates": "fast"}, "rates='fast' must be a number"),
        ({"rates": []}, "rates=\\[\\]"),
        ({"keep": None, "method": "merge"}, "keep='self' to let the model"),
        ({"keep": "none.txt"}, "no file or folder"),
        ({"length": 4096}, "too|positions|fewer|held-out rows"),
        ({"device": "cuda:9"}, "device='cuda:9'"),
        ({"lora": 2, "targets": ["c"]}, "targets=.'c_attn', 'c_proj'."),
        ({"decay": "slow"}, "choose linear, cosine or none"),
        ({"epochs": 3}, "unknown parameter 'epochs'"),
        ({"held_out": 0.9}, "held_out=0.9 lies outside"),
    ],
)
def test_bad_input_is_named_and_leaves_no_folder(wrong, said, made):
    with pytest.raises(ValueError, match=said):
        tuned(made, **wrong)
    assert not (made / "out").exists()


def test_a_folder_is_of_one_request(made):
    done = tuned(made)
    listed = sorted(p for p in (made / "out").rglob("*"))
    changed = [p.stat().st_mtime_ns for p in listed]
    with pytest.raises(ValueError, match="batch=2 there and 3 here; pass ano"):
        tuned(made, batch=3)
    (made / "new.txt").write_text(NEW * 119)
    with pytest.raises(ValueError, match="content of new='"):
        tuned(made)
    (made / "new.txt").write_text(NEW * 120)
    assert tuned(made) == done
    assert changed == [p.stat().st_mtime_ns for p in listed]


def test_other_weights_under_the_same_name_are_not_gone_on_with(
    made, monkeypatch
):
    step = Training.train_step

    def interrupted(self):
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    monkeypatch.setattr(Training, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tuned(made)
    monkeypatch.undo()
    save_small_llama(made / "tiny", seed=1, width=32)
    with pytest.raises(ValueError, match="is of a run with start="):
        tuned(made)


def test_a_merge_is_plain_training_until_its_end(made):
    "So that one training gives the method and its controls."
    merged = tuned(made, "merge", method="merge").run
    plain = tuned(made, "plain", method="none").run
    assert merged["curve"] == plain["curve"]
    assert merged["way_back"] == plain["way_back"]
    assert merged["change"] != plain["change"] == plain["curve"][-1]["change"]


def test_the_best_of_several_rates_is_kept(made):
    done = tuned(made, rates=[1e-5, 3e-3, 1e-4])
    assert done.run["rate"] == 3e-3 and len(done.runs) == 3
    alone = tuned(made, "alone", rates=3e-3)
    assert done.run["change"] == alone.run["change"]
    assert torch.equal(
        weights_in(done.checkpoint), weights_in(alone.checkpoint)
    )


def test_two_processes_do_not_share_a_folder(made):
    (made / "out").mkdir()
    with locked(made / "out"):
        with pytest.raises(ValueError, match="another process is training"):
            tuned(made)
    assert [p.name for p in (made / "out").iterdir()] == [".lock"]
    assert tuned(made).learned[0] > 0  # a lock that was left is nothing


def test_a_folder_of_the_users_survives_a_failure(made):
    (made / "out").mkdir()
    with pytest.raises(ValueError, match="not finite"):
        tuned(made, rates=1e30)
    assert tuned(made).learned[0] > 0


@pytest.mark.slow
def test_a_model_out_of_a_gguf_file_is_saved_as_a_folder(tmp_path):
    from transformers import AutoModelForCausalLM

    model, tokenizer = dmr.load_pretrained("smollm2-135m")
    finetune_module.save_model(model, tokenizer, tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.arange(20)[None]
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_model_that_is_not_what_was_written_is_made_again(made):
    "Lost, damaged, or of another training than the best one."
    done = tuned(made, rates=[1e-4, 3e-3])
    folder, weights = made / "out/model", weights_in(done.checkpoint)
    assert done.best == 1
    assert tuned(made, rates=[1e-4, 3e-3]) == done  # and nothing was made

    def again():
        with pytest.warns(UserWarning, match="is not the model that was wri"):
            found = tuned(made, rates=[1e-4, 3e-3])
        assert found.best == 1
        assert torch.equal(weights_in(found.checkpoint), weights)

    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    again()
    shutil.rmtree(folder)
    again()
    # the record of the other training is lost: made again, its model is the
    # best one so far, and takes the place of the best one of all
    (made / "out/result.json").unlink()
    (made / "out/runs/merge-0.0001/run.json").unlink()
    again()
    (made / "out/model.json").unlink()  # as earlier versions left it
    assert tuned(made, rates=[1e-4, 3e-3]).best == 1
