"""What a router does that is told nothing but the method, and what it warns
of."""

import warnings

import pytest
import torch
from conftest import regression, train

import dmr
from dmr.methods.agem import AGEM
from dmr.methods.penalty import EWC
from dmr.routing.router import MomentRouter
from dmr.routing.strength import Fixed


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def replay(model, loss):
    return dmr.ReplayMix(dmr.ReplayBuffer(capacity=4), lambda b: loss())


def test_a_projection_edits_the_step_and_replay_mixes_half_of_the_gradient():
    model, loss = regression()
    router = MomentRouter(model, adam(model), dmr.Projection(rank=2))
    assert (router.routing, router.strength.alpha) == ("displacement", 0.5)
    router = MomentRouter(model, adam(model), replay(model, loss))
    assert (router.routing, router.strength.alpha) == ("shared", 0.5)
    agem = AGEM(dmr.ReplayBuffer(capacity=4), lambda b: loss())
    router = MomentRouter(model, adam(model), agem)
    assert (router.routing, router.strength.alpha) == ("displacement", 1.0)
    router = MomentRouter(model, adam(model), EWC(lambda b: loss()))
    assert router.routing == "shared"


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
def test_the_default_is_the_same_as_its_name(make):
    ends = []
    for options in ({}, {"routing": "displacement", "strength": Fixed(0.5)}):
        torch.manual_seed(0)
        model, loss = regression()
        optimizer = make(model.parameters(), lr=1e-2)
        router = MomentRouter(
            model, optimizer, dmr.Projection(rank=2), **options
        )
        for _ in range(2):
            train(model, loss, optimizer, 5)
            router.consolidate()
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends))


def after_a_domain(routing, kept, **options):
    "Warnings of the first protected steps, with the optimizer kept or new."
    torch.manual_seed(0)
    model, loss = regression()
    optimizer = adam(model)
    router = MomentRouter(
        model, optimizer, dmr.Projection(rank=2), routing, **options
    )
    train(model, loss, optimizer, 5)
    router.consolidate()
    if not kept:
        state = router.state_dict()
        router.close()
        optimizer = adam(model)
        router = MomentRouter(
            model, optimizer, dmr.Projection(rank=2), routing, **options
        )
        router.load_state_dict(state)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, loss, optimizer, 4)
    return [str(w.message) for w in caught]


def test_decoupled_routing_of_a_new_optimizer_warns_once():
    assert after_a_domain("decoupled", kept=True) == []
    (message,) = after_a_domain("decoupled", kept=False)
    assert "the optimizer is new" in message
    assert "routing='displacement'" in message
    assert after_a_domain("displacement", kept=False) == []
    assert after_a_domain("shared", kept=False) == []


@pytest.mark.parametrize("guard, count", [(None, 1), ("clamp", 0)])
def test_decoupled_routing_of_whole_gradients_without_a_guard_warns_once(
    guard, count
):
    model, loss = regression()
    optimizer = adam(model)
    router = MomentRouter(
        model, optimizer, replay(model, loss), "decoupled", guard=guard
    )
    router.observe(torch.zeros(4, 2), total=4)
    train(model, loss, optimizer, 3)
    router.consolidate()
    router.observe(torch.zeros(4, 2), total=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, loss, optimizer, 3)
    assert len(caught) == count
    if count:
        assert "pass routing='shared', or guard='clamp'" in str(
            caught[0].message
        )


def test_a_router_without_an_edit_names_no_routing_and_no_strength():
    model, loss = regression()
    router = MomentRouter(model, adam(model), consolidation=dmr.FisherMerge())
    assert repr(router) == "MomentRouter(AdamW, None)"
    train(model, loss, router.optimizer, 2)
    router.consolidate()
    said = router.summary()
    assert "routing=" not in said and "strength=" not in said
    assert "at a boundary: FisherMerge" in said
    router.close()
    router = MomentRouter(model, adam(model), dmr.Projection(rank=2))
    assert "routing='displacement', strength=Fixed(alpha=0.5)" in repr(router)
