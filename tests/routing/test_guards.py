"""The guard against the leak, and the meter of inflation."""

import pytest
import torch
from conftest import basis, gradients, layer, run
from plain_adam import LR
from torch import nn

import dmr
from dmr.routing.modification import LowRank
from dmr.routing.router import MomentRouter
from dmr.routing.step import clamped

torch.set_num_threads(1)


def test_the_clamp_guard_keeps_the_decoupled_step_in_bounds():
    """SCIENCE: dense random U, steep spectrum; ‖u‖ <= 1.1 and ‖uU‖ <= 1 - α/2
    times vanilla's, at both β2.
    """
    for beta2 in (0.95, 0.999):
        norms = {}
        for guard in ("vanilla", None, "clamp"):
            torch.manual_seed(0)
            model = nn.Linear(64, 16, bias=False, dtype=torch.float64)
            U = basis(64, 8)
            optimizer = torch.optim.Adam(
                model.parameters(), lr=1e-6, betas=(0.9, beta2)
            )
            modification = (
                None
                if guard == "vanilla"
                else dmr.Projection(bases={"weight": U})
            )
            router = MomentRouter(
                model,
                optimizer,
                modification,
                "decoupled",
                0.5,
                guard=None if guard == "vanilla" else guard,
            )
            generator, total, inside = (
                torch.Generator().manual_seed(1),
                0.0,
                0.0,
            )
            scale = torch.logspace(0, -2, 64, dtype=torch.float64)
            steps = 3000
            for step in range(steps):
                model.weight.grad = (
                    torch.randn(
                        16, 64, generator=generator, dtype=torch.float64
                    )
                    * scale
                )
                optimizer.step()
                if step >= steps // 2 and step % 10 == 0:
                    u = router.moments.step(
                        optimizer.state[model.weight], optimizer.param_groups[0]
                    )
                    total, inside = (
                        total + u.norm().item(),
                        inside + (u @ U).norm().item(),
                    )
            norms[guard] = (total, inside)
        assert norms[None][0] > 1.5 * norms["vanilla"][0]  # the leak is there
        assert norms["clamp"][0] <= 1.1 * norms["vanilla"][0]
        assert norms["clamp"][1] <= (1 - 0.5 / 2) * norms["vanilla"][1]


def test_the_clamp_guard_keeps_every_coordinate_between_zero_and_the_gradient():
    g, U = gradients((7, 12), 1)[0], basis()
    edited = g - clamped(LowRank(g @ U, U), g, 0.9).d
    expected = (g - 0.9 * g @ U @ U.T).clamp(
        min=g.clamp(max=0), max=g.clamp(min=0)
    )
    torch.testing.assert_close(edited, expected, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(expected, g - 0.9 * g @ U @ U.T)


@pytest.mark.parametrize("routing", ["shared", "decoupled"])
def test_measured_inflation_is_the_ratio_of_the_second_moments(routing):
    model, U, moments = layer(), basis(), {}
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, betas=(0.9, 0.95))
    router = MomentRouter(
        model,
        optimizer,
        dmr.Projection(bases={"weight": U}),
        routing,
        0.7,
        track_inflation=True,
    )
    grads = gradients(model.weight.shape)
    for seen in ("raw", "shared"):
        moments[seen] = torch.zeros_like(model.weight)
        for g in grads:
            g = g - 0.7 * g @ U @ U.T if seen == "shared" else g
            moments[seen] = 0.95 * moments[seen] + 0.05 * g**2
    run(model, optimizer, grads)
    energy = {
        k: torch.trace(U.T @ torch.diag(v.detach().sum(0)) @ U)
        for k, v in moments.items()
    }
    measured = router.inflation()["weight"]
    assert measured["protected"] == pytest.approx(
        (energy["raw"] / energy["shared"]).sqrt().item(), rel=1e-9
    )
    assert measured["matrix"] == pytest.approx(
        (moments["raw"].sum() / moments["shared"].sum()).sqrt().item(), rel=1e-9
    )
    predicted = (1 - 0.7 * 1.3 * measured["kappa"]) ** -0.5  # the κ law
    assert measured["matrix"] == pytest.approx(predicted, rel=1e-9)
    assert router.last["inflation"] == pytest.approx(
        measured["protected"], rel=1e-12
    )
