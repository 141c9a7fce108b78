"""Each family against its paper's formula, written again here in float64 and
from scratch, and what must be refused.
"""

import copy
import math
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dmr
from dmr.methods.agem import AGEM
from dmr.methods.controls import CurrentBasis, RandomBasis
from dmr.methods.gpm import GPM, NSCL, SGP
from dmr.methods.inputs import DomainSample, capture_inputs
from dmr.methods.ogd import OGD
from dmr.methods.penalty import EWC, SI
from dmr.methods.registry import FAMILIES, make
from dmr.routing.conformance import (
    Problem,
    require,
    same,
    train,
    trainer,
    weights,
)
from dmr.routing.modification import find_targets
from dmr.routing.router import MomentRouter

torch.set_num_threads(1)
ROUTINGS = ["shared", "decoupled", "denominator", "displacement"]


# -- input subspaces -----------------------------------------------------------
# -------------------------------------------


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


class PlainAdam:
    "Adam on one tensor, as in the paper, float64."

    def __init__(self, lr, betas=(0.9, 0.999), eps=1e-8):
        self.lr, (self.b1, self.b2), self.eps = lr, betas, eps
        self.m = self.v = 0.0
        self.t = 0

    def step(self, to_m, to_v=None):
        self.t += 1
        self.m = self.b1 * self.m + (1 - self.b1) * to_m
        self.v = (
            self.b2 * self.v
            + (1 - self.b2) * (to_m if to_v is None else to_v) ** 2
        )
        return (
            self.lr
            * (self.m / (1 - self.b1**self.t))
            / ((self.v / (1 - self.b2**self.t)) ** 0.5 + self.eps)
        )


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


def test_a_weight_used_twice_collects_from_both_layers():
    a, b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    b.weight = a.weight
    model = nn.Sequential(a, nn.Tanh(), b)
    x = torch.randn(10, 4)
    with torch.no_grad(), capture_inputs(model, find_targets(model)) as moments:
        model(x)
    hidden = torch.tanh(a(x)).double()
    torch.testing.assert_close(
        moments["0.weight"].matrix,
        x.double().T @ x.double() + hidden.T @ hidden,
        rtol=1e-5,
        atol=1e-5,
    )
    assert moments["0.weight"].rows == 20


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


def test_the_domain_sample_is_uniform():
    from scipy import stats

    counts = np.zeros(40)
    for seed in range(600):
        sample = DomainSample(5, seed)
        for part in torch.arange(40).split(7):
            sample.observe(part)
        counts[torch.cat(list(sample.batches(3))).numpy()] += 1
    assert counts.sum() == 5 * 600 and stats.chisquare(counts).pvalue > 1e-3


# -- OGD -----------------------------------------------------------------------
# -----------------------------------------


def flat(tensors):
    return torch.cat([x.detach().flatten() for x in tensors])


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


# -- A-GEM ---------------------------------------------------------------------
# -------------------------------------------


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


# -- penalties -----------------------------------------------------------------
# -------------------------------------------


def per_example(problem, batch):
    "Squared gradients of each example's loss, by an explicit loop."
    out = []
    for x, y in zip(*batch):
        logits = problem.model(x[None])
        grads = torch.autograd.grad(
            -F.log_softmax(logits, 1)[0, y], list(problem.model.parameters())
        )
        out.append(flat(grads).square())
    return torch.stack(out).mean(0)


