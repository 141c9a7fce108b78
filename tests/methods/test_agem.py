"A-GEM against Adam written out, and under displacement."

import copy

import numpy as np
import pytest
import torch
from conftest import BROKEN, PlainAdam, flat
from torch import nn

import dmr
from dmr.methods.agem import AGEM
from dmr.routing.conformance import Problem, same, train, weights
from dmr.routing.router import MomentRouter

torch.set_num_threads(1)


def test_agem_under_displacement_never_steps_against_the_memory():
    """⟨step, g_ref⟩ >= 0 for Adam's own step; without the method it is often
    negative.
    """
    conflicts = 0
    problem = Problem(torch.float64)
    agem = AGEM(dmr.ReplayBuffer(seed=0), problem.loss_fn, fraction=0.5)
    optimizer = torch.optim.Adam(problem.model.parameters(), lr=1e-2)
    router = MomentRouter(problem.model, optimizer, agem, "displacement", 1.0)
    references = []
    prepare = agem.prepare
    agem.prepare = lambda: (
        prepare(),
        references.append(flat(agem._g.values())),
    )[0]
    train(problem, optimizer, router, 0, range(9))
    router.consolidate()
    for step in range(30):
        before = flat(problem.model.parameters())
        train(problem, optimizer, router, 2, range(step, step + 1))
        moved = before - flat(problem.model.parameters())
        g_ref = references[-1]
        assert moved @ g_ref >= -1e-12 * moved.norm() * g_ref.norm()
        # projected: orthogonal
        conflicts += bool(
            abs(moved @ g_ref) <= 1e-9 * moved.norm() * g_ref.norm()
        )
    assert conflicts > 3


@pytest.mark.parametrize("routing", ["shared", "decoupled", "denominator"])
def test_agem_against_adam_written_out(routing):
    torch.manual_seed(0)
    layer = nn.Linear(5, 1, bias=False, dtype=torch.float64)
    W, adam = layer.weight.detach().numpy().copy(), PlainAdam(1e-2, (0.9, 0.95))
    rng, domains = np.random.default_rng(0), []
    for sign in (1.0, -1.0):  # the second domain wants the opposite
        x = rng.normal(size=(20, 5))
        domains.append((x, sign * x[:, :1]))
    gradient = lambda W, x, y: 2 * (x @ W.T - y).T @ x / len(x)
    fit = lambda b: (layer(b[0]) - b[1]).square().mean()
    agem = AGEM(dmr.ReplayBuffer(seed=5), fit, fraction=1.0, batch_size=4)
    router = MomentRouter(
        layer,
        torch.optim.Adam(layer.parameters(), lr=1e-2, betas=(0.9, 0.95)),
        agem,
        routing,
        1.0,
    )
    drawn, sample = [], agem.buffer.sample
    agem.buffer.sample = lambda n: drawn.append(sample(n)) or drawn[-1]
    conflicts = 0
    for t, (x, y) in enumerate(domains):
        for _ in range(20):
            batch = (torch.tensor(x), torch.tensor(y))
            router.observe(batch, total=20)
            layer.zero_grad()
            fit(batch).backward()
            router.optimizer.step()
            g = g_tilde = gradient(W, x, y)
            if t:
                g_ref = gradient(W, drawn[-1][0].numpy(), drawn[-1][1].numpy())
                if (g * g_ref).sum() < 0:
                    conflicts += 1
                    g_tilde = g - (g * g_ref).sum() / (g_ref**2).sum() * g_ref
            to_m, to_v = {
                "shared": (g_tilde, g_tilde),
                "decoupled": (g_tilde, g),
                "denominator": (g, g_tilde),
            }[routing]
            W = W - adam.step(to_m, to_v)
        np.testing.assert_allclose(
            layer.weight.detach().numpy(), W, rtol=1e-8, atol=1e-10
        )
        if not t:
            router.consolidate()
    assert conflicts > 5


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_reference_loss_changes_nothing(kind):
    problem, (function, message) = Problem(), BROKEN[kind]
    optimizer = torch.optim.AdamW(problem.model.parameters())
    agem = AGEM(
        dmr.ReplayBuffer(), lambda batch: function(problem, batch), fraction=0.5
    )
    router = MomentRouter(problem.model, optimizer, agem, "decoupled")
    train(problem, optimizer, router, 0, range(3))
    router.consolidate()
    kept, moments = (
        weights(problem),
        copy.deepcopy(optimizer.state_dict()["state"]),
    )
    with pytest.raises(ValueError, match=message):
        train(problem, optimizer, router, 1, range(1))
    assert same(kept, weights(problem)) and same(
        moments, optimizer.state_dict()["state"]
    )


def test_an_empty_buffer_is_said_to_be_empty():
    with pytest.raises(ValueError, match="replay buffer is empty"):
        AGEM(dmr.ReplayBuffer(), lambda b: b.mean()).buffer.sample(3)


@pytest.mark.parametrize("rates", [(1e-4, 1e-2), (1e-2, 1e-4)])
def test_the_whole_update_never_conflicts_where_rates_differ(rates):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    body, head = (x.parameters() for x in (model[0], model[2]))
    groups = [dict(params=body, lr=rates[0]), dict(params=head, lr=rates[1])]
    fit = lambda batch: (model(batch[0]) - batch[1]).square().mean()
    agem = AGEM(dmr.ReplayBuffer(capacity=8), fit, fraction=None)
    router = MomentRouter(model, torch.optim.Adam(groups), agem)
    references, prepare = [], agem.prepare
    agem.prepare = lambda: (
        prepare(),
        references.append(flat(agem._g.values())),
    )[0]
    x, y = torch.randn(16, 5).double(), torch.randn(16, 1).double()
    conflicts = 0
    for sign in (1.0, -1.0):  # the second domain wants the opposite
        for _ in range(30):
            router.observe((x, sign * y), total=16)
            before = flat(model.parameters())
            router.optimizer.zero_grad()
            fit((x, sign * y)).backward()
            router.optimizer.step()
            moved = flat(model.parameters()) - before
            if references:
                along = moved @ references[-1]
                size = moved.norm() * references[-1].norm()
                assert along <= 1e-10 * size
                conflicts += bool(along.abs() <= 1e-10 * size)
        if not references:
            router.consolidate()
    assert conflicts > 3
