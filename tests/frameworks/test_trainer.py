"""transformers' Trainer and Accelerate, for real on a small model: they route
as a bare loop does, with accumulation, clipping and bf16.
"""

import shutil
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")

import peft
from transformers import (
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from dmr.frameworks.callbacks import DomainCallback
from dmr.frameworks.lora import route_lora
from dmr.frameworks.trainer import Routed, RoutedTrainer, RouterCallback
from dmr.methods.consolidation import FisherMerge
from dmr.methods.projection import Projection
from dmr.methods.replay import ReplayBuffer, ReplayMix
from dmr.methods.rivals import RegMean
from dmr.routing.kept import read_kept
from dmr.routing.router import MomentRouter
from dmr.routing.strength import OverlapAware
from dmr.training.pretrained import small_llama

torch.set_num_threads(1)
warnings.simplefilter("ignore")
LR = 3e-3


def adapted(dtype=torch.float32):
    model, _ = small_llama(width=16, layers=1, context=32)
    torch.manual_seed(0)
    return peft.get_peft_model(
        model.to(dtype),
        peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    )


def data(n=32):
    rows = torch.randint(
        0, 257, (n, 12), generator=torch.Generator().manual_seed(1)
    )
    return [{"input_ids": row, "labels": row} for row in rows]


def arguments(folder, steps=8, **options):
    given = dict(
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=LR,
        adam_beta2=0.95,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        use_cpu=True,
        seed=0,
    )
    return TrainingArguments(output_dir=str(folder), **given | options)


def made():
    return Projection(rank=2, every=1), "decoupled", OverlapAware(0.9)


def over(model):
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        trained, lr=LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )


class InOrder(Trainer):
    """A Trainer that reads its data in order, so that a bare loop can read the
    same.
    """

    def _get_train_sampler(self, *args, **options):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def bare_loop(
    boundaries, every=1, clip=None, dtype=torch.float32, autocast=False
):
    model = adapted(dtype)
    optimizer = over(model)
    router = route_lora(model, optimizer, *made(), protect="both")
    rows, step = torch.stack([r["input_ids"] for r in data()]), 0
    for i, batch in enumerate(rows.split(4)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=batch, labels=batch).loss
        (loss / every).backward()
        if (i + 1) % every:
            continue
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step in boundaries:
            router.consolidate()
    return model, router


def close(a, b, rtol=1e-4, atol=1e-5):
    for (name, p), q in zip(a.named_parameters(), b.parameters()):
        torch.testing.assert_close(p, q, rtol=rtol, atol=atol, msg=name)