@pytest.mark.parametrize("online, gamma", [(False, 1.0), (True, 0.7)])
def test_ewc_gradient_by_finite_differences_of_the_papers_penalty(
    online, gamma
):
    problem = Problem(torch.float64)
    ewc = EWC(problem.loss_fn, lam=7.0, samples=24, online=online, gamma=gamma)
    optimizer = torch.optim.Adam(problem.model.parameters(), lr=0.03)
    router = MomentRouter(problem.model, optimizer, ewc, "decoupled")
    past = []
    for domain in range(3):
        router.observe(problem.domains[domain])  # all 24 examples, once
        for step in range(12):
            optimizer.zero_grad()
            problem.loss_fn(problem.batch(domain, step)).backward()
            optimizer.step()
        past.append(
            (
                per_example(problem, problem.domains[domain]),
                flat(problem.model.parameters()),
            )
        )
        router.consolidate()

    def penalty(theta):
        if online:
            fisher = sum(
                gamma ** (len(past) - 1 - k) * f
                for k, (f, _) in enumerate(past)
            )
            return 0.5 * 7.0 * (fisher * (theta - past[-1][1]) ** 2).sum()
        return sum(
            0.5 * 7.0 * (f * (theta - anchor) ** 2).sum() for f, anchor in past
        )

    with torch.no_grad():
        for p in problem.model.parameters():
            p.add_(
                0.1
                * torch.randn(
                    p.shape,
                    generator=torch.Generator().manual_seed(1),
                    dtype=p.dtype,
                )
            )
    theta = flat(problem.model.parameters())
    e = torch.eye(len(theta), dtype=torch.float64) * 1e-5
    numeric = torch.stack(
        [(penalty(theta + d) - penalty(theta - d)) / 2e-5 for d in e]
    )
    own = flat(ewc.pull(name) for name, _ in problem.model.named_parameters())
    torch.testing.assert_close(own, numeric, rtol=1e-6, atol=1e-8)
    assert own.norm() > 1e-3


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


def test_si_adds_up_the_fall_of_the_loss_for_small_sgd_steps():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 5, dtype=torch.float64),
        nn.Tanh(),
        nn.Linear(5, 1, dtype=torch.float64),
    )
    x, y = (
        torch.randn(30, 4, dtype=torch.float64),
        torch.randn(30, 1, dtype=torch.float64),
    )
    fit = lambda: (model(x) - y).square().mean()
    errors = []
    for lr, steps in ((1e-2, 100), (1e-3, 1000)):
        twin = copy.deepcopy(model.state_dict())
        router = MomentRouter(
            model,
            torch.optim.SGD(model.parameters(), lr=lr, momentum=1e-9),
            SI(),
            "shared",
        )
        first = fit().item()
        for _ in range(steps):
            model.zero_grad()
            fit().backward()
            router.optimizer.step()
        fall, path = first - fit().item(), router.consolidate()["path_integral"]
        errors.append(abs(path - fall) / fall)
        router.close()
        model.load_state_dict(twin)
    # first order in the rate
    assert errors[1] < 2e-3 and errors[1] < errors[0] / 5


