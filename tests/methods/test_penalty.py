"EWC and SI against the papers' formulas, in both forms."

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import PlainAdam, flat, regression
from torch import nn

import dmr
from dmr.methods.penalty import EWC, SI
from dmr.routing.conformance import Problem, train
from dmr.routing.router import MomentRouter
from dmr.routing.step import ROUTINGS

torch.set_num_threads(1)


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


def test_the_path_is_the_same_under_a_loss_scale():
    "The fused kernel unscales gradients in place; they are not divided twice."
    paths = {}
    for scale in (None, 2.0**6):
        torch.manual_seed(0)
        model = nn.Linear(5, 3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        router = dmr.MomentRouter(model, optimizer, SI(), "shared")
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0)
        x = torch.randn(9, 5)
        for _ in range(4):
            optimizer.zero_grad()
            loss = (model(x) - x[:, :3]).square().mean()
            if scale is None:
                loss.backward()
                optimizer.step()
            else:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
        paths[scale] = router.modification.path
    for name, path in paths[None].items():
        torch.testing.assert_close(paths[2.0**6][name], path)


def one_domain(router, steps=5):
    "Train on a domain, and end it."
    for _ in range(steps):
        x = torch.randn(8, 6)
        router.observe(x)
        router.optimizer.zero_grad()
        router.model(x).square().mean().backward()
        router.optimizer.step()
    return router.consolidate()


PENALTIES = {
    "ewc": lambda model: EWC(lambda x: model(x).square().mean(), samples=4),
    "online": lambda model: EWC(
        lambda x: model(x).square().mean(), samples=4, online=True, gamma=0.5
    ),
    "brake": lambda model: EWC(
        lambda x: model(x).square().mean(), form="rescale", samples=4
    ),
    "uniform": lambda model: EWC(lambda x: x, uniform=True, online=True),
    "si": lambda model: SI(c=1.0),
}


@pytest.mark.parametrize("kind", PENALTIES)
def test_a_weight_may_be_frozen_after_the_router_was_made(kind):
    model, _ = regression()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    router = MomentRouter(model, optimizer, PENALTIES[kind](model))
    one_domain(router)
    edit = router.modification
    kept = edit.importance["0.weight"].clone()
    model[0].weight.requires_grad_(False)
    weight = model[0].weight.detach().clone()
    one_domain(router)
    if kind in ("ewc", "brake", "si"):  # it was not measured, and not lost
        assert torch.equal(edit.importance["0.weight"], kept)
    state = copy.deepcopy(router.state_dict())
    router.close()
    again = MomentRouter(model, optimizer, PENALTIES[kind](model))
    again.load_state_dict(state)
    model[0].weight.requires_grad_(True)
    one_domain(again)
    assert "0.weight" in again.modification.edited()
    assert not torch.equal(weight, model[0].weight)


@pytest.mark.parametrize("kind", PENALTIES)
@pytest.mark.parametrize("at", ["the boundary", "within the domain"])
def test_a_weight_that_is_unfrozen_later_is_protected_from_then_on(kind, at):
    model, _ = regression()
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    router = MomentRouter(model, optimizer, PENALTIES[kind](model))
    one_domain(router)
    edit = router.modification
    assert "0.weight" not in edit.edited()
    if at == "within the domain":
        model(torch.ones(1, 6)).sum().backward()
        optimizer.step()
    model[0].weight.requires_grad_(True)
    one_domain(router)
    assert "0.weight" in edit.edited()
    assert edit.importance["0.weight"].abs().sum() > 0
    one_domain(router)  # and its edit can be used


@pytest.mark.parametrize("kind", ["online", "si", "ewc", "brake"])
def test_only_an_anchor_for_the_last_weights_moves_with_a_merge(kind):
    model, _ = regression()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    router = MomentRouter(model, optimizer, PENALTIES[kind](model))
    one_domain(router)
    edit, ends = router.modification, flat(model.parameters())
    with torch.no_grad():  # what a merge does
        for p in model.parameters():
            p.mul_(0.5)
    edit.after_merge()
    names = [name for name, _ in model.named_parameters()]
    if kind == "brake":
        assert not edit.anchors
        return
    anchors = flat(edit.anchors[name] for name in names)
    merged = kind != "ewc"  # a sum of quadratics, each around its own end
    assert torch.equal(anchors, flat(model.parameters()) if merged else ends)
    pull = flat(edit.pull(name) for name in names)
    assert bool(pull.any()) != merged
    with torch.no_grad():
        model[0].weight.zero_()  # the anchors are copies
    assert torch.equal(anchors, flat(edit.anchors[name] for name in names))


@pytest.mark.parametrize("kind", ["online", "si"])
def test_a_penalty_does_not_undo_the_merge_of_a_boundary(kind):
    model, _ = regression()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    edit = PENALTIES[kind](model) if kind == "online" else SI(c=10.0)
    router = MomentRouter(
        model, optimizer, edit, consolidation=dmr.Interpolate(0.5)
    )
    one_domain(router)
    start = flat(model.parameters())
    for _ in range(20):
        x = torch.randn(8, 6)
        router.observe(x)
        optimizer.zero_grad()
        (model(x) - 3).square().mean().backward()
        optimizer.step()
    end = flat(model.parameters())
    router.consolidate()
    merged = flat(model.parameters())
    torch.testing.assert_close(merged, (start + end) / 2)
    for name, p in model.named_parameters():
        assert torch.equal(edit.anchors[name], p)
        assert not edit.pull(name).any()


@pytest.mark.parametrize("told", ["examples", "weights"])
def test_si_says_that_it_cannot_be_told_of_a_past(told):
    model, _ = regression()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    router = MomentRouter(model, optimizer, SI())
    loss = lambda x: model(x).square().mean()
    with pytest.raises(TypeError, match="follows the path.*take EWC, which"):
        if told == "weights":
            router.protect_weights()
        else:
            router.protect([torch.randn(8, 6)], loss)
    assert router.domains == 0 and not router.modification.edited()
    one_domain(router)  # its training is the past, then
    assert router.modification.edited()


def test_beside_si_a_past_is_shown_to_the_merge_alone():
    def shown(method):
        model, _ = regression()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        merge = dmr.FisherMerge()
        router = MomentRouter(model, optimizer, method, consolidation=merge)
        seeded = torch.Generator().manual_seed(0)
        batches = torch.randn(3, 8, 6, generator=seeded)
        router.protect(batches, lambda x: model(x).square().mean())
        return router

    si, plain = shown(SI()), shown(None)
    assert si.domains == plain.domains == 1
    kept, expected = (r.consolidation.state_dict() for r in (si, plain))
    for table in ("before", "past"):
        assert kept[table].keys() == expected[table].keys() != set()
        for name, x in expected[table].items():
            assert torch.equal(kept[table][name], x), (table, name)
    assert not si.modification.edited() and not si.modification.path
    one_domain(si)  # its training is the first that SI learns from
    assert si.modification.edited() and si.domains == 2


def test_the_anchor_of_a_layer_that_was_removed_stays_where_it_was():
    model = nn.ModuleDict({"a": nn.Linear(2, 1), "b": nn.Linear(2, 1)})
    si = SI()
    si.attach(model, {})
    si.anchors = {n: p.detach() + 1 for n, p in model.named_parameters()}
    kept = si.anchors["b.weight"]
    del model["b"]
    si.attach(model, {})
    si.after_merge()
    assert si.anchors["b.weight"] is kept
    assert torch.equal(si.anchors["a.weight"], model["a"].weight)
