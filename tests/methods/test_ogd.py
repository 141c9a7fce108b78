"OGD against every stored gradient, and what does not fit."

import copy

import pytest
import torch
from conftest import flat, regression

from dmr.methods.ogd import OGD, logit_gradients
from dmr.routing.conformance import Problem, same, train
from dmr.routing.router import MomentRouter

torch.set_num_threads(1)


@pytest.mark.parametrize("routing", ["shared", "displacement"])
def test_ogd_is_orthogonal_to_every_stored_logit_gradient(routing):
    problem = Problem(torch.float64)
    ogd = OGD(problem.logit_fn, vectors=6)
    optimizer = torch.optim.AdamW(
        problem.model.parameters(), lr=1e-2, weight_decay=0.0
    )
    router = MomentRouter(problem.model, optimizer, ogd, routing, 1.0)
    stored = []
    for domain in range(2):
        train(problem, optimizer, router, domain, range(6))
        # the examples that the boundary will use
        for x, y in ogd.sample.batches(1):
            logit = problem.model(x)[0, y[0]]
            stored.append(
                flat(
                    torch.autograd.grad(logit, list(problem.model.parameters()))
                )
            )
        router.consolidate()
    raw = torch.stack(stored)  # (12, P), not orthogonalised
    V = ogd.V
    assert V.shape == (12, raw.shape[1])
    torch.testing.assert_close(
        V @ V.T, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-10
    )
    torch.testing.assert_close(
        raw - raw @ V.T @ V, torch.zeros_like(raw), rtol=0, atol=1e-9
    )
    before = flat(problem.model.parameters())
    batch = problem.batch(2, 0)
    optimizer.zero_grad()
    problem.loss_fn(batch).backward()
    if routing == "displacement":  # the step itself
        optimizer.step()
        edited = flat(problem.model.parameters()) - before
    else:  # the gradient that both moments see
        grads = {n: p.grad for n, p in problem.model.named_parameters()}
        ogd.begin(grads, overlap=False)
        edited = flat(g - ogd.edit(n, g).d for n, g in grads.items())
        g = flat(grads.values())
        torch.testing.assert_close(
            edited, g - V.T @ (V @ g), rtol=1e-10, atol=1e-14
        )
    assert (raw @ edited).abs().max() < 1e-9 * raw.norm(dim=1).max() * max(
        float(edited.norm()), 1e-3
    )
    assert edited.norm() > 1e-4  # it still moves


def test_ogd_refuses_what_does_not_fit_early_and_at_a_boundary():
    problem = Problem()
    P = sum(p.numel() for p in problem.model.parameters())
    optimizer = torch.optim.SGD(
        problem.model.parameters(), lr=0.01, momentum=0.9
    )
    with pytest.raises(
        ValueError,
        match=(
            "would keep 100 vectors of 114 numbers.*budget=40000 bytes holds 87"
        ),
    ):
        MomentRouter(
            problem.model,
            optimizer,
            OGD(problem.logit_fn, vectors=100, budget=40_000),
            "shared",
        )
    # one domain fits, two do not
    ogd = OGD(problem.logit_fn, vectors=6, budget=10 * 4 * P)
    router = MomentRouter(problem.model, optimizer, ogd, "shared")
    train(problem, optimizer, router, 0, range(4))
    router.consolidate()
    train(problem, optimizer, router, 1, range(4))
    before = copy.deepcopy(router.state_dict())
    with pytest.raises(ValueError, match="would keep 1[12] vectors"):
        router.consolidate()
    assert same(before, router.state_dict())


def taught(model, optimizer, ogd):
    "A router whose method knows one domain."
    router = MomentRouter(model, optimizer, ogd)
    another_domain(model, router)
    return router


def another_domain(model, router, steps=3):
    for _ in range(steps):
        x = torch.randn(8, 6)
        router.observe(x)
        router.optimizer.zero_grad()
        model(x).square().mean().backward()
        router.optimizer.step()
    return router.consolidate()


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=1e-2)


def answer(model, vectors=4):
    return OGD(lambda x: model(x)[0, 0], vectors=vectors)


def test_the_vectors_go_along_to_the_next_router_of_the_same_model():
    model, _ = regression()
    ogd = answer(model)
    taught(model, adam(model), ogd).close()
    V = ogd.V.clone()
    router = MomentRouter(model, adam(model), ogd)
    assert torch.equal(ogd.V, V) and len(V) == 4 and ogd.edited()
    assert another_domain(model, router)["vectors"] == 8
    assert torch.equal(ogd.V[:4], V)
    router.close()
    other, _ = regression(seed=1)
    with pytest.raises(ValueError, match="keeps vectors of another model"):
        MomentRouter(other, adam(other), ogd)
    assert len(ogd.V) == 8