@pytest.mark.parametrize("routing", ["shared", "decoupled"])
def test_si_follows_the_real_step_and_the_raw_gradient(routing):
    """Also while its own penalty is routed: ω = -Σ g Δθ with the loss's
    gradient and what the parameters really did.
    """
    problem = Problem(torch.float64)
    si = SI(c=5.0, xi=0.05)
    optimizer = torch.optim.AdamW(
        problem.model.parameters(), lr=2e-2, weight_decay=0.1
    )
    router = MomentRouter(problem.model, optimizer, si, routing)
    omega_sum, against = (
        torch.zeros(
            sum(p.numel() for p in problem.model.parameters()),
            dtype=torch.float64,
        ),
        False,
    )
    for domain in range(3):
        start, path = (
            flat(problem.model.parameters()),
            torch.zeros_like(omega_sum),
        )
        for step in range(10):
            before = flat(problem.model.parameters())
            g = flat(
                torch.autograd.grad(
                    problem.loss_fn(problem.batch(domain, step)),
                    list(problem.model.parameters()),
                )
            )
            train(problem, optimizer, router, domain, range(step, step + 1))
            path -= g * (flat(problem.model.parameters()) - before)
        against |= bool((path < 0).any())
        omega_sum = (
            omega_sum
            + path / ((flat(problem.model.parameters()) - start) ** 2 + 0.05)
        ).clamp_min(0)
        router.consolidate()
        own = flat(
            si.importance[name] for name, _ in problem.model.named_parameters()
        )
        torch.testing.assert_close(own, omega_sum, rtol=1e-9, atol=1e-12)
    # some parameters worked against the fall, so that the cut at 0 was seen
    assert against


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("normalise", ["mean", "max", "none"])
def test_rescaling_against_adam_written_out(routing, normalise):
    problem = Problem(torch.float64)
    ewc = EWC(
        problem.loss_fn,
        lam=0.8,
        form="rescale",
        samples=24,
        normalise=normalise,
    )
    optimizer = torch.optim.Adam(
        problem.model.parameters(), lr=1e-2, betas=(0.9, 0.95)
    )
    router = MomentRouter(problem.model, optimizer, ewc, routing, 0.9)
    router.observe(problem.domains[0])
    fisher = per_example(problem, problem.domains[0])
    router.consolidate()
    unit = {
        "mean": fisher.mean(),
        "max": fisher.max(),
        "none": torch.tensor(1.0),
    }[normalise]
    factor = 1 - 0.9 * (0.8 * fisher / unit).clamp(0, 1)
    assert factor.min() < 1 and (
        normalise != "mean"
        or torch.isclose(factor.min(), torch.tensor(0.1, dtype=torch.float64))
    )
    theta, adam = flat(problem.model.parameters()), PlainAdam(1e-2, (0.9, 0.95))
    for step in range(15):
        g = flat(
            torch.autograd.grad(
                problem.loss_fn(problem.batch(1, step)),
                list(problem.model.parameters()),
            )
        )
        to_m = factor * g if routing in ("shared", "decoupled") else g
        to_v = factor * g if routing in ("shared", "denominator") else g
        u = adam.step(to_m, to_v)
        theta = theta - (factor * u if routing == "displacement" else u)
        train(problem, optimizer, router, 1, range(step, step + 1))
        torch.testing.assert_close(
            flat(problem.model.parameters()), theta, rtol=1e-8, atol=1e-10
        )


# -- controls ------------------------------------------------------------------
# -------------------------------------------


@pytest.mark.parametrize(
    "options", [{"rank": 2}, {"energy": 0.7, "max_rank": 4}]
)
def test_controls_have_the_ranks_of_the_real_thing(options):
    ranks, bases = {}, {}
    kinds = {
        "real": dmr.Projection,
        "random": RandomBasis,
        "current": lambda **o: CurrentBasis(refresh=2, **o),
    }
    for kind, cls in kinds.items():
        # equal gradients
        problem, optimizer, router = trainer(
            lambda p, cls=cls: cls(every=1, **options), "shared", strength=0.0
        )
        ranks[kind] = []
        for domain in range(3):
            train(problem, optimizer, router, domain, range(5))
            active = {
                n: U.shape[1] for n, U in router.modification.bases.items()
            }
            ranks[kind].append(active)
            bases[kind] = {
                n: U.clone() for n, U in router.modification.bases.items()
            }
            router.consolidate()
    assert ranks["real"] == ranks["random"] == ranks["current"]
    assert any(ranks["real"][-1].values())
    for name, U in bases["real"].items():
        for kind in ("random", "current"):
            V = bases[kind][name]
            torch.testing.assert_close(
                V.T @ V, torch.eye(V.shape[1]), rtol=0, atol=1e-5
            )
            assert not torch.allclose(U @ U.T, V @ V.T, atol=1e-2)


def test_the_random_basis_draws_from_its_own_stream_and_keeps_what_it_drew():
    def bases(seed, disturb=0):
        torch.manual_seed(disturb)
        run = trainer(lambda p: RandomBasis(rank=1, every=1, seed=seed))
        out = []
        for domain in range(2):
            train(*run, domain, range(3))
            run[2].consolidate()
            out.append(run[2].modification.bases["0.weight"].clone())
        return out

    first, second = bases(0)
    assert torch.equal(first, second[:, :1]) and second.shape[1] == 2
    assert same(bases(0), bases(0, disturb=9)) and not same(bases(0), bases(1))


