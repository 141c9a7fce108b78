"OGD against every stored gradient, and what does not fit."

import copy

import pytest
import torch
from conftest import flat

from dmr.methods.ogd import OGD
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
