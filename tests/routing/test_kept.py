"""One file brings a router back: bit for bit, or not at all."""

import pickle
import warnings

import numpy as np
import pytest
import torch
from conftest import basis, regression, train
from torch import nn

import dmr
from dmr.methods.controls import CurrentBasis, LastTaskProjection, RandomBasis
from dmr.methods.penalty import SI
from dmr.routing.kept import read_kept, write_kept
from dmr.routing.modification import Dense, Modification
from dmr.routing.router import MomentRouter

torch.set_num_threads(1)


def setup(seed=0):
    model, loss = regression(seed)
    return model, loss, torch.optim.AdamW(model.parameters(), lr=1e-2)


def projection():
    return dmr.Projection(rank=2, every=3, importance=5.0)


#: What a router is made of -> its arguments, anew for each router.
MADE = {
    "projection": lambda: (projection(), "decoupled", dmr.OverlapAware(0.9)),
    "inputs": lambda: (dmr.Projection(rank=2, source="inputs"), "displacement"),
    "fixed": lambda: (
        dmr.Projection(bases={"0.weight": basis(6, 2, dtype=torch.float32)}),
        "shared",
        0.7,
    ),
    "random": lambda: (RandomBasis(2, every=2, seed=3), "displacement", 0.9),
    "current": lambda: (CurrentBasis(rank=2, refresh=4), "shared", 0.5),
    "last task": lambda: (
        LastTaskProjection(rank=2),
        "decoupled",
        dmr.OverlapAware(initial=0.0, restart=True),
    ),
    "si": lambda: (SI(0.2), "decoupled"),
    "plain": lambda: (None,),
}
MERGES = {
    "none": lambda: None,
    "interpolate": lambda: dmr.Interpolate(0.5),
    "fisher": lambda: dmr.FisherMerge(0.7),
    "factored": lambda: dmr.FisherMerge(0.6, curvature="factored"),
    "half": lambda: dmr.FisherMerge(0.7, storage=torch.bfloat16),
}


def saved(folder, model, optimizer, router):
    router.save(folder / "router.pt")
    both = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(both, folder / "model.pt")


def loaded(folder, **passed):
    model, loss, optimizer = setup(seed=9)
    both = torch.load(folder / "model.pt", weights_only=True)
    model.load_state_dict(both["model"])
    optimizer.load_state_dict(both["optimizer"])
    _, loss_of = regression()
    router = MomentRouter.load(folder / "router.pt", model, optimizer, **passed)
    return model, optimizer, router


def batches(model, steps, start):
    for i in range(start, start + steps):
        generator = torch.Generator().manual_seed(i)
        x = torch.randn(8, 6, generator=generator)
        yield (model(x) - i % 3).square().mean()


def go(model, optimizer, router, start, steps=7):
    for loss in batches(model, steps, start):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("moment", ["boundary", "within"])
@pytest.mark.parametrize(
    "made, merge",
    [(made, "none") for made in MADE]
    + [("projection", merge) for merge in MERGES if merge != "none"],
)
def test_what_comes_back_goes_on_bit_for_bit(made, merge, moment, tmp_path):
    model, _, optimizer = setup()
    router = MomentRouter(
        model,
        optimizer,
        *MADE[made](),
        consolidation=MERGES[merge](),
        exclude="2.*",
        track_step=2,
    )
    go(model, optimizer, router, 0)
    router.consolidate()
    if moment == "within":
        go(model, optimizer, router, 7, steps=4)
    saved(tmp_path, model, optimizer, router)
    again = loaded(tmp_path)
    assert repr(again[2]) == repr(router)
    assert again[2].summary() == router.summary()
    for each in ((model, optimizer, router), again):
        go(*each, 11)
        each[2].consolidate()
        go(*each, 18)
    for p, q in zip(model.parameters(), again[0].parameters()):
        assert torch.equal(p, q)
    assert router.last == again[2].last
    assert (router.steps, router.domains) == (again[2].steps, again[2].domains)


