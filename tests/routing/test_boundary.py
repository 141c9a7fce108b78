"""A boundary and what surrounds it: who may draw one, what is said before
anything changes, and boundaries that come by themselves.
"""

import copy
import pickle
import re
import warnings

import pytest
import torch
from torch import nn

import dmr
from dmr.methods.rivals import FisherVariant
from dmr.routing.consolidation import Interpolate

torch.set_num_threads(1)


def network(seed=0, *between):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), *between, nn.Tanh(), nn.Linear(8, 2))


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def projection():
    return dmr.Projection(rank=1, every=1)


def loss_on(model):
    return lambda x: model(x).square().mean()


def train(model, optimizer, seed=0, steps=6):
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_on(model)(torch.randn(16, 6, generator=draw)).backward()
        optimizer.step()


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def merging(merge=None, method=None, **options):
    model = network()
    optimizer = adamw(model)
    merge = dmr.FisherMerge() if merge is None else merge
    router = dmr.MomentRouter(
        model, optimizer, method, consolidation=merge, **options
    )
    return model, optimizer, router


CLOSED = r"{}\(\) of a router that was closed.*call it before close\(\), or"


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_a_closed_router_draws_no_boundary(late, copied):
    "Neither where steps were seen before it was closed, nor where none were."
    model, optimizer, router = merging(method=projection())
    train(model, optimizer)
    router.consolidate()
    if late:
        train(model, optimizer, seed=1)
    router.close()
    if copied:
        router = pickle.loads(pickle.dumps(router))
        model, optimizer = router.model, router.optimizer
    if not late:
        train(model, optimizer, seed=1)
    kept, now = copy.deepcopy(router.state_dict()), weights(model)
    x = [torch.ones(2, 6)]
    for name, call in {
        "consolidate": router.consolidate,
        "protect": lambda: router.protect(x, loss_on(model)),
        "protect_weights": router.protect_weights,
    }.items():
        with pytest.raises(ValueError, match=CLOSED.format(name)):
            call()
    assert same(now, weights(model)) and str(kept) == str(router.state_dict())
    assert router.summary()  # what it knows can still be read and saved


def test_a_strength_with_a_state_serves_one_router():
    strength = dmr.OverlapAware(0.5)
    first, second = network(0), network(1)
    router = dmr.MomentRouter(
        first, adamw(first), projection(), strength=strength
    )
    optimizer = adamw(second)
    make = lambda given: dmr.MomentRouter(
        second, optimizer, projection(), strength=given
    )
    with pytest.raises(ValueError, match="this OverlapAware serves another"):
        make(strength)
    assert not optimizer._optimizer_step_pre_hooks
    make(copy.deepcopy(strength)).close()  # a copy serves nobody
    twin = copy.deepcopy(router)
    with pytest.raises(ValueError, match="serves another router"):
        make(twin.strength)
    router.close()
    make(strength)


def test_a_strength_without_a_state_serves_many():
    fixed, routers = dmr.Fixed(0.5), []
    for seed in range(2):
        model = network(seed)
        routers.append(
            dmr.MomentRouter(model, adamw(model), projection(), strength=fixed)
        )
    assert routers[0].strength is routers[1].strength is fixed


def short_memory():
    optimizer = lambda m: torch.optim.AdamW(m.parameters(), betas=(0.9, 0.5))
    model = network()
    own, method = optimizer(model), projection()
    router = dmr.MomentRouter(
        model, own, method, consolidation=dmr.FisherMerge(curvature="moment")
    )
    train(model, own)
    router.consolidate()
    train(model, own, 1, steps=30)
    return model, router, "its second moment stands for the domain's end"


def unknown_past():
    model, optimizer, router = merging(method=projection())
    router.anchor()
    train(model, optimizer)
    return model, router, "nothing is known of what this model knew"


def no_step():
    basis = dmr.Projection(bases={"0.weight": torch.eye(6)[:, :2]})
    model, optimizer, router = merging(method=basis)
    train(model, optimizer)
    router.consolidate()
    train(model, adamw(model), seed=1)
    return model, router, "the router saw no step since the last boundary"


@pytest.mark.parametrize("make", [short_memory, unknown_past, no_step])
def test_what_a_merge_warns_of_is_said_before_anything_changes(make):
    "Where warnings are errors the domain stays open, and whole."
    model, router, words = make()
    kept, now = copy.deepcopy(router.state_dict()), weights(model)
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserWarning, match=words):
                router.consolidate()
    assert same(now, weights(model)) and str(kept) == str(router.state_dict())
    with pytest.warns(UserWarning, match=words) as said:
        router.consolidate()
    assert len(said) == 1 and said[0].filename == __file__
    assert router.domains == kept["domains"] + 1


def test_a_merge_in_the_middle_of_a_domain_warns_of_a_short_memory_too():
    model, router, words = short_memory()
    now = weights(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=words):
            router.consolidation.pull()
    assert same(now, weights(model))


OTHER = r"saved with other weights \('0.weight' differs\).*router.anchor\(\)"


