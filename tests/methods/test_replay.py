"An added term, a penalty or a replayed loss, under shared routing."

import copy

import pytest
import torch

import dmr
from dmr.methods.penalty import EWC, SI
from dmr.routing.conformance import Problem, train
from dmr.routing.router import MomentRouter

torch.set_num_threads(1)


@pytest.mark.parametrize("method", ["ewc", "si", "replay"])
def test_shared_routing_of_an_added_term_is_plain_training_on_the_summed_loss(
    method,
):
    """The published form: the term stands in the loss, and torch's Adam sees
    the gradient of the sum.
    """
    problem = Problem(torch.float64)
    buffer = dmr.ReplayBuffer(seed=2)
    modification = {
        "ewc": lambda: EWC(problem.loss_fn, lam=40.0, samples=24),
        "si": lambda: SI(c=2.0, xi=1e-2),
        "replay": lambda: dmr.ReplayMix(buffer, problem.loss_fn, fraction=0.5),
    }[method]()
    strength = 0.3 if method == "replay" else 1.0
    optimizer = torch.optim.Adam(problem.model.parameters(), lr=1e-2)
    router = MomentRouter(
        problem.model, optimizer, modification, "shared", strength
    )
    train(problem, optimizer, router, 0, range(9))
    router.consolidate()
    twin = copy.deepcopy(problem)
    twin_optimizer = torch.optim.Adam(twin.model.parameters(), lr=1e-2)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    twin_buffer = copy.deepcopy(buffer)
    anchor = [p.detach().clone() for p in twin.model.parameters()]
    if method != "replay":
        weight = [
            modification.importance[n].clone()
            for n, _ in twin.model.named_parameters()
        ]
        assert (
            all((w >= 0).all() for w in weight)
            and sum(w.sum() for w in weight) > 0
        )
    train(problem, optimizer, router, 1, range(12))
    for step in range(12):
        twin_optimizer.zero_grad()
        loss = twin.loss_fn(twin.batch(1, step))
        if method == "replay":
            # draws from the buffer's generator as well
            twin_buffer.observe(twin.batch(1, step), capacity=12)
            loss = 0.7 * loss + 0.3 * twin.loss_fn(twin_buffer.sample(8))
        else:
            scale = 0.5 * 40.0 if method == "ewc" else 2.0
            loss = loss + scale * sum(
                (w * (p - a) ** 2).sum()
                for w, p, a in zip(weight, twin.model.parameters(), anchor)
            )
        loss.backward()
        twin_optimizer.step()
    for a, b in zip(problem.model.parameters(), twin.model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
