"""Lightning, for real on a small model: the callback routes exactly as a bare
loop, with accumulation, clipping and bf16, and resumes.
"""

import logging
import warnings

import pytest
import torch

pytest.importorskip("lightning")

import lightning.pytorch as lightning
from lightning.pytorch.callbacks import ModelCheckpoint

from dmr.frameworks.lightning import LightningRouter
from dmr.methods.consolidation import FisherMerge
from dmr.methods.projection import Projection
from dmr.methods.replay import ReplayBuffer, ReplayMix
from dmr.routing.router import MomentRouter
from dmr.routing.strength import OverlapAware

torch.set_num_threads(1)
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.simplefilter("ignore")


class Regression(lightning.LightningModule):
    "Two layers."

    def __init__(self, weight_decay=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(12, 16), torch.nn.GELU(), torch.nn.Linear(16, 3)
        )

    def loss(self, batch):
        x, y = batch
        return (self.net(x).float() - y).square().mean()

    def training_step(self, batch, index):
        return self.loss(batch)

    def configure_optimizers(self):
        return torch.optim.AdamW(
            self.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0
        )


def data(batches=8, size=4):
    generator = torch.Generator().manual_seed(1)
    x, y = (
        torch.randn(batches * size, 12, generator=generator),
        torch.randn(batches * size, 3, generator=generator),
    )
    return torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, y), batch_size=size
    )


def fit(
    callback, folder, module=None, ckpt_path=None, more=(), batches=8, **options
):
    module = module or Regression()
    trainer = lightning.Trainer(
        max_epochs=8 // batches,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(more),
        default_root_dir=folder,
        callbacks=[callback, *more],
        **options,
    )
    trainer.fit(module, data(batches), ckpt_path=ckpt_path)
    return module