@pytest.mark.parametrize("order", ["router first", "model first"])
def test_a_state_with_the_weights_that_belong_to_it_is_silent(order):
    model, optimizer, router = merging(method=projection())
    train(model, optimizer)
    router.consolidate()
    train(model, optimizer, seed=1, steps=2)
    state = copy.deepcopy(router.state_dict())
    saved = {n: x.clone() for n, x in model.state_dict().items()}
    other = network(1)
    its = adamw(other)
    again = dmr.MomentRouter(
        other, its, projection(), consolidation=dmr.FisherMerge()
    )
    parts = [(again, state), (other, saved)]
    for part, kept in parts if order == "router first" else parts[::-1]:
        part.load_state_dict(kept)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(other, its)


def test_a_state_of_another_model_with_the_same_shapes_is_spoken_of():
    model, optimizer, router = merging(method=projection())
    train(model, optimizer)
    router.consolidate()
    state = copy.deepcopy(router.state_dict())

    def taken(state, meant=False):
        "Warnings of two steps of another model with this state."
        other = network(1)
        its = adamw(other)
        again = dmr.MomentRouter(
            other, its, projection(), consolidation=dmr.FisherMerge()
        )
        again.load_state_dict(state)
        if meant:
            again.anchor()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            train(other, its, steps=2)
        return said

    (one,) = taken(state)
    assert re.search(OTHER, str(one.message)) and one.filename == __file__
    assert not taken(state, meant=True)
    del state["weights"]  # an older state
    assert not taken(state)


def test_a_state_in_half_precision_belongs_to_the_same_weights():
    model, optimizer, router = merging()
    train(model, optimizer)
    state = copy.deepcopy(router.state_dict())
    half = copy.deepcopy(model).bfloat16()
    its = adamw(half)
    again = dmr.MomentRouter(half, its, consolidation=dmr.FisherMerge())
    again.load_state_dict(state)
    half(torch.ones(2, 6).bfloat16()).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        its.step()


@pytest.mark.parametrize("merge", [dmr.FisherMerge, lambda: Interpolate(0.5)])
def test_running_statistics_are_no_weights_and_are_spoken_of(merge):
    model = network(0, nn.BatchNorm1d(8))
    optimizer = adamw(model)
    words = "1 layers, such as '1', keep running statistics.*update_bn"
    with pytest.warns(UserWarning, match=words) as said:
        router = dmr.MomentRouter(model, optimizer, consolidation=merge())
    assert len(said) == 1 and said[0].filename == __file__
    router.anchor()
    for seed in range(2):
        train(model, optimizer, seed)
        before = {n: x.clone() for n, x in model.named_buffers()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            router.consolidate()
        assert same(before, dict(model.named_buffers()))
    router.close()
    bare = network(0, nn.BatchNorm1d(8, track_running_stats=False))
    for each, rule in ((bare, merge()), (model, None)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            dmr.MomentRouter(each, adamw(each), consolidation=rule)


@pytest.mark.parametrize("method", [lambda: None, projection])
def test_boundaries_that_come_by_themselves_are_those_of_the_loop(method):
    ends = []
    for every in (4, None):
        model, optimizer, router = merging(
            method=method(), consolidate_every=every
        )
        for seed in range(3):
            train(model, optimizer, seed, steps=4)
            if every is None:
                router.consolidate()
        assert router.domains == 3
        train(model, optimizer, 3, steps=3)
        ends.append((weights(model), str(router.state_dict())))
    assert same(ends[0][0], ends[1][0]) and ends[0][1] == ends[1][1]


def test_own_boundaries_count_from_the_last_one_and_are_saved(tmp_path):
    model, optimizer, router = merging(consolidate_every=5)
    train(model, optimizer, steps=3)
    router.consolidate()
    train(model, optimizer, 1, steps=4)
    assert router.domains == 1
    router.save(tmp_path / "router.pt")
    router.close()
    again = dmr.MomentRouter.load(tmp_path / "router.pt", model, optimizer)
    train(model, optimizer, 2, steps=1)
    assert again.domains == 2 and again.boundary == 8


def test_a_round_of_several_optimizers_is_over_before_its_boundary():
    model = network()
    pair = [adamw(model[0]), adamw(model[2])]
    router = dmr.MomentRouter(
        model, pair, consolidation=dmr.FisherMerge(), consolidate_every=1
    )
    loss_on(model)(torch.ones(2, 6)).backward()
    pair[0].step()
    assert router.domains == 0
    pair[1].step()
    assert router.domains == 1 and set(router.consolidation.past) == {
        "0.weight", "0.bias", "2.weight", "2.bias",
    }  # fmt: skip


@pytest.mark.parametrize("every", [0, -3, 2.5, True, "4"])
def test_a_length_that_means_nothing_is_refused(every):
    model = network()
    optimizer = adamw(model)
    with pytest.raises(
        ValueError, match="consolidate_every=.*positive integer"
    ):
        dmr.MomentRouter(model, optimizer, consolidate_every=every)
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("make", [dmr.FisherMerge, FisherVariant])
def test_a_merge_leaves_the_optimizer_as_it_is(make):
    "Both moments and the count of steps are kept: a page says why."
    model, optimizer, router = merging(make())
    for seed in range(2):
        train(model, optimizer, seed)
        before, now = copy.deepcopy(optimizer.state_dict()), weights(model)
        router.consolidate()
        assert str(before) == str(optimizer.state_dict())
    assert not same(now, weights(model))
