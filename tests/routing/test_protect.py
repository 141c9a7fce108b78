"""A past that was never trained here: what `protect` learns, and what it leaves
alone.
"""

import pytest
import torch
from torch import nn

import dmr


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 3)
    )


def batches(seed=0, n=6):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 8, generator=draw) for _ in range(n)]


def loss_on(model):
    return lambda x: (model(x) - x[:, :3]).square().mean()


def made(model, source="gradients", routing="displacement"):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    projection = dmr.Projection(rank=2, every=1, source=source)
    rule = dmr.FisherMerge()
    router = dmr.MomentRouter(
        model, optimizer, projection, routing, consolidation=rule
    )
    return optimizer, router


def test_it_knows_what_a_domain_of_the_same_gradients_would_have_taught():
    model = network().eval()
    optimizer, router = made(model)
    router.protect(batches(), loss_on(model))
    other = network().eval()
    still = torch.optim.AdamW(other.parameters(), lr=0.0, weight_decay=0.0)
    trained = dmr.MomentRouter(
        other,
        still,
        dmr.Projection(rank=2, every=1),
        "displacement",
        consolidation=dmr.FisherMerge(),
    )
    for x in batches():
        still.zero_grad()
        loss_on(other)(x).backward()
        still.step()
    trained.consolidate()
    for name, U in trained.modification.bases.items():
        torch.testing.assert_close(router.modification.bases[name], U)
    for name, f in trained.consolidation.past.items():
        torch.testing.assert_close(router.consolidation.past[name], f)


@pytest.mark.parametrize("source", ["gradients", "inputs"])
def test_nothing_else_changes(source):
    model = network()
    optimizer, router = made(model, source)
    model[0].weight.grad = torch.ones(16, 8)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    router.protect(iter(batches()), loss_on(model))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert model[0].weight.grad.eq(1).all() and model[3].weight.grad is None
    assert not optimizer.state and router.steps == 0 and model.training
    assert all(U.shape[1] == 2 for U in router.modification.bases.values())


def test_the_first_boundary_merges_with_the_protected_past():
    losses = {}
    for known in (False, True):
        model = network()
        optimizer, router = made(model)
        old, new = batches(0), batches(1)
        if known:
            router.protect(old, loss_on(model))
        start = {n: p.detach().clone() for n, p in model.named_parameters()}
        for x in new:
            optimizer.zero_grad()
            loss_on(model)(x).backward()
            optimizer.step()
        end = {n: p.detach().clone() for n, p in model.named_parameters()}
        report = router.consolidate()
        moved = any(
            not torch.equal(end[n], p) for n, p in model.named_parameters()
        )
        losses[known] = moved, "consolidation" in report
        assert any(not torch.equal(start[n], end[n]) for n in start)
    assert losses == {False: (False, False), True: (True, True)}


def test_wrong_batches_change_nothing():
    model = network()
    _, router = made(model)
    with pytest.raises(ValueError, match="got no batch"):
        router.protect([], loss_on(model))
    bad = [torch.full((4, 8), float("nan"))]
    with pytest.raises(ValueError, match="has NaN or infinite values"):
        router.protect(bad, loss_on(model))
    assert router.domains == 0 and not router.consolidation.past
    assert all(U.shape[1] == 0 for U in router.modification.bases.values())