def made():
    return Projection(rank=3, every=1), "decoupled", OverlapAware(0.9)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.05},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05},
        {"precision": "bf16-mixed"},
    ],
)
def test_it_routes_as_a_bare_loop_does(options, tmp_path):
    every, clip = (
        options.get("accumulate_grad_batches", 1),
        options.get("gradient_clip_val"),
    )
    boundaries = [2, 4] if every == 2 else [3, 8]
    callback = LightningRouter(*made(), boundaries=boundaries)
    module = fit(callback, tmp_path, **options)

    bare = Regression()
    optimizer = bare.configure_optimizers()
    router = MomentRouter(bare, optimizer, *made())
    for i, batch in enumerate(data()):
        with torch.autocast(
            "cpu", torch.bfloat16, enabled="precision" in options
        ):
            (bare.loss(batch) / every).backward()
        if (i + 1) % every:
            continue
        if clip:
            torch.nn.utils.clip_grad_norm_(bare.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        if (i + 1) // every in boundaries:
            router.consolidate()
    assert (
        callback.router.steps == router.steps == 8 // every
        and callback.router.domains == router.domains == 2
    )
    assert 0 < router.last["alpha"] < 0.9
    for p, q in zip(module.parameters(), bare.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    plain = fit(LightningRouter(None), tmp_path, **options)
    assert not torch.allclose(
        next(plain.parameters()), next(module.parameters()), rtol=1e-4
    )


# within the first domain, at the boundary, and within the second
@pytest.mark.parametrize("step", [2, 4, 6])
def test_resumed_from_lightnings_checkpoint_it_is_bit_identical(step, tmp_path):
    def run(resume=None):
        callback = LightningRouter(*made(), boundaries=[4, 8])
        keep = ModelCheckpoint(
            tmp_path,
            "at-{step}",
            save_on_train_epoch_end=True,
            save_top_k=-1,
            auto_insert_metric_name=False,
        )
        return (
            fit(callback, tmp_path, ckpt_path=resume, more=[keep], batches=2),
            callback,
        )

    whole, first = run()
    resumed, second = run(str(tmp_path / f"at-{step}.ckpt"))
    assert all(
        torch.equal(p, q)
        for p, q in zip(whole.parameters(), resumed.parameters())
    )
    assert (
        (second.router.steps, second.router.domains)
        == (8, 2)
        == (first.router.steps, first.router.domains)
    )
    assert all(
        torch.equal(U, second.router.modification.bases[n])
        for n, U in first.router.modification.bases.items()
    )


def test_replay_is_offered_the_batches(tmp_path):
    module = Regression()
    callback = LightningRouter(
        ReplayMix(ReplayBuffer(0), module.loss, fraction=0.25),
        "shared",
        0.5,
        boundaries=[4, 8],
    )
    fit(callback, tmp_path, module)
    assert [r["windows"] for r in callback.reports] == [8, 16]


def test_a_fit_is_a_domain_and_what_is_protected_stays(tmp_path):
    callback, module = (
        LightningRouter(Projection(rank=3, every=1)),
        Regression(),
    )
    for _ in range(2):
        fit(callback, tmp_path, module)
    assert callback.router.domains == 2
    assert callback.reports[1]["layers"]["net.0.weight"]["rank"] == 6


@pytest.mark.parametrize("every", [1, 2])
def test_each_fit_ends_its_domains_at_the_boundaries(every, tmp_path):
    "Though its global step begins at 0 again."
    callback = LightningRouter(made()[0], boundaries=[8 // every])
    module, domains = Regression(), []
    for _ in range(3):
        fit(callback, tmp_path, module, accumulate_grad_batches=every)
        domains.append(callback.router.domains)
    assert domains == [1, 2, 3]


def test_a_trainer_that_goes_on_ends_no_domain_twice(tmp_path):
    "Its global step goes on, and stays within the first accumulated batch."
    callback, module = LightningRouter(made()[0], boundaries=[4, 8]), None
    fit(callback, tmp_path, module := Regression(), accumulate_grad_batches=2)
    trainer = module.trainer
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, data())
    assert (trainer.global_step, callback.router.domains) == (8, 2)


def test_the_last_checkpoint_of_every_fit_is_past_its_boundary(tmp_path):
    "With the merged weights, where `max_steps` ends the fit."
    callback, module = merged(), Regression()
    for domain in (1, 2, 3):
        folder = tmp_path / str(domain)
        keep = ModelCheckpoint(folder, every_n_train_steps=4, save_top_k=-1)
        fit(callback, folder, module, more=[keep], max_steps=8)
        (path,) = folder.glob("*step=8.ckpt")
        read = torch.load(path, weights_only=True)
        state = read["callbacks"]["LightningRouter"]["router"]["state"]
        assert state["domains"] == domain
        assert state["boundary"] == state["steps"] == 8 * domain
        for name, x in module.state_dict().items():
            assert torch.equal(read["state_dict"][name], x)


def test_a_second_fit_on_one_callback_resumes_bit_identically(tmp_path):
    "From the step of its own first boundary, in another process."

    def run(callback, module, resume=None):
        keep = ModelCheckpoint(
            tmp_path / str(len(callback.reports)),
            "at-{step}",
            save_on_train_epoch_end=True,
            save_top_k=-1,
            auto_insert_metric_name=False,
        )
        more = {"more": [keep], "ckpt_path": resume, "batches": 4}
        fit(callback, tmp_path, module, accumulate_grad_batches=2, **more)

    routed = lambda: LightningRouter(*made(), boundaries=[2, 4])
    first, whole = routed(), Regression()
    run(first, whole)
    run(first, whole)
    second, resumed = routed(), Regression()
    run(second, resumed, str(tmp_path / "2/at-2.ckpt"))
    assert first.router.domains == second.router.domains == 4
    for p, q in zip(whole.parameters(), resumed.parameters()):
        assert torch.equal(p, q)


def test_a_past_may_be_shown_before_the_first_fit(tmp_path):
    "By a router on an optimizer of one's own; as in a bare loop."
    batches = [*data()]
    parts = lambda: (Projection(rank=3, every=1), "displacement", 0.9)
    callback = LightningRouter(*parts(), consolidation=FisherMerge())
    module = Regression()
    first = callback.attach(module, module.configure_optimizers())
    first.protect(batches[4:], module.loss)
    fit(callback, tmp_path, module)

    bare = Regression()
    optimizer = bare.configure_optimizers()
    merge = FisherMerge()
    router = MomentRouter(bare, optimizer, *parts(), consolidation=merge)
    router.protect(batches[4:], bare.loss)
    for batch in batches:
        optimizer.zero_grad()
        bare.loss(batch).backward()
        optimizer.step()
    router.consolidate()
    assert callback.router.domains == router.domains == 2
    for p, q in zip(module.parameters(), bare.parameters()):
        assert torch.equal(p, q)


def test_a_fit_that_begins_unprotected_says_so(tmp_path):
    "Where a part of the module was loaded from somewhere."
    loaded, made = Regression(), Regression()
    loaded.net.name_or_path = "some/model"
    routed = lambda: LightningRouter(consolidation=FisherMerge())
    with pytest.warns(UserWarning, match="some/model': training begins unpro"):
        fit(routed(), tmp_path, loaded)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*unprotected")
        fit(routed(), tmp_path, made)
        again = Regression()
        again.net.name_or_path = "some/model"
        known = routed()
        router = known.attach(again, again.configure_optimizers())
        router.protect([*data()], again.loss)
        fit(known, tmp_path, again)


def merged(**options):
    edit = Projection(rank=3, every=1)
    return LightningRouter(edit, consolidation=FisherMerge(), **options)


def kept(path):
    "A module with the weights of a checkpoint."
    module = Regression()
    read = torch.load(path, weights_only=True)["state_dict"]
    module.load_state_dict(read)
    return module


def trained(folder, **options):
    "One domain of 8 steps, or as told; its last checkpoint."
    last = ModelCheckpoint(folder, save_top_k=0, save_last=True)
    fit(merged(**options), folder, more=[last])
    return folder / "last.ckpt"


def test_a_module_without_the_checkpoints_weights_is_refused(tmp_path):
    path = trained(tmp_path)
    with pytest.raises(ValueError, match="saved with other weights"):
        fit(merged(saved=path), tmp_path)
    callback = merged(saved=path)
    fit(callback, tmp_path, kept(path))
    assert callback.router.domains == 2


@pytest.mark.parametrize("ends, copies", [(8, 0), (6, 1)])
def test_no_second_copy_of_the_weights_at_a_boundary(ends, copies, tmp_path):
    read = torch.load(trained(tmp_path, boundaries=[ends]), weights_only=True)
    state = read["callbacks"]["LightningRouter"]["router"]["state"]
    before = state["consolidation"]["before"].values()
    sizes = [x.numel() for x in before if isinstance(x, torch.Tensor)]
    numbers = sum(p.numel() for p in Regression().parameters())
    assert sum(sizes) == copies * numbers


def test_a_checkpoint_with_the_state_alone_is_still_read(tmp_path, monkeypatch):
    "As earlier versions wrote it, for a new run and to resume."
    first = lambda it: {"router": it.router.state_dict(), "ended": it.ended}
    with monkeypatch.context() as earlier:
        earlier.setattr(LightningRouter, "state_dict", first)
        path = trained(tmp_path)
    following, resumed = merged(saved=path), merged()
    fit(following, tmp_path, kept(path))
    fit(resumed, tmp_path, ckpt_path=path, batches=2)  # to a fourth epoch
    assert (following.router.domains, resumed.router.domains) == (2, 2)


class Stop(lightning.Callback):
    "Early."

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = True


def test_a_run_that_begins_in_an_open_domain_is_warned(tmp_path):
    "From what was written before an early stop; closed first, all is well."
    more = [Stop(), ModelCheckpoint(tmp_path, "early")]
    module = fit(merged(), tmp_path, more=more, batches=2)
    module.trainer.save_checkpoint(tmp_path / "over.ckpt")
    path, said = tmp_path / "early.ckpt", "2 steps after the last boundary"
    with pytest.warns(UserWarning, match=said):
        fit(merged(saved=path), tmp_path, kept(path))
    closed, callback = kept(path), merged(saved=path)
    callback.attach(closed, closed.configure_optimizers())
    with pytest.warns(UserWarning, match=said):
        callback.begin(closed)
    callback.consolidate()
    over = kept(tmp_path / "over.ckpt")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*never closed")
        fit(callback, tmp_path, closed)
        fit(merged(saved=tmp_path / "over.ckpt"), tmp_path, over)
        fit(merged(), tmp_path, ckpt_path=path, batches=2)  # resumed
    for p, q in zip(closed.parameters(), over.parameters()):
        assert torch.equal(p, q)