@pytest.mark.parametrize(
    ("options", "bare"),
    [
        ({}, {}),
        ({"gradient_accumulation_steps": 2}, {"every": 2}),
        ({"max_grad_norm": 0.02}, {"clip": 0.02}),
        (
            {"gradient_accumulation_steps": 2, "max_grad_norm": 0.02},
            {"every": 2, "clip": 0.02},
        ),
        ({"bf16": True}, {"autocast": True}),
    ],
)
def test_the_trainer_routes_as_a_bare_loop_does(options, bare, tmp_path):
    steps = 8 // bare.get("every", 1)
    boundaries = [steps // 2, steps]
    callback = RouterCallback(*made(), protect="both", boundaries=boundaries)
    trainer = InOrder(
        adapted(),
        arguments(tmp_path, steps, **options),
        train_dataset=data(),
        callbacks=[callback],
    )
    trainer.train()
    model, router = bare_loop(boundaries, **bare)
    assert (
        callback.router.steps == router.steps == steps
        and callback.router.domains == router.domains == 2
    )
    assert (
        callback.router.last["alpha"]
        == pytest.approx(router.last["alpha"], rel=1e-3)
        and router.last["alpha"] < 0.9
    )
    close(trainer.model, model, *((2e-2, 1e-3) if "bf16" in options else ()))


def test_weights_in_bf16_keep_their_bases_in_fp32(tmp_path):
    callback = RouterCallback(*made(), protect="both", boundaries=[4, 8])
    trainer = Trainer(
        adapted(torch.bfloat16),
        arguments(tmp_path),
        train_dataset=data(),
        callbacks=[callback],
    )
    trainer.train()
    assert {U.dtype for U in callback.router.modification.bases.values()} == {
        torch.float32
    }
    assert all(bool(p.isfinite().all()) for p in trainer.model.parameters())


# within the first domain, at the boundary, within the second
@pytest.mark.parametrize("step", [2, 4, 6])
@pytest.mark.parametrize("method", ["projection", "replay"])
def test_resumed_from_the_trainers_checkpoint_it_is_bit_identical(
    step, method, tmp_path
):
    def run(resume=None):
        model = adapted()
        loss_fn = lambda batch: model(**batch).loss
        how = (
            made()
            if method == "projection"
            else (
                ReplayMix(ReplayBuffer(0), loss_fn, fraction=0.25),
                "decoupled",
                0.5,
            )
        )
        callback = RouterCallback(*how, protect="both", boundaries=[4, 8])
        args = arguments(
            tmp_path,
            save_strategy="steps",
            save_steps=2,
            gradient_accumulation_steps=2,
        )
        trainer = RoutedTrainer(
            model, args, train_dataset=data(64), router=callback
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model, callback

    whole, first = run()
    resumed, second = run(str(tmp_path / f"checkpoint-{step}"))
    assert all(
        torch.equal(p, q)
        for p, q in zip(whole.parameters(), resumed.parameters())
    )
    assert (
        (second.router.steps, second.router.domains)
        == (first.router.steps, first.router.domains)
        == (8, 2)
    )


def two_runs(folder):
    "Of one model on two domains, each with its checkpoint-3."

    def routed(name, domain, kind=RoutedTrainer, **more):
        args = arguments(
            folder / name, 4, save_strategy="steps", save_steps=3, **more
        )
        rows = data(64)[32 * domain :][:32]
        callback = RouterCallback(Projection(rank=2, every=1))
        given = {"train_dataset": rows}
        model, _ = small_llama(width=16, layers=1, context=32)
        if kind is Trainer:
            return Trainer(model, args, callbacks=[callback], **given), callback
        return kind(model, args, router=callback, **given), callback

    for domain, name in enumerate("XY"):
        routed(name, domain)[0].train()
    return routed


@pytest.mark.parametrize("named", [str, Path])
def test_a_run_resumes_in_the_folder_of_another(named, tmp_path):
    "The router's file is that of the folder `train` was told."
    routed = two_runs(tmp_path)
    trainer, callback = routed("Y", 0)
    path = tmp_path / "X/checkpoint-3"
    taken, whole = [], read_kept(path / "router.pt")["weights"]
    take_up = MomentRouter.take_up
    with pytest.MonkeyPatch.context() as watched:
        watched.setattr(
            MomentRouter,
            "take_up",
            lambda it, contents: (
                taken.append(contents["weights"]),
                take_up(it, contents),
            ),
        )
        trainer.train(resume_from_checkpoint=named(path))
    assert taken == [whole] and callback.router.steps == 4
    assert callback.told is None  # it may go on with a plain Trainer
    (path / "router.pt").unlink()
    with pytest.raises(FileNotFoundError, match="router.pt in .*X.checkpoint"):
        routed("Y", 0)[0].train(resume_from_checkpoint=named(path))


def test_the_folders_own_last_checkpoint_is_meant_by_true(tmp_path):
    "Whatever the arguments name, which the Trainer does not read."
    routed = two_runs(tmp_path)
    elsewhere = {"resume_from_checkpoint": str(tmp_path / "X/checkpoint-3")}
    shutil.rmtree(tmp_path / "Y/checkpoint-4")
    trainer, callback = routed("Y", 1, **elsewhere)
    trainer.train(resume_from_checkpoint=True)
    assert callback.router.steps == 4


def test_a_plain_trainer_says_where_it_resumes_in_its_arguments(tmp_path):
    "Told to `train` alone, another run's file is found out and refused."
    routed, path = two_runs(tmp_path), str(tmp_path / "X/checkpoint-3")
    trainer, _ = routed("Y", 0, Trainer)
    said = r"Y.checkpoint-3.router.pt: .*other weights.*set args.resume_from"
    with pytest.raises(ValueError, match=said):
        trainer.train(resume_from_checkpoint=path)
    told = {"resume_from_checkpoint": path}
    trainer, callback = routed("Y", 0, Trainer, **told)
    trainer.train(**told)
    assert callback.router.steps == 4


@pytest.mark.parametrize("how", ["lost", "a bit"])
@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt"])
def test_a_checkpoint_with_a_file_lost_or_changed_is_refused(
    file, how, tmp_path
):
    def run(resume=None):
        callback = RouterCallback(*made(), protect="both")
        args = arguments(
            tmp_path, save_strategy="steps", save_steps=2, max_steps=4
        )
        RoutedTrainer(
            adapted(), args, train_dataset=data(64), router=callback
        ).train(resume_from_checkpoint=resume)

    run()
    folder = tmp_path / "checkpoint-2"
    run(str(folder))  # whole, it is taken
    whole = bytearray((folder / file).read_bytes())
    whole[len(whole) // 2] ^= 1
    (folder / file).unlink()
    if how == "a bit":
        (folder / file).write_bytes(whole)
    with pytest.raises(Exception, match=f"{file} is lost, or not what was"):
        run(str(folder))
    (folder / "router.files.json").unlink()
    if how == "lost":
        run(str(folder))  # the user's own doing


@pytest.mark.parametrize("attach", ["before", "after"])
def test_accelerate_routes_as_a_bare_loop_does(attach):
    """Accumulation and clipping by Accelerate; the router attached before or
    after `prepare`.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = adapted()
    optimizer = over(model)
    router = (
        route_lora(model, optimizer, *made(), protect="both")
        if attach == "before"
        else None
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    router = router or route_lora(model, optimizer, *made(), protect="both")
    for i, batch in enumerate(
        torch.stack([r["input_ids"] for r in data()]).split(4)
    ):
        with accelerator.accumulate(model):
            accelerator.backward(model(input_ids=batch, labels=batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.02)
            optimizer.step()
            optimizer.zero_grad()
        if i + 1 in (4, 8):
            router.consolidate()
    bare, other = bare_loop([2, 4], every=2, clip=0.02)
    assert router.steps == other.steps == 4
    close(model, bare)


def test_accelerates_checkpoint_and_the_routers_resume_bit_identically(
    tmp_path,
):
    from accelerate import Accelerator

    def begin():
        accelerator = Accelerator(cpu=True)
        model = adapted()
        optimizer = over(model)
        model, optimizer = accelerator.prepare(model, optimizer)
        router = route_lora(model, optimizer, *made(), protect="both")
        accelerator.register_for_checkpointing(router)
        return accelerator, model, optimizer, router

    def steps(parts, accelerator, model, optimizer, router):
        for batch in parts:
            accelerator.backward(model(input_ids=batch, labels=batch).loss)
            optimizer.step()
            optimizer.zero_grad()

    rows = torch.stack([r["input_ids"] for r in data()]).split(4)
    whole = begin()
    steps(rows[:4], *whole)
    whole[3].consolidate()
    steps(rows[4:5], *whole)
    whole[0].save_state(str(tmp_path / "kept"))
    steps(rows[5:], *whole)
    resumed = begin()
    steps(rows[:1], *resumed)  # so that there is a state to be replaced
    resumed[0].load_state(str(tmp_path / "kept"))
    steps(rows[5:], *resumed)
    assert all(
        torch.equal(p, q)
        for p, q in zip(whole[1].parameters(), resumed[1].parameters())
    )
    assert (resumed[3].steps, resumed[3].domains) == (8, 1)


def test_a_full_model_is_routed_by_the_same_two_lines(tmp_path):
    callback = RouterCallback(
        Projection(rank=2, every=1), "shared", 0.9, boundaries=[4, 8]
    )
    model, _ = small_llama(width=16, layers=1, context=32)
    Trainer(
        model, arguments(tmp_path), train_dataset=data(), callbacks=[callback]
    ).train()
    assert (
        isinstance(callback.router, MomentRouter)
        and callback.router.domains == 2
    )
    assert all("proj" in name for name in callback.router.modification.bases)


@pytest.mark.parametrize("merges", [False, True])
def test_a_training_that_begins_unprotected_says_so(merges, tmp_path):
    "Of a projection and of a merge; not where the file is beside the model."

    def parts():
        if merges:
            return {"consolidation": FisherMerge()}
        return {"modification": Projection(rank=2, every=1)}

    def trained(model):
        callback = RouterCallback(**parts())
        args, rows = arguments(tmp_path / "run", steps=2), data(8)
        one = RoutedTrainer(model, args, train_dataset=rows, router=callback)
        one.train()
        return one, callback.router.domains

    small_llama(width=16, layers=1, context=32)[0].save_pretrained(
        tmp_path / "first"
    )
    load = LlamaForCausalLM.from_pretrained
    with pytest.warns(UserWarning, match="first': training begins unprotected"):
        one, domains = trained(load(tmp_path / "first"))
    assert domains == 1
    one.save_model(str(tmp_path / "second"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*unprotected")
        assert trained(load(tmp_path / "second"))[1] == 2
        trained(small_llama(width=16, layers=1, context=32)[0])  # made here


def test_a_plain_trainer_refuses_at_the_start_what_keeps_examples(tmp_path):
    "Not after the whole domain, where nothing was kept."
    keeps = ReplayMix(ReplayBuffer(), lambda batch: batch.sum())
    model, _ = small_llama(width=16, layers=1, context=32)
    callbacks, rows = [RouterCallback(keeps)], data(8)
    trainer = Trainer(
        model, arguments(tmp_path), train_dataset=rows, callbacks=callbacks
    )
    with pytest.raises(ValueError, match=r"use RoutedTrainer\(..., router=c"):
        trainer.train()
    assert trainer.state.global_step == 0


class Stop(TrainerCallback):
    "Early, after a checkpoint."

    def on_step_end(self, args, state, control, **more):
        stop = state.global_step == 2
        control.should_save = control.should_training_stop = stop


def test_a_process_that_begins_in_an_open_domain_is_warned(tmp_path):
    "From what was written before an early stop; closed first, all is well."

    def routed(model, *callbacks):
        edit, merge = Projection(rank=2, every=1), FisherMerge()
        one = RoutedTrainer(
            model,
            arguments(tmp_path / "run", steps=4),
            train_dataset=data(),
            callbacks=[*callbacks],
            router=RouterCallback(edit, consolidation=merge),
        )
        return one, one.routed

    load = LlamaForCausalLM.from_pretrained
    path, said = tmp_path / "run/checkpoint-2", "2 steps after the last boundar"
    first, _ = routed(small_llama(width=16, layers=1, context=32)[0], Stop())
    first.train()
    first.save_model(str(tmp_path / "over"))
    with pytest.warns(UserWarning, match=said):
        routed(load(path))[0].train()
    closed, callback = routed(load(path))
    closed.create_optimizer()
    with pytest.warns(UserWarning, match=said):
        callback.begin(closed.model)
    callback.consolidate()
    over, _ = routed(load(tmp_path / "over"))
    resumed, _ = routed(load(path))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*never closed")
        closed.train()
        over.train()
        resumed.train(resume_from_checkpoint=str(path))
    for p, q in zip(closed.model.parameters(), over.model.parameters()):
        assert torch.equal(p, q)


def test_one_callback_goes_on_with_a_model_that_was_loaded_again():
    "A new object with the weights of the last domain is no foreign model."
    torch.manual_seed(0)
    keeper = DomainCallback(Projection(rank=2), consolidation=FisherMerge(0.5))
    model, shares = torch.nn.Linear(6, 3), []
    for _ in range(3):
        again = torch.nn.Linear(6, 3)
        again.load_state_dict(model.state_dict())
        model = again
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        router = keeper.attach(model, optimizer)
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(8, 6)).square().mean().backward()
            optimizer.step()
        shares.append(router.consolidate().get("consolidation"))
    assert router.domains == 3
    assert not shares[0] and all(0 < x["share"] < 1 for x in shares[1:])


def test_a_trainer_whose_train_takes_nothing_is_routed_too():
    class Plain:
        def __init__(self):
            self.callbacks = []

        def add_callback(self, callback):
            self.callbacks.append(callback)

        def train(self):
            return "trained"

    class Mine(Routed, Plain):
        pass

    callback = RouterCallback(Projection(rank=2))
    assert Mine(router=callback).train() == "trained"


def steps_of(model, optimizer, n=4):
    for _ in range(n):
        optimizer.zero_grad()
        model(torch.randn(8, 6)).square().mean().backward()
        optimizer.step()


def meets(keeper, model):
    optimizer = torch.optim.Adam(
        [p for p in model.parameters() if p.requires_grad], 1e-2
    )
    return keeper.attach(model, optimizer), optimizer


@pytest.mark.parametrize("out", [3, 5])
def test_a_foreign_model_is_refused_and_what_is_known_is_kept(out):
    "One with other weights, or of another shape; then the right one goes on."
    torch.manual_seed(0)
    merge = FisherMerge(0.5)
    keeper = DomainCallback(Projection(rank=2), consolidation=merge)
    model = torch.nn.Linear(6, 3)
    router, optimizer = meets(keeper, model)
    steps_of(model, optimizer)
    keeper.consolidate()
    known = merge.before["weight"].clone()
    with pytest.raises(ValueError, match="knows the weights of another model"):
        meets(keeper, torch.nn.Linear(6, out))
    assert torch.equal(merge.before["weight"], known)
    again, optimizer = meets(keeper, model)
    assert again.domains == 1 and keeper.router is again
    steps_of(model, optimizer)
    assert 0 < keeper.consolidate()["consolidation"]["share"] < 1


def test_a_merge_that_calls_a_loss_is_refused_by_a_callback_too():
    model = torch.nn.Linear(6, 3)
    merge = RegMean(loss_fn=lambda x: model(x).square().mean())
    keeper = DomainCallback(consolidation=merge)
    router, optimizer = meets(keeper, model)
    for _ in range(3):
        router.observe(torch.randn(8, 6))
        steps_of(model, optimizer, 1)
    keeper.consolidate()
    loaded = torch.nn.Linear(6, 3)
    loaded.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="knows the weights of another model"):
        meets(keeper, loaded)


def test_layers_may_be_frozen_and_thawed_between_domains():
    model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 3))
    keeper = DomainCallback(
        Projection(rank=2, every=1), consolidation=FisherMerge(0.5)
    )
    for domain, frozen in enumerate(([], ["0"], [], ["1"])):
        for name, layer in model.named_children():
            layer.requires_grad_(name not in frozen)
        router, optimizer = meets(keeper, model)
        steps_of(model, optimizer)
        keeper.consolidate()
        assert router.domains == domain + 1


def test_a_callback_given_twice_ends_each_domain_once(tmp_path):
    callback = RouterCallback(Projection(rank=2, every=1))
    trainer = RoutedTrainer(
        adapted(), arguments(tmp_path, 4), train_dataset=data(),
        router=callback, callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    assert len(callback.reports) == 1


def test_a_training_that_ends_before_its_boundary_says_so(tmp_path):
    callback = RouterCallback(Projection(rank=2, every=1), boundaries=[10])
    trainer = RoutedTrainer(
        adapted(), arguments(tmp_path, 4), train_dataset=data(), router=callback
    )
    said = r"step 4, 4 steps into a domain: boundaries=\[10\] names no end"
    with pytest.warns(UserWarning, match=said):
        trainer.train()