def size_of_weights(kept):
    "Numbers in the file that are as many as a weight's, below `before`."
    before = kept["state"]["consolidation"]["before"].values()
    return sum(x.numel() for x in before if isinstance(x, torch.Tensor))


def test_no_second_copy_of_the_weights_at_a_boundary(tmp_path):
    model, _, optimizer = setup()
    router = MomentRouter(
        model, optimizer, projection(), consolidation=dmr.FisherMerge(0.7)
    )
    go(model, optimizer, router, 0)
    router.consolidate()
    router.save(tmp_path / "boundary.pt")
    assert size_of_weights(read_kept(tmp_path / "boundary.pt")) == 0
    go(model, optimizer, router, 7, steps=1)
    router.save(tmp_path / "within.pt")
    numbers = sum(p.numel() for p in model.parameters())
    assert size_of_weights(read_kept(tmp_path / "within.pt")) == numbers
    plain = torch.load(tmp_path / "boundary.pt", weights_only=True)
    assert plain["settings"]["routing"] == "displacement"


def test_another_model_is_refused_and_left_alone(tmp_path):
    model, _, optimizer = setup()
    router = MomentRouter(model, optimizer, projection())
    go(model, optimizer, router, 0)
    router.consolidate()
    router.save(tmp_path / "router.pt")
    other, _, its = setup(seed=1)
    load = lambda **more: MomentRouter.load(
        tmp_path / "router.pt", other, its, **more
    )
    with pytest.raises(ValueError, match="saved with other weights"):
        load()
    assert not its._optimizer_step_pre_hooks
    assert load(same_weights=False).domains == 1
    narrow, _ = regression(size=(6, 8, 3))
    with pytest.raises(ValueError, match="another model: '0.weight'"):
        MomentRouter.load(
            tmp_path / "router.pt",
            narrow,
            torch.optim.AdamW(narrow.parameters()),
        )


def test_a_model_in_another_precision_with_equal_numbers_is_the_same(tmp_path):
    model, _, _ = setup()
    half = model.bfloat16()
    optimizer = torch.optim.AdamW(half.parameters(), lr=1e-2)
    router = MomentRouter(half, optimizer, projection())
    router.save(tmp_path / "router.pt")
    wide, _, its = setup(seed=4)
    wide.load_state_dict(half.state_dict())
    MomentRouter.load(tmp_path / "router.pt", wide, its)


