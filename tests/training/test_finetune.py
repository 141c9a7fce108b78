"""One call fine-tunes a saved model, says what it learned and lost, and ends
where it would have ended without an interruption.
"""

import json
import math
import os
import re
import shutil
import signal
import time
from functools import partial

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

import torch
from conftest import flat

import dmr
import dmr.training.finetune as finetune_module
from dmr.files import (
    last_checkpoint,
    locked,
    read_object,
    write_checkpoint,
    write_object,
)
from dmr.reporting.finetuned import equal_learning_table
from dmr.routing.kept import read_kept
from dmr.routing.router import MomentRouter
from dmr.training.finetune import (
    METHODS,
    Arm,
    Bench,
    Training,
    compare,
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


def small_case(folder):
    "In a folder: a model that drops attention, a new text and an old one."
    save_small_llama(folder / "tiny", width=32)
    path = folder / "tiny/config.json"
    config = json.loads(path.read_text()) | {"attention_dropout": 0.1}
    path.write_text(json.dumps(config))
    (folder / "new.txt").write_text(NEW * 120)
    (folder / "old.txt").write_text(OLD * 120)
    return folder


@pytest.fixture
def made(tmp_path):
    return small_case(tmp_path)


def tuned(folder, output="out", keep="old.txt", **other):
    if keep not in (None, "self", "saved"):
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


def stop(monkeypatch, call, when):
    "A call that is interrupted in the first step for which `when` holds."
    step, kill = Training.train_step, os.kill

    def interrupted(self):
        if when(self):
            kill(os.getpid(), signal.SIGINT)
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            call()


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


@pytest.mark.parametrize("method", ["merge", "merge+projection"])
def test_a_training_resumed_at_its_merge_counts_the_rows_of_a_step(
    method, made, monkeypatch
):
    "Interrupted in the last step: what is left is the merge."
    how = {"method": method, "accumulation": 3}
    whole = tuned(made, "whole", **how)
    step = Training.train_step

    def interrupted(self):
        loss = step(self)
        if self.step == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return loss

    monkeypatch.setattr(Training, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tuned(made, "parts", **how)
    monkeypatch.undo()
    parts = tuned(made, "parts", **how)
    assert numbers(parts) == numbers(whole)
    assert torch.equal(
        weights_in(parts.checkpoint), weights_in(whole.checkpoint)
    )


def test_a_folder_may_be_moved(made, monkeypatch):
    stop(monkeypatch, lambda: tuned(made, "first"), lambda x: x.step == 2)
    (made / "first").rename(made / "second")
    done = tuned(made, "second")
    assert done.checkpoint == str(made / "second/model")
    (made / "second").rename(made / "third")
    moved = tuned(made, "third")
    assert moved.folder == str(made / "third")
    assert moved.checkpoint == str(made / "third/model")
    assert len(weights_in(moved.checkpoint))
    assert numbers(moved) == numbers(done)
    # as earlier versions wrote it
    path = made / "third/result.json"
    found = read_object(path) | {"checkpoint": "finetuned/model"}
    write_object(path, found)
    assert tuned(made, "third") == moved


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


CHAT = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def as_line(form, question, answer):
    "An example of a .jsonl file."
    if form == "prompt":
        return json.dumps({"prompt": question, "completion": answer})
    said = (("user", question), ("assistant", answer))
    talk = [{"role": role, "content": content} for role, content in said]
    return json.dumps({"messages": talk})


def asked(form, tokenizer, question):
    "A question as tokens (1, n), up to where the answer begins."
    if form == "prompt":
        return tokenizer(question, return_tensors="pt")["input_ids"]
    how = {"return_tensors": "pt", "return_dict": True}
    talk = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(
        talk, add_generation_prompt=True, **how
    )["input_ids"]


@pytest.mark.parametrize("form", ["prompt", "chat"])
def test_answers_are_learned_and_questions_are_not(form, tmp_path):
    "From a file of either form to a model that answers, old questions too."
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = save_small_llama(tmp_path / "tiny", width=32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    new, old = {"sea": "blue", "leaf": "green"}, {"sun": "yellow"}
    for name, answers in (("new", new), ("old", old)):
        lines = [
            as_line(form, f"{i} {word}?", answer)
            for i in range(0, 100, 2)
            for word, answer in answers.items()
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    how = SMALL | {"rates": 1e-2, "steps": 150, "batch": 8, "looks": 1}
    done = dmr.finetune(
        folder,
        tmp_path / "new.jsonl",
        tmp_path / "old.jsonl",
        method="replay",
        output=tmp_path / "out",
        **how,
    )
    assert done.learned[0] > 5 and done.lost["old"][0] < -5
    model = AutoModelForCausalLM.from_pretrained(done.checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(done.checkpoint)
    for word, answer in (new | old).items():
        ids = asked(form, tokenizer, f"37 {word}?")
        out = model.generate(ids, do_sample=False, max_new_tokens=12)[0]
        assert tokenizer.decode(out[ids.shape[1] :]) == f"{answer}<|end|>"
        loss = model(input_ids=ids, labels=ids).loss
        assert loss > math.log(257)  # more than without any training


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
        ({"device": "cuda:9"}, "device='cuda:9'"),
        ({"device": "tpu"}, "device='tpu' is unknown; pass cpu, cuda"),
        ({"device": 1}, "device=1 is unknown; pass cpu, cuda"),
        ({"device": "meta"}, "device='meta' cannot be used by torch on this"),
        ({"lora": 2, "targets": ["c"]}, "targets=.'c'.; .*targets=.'q_proj'"),
        ({"lora": 2, "targets": "q_proj"}, "targets='q_proj' must be a list"),
        ({"targets": ["q_proj"]}, "targets=.'q_proj'. is of adapters"),
        ({"method": [1]}, "method=.1. is unknown; choose one of none"),
        ({"rates": {"a": 1}}, "rates={'a': 1} must be a number"),
        ({"rates": [[1]]}, "rates=.1. must be a number"),
        ({"decay": "slow"}, "choose linear, cosine or none"),
        ({"epochs": 3}, "unknown parameter 'epochs'"),
        ({"held_out": 0.9}, "held_out=0.9 lies outside"),
        ({"checkpointing": "yes"}, "checkpointing='yes' must be true or false"),
        ({"keep": "saved"}, "needs router.pt in the model's folder"),
        ({"keep": "new.txt"}, "1 of 1 texts in keep=.*new.txt' stand in new="),
    ],
)
def test_bad_input_is_named_and_leaves_no_folder(wrong, said, made):
    with pytest.raises(ValueError, match=said):
        tuned(made, **wrong)
    assert not (made / "out").exists()


@pytest.mark.parametrize("name", ["model", "new", "keep"])
def test_an_empty_name_is_not_the_current_folder(name, made, monkeypatch):
    "As where the variable of a script is not set."
    monkeypatch.chdir(made)
    given = {"model": "tiny", "new": "new.txt", "keep": "old.txt"} | {name: ""}
    with pytest.raises(ValueError, match=f"{name}='' names nothing"):
        dmr.finetune(**given, **SMALL)
    assert not (made / "finetuned").exists()


@pytest.mark.parametrize("name", ["model", "new", "keep"])
@pytest.mark.parametrize("value", [2024, [1], b"here"])
def test_a_place_that_is_no_text_is_named(name, value):
    given = {"model": "m", "new": "n", "keep": None} | {name: value}
    said = re.escape(f"{name}={value!r} must be text, the name of")
    with pytest.raises(ValueError, match=said):
        make_request(**given, device="cpu")


@pytest.mark.parametrize("call", [dmr.finetune, compare])
def test_an_output_that_is_no_folder_is_named(call):
    for value, said in ((7, "=7 must be text"), ("", "='' names nothing")):
        with pytest.raises(ValueError, match=f"output{said}"):
            call("m", "n", "o", output=value)


def test_a_tilde_is_the_home_folder(made, monkeypatch):
    monkeypatch.setenv("HOME", str(made))
    monkeypatch.chdir(made)
    given = SMALL | {"steps": 1, "output": "~/out"}
    done = dmr.finetune("~/tiny", "~/new.txt", **given)
    assert done.folder == str(made / "out") and not (made / "~").exists()


def test_an_output_among_its_own_text_is_not_read(made, monkeypatch):
    monkeypatch.chdir(made)
    (made / "texts").mkdir()
    for name in ("new", "old"):
        (made / f"{name}.txt").rename(made / f"texts/{name}.txt")
    given = SMALL | {"steps": 1, "output": made / "texts/deep/out"}
    done = dmr.finetune(made / "tiny", made / "texts", **given)
    with pytest.warns(UserWarning, match="of a training .deep/out/"):
        again = dmr.finetune(made / "tiny", made / "texts", **given)
    assert again == done


def save_gpt2(folder, positions=64):
    "A model without the names of a Llama, and with a table of positions."
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    size = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": positions}
    ends = {"bos_token_id": 256, "eos_token_id": 256}
    config = GPT2Config(vocab_size=257, **size, **ends)
    GPT2LMHeadModel(config).save_pretrained(folder / "gpt2")
    AutoTokenizer.from_pretrained(folder / "tiny").save_pretrained(
        folder / "gpt2"
    )
    return folder / "gpt2"


def test_another_kind_of_model_gets_adapters_where_peft_puts_them(made):
    model = save_gpt2(made)
    texts = made / "new.txt", made / "old.txt"
    given = SMALL | {"output": made / "out", "steps": 1, "rates": [1e-3]}
    done = compare(model, *texts, lora=2, **given)
    assert [run["lora"] for run in done.runs] == [None, 2]
    given |= {"output": made / "adapted", "rates": 1e-3, "lora": 2}
    dmr.finetune(model, made / "new.txt", **given)
    config = read_object(made / "adapted/model/adapter_config.json")
    assert config["target_modules"] == ["c_attn"]


def test_adapters_are_looked_at_before_the_first_training(made, monkeypatch):
    model = save_gpt2(made)
    texts = made / "new.txt", made / "old.txt"
    given = SMALL | {"output": made / "out"}
    known = "peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING"
    monkeypatch.setattr(Training, "train_step", None)
    with pytest.raises(ValueError, match="by targets=.'nope'.; .*'c_attn'"):
        compare(model, *texts, targets=["nope"], **given)
    with pytest.raises(ValueError, match="by targets=.'mlp'.; .*'c_attn'"):
        compare(model, *texts, targets=["mlp"], **given)  # no single layer
    with pytest.raises(ValueError, match="is of adapters, and no training"):
        compare(model, *texts, targets=["c_attn"], controls=False, **given)
    monkeypatch.setattr(known, {})
    with pytest.raises(ValueError, match="none of the layers that usually"):
        compare(model, *texts, **given)
    assert not (made / "out").exists()


def test_rows_are_no_longer_than_the_model_reads(made):
    "Neither those of training nor what it writes; asked for, or as usual."
    model = save_gpt2(made, positions=32)
    given = SMALL | {"output": made / "out", "steps": 1}
    texts = made / "new.txt", made / "old.txt"
    for call in (dmr.finetune, compare):
        with pytest.raises(ValueError, match="length=33 is more than the 32"):
            call(model, *texts, **given | {"length": 33})
    assert not (made / "out").exists()
    del given["length"]
    done = dmr.finetune(model, texts[0], "self", **given)
    assert done.request["length"] == 32
    assert make_request(made / "tiny", "n", device="cpu").length == 128


def test_a_table_of_positions_ends_whatever_else_a_file_names(made):
    model = save_gpt2(made, positions=32)
    path = model / "config.json"
    config = json.loads(path.read_text()) | {"rope_scaling": None}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="length=48 is more than the 32"):
        dmr.finetune(model, made / "new.txt", output=made / "out", **SMALL)


def test_rotary_angles_go_on_where_a_longer_row_is_asked_for(made):
    model = save_small_llama(made / "short", width=32, context=32)
    assert make_request(model, "n", device="cpu").length == 32
    given = SMALL | {"output": made / "out", "length": 48}
    said = pytest.warns(UserWarning, match="length=48 is more than the 32 pos")
    refused = pytest.raises(ValueError, match="length=48 exceeds the 32 posit")
    with said, refused:  # what it was not trained for it shall not write
        dmr.finetune(model, made / "new.txt", "self", **given)
    assert not (made / "out").exists()
    with said:
        done = dmr.finetune(model, made / "new.txt", made / "old.txt", **given)
    assert done.learned[0] > 0 and done.request["length"] == 48


def test_old_text_that_is_new_as_well_is_spoken_of(tmp_path):
    def asked(new, old):
        for name, texts in (("new", new), ("old", old)):
            rows = [json.dumps({"text": text}) for text in texts]
            (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
        names = (tmp_path / "new.jsonl", tmp_path / "old.jsonl")
        return read_sources(make_request("m", *names, device="cpu"))

    with pytest.raises(ValueError, match="2 of 2 texts in keep="):
        asked("abc", "ab")
    with pytest.raises(ValueError, match="1 of 3 texts in keep="):
        asked("a", "abc")
    with pytest.warns(UserWarning, match="1 of 2 texts in keep="):
        asked("ab", "bc")
    assert len(asked("ab", "cd")["old"]) == 2


def _damaged(kind, folder):
    weights, words = folder / "model.safetensors", folder / "tokenizer.json"
    config = folder / "tokenizer_config.json"
    if kind == "cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif kind == "lost":
        weights.unlink()
    elif kind == "another":
        save_small_llama(folder.with_name("wide"), width=64)
        shutil.copy(folder.with_name("wide") / weights.name, weights)
    elif kind == "words":
        words.unlink()
        config.unlink()
    else:
        found = json.loads(config.read_text())
        kept = {k: x for k, x in found.items() if not k.endswith("os_token")}
        config.write_text(json.dumps(kept))


@pytest.mark.parametrize(
    "kind, said",
    [
        ("cut", "tiny' cannot be opened .*: copy or download it again"),
        ("lost", "tiny' cannot be opened .*: copy or download it again"),
        ("another", "tiny' cannot be opened .*: copy or download it again"),
        ("words", "tiny' has no tokenizer; write one .*NAME..save_pretrained"),
        ("end", "tiny' has no end-of-text token.* tokenizer.eos_token = "),
    ],
)
def test_a_model_that_lacks_something_is_named_with_the_way_out(
    kind, said, made
):
    _damaged(kind, made / "tiny")
    with pytest.raises(ValueError, match=said):
        tuned(made)
    assert not (made / "out").exists()


def test_a_tokenizer_needs_no_padding(made):
    "Rows are full, so nothing is filled up."
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(made / "tiny").pad_token is None
    assert tuned(made, steps=1).run["change"]


def test_an_adapters_folder_is_a_model(made, monkeypatch, capsys):
    "It names its model from every folder; the two are trained as one."
    import peft
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(made)
    given = SMALL | {"lora": 2, "output": "first", "keep": "old.txt"}
    first = dmr.finetune("tiny", "new.txt", **given)
    (made / "third.txt").write_text("The moon has no wind at all. " * 120)
    (made / "elsewhere").mkdir()
    monkeypatch.chdir(made / "elsewhere")
    base = AutoModelForCausalLM.from_pretrained(made / "tiny")
    folder = made / first.checkpoint
    adapted = peft.PeftModel.from_pretrained(base, folder).eval()
    model, tokenizer = finetune_module.merged_model(folder)
    ids = tokenizer("Rain falls", return_tensors="pt")["input_ids"]
    wanted = adapted(input_ids=ids).logits
    torch.testing.assert_close(model(input_ids=ids).logits, wanted)
    with adapted.disable_adapter():
        assert not torch.allclose(adapted(input_ids=ids).logits, wanted)
    given = SMALL | {"output": made / "on", "progress": True}
    on = dmr.finetune(folder, made / "third.txt", **given)
    assert "keep='saved'" not in capsys.readouterr().out
    assert on.parameters["trained"] == on.parameters["all"]
    # it begins where the adapter ended, but for a loss of the merge's digits
    losses = first.texts["factbook"]["bits_per_byte"]
    losses += first.run["change"]["factbook"]["bits_per_byte"]
    assert on.texts["factbook"]["bits_per_byte"] == pytest.approx(losses, 1e-5)
    weights_in(on.checkpoint)  # an ordinary folder


def test_an_adapters_folder_says_what_it_cannot(made):
    first = tuned(made, "first", lora=2)
    folder, third = first.checkpoint, made / "third.txt"
    third.write_text("The moon has no wind at all. " * 120)
    given = SMALL | {"output": made / "out"}
    call = partial(dmr.finetune, folder, third, **given)
    for wrong, said in (
        ({"lora": 2}, "lora=2 on .*merged_model"),
        ({"keep": "saved"}, "keep='saved' is not offered for .*an adapter"),
    ):
        with pytest.raises(ValueError, match=said):
            call(**wrong)
    with pytest.raises(ValueError, match="lora=8 on .*lora=None"):
        compare(folder, third, made / "old.txt", **given)
    path = made / "first/model/adapter_config.json"
    config = json.loads(path.read_text())
    assert config["base_model_name_or_path"] == str(made / "tiny")
    (made / "tiny").rename(made / "away")
    with pytest.raises(ValueError, match="holds an adapter for .*tiny', which"):
        call()
    path.write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="names no model .*base_model_name_or"):
        call()
    assert not (made / "out").exists()


def test_an_older_folder_is_gone_on_with(made, monkeypatch):
    "A parameter that it does not know has the value that a request gives it."
    stop(monkeypatch, lambda: tuned(made), lambda x: x.step == 2)
    path = made / "out/request.json"
    found = read_object(path)
    del found["request"]["accumulation"]
    write_object(path, found)
    (state,) = (made / "out/runs").glob("*/state.pt")
    contents = last_checkpoint(state)
    del contents["identity"]["accumulation"]
    write_checkpoint(state, contents)
    with pytest.raises(ValueError, match="accumulation=None there and 1 here"):
        tuned(made)
    usual = lambda request: {"accumulation": 1}
    monkeypatch.setattr(finetune_module, "_defaults", usual)
    whole = tuned(made, "whole")
    assert numbers(tuned(made)) == numbers(whole)


def test_a_model_that_cannot_recompute_says_so(made, monkeypatch):
    from transformers import LlamaForCausalLM

    kind = "supports_gradient_checkpointing"
    monkeypatch.setattr(LlamaForCausalLM, kind, False)
    for lora in (None, 2):
        with pytest.raises(ValueError, match="checkpointing=True is not off"):
            tuned(made, checkpointing=True, lora=lora)
    assert not (made / "out").exists()


def test_a_name_that_nobody_can_be_asked_for_fails_at_once(made, monkeypatch):
    "And not after half a minute of retries."
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    began = time.perf_counter()
    given = SMALL | {"output": made / "out"}
    with pytest.raises(ValueError, match="'some/modle' here, and http://127"):
        dmr.finetune("some/modle", made / "new.txt", **given)
    assert time.perf_counter() - began < 10
    assert not (made / "out").exists()


def test_with_a_card_the_usual_steps_fit_the_text(made, monkeypatch):
    "Eight rows of 512 tokens a step, four bytes a token."
    card = lambda name: torch.device(name)
    monkeypatch.setattr(finetune_module, "_usable_device", card)
    monkeypatch.setattr(finetune_module, "native_bfloat16", lambda d: False)

    def steps(size, device="cuda", **other):
        (made / "new.txt").write_text("x" * size)
        where = {"device": device} | other
        return make_request("m", made / "new.txt", **where).steps

    megabyte = 0.9 * 1_000_000 / 4 / (8 * 512)  # steps that read it once
    assert abs(steps(1_000_000) - 3 * megabyte) < 1
    assert abs(steps(1_000_000, accumulation=2) - 1.5 * megabyte) < 1
    assert steps(20_000_000) == 500 and steps(100) == 1
    assert steps(100, steps=700) == 700  # what is asked for is asked for
    assert steps(100, device="cpu") == 40


def test_a_comparison_says_what_it_takes(made):
    call = partial(compare, made / "tiny", made / "new.txt")
    given = SMALL | {"output": made / "out"}
    with pytest.raises(ValueError, match="method='none' is what the others"):
        call(made / "old.txt", method="none", **given)
    with pytest.raises(ValueError, match="a file or a folder, or self"):
        call(**given)
    assert not (made / "out").exists()
    alone = call(made / "old.txt", method="projection", controls=False, **given)
    assert [run["method"] for run in alone.runs] == ["projection"]


def test_trainings_that_have_ended_are_counted(made, capsys, monkeypatch):
    "Also those of an earlier sitting; with the time that the others take."
    given = SMALL | {"output": made / "out", "progress": True}
    given |= {"rates": [1e-3, 3e-3], "lora": 2, "steps": 4}
    call = partial(compare, made / "tiny", made / "new.txt", made / "old.txt")
    stop(
        monkeypatch,
        lambda: call(**given),
        lambda x: x.arm.rate == 3e-3 and x.step == 1,
    )
    first = [x for x in capsys.readouterr().out.splitlines() if " done: " in x]
    assert len(first) == 1 and first[0].startswith("1 of 4 trainings done: me")
    assert re.search(r"learned [+-]\d.*; about \d+:\d\d left$", first[0])
    done = call(**given)
    said = [x for x in capsys.readouterr().out.splitlines() if " done: " in x]
    assert [line[:6] for line in said] == [f"{k} of 4" for k in (1, 2, 3, 4)]
    assert ["left" in line for line in said] == [False, True, True, False]
    assert all(run["name"] in x for run, x in zip(done.runs, said))
    # adapters at ten times the rates, read off as the others are
    adapted = [run["rate"] for run in done.runs if run["lora"]]
    assert adapted == pytest.approx([1e-2, 3e-2])
    rows = equal_learning_table(done).index
    assert {"LoRA, rank 2, at other rates", "stopped early"} <= set(rows)


def test_a_bar_stands_where_the_trainings_are():
    "Found ones, diverged ones and a half one are on it."
    shown = finetune_module._Trainings(4, 10, 1, enabled=False)
    shown.bar = bar = Bar()
    shown.end({"name": "found", "error": "none"}, made=False)
    assert bar.n == 10
    shown.begin(1, 6, seconds=3.0)
    assert bar.n == 16
    shown.end({"name": "diverged", "error": "none"}, made=True)
    assert bar.n == 20


class Bar:
    "As much of a bar as is used."

    n = 0

    def update(self, by):
        self.n += by


def test_a_resumed_training_says_its_speed(capsys):
    "Of all its steps, over all their seconds."
    shown = finetune_module._Trainings(1, 10, 1000, True)
    shown.begin(0, 8, seconds=80.0)
    shown.interval = 0.0
    shown.step(0, "x", 8, torch.tensor(1.0))
    speed = re.search(r"([\d,]+) bytes/s", capsys.readouterr().out)[1]
    assert int(speed) == 100


def test_a_short_text_is_told_of(made, capsys):
    (made / "new.txt").write_text(NEW * 24)
    tuned(made, progress=True, keep=None)
    assert "is short" not in capsys.readouterr().out
    tuned(made, "many", progress=True, steps=60, looks=1, keep=None)
    line = next(
        x for x in capsys.readouterr().out.splitlines() if "is short" in x
    )
    r = make_request(
        made / "tiny", made / "new.txt", length=48, windows=2, device="cpu"
    )
    rows = len(Bench(r, read_sources(r), None).texts.train[0])
    assert f"60 steps read it {120 / rows:.0f} times" in line
    assert line.endswith(f"steps={round(3 * rows / 2)}")


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


@pytest.mark.parametrize("lora", [None, 2])
def test_other_weights_under_the_same_name_are_not_gone_on_with(
    lora, made, monkeypatch
):
    call = lambda: tuned(made, lora=lora)
    stop(monkeypatch, call, lambda x: x.step == 2)
    save_small_llama(made / "tiny", seed=1, width=32)
    with pytest.raises(ValueError, match="is of a run with start="):
        call()


def test_rates_that_remain_are_not_made_from_other_weights(made, monkeypatch):
    call = lambda: tuned(made, rates=[1e-3, 3e-3], lora=2)
    stop(monkeypatch, call, lambda x: x.arm.rate == 3e-3)
    save_small_llama(made / "tiny", seed=1, width=32)
    with pytest.raises(ValueError, match="has other weights than when .*0.001"):
        call()


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


FULL = (
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"),
)


@pytest.mark.parametrize("error", FULL, ids=["card", "processor"])
def test_a_batch_without_room_names_the_ways_out(error, made, monkeypatch):
    "And leaves the folder free for a smaller batch, if nothing was done."
    step = Training.train_step

    def full(self):
        if self.arm.rate == 1e-3:
            raise error
        return step(self)

    monkeypatch.setattr(Training, "train_step", full)
    said = "batch=2 rows of length=48 .* cpu; pass a smaller batch"
    with pytest.raises(MemoryError, match=said):
        tuned(made, rates=1e-3)
    assert not (made / "out").exists()
    with pytest.raises(MemoryError, match=said):
        tuned(made, rates=[3e-3, 1e-3], keep=None)
    assert (made / "out/runs/none-0.003/run.json").exists()


def test_a_folder_of_the_users_survives_a_failure(made):
    (made / "out").mkdir()
    with pytest.raises(ValueError, match="not finite"):
        tuned(made, rates=1e30)
    assert tuned(made).learned[0] > 0


@pytest.mark.parametrize("method", [m for m in METHODS if m != "none"])
def test_what_was_protected_is_saved_and_gone_on_with(method, made):
    first = tuned(made, "first", method=method)
    (made / "tiny").rename(made / "base")
    (made / "first/model").rename(made / "tiny")
    saved = read_kept(made / "tiny/router.pt")["state"]
    assert saved["domains"] == 2  # the old text, and the new one
    (made / "new.txt").write_text("The moon has no wind at all today. " * 120)
    on = tuned(made, "on", keep="saved")
    assert on.request["method"] == first.request["method"] == method
    assert set(on.texts) == {"new", "factbook", "speeches"}
    plain = tuned(made, "plain", keep=None)
    assert on.run["change"] != plain.run["change"]
    again = read_kept(made / "on/model/router.pt")["state"]
    assert again["domains"] == 3
    # both texts are in it: what the first one's file knew, and more
    if method == "merge":
        past = saved["consolidation"]["past"]
        later = again["consolidation"]["past"]
        assert all((later[n] > 0.4 * x).all() for n, x in past.items())
    if method == "replay":
        assert len(again["edit"]["domain"]) > len(saved["edit"]["domain"])
    # a second training of the same call begins as if it were alone
    both = tuned(made, "both", keep="saved", rates=[1e-3, 3e-3])
    assert both.runs[1] | {"seconds": 0} == on.run | {"seconds": 0}


def test_a_saved_past_survives_an_interruption(made, monkeypatch):
    tuned(made, "first", method="merge")
    (made / "tiny").rename(made / "base")
    (made / "first/model").rename(made / "tiny")
    whole = tuned(made, "whole", keep="saved", accumulation=2)
    stop(
        monkeypatch,
        lambda: tuned(made, "parts", keep="saved", accumulation=2),
        lambda x: x.step == 2,
    )
    parts = tuned(made, "parts", keep="saved", accumulation=2)
    assert numbers(parts) == numbers(whole)


def test_a_saved_past_is_of_its_method_and_its_weights(made, capsys):
    done = tuned(made, "first", method="merge")
    model = made / "first/model"

    def on(**other):
        given = SMALL | {"output": made / "out", "keep": "saved"} | other
        return dmr.finetune(done.checkpoint, made / "new.txt", **given)

    for wrong, said in (
        ({"method": "replay"}, "which 'merge' wrote; leave method out"),
        ({"lora": 2}, "leave lora out"),
    ):
        with pytest.raises(ValueError, match=said):
            on(**wrong)
    on(keep=None, progress=True, output=made / "plain")
    assert "keep='saved' to go on with it" in capsys.readouterr().out
    save_small_llama(made / "other", seed=1, width=32)
    (made / "other/model.safetensors").replace(model / "model.safetensors")
    with pytest.raises(ValueError, match="with other weights than lie there"):
        on()
    assert not (made / "out").exists()


def test_a_saved_past_is_one_line_in_a_loop_of_ones_own(made):
    from transformers import AutoModelForCausalLM

    done = tuned(made, method="merge+projection")
    model = AutoModelForCausalLM.from_pretrained(done.checkpoint)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    path = f"{done.checkpoint}/router.pt"
    router = MomentRouter.load(path, model, optimizer)
    assert router.domains == 2 and router.consolidation.past


def test_a_saved_projection_may_leave_its_rank_to_the_method():
    go_on = finetune_module._go_on
    saved = {"modification": {"options": {"rank": None}}}
    assert go_on(saved, {}) == {}
    saved["modification"]["options"]["rank"] = 4
    assert go_on(saved, {}) == {"rank": 4}
    saved["modification"]["options"] = {"rank": None, "energy": 0.9}
    with pytest.raises(ValueError, match="energy=0.9, which no request"):
        go_on(saved, {})


def settings_of(done):
    "Rank, strength and weight of the router that a training left."
    parts = read_kept(f"{done.checkpoint}/router.pt")["parts"]
    asked = (("modification", "rank"), ("strength", "alpha"))
    asked += (("consolidation", "weight"),)
    return [parts[part]["options"][name] for part, name in asked]


def test_the_settings_of_a_method_can_be_asked_for(made):
    asked = {"method": "merge+projection", "rank": 4, "strength": 0.9}
    done = tuned(made, weight=0.3, **asked)
    assert settings_of(done) == [4, 0.9, 0.3]
    for name, value in (("rank", 0), ("strength", 1.5), ("weight", 0)):
        with pytest.raises(ValueError, match=f"{name}={value}.* lies outside"):
            tuned(made, "other", **asked | {"weight": 0.3, name: value})
    # what was protected goes on as it was
    third = made / "third.txt"
    third.write_text("The moon has no wind at all. " * 120)
    go_on = partial(dmr.finetune, done.checkpoint, third, "saved", **SMALL)
    with pytest.raises(ValueError, match="rank=8 with keep='saved'"):
        go_on(rank=8, output=made / "third")
    assert not (made / "third").exists()
    assert settings_of(go_on(output=made / "third")) == [4, 0.9, 0.3]


@pytest.mark.parametrize(
    "name, method, part",
    [
        ("rank", "merge", "projection"),
        ("strength", "replay", "projection"),
        ("weight", "projection", "merge"),
    ],
)
def test_a_setting_without_its_method_is_named(made, name, method, part):
    said = f"{name}=1 is of a {part}, and method='{method}' has none"
    with pytest.raises(ValueError, match=said):
        tuned(made, method=method, **{name: 1})
    assert not (made / "out").exists()


def test_without_a_method_there_is_no_router_to_save(made):
    done = tuned(made, keep=None)
    assert not (made / "out/model/router.pt").exists()
    assert done.run["method"] == "none"


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