def test_vectors_that_no_longer_fit_are_not_lost_at_the_next_router():
    model, _ = regression()
    model[0].requires_grad_(False)
    P = sum(p.numel() for p in model[2].parameters())
    ogd = OGD(lambda x: model(x)[0, 0], vectors=4, budget=4 * 4 * P)
    taught(model, adam(model), ogd).close()
    V = ogd.V.clone()
    model[0].requires_grad_(True)
    with pytest.raises(ValueError, match="would keep 4 vectors"):
        MomentRouter(model, adam(model), ogd)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires"):
        MomentRouter(model, adam(model), ogd)
    model[2].requires_grad_(True)
    MomentRouter(model, adam(model), ogd)
    assert torch.equal(ogd.V, V)


def test_a_layer_may_be_frozen_after_the_router_was_made():
    model, _ = regression()
    router = taught(model, adam(model), answer(model))
    ogd, V = router.modification, router.modification.V.clone()
    model[0].requires_grad_(False)
    assert another_domain(model, router)["vectors"] == 8
    assert torch.equal(ogd.V[:4], V)
    rows = torch.zeros(1, V.shape[1])
    logit_gradients(ogd.logit_fn, [torch.randn(1, 6)], ogd._params, rows)
    at = ogd._places
    assert not rows[:, at["0.weight"]].any() and rows[:, at["2.weight"]].any()
    state = copy.deepcopy(router.state_dict())
    router.close()
    again = MomentRouter(model, adam(model), answer(model))  # it is frozen
    assert again.modification.V.shape[1] < V.shape[1]
    again.load_state_dict(state)
    assert same(again.state_dict()["edit"], state["edit"])
    assert {"0.weight", "0.bias"} <= set(again.modification.edited())


def test_a_state_of_an_earlier_edition_is_over_what_is_trained():
    model, _ = regression()
    router = taught(model, adam(model), answer(model))
    state = copy.deepcopy(router.state_dict())
    del state["edit"]["sizes"]
    router.load_state_dict(state)
    assert same(router.state_dict()["edit"]["V"], state["edit"]["V"])
    router.close()
    model[0].requires_grad_(False)
    again = MomentRouter(model, adam(model), answer(model))
    with pytest.raises(ValueError, match="not fit the 30 parameters of this"):
        again.load_state_dict(state)
    assert not len(again.modification.V)


def test_a_layer_that_is_unfrozen_later_is_protected_from_then_on():
    model, _ = regression()
    model[0].weight.requires_grad_(False)
    router = taught(model, adam(model), answer(model))
    ogd, V = router.modification, router.modification.V.clone()
    model[0].weight.requires_grad_(True)
    another_domain(model, router, steps=1)
    assert torch.equal(ogd.V[:4, : V.shape[1]], V)
    assert not ogd.V[:4, V.shape[1] :].any()
    assert ogd.V[4:, V.shape[1] :].any() and "0.weight" in ogd.edited()
    torch.testing.assert_close(ogd.V @ ogd.V.T, torch.eye(8), rtol=0, atol=1e-5)
    state = copy.deepcopy(router.state_dict())
    router.close()
    again = MomentRouter(model, adam(model), answer(model))
    again.load_state_dict(state)
    before = [p.detach().clone() for p in ogd._params.values()]
    x = torch.randn(8, 6)
    model(x).square().mean().backward()
    again.optimizer.step()
    after = ogd._params.values()
    moved = flat(p.detach() - q for p, q in zip(after, before))
    assert moved.norm() > 1e-3
    assert (ogd.V @ moved).norm() < 1e-4 * moved.norm()


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
def test_the_whole_update_is_orthogonal_where_rates_differ(kind):
    model, _ = regression(dtype=torch.float64)
    groups = [
        {"params": model[0].parameters(), "lr": 1e-4},
        {"params": model[2].parameters(), "lr": 1e-2},
    ]
    ogd = answer(model)
    router = MomentRouter(model, kind(groups), ogd)
    x = torch.randn(8, 6, dtype=torch.float64)
    router.observe(x)
    model(x).square().mean().backward()
    router.optimizer.step()
    router.consolidate()
    router.optimizer.state.clear()
    for _ in range(3):
        before = flat(model.parameters())
        router.optimizer.zero_grad()
        model(x).square().mean().backward()
        router.optimizer.step()
        moved = flat(model.parameters()) - before
        assert moved.norm() > 1e-6
        assert (ogd.V @ moved).norm() < 1e-4 * moved.norm()
