"""GPM, SGP and Adam-NSCL against their papers' formulas, written again in
float64 and from scratch.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import PlainAdam
from torch import nn

from dmr.methods.gpm import GPM, NSCL, SGP
from dmr.routing.router import MomentRouter

torch.set_num_threads(1)


def linear_stream(modification, domains, routing="shared"):
    """A linear layer in float64 that sees each domain's inputs once; yields
    after each boundary.
    """
    torch.manual_seed(0)
    layer = nn.Linear(domains[0].shape[1], 3, bias=False, dtype=torch.float64)
    router = MomentRouter(
        layer,
        torch.optim.SGD(layer.parameters(), lr=1e-3, momentum=0.9),
        modification(layer),
        routing,
    )
    for x in domains:
        router.observe(x)
        layer.zero_grad()
        layer(x).square().mean().backward()
        router.optimizer.step()
        router.consolidate()
        yield router.modification


def hand_made(seed=0, domains=4, n=40, fan_in=12):
    rng = np.random.default_rng(seed)
    spectra = [
        np.exp(-rng.uniform(0.3, 1.2) * np.arange(fan_in))
        for _ in range(domains)
    ]
    return [
        rng.normal(size=(n, fan_in)) * s[rng.permutation(fan_in)]
        for s in spectra
    ]


def gpm_growth(M, R, threshold):
    """Equations 5, 8 and 9 of the paper, on R (fan_in, n): the smallest number
    of directions that reaches the threshold.
    """
    whole = (R**2).sum()
    R_hat = R - M @ (M.T @ R)
    U, S, _ = np.linalg.svd(R_hat, full_matrices=False)
    captured, k = whole - (R_hat**2).sum(), 0
    while captured < threshold * whole and k < len(S):
        captured, k = captured + S[k] ** 2, k + 1
    return np.concatenate([M, U[:, :k]], 1), S[:k]


@pytest.mark.parametrize("threshold, increment", [(0.9, 0.0), (0.8, 0.05)])
def test_gpm_grows_as_the_paper_says(threshold, increment):
    domains = hand_made()
    M, ranks = np.zeros((12, 0)), []
    states = linear_stream(
        lambda layer: GPM(lambda b: layer(b).mean(), threshold, increment),
        [torch.tensor(x) for x in domains],
    )
    for t, (x, gpm) in enumerate(zip(domains, states)):
        M, _ = gpm_growth(M, x.T, min(threshold + t * increment, 1.0))
        U = gpm.bases["weight"].numpy()
        assert U.shape == M.shape
        np.testing.assert_allclose(U @ U.T, M @ M.T, atol=1e-7)
        ranks.append(M.shape[1])
    assert 0 < ranks[0] < ranks[-1] < 12  # it grew, and not to everything


def test_sgp_accumulates_importance_as_the_authors_code_does():
    """The reference takes the singular values along old directions from a
    second SVD, as the published code does.
    """
    a, threshold, domains = 0.3, 0.97, hand_made(seed=1)
    M, lam = np.zeros((12, 0)), np.zeros(0)
    states = linear_stream(
        lambda layer: SGP(
            lambda b: layer(b).mean(),
            scale=a,
            threshold=threshold,
            increment=0.0,
        ),
        [torch.tensor(x) for x in domains],
    )
    clipped = partial = False
    for x, sgp in zip(domains, states):
        R, r = x.T, M.shape[1]
        Uc, Sc, _ = np.linalg.svd(M @ (M.T @ R), full_matrices=False)
        sigma_old = np.sqrt((M.T @ Uc[:, :r]) ** 2 @ Sc[:r] ** 2)
        M, sigma_new = gpm_growth(M, R, threshold)
        sigma = np.concatenate([sigma_old, sigma_new])
        fresh = (a + 1) * sigma / (a * sigma + sigma.max())
        clipped |= bool((lam + fresh[:r] > 1).any())
        lam = np.concatenate([np.clip(lam + fresh[:r], 0, 1), fresh[r:]])
        U, own = sgp.bases["weight"].numpy(), sgp._lam["weight"].numpy()
        np.testing.assert_allclose(own, lam, atol=1e-6)
        np.testing.assert_allclose(U * own @ U.T, M * lam @ M.T, atol=1e-6)
        partial |= bool(r and (lam[:r] < 0.99).any())
    assert clipped and partial  # both cases were seen


@pytest.mark.parametrize("normalise", [False, True])
def test_nscl_projects_adams_step_on_the_null_space(normalise):
    rng = np.random.default_rng(2)
    scales = np.array([3.0, 2.0, 1.0, 0.5, 0.01, 0.008, 0.005])
    domains = [
        rng.normal(size=(60, 7)) * scales,
        rng.normal(size=(40, 7)) * scales[[1, 0, 2, 3, 6, 5, 4]],
        rng.normal(size=(30, 7)),
    ]
    targets = [rng.normal(size=(len(x), 2)) for x in domains]
    torch.manual_seed(0)
    layer = nn.Linear(7, 2, bias=False, dtype=torch.float64)
    W, adam, cov, P, ks = (
        layer.weight.detach().numpy().copy(),
        PlainAdam(1e-2),
        np.zeros((7, 7)),
        np.eye(7),
        [],
    )
    fit = lambda batch: (layer(batch[0]) - batch[1]).square().mean()
    nscl = NSCL(fit, ratio=20.0, normalise=normalise)
    router = MomentRouter(
        layer,
        torch.optim.Adam(layer.parameters(), lr=1e-2),
        nscl,
        "displacement",
    )
    for x, y in zip(domains, targets):
        batch = (torch.tensor(x), torch.tensor(y))
        router.observe(batch)
        for _ in range(25):
            layer.zero_grad()
            fit(batch).backward()
            router.optimizer.step()
            g = 2 * (x @ W.T - y).T @ x / y.size
            W = W - adam.step(g) @ P
        router.consolidate()
        cov += x.T @ x
        values, V = np.linalg.eigh(cov)
        null = V[:, values <= 20.0 * values[0]]
        P = null @ null.T
        P = P / np.linalg.norm(P) if normalise else P
        ks.append(null.shape[1])
        np.testing.assert_allclose(
            layer.weight.detach().numpy(), W, rtol=1e-8, atol=1e-10
        )
    assert ks[0] == 3 and 1 <= ks[-1]
    router.close()


def test_an_exact_null_space_is_found_whole_and_old_answers_stay():
    torch.manual_seed(0)
    layer = nn.Linear(20, 2, bias=False)
    old, new = torch.randn(5, 20), torch.randn(50, 20)
    nscl = NSCL(lambda b: layer(b).mean(), ratio=10.0)
    router = MomentRouter(
        layer,
        torch.optim.Adam(layer.parameters(), lr=1e-2),
        nscl,
        "displacement",
    )
    router.observe(old)
    layer(old).sum().backward()
    router.optimizer.step()
    report = router.consolidate()
    assert report["layers"]["weight"]["null"] == 15
    answers, first = (
        layer(old).detach(),
        (layer(new) - 1).square().mean().item(),
    )
    for _ in range(100):
        layer.zero_grad()
        (layer(new) - 1).square().mean().backward()
        router.optimizer.step()
    torch.testing.assert_close(layer(old), answers, rtol=1e-4, atol=1e-4)
    assert (layer(new) - 1).square().mean() < 0.8 * first  # and it learned


def test_inputs_are_caught_without_touching_the_model():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(48, 4),
    )
    loss_fn = lambda b: F.cross_entropy(model(b[0]), b[1])
    gpm = GPM(loss_fn, threshold=0.7, samples=12)
    router = MomentRouter(
        model, torch.optim.AdamW(model.parameters()), gpm, "shared"
    )
    batch = (torch.randn(16, 1, 6, 6), torch.randint(4, (16,)))
    router.observe(batch)
    loss_fn(batch).backward()
    router.optimizer.step()
    mean, modes = (
        model[1].running_mean.clone(),
        [m.training for m in model.modules()],
    )
    router.consolidate()
    assert torch.equal(mean, model[1].running_mean) and modes == [
        m.training for m in model.modules()
    ]
    assert not any(
        m._forward_pre_hooks or m._forward_hooks for m in model.modules()
    )
    assert (
        gpm.bases["0.weight"].shape[0] == 9
        and 0 < gpm.bases["0.weight"].shape[1] < 9
    )
    assert 0 < gpm.bases["5.weight"].shape[1] < 48


@pytest.mark.filterwarnings("ignore:the basis of")
def test_a_layer_that_is_not_reached_is_named_and_left():
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "idle": nn.Linear(3, 2)})
    gpm = GPM(lambda b: model["used"](b).mean())
    router = MomentRouter(
        model, torch.optim.Adam(model.parameters()), gpm, "shared"
    )
    router.observe(torch.randn(8, 3))
    with pytest.warns(UserWarning, match=r"no input reached \['idle.weight'\]"):
        router.consolidate()
    assert (
        gpm.bases["used.weight"].shape[1] > 0
        and gpm.bases["idle.weight"].shape[1] == 0
    )


@pytest.mark.parametrize("threshold", [0.0, -0.1, 1.0001, math.nan, "high"])
def test_thresholds_outside_the_half_open_unit_interval(threshold):
    for cls in (GPM, SGP):
        with pytest.raises(ValueError, match="threshold="):
            cls(lambda b: b.mean(), threshold=threshold)