@pytest.mark.parametrize("where", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("damage", ["bit", "cut", "empty", "other"])
def test_a_damaged_file_is_said_to_be_so(damage, where, tmp_path):
    model, _, optimizer = setup()
    router = MomentRouter(model, optimizer, projection())
    go(model, optimizer, router, 0)
    path = tmp_path / "router.pt"
    router.save(path)
    router.close()
    whole = bytearray(path.read_bytes())
    at = int(len(whole) * where)
    if damage == "bit":
        # zip files have padding that nothing reads; a stretch hits data
        for i in range(at, at + 200):
            whole[i] ^= 1
    elif damage == "cut":
        del whole[at:]
    elif damage == "empty":
        whole.clear()
    path.write_bytes(bytes(whole))
    if damage == "other":
        torch.save({"weights": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="is damaged, or no router's file"):
        MomentRouter.load(path, model, optimizer)
    assert not optimizer._optimizer_step_pre_hooks
    with pytest.raises(FileNotFoundError, match="there is no router's file"):
        read_kept(tmp_path / "none.pt")


class Halve(Modification):
    "A user's own method."

    def edit(self, name, x):
        return Dense(x / 2)


def test_what_a_file_cannot_hold_is_refused_when_it_is_written(tmp_path):
    model, _, optimizer = setup()
    router = MomentRouter(model, optimizer, Halve())
    path = tmp_path / "router.pt"
    with pytest.raises(
        ValueError, match=r"Halve is not a class of dmr; save with given=\['mod"
    ):
        router.save(path)
    with pytest.raises(ValueError, match=r"given=\['method'\] is no part"):
        router.save(path, given=["method"])
    assert not path.exists()
    router.save(path, given=["modification"])
    router.close()
    with pytest.raises(ValueError, match="was saved without its modification"):
        MomentRouter.load(path, model, optimizer)
    again = MomentRouter.load(path, model, optimizer, modification=Halve())
    assert isinstance(again.modification, Halve)


def test_replay_comes_back_with_its_examples(tmp_path):
    model, _, optimizer = setup()
    loss_fn = lambda batch: model(batch).square().mean()
    mix = lambda: dmr.ReplayMix(dmr.ReplayBuffer(seed=2), loss_fn, 0.2)
    router = MomentRouter(model, optimizer, mix(), strength=0.5)
    router.observe(torch.randn(20, 6), total=20)
    router.consolidate()
    router.save(tmp_path / "router.pt", given=["modification"])
    router.close()
    again = MomentRouter.load(
        tmp_path / "router.pt", model, optimizer, modification=mix()
    )
    assert len(again.modification.buffer) == 4
    assert again.strength.alpha == 0.5


def test_a_parameter_as_key_of_a_basis_becomes_its_name(tmp_path):
    model, _, optimizer = setup()
    U = basis(6, 2, dtype=torch.float32)
    router = MomentRouter(
        model, optimizer, dmr.Projection(bases={model[0].weight: U})
    )
    router.save(tmp_path / "router.pt")
    router.close()
    again = MomentRouter.load(tmp_path / "router.pt", model, optimizer)
    assert torch.equal(again.modification.bases["0.weight"], U)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_neither_written_nor_read(value, tmp_path):
    model, _, optimizer = setup()
    router = MomentRouter(model, optimizer, projection())
    go(model, optimizer, router, 0)
    router.consolidate()
    good = router.state_dict()
    bad = router.state_dict()
    bad["edit"]["bases"]["0.weight"][0, 0] = value
    with pytest.raises(
        ValueError, match=r"NaN or infinite values at \['edit'\]\['bases'\]"
    ):
        router.load_state_dict(bad)
    kept = router.state_dict()["edit"]["bases"]
    before = good["edit"]["bases"]
    assert all(torch.equal(U, before[n]) for n, U in kept.items())
    router.modification.bases["0.weight"][0, 0] = value
    with pytest.raises(ValueError, match="nothing was written"):
        router.save(tmp_path / "router.pt")
    assert not (tmp_path / "router.pt").exists()


def test_the_present_strength_is_saved(tmp_path):
    model, _, optimizer = setup()
    router = MomentRouter(model, optimizer, projection(), strength=0.5)
    router.strength.alpha = np.float64(0.75)
    router.save(tmp_path / "router.pt")
    router.close()
    again = MomentRouter.load(tmp_path / "router.pt", model, optimizer)
    assert again.strength.alpha == 0.75


def test_a_file_makes_nothing_but_parts_of_a_router(tmp_path):
    model, _, optimizer = setup()
    router = MomentRouter(model, optimizer, projection())
    contents = router.contents()
    router.close()
    contents["parts"]["modification"]["class"] = "subprocess.run"
    write_kept(tmp_path / "router.pt", contents)
    with pytest.raises(ValueError, match="subprocess.run is no modification"):
        MomentRouter.load(tmp_path / "router.pt", model, optimizer)


def test_a_state_of_the_first_edition_is_taken_up(tmp_path):
    model, _, optimizer = setup()
    router = MomentRouter(model, optimizer, projection())
    go(model, optimizer, router, 0)
    router.consolidate()
    torch.save(router.state_dict(), tmp_path / "router.pt")
    router.close()
    with pytest.raises(ValueError, match="holds a state without settings"):
        MomentRouter.load(tmp_path / "router.pt", model, optimizer)
    again = MomentRouter(model, optimizer, projection())
    again.take_up(read_kept(tmp_path / "router.pt"))
    assert again.domains == 1


def test_a_state_without_the_print_of_its_weights_is_checked_at_a_step(
    tmp_path,
):
    model, _, optimizer = setup()
    router = MomentRouter(model, optimizer, projection())
    go(model, optimizer, router, 0)
    router.consolidate()
    torch.save(router.state_dict(), tmp_path / "router.pt")
    other, _, its = setup(seed=1)
    for same, says in ((True, True), (False, False)):
        again = MomentRouter(other, its, projection())
        again.take_up(read_kept(tmp_path / "router.pt"), same_weights=same)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            go(other, its, again, 0, steps=2)
        told = [
            x for x in found if "saved with other weights" in str(x.message)
        ]
        assert len(told) == says
        again.close()


def test_swapped_arguments_are_told():
    model, _, optimizer = setup()
    with pytest.raises(TypeError, match="pass the model first, then its opt"):
        MomentRouter(optimizer, model, projection())
    with pytest.raises(TypeError, match="model=list is no torch.nn.Module"):
        MomentRouter(list(model.parameters()), optimizer)
    with pytest.raises(TypeError, match="pass the model first"):
        dmr.route_lora(optimizer, model, projection())


def test_a_hook_that_changes_gradients_after_the_router_is_noticed():
    model, loss, optimizer = setup()

    def clip(*_):
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)

    first = optimizer.register_step_pre_hook(clip)
    router = MomentRouter(model, optimizer, projection())
    train(model, loss, optimizer, 3)  # in the right order
    looks = optimizer.register_step_pre_hook(lambda *_: None)
    train(model, loss, optimizer, 3)  # one that only looks
    looks.remove()
    first.remove()
    optimizer.register_step_pre_hook(clip)
    with pytest.raises(ValueError, match="'0.weight' was changed after the ro"):
        train(model, loss, optimizer, 1)
    router.close()
    train(model, loss, optimizer, 1)


def test_numpys_numbers_are_numbers(tmp_path):
    model, _, optimizer = setup()
    edit = dmr.Projection(
        rank=np.int64(2), every=np.int32(3), importance=np.float32(2)
    )
    router = MomentRouter(
        model,
        optimizer,
        edit,
        strength=np.float32(0.5),
        track_step=np.int64(4),
        consolidate_every=np.int64(500),
        consolidation=dmr.FisherMerge(np.float32(0.5), np.float64(1e-3)),
    )
    kept = (edit.rank, edit.every, router.track_step, router.consolidate_every)
    assert kept == (2, 3, 4, 500) and {type(x) for x in kept} == {int}
    router.save(tmp_path / "router.pt")
    assert read_kept(tmp_path / "router.pt")["settings"]["track_step"] == 4
    assert len(dmr.ReplayBuffer(capacity=np.int64(3))) == 0
    for wrong in (np.bool_(True), np.float32("nan")):
        with pytest.raises(ValueError, match="is not a number"):
            dmr.Fixed(wrong)


def test_a_router_of_replicas_is_pickled_with_its_model(tmp_path):
    both = torch.distributed
    if not both.is_available():
        pytest.skip("torch was built without distributed")
    store = f"file://{tmp_path}/store"
    both.init_process_group("gloo", store, rank=0, world_size=1)
    try:
        model, _, _ = setup()
        replica = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(replica.parameters(), lr=1e-2)
        router = MomentRouter(replica, optimizer, projection())
        # one process has no group of its own; several would have this one
        router.group = router.modification.group = both.group.WORLD
        go(replica, optimizer, router, 0)
        router.consolidate()
        twin = pickle.loads(pickle.dumps(router))
        assert twin.group is None and twin.modification.group is None
        for each in (
            (replica, optimizer, router),
            (
                twin.model,
                twin.optimizer,
                twin,
            ),
        ):
            go(*each, 7)
        for p, q in zip(model.parameters(), twin.model.parameters()):
            assert torch.equal(p, q)
    finally:
        both.destroy_process_group()