# -- the table, the backbones, what is refused
# ----------------------------------------------------------------------------

FUNCTIONS = {"loss_fn": lambda b: b.mean(), "logit_fn": lambda b: b.mean()}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_table_says_what_the_classes_do(name):
    modification = make(name, **FUNCTIONS)
    family = FAMILIES[name]
    assert family.native in family.routings
    assert family.steps_too == modification.acts_on_steps
    model = nn.Linear(3, 2)
    for routing in ROUTINGS:
        optimizer = torch.optim.AdamW(model.parameters())
        if routing in family.routings:
            MomentRouter(
                model, optimizer, make(name, **FUNCTIONS), routing
            ).close()
        else:
            with pytest.raises(ValueError, match="has no meaning"):
                MomentRouter(model, optimizer, make(name, **FUNCTIONS), routing)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for routing in ("decoupled", "denominator"):
        with pytest.raises(ValueError, match="no second moment"):
            MomentRouter(model, sgd, make(name, **FUNCTIONS), routing)


OPTIMIZERS = {
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "radam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("backbone", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:the basis of")
def test_every_backbone_takes_every_family(name, backbone):
    problem = Problem()
    options = (
        {"fraction": 0.5}
        if "buffer" in FAMILIES[name].needs
        else {"every": 1, "rank": 2}
        if FAMILIES[name].kind == "control"
        else {}
    )
    modification = make(
        name, loss_fn=problem.loss_fn, logit_fn=problem.logit_fn, **options
    )
    optimizer = OPTIMIZERS[backbone](problem.model.parameters())
    routing = "shared" if backbone == "sgd" else FAMILIES[name].native
    router = MomentRouter(problem.model, optimizer, modification, routing, 0.5)
    for domain in range(2):
        start = weights(problem)
        train(problem, optimizer, router, domain, range(4))
        router.consolidate()
        assert not same(start, weights(problem))
    assert all(p.isfinite().all() for p in problem.model.parameters())


BROKEN = {
    "vector": (
        lambda problem, batch: problem.model(batch[0])[0],
        "returned a tensor of shape",
    ),
    "nan": (
        lambda problem, batch: problem.loss_fn(batch) * math.nan,
        "returned nan",
    ),
    "number": (lambda problem, batch: 1.0, "returned float"),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize(
    "name", ["gpm", "sgp", "nscl", "ogd", "ewc", "ewc_scale"]
)
def test_a_broken_sample_function_changes_nothing(name, kind):
    problem, (function, message) = Problem(), BROKEN[kind]
    broken = lambda batch: function(problem, batch)
    optimizer = torch.optim.AdamW(problem.model.parameters())
    modification = make(name, loss_fn=broken, logit_fn=broken)
    router = MomentRouter(problem.model, optimizer, modification, "decoupled")
    train(problem, optimizer, router, 0, range(3))
    before, kept = copy.deepcopy(router.state_dict()), weights(problem)
    with pytest.raises(ValueError, match=message):
        router.consolidate()
    assert (
        same(before, router.state_dict())
        and same(kept, weights(problem))
        and problem.model.training
    )


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


@pytest.mark.parametrize("threshold", [0.0, -0.1, 1.0001, math.nan, "high"])
def test_thresholds_outside_the_half_open_unit_interval(threshold):
    for cls in (GPM, SGP):
        with pytest.raises(ValueError, match="threshold="):
            cls(lambda b: b.mean(), threshold=threshold)


def test_an_empty_buffer_is_said_to_be_empty():
    with pytest.raises(ValueError, match="replay buffer is empty"):
        AGEM(dmr.ReplayBuffer(), lambda b: b.mean()).buffer.sample(3)


# -- the conformance checks can fail -------------------------------------------
# -------------------------------------------


class Shrink(dmr.Modification):
    """A proper little method: takes away a tenth of the gradient once a domain
    is over.
    """

    def __init__(self):
        self.domains = self.steps = 0

    def __repr__(self):
        return "Shrink()"

    def edited(self):
        return None if self.domains else ()

    def learn(self, grads):
        self.steps += 1

    def begin(self, vectors, overlap):
        return torch.tensor(0.5) if overlap else None

    def edit(self, name, x):
        return dmr.Dense(0.1 * self.domains * x)

    def consolidate(self):
        if not self.steps:
            raise ValueError("no step yet")
        self.domains, self.steps = self.domains + 1, 0
        return {"domains": self.domains}

    def state_dict(self):
        return {"domains": self.domains, "steps": self.steps}

    def load_state_dict(self, state):
        self.domains, self.steps = state["domains"], state["steps"]


def fault(**methods):
    return type("Faulty", (Shrink,), methods)


FAULTS = {
    "identity": fault(
        edited=lambda self: None, edit=lambda self, name, x: dmr.Dense(0.1 * x)
    ),
    "routings": fault(edit=lambda self, name, x: None),
    "gradients": fault(
        begin=lambda self, vectors, overlap: (
            [vectors[n].mul_(2) for n in vectors] and None
        )
    ),
    "resumption": fault(load_state_dict=lambda self, state: None),
    "types_and_devices": fault(edit=lambda self, name, x: dmr.Dense(x / 0)),
    "missing_gradients": fault(
        edited=lambda self: None,
        end=lambda self, grads=None: self.model[0].bias.data.add_(1),
    ),
    "reports": fault(memory=lambda self: 0.5),
    "overlap": fault(
        begin=lambda self, vectors, overlap: (
            torch.tensor(1.5) if overlap else None
        )
    ),
    "errors": fault(consolidate=lambda self: {}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_check_finds_its_fault(name):
    import dmr.routing.conformance

    one = getattr(dmr.routing.conformance, name)
    one(lambda problem: Shrink())
    with pytest.raises((AssertionError, ValueError)) as found:
        one(lambda problem: FAULTS[name]())
    require(str(found.value) != "", "the check says what went wrong")


# -- several processes ---------------------------------------------------------
# -------------------------------------------


def replica(rank, store, names, out):
    """One of two processes with a copy of the model each, and examples of its
    own.
    """
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        store=torch.distributed.FileStore(store, 2),
        rank=rank,
        world_size=2,
    )
    for name in names:
        problem = Problem(torch.float64)
        model = nn.parallel.DistributedDataParallel(problem.model)
        # other examples in each process
        shift = [(x + 0.5 * rank, y) for x, y in problem.domains]
        options = {"fraction": 0.5} if "buffer" in FAMILIES[name].needs else {}
        options |= (
            {"every": 1, "rank": 2} if FAMILIES[name].kind == "control" else {}
        )
        options |= {"threshold": 0.7} if name in ("gpm", "sgp") else {}
        modification = make(
            name,
            loss_fn=problem.loss_fn,
            logit_fn=problem.logit_fn,
            seed=rank,
            **options,
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        with MomentRouter(
            model, optimizer, modification, FAMILIES[name].native, 0.7
        ) as router:
            for x, y in shift:
                for step in range(4):
                    batch = (x[8 * (step % 3) :][:8], y[8 * (step % 3) :][:8])
                    router.observe(batch, total=24)
                    optimizer.zero_grad()
                    F.cross_entropy(model(batch[0]), batch[1]).backward()
                    optimizer.step()
                router.consolidate()
        torch.save(flat(problem.model.parameters()), f"{out}/{name}-{rank}.pt")
    torch.distributed.barrier()  # nobody leaves while the other still writes
    # gloo's threads let go of their last tensors, or the process aborts at its
    # end
    time.sleep(0.2)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_replicas_stay_equal(tmp_path):
    torch.multiprocessing.spawn(
        replica,
        (str(tmp_path / "store"), list(FAMILIES), str(tmp_path)),
        nprocs=2,
    )
    for name in FAMILIES:
        a, b = (
            torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True)
            for rank in range(2)
        )
        assert torch.equal(a, b) and a.isfinite().all(), name
