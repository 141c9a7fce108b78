"""Rivals of the merge: float64 references, states, and what is refused."""

import copy
import warnings

import pytest
import torch
from torch import nn

import dmr
from dmr.methods.consolidation import FisherMerge, merge
from dmr.methods.penalty import EWC, fisher_diagonal
from dmr.methods.rivals import (
    FisherVariant,
    KFACMerge,
    RegMean,
    kronecker_factors,
    kronecker_mean,
    nearest_product,
    regression_mean,
    softened,
)
from dmr.routing.consolidation import Interpolate
from dmr.routing.modification import find_targets


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3)
    ).double()


def domains(count=3, n=48):
    draw = torch.Generator().manual_seed(1)
    for k in range(count):
        x = torch.randn(n, 6, generator=draw, dtype=torch.float64) + k
        yield x, torch.randint(3, (n,), generator=draw)


def loss_of(net):
    return lambda b: nn.functional.cross_entropy(net(b[0]), b[1])


def routed(net, rule, modification=None, routing="decoupled", **options):
    adam = torch.optim.AdamW(net.parameters(), lr=0.02, **options)
    return dmr.MomentRouter(
        net, adam, modification, routing, consolidation=rule
    )


def learn(router, batch, loss, steps=12, batches=4):
    "One domain without its boundary; returns the raw gradients of its steps."
    seen = []
    for k in range(steps):
        rows = slice(k % batches, None, batches)
        part = tuple(x[rows] for x in batch)
        router.observe(part)
        router.optimizer.zero_grad()
        loss(part).backward()
        named = router.model.named_parameters()
        seen.append({n: p.grad.clone() for n, p in named})
        router.optimizer.step()
    return seen


def weights(net):
    return {n: p.detach().clone() for n, p in net.named_parameters()}


def squares(seen):
    return {n: sum(g[n] ** 2 for g in seen) / len(seen) for n in seen[0]}


def same(a, b, tolerance=1e-10):
    for name in b:
        torch.testing.assert_close(
            a[name], b[name], rtol=tolerance, atol=tolerance
        )


def test_a_pull_leaves_the_past_as_it_is():
    "SFA: twice inside a domain and at its end, to the same checkpoint."
    net, loss = network(), None
    loss = loss_of(net)
    router = routed(net, Interpolate(0.75))
    first, second, _ = domains()
    learn(router, first, loss)
    start = weights(net)
    router.consolidation.pull()  # the first domain has no past
    same(weights(net), start, 0)
    router.consolidate()
    for _ in range(2):
        learn(router, second, loss, steps=4)
        before = weights(net)
        router.consolidation.pull()
        expected = {n: 0.25 * start[n] + 0.75 * before[n] for n in before}
        same(weights(net), expected, 1e-12)
    learn(router, second, loss, steps=4)
    before = weights(net)
    router.consolidate()
    same(weights(net), {n: 0.25 * start[n] + 0.75 * before[n] for n in before})


def test_a_pull_by_curvature_uses_what_was_seen_of_the_domain():
    net = network()
    loss, rule = loss_of(net), FisherMerge(0.6)
    router = routed(net, rule)
    first, second, _ = domains()
    f_old = squares(learn(router, first, loss))
    router.consolidate()
    start, past = weights(net), copy.deepcopy(rule.past)
    seen = learn(router, second, loss, steps=5)
    ends = weights(net)
    rule.pull()
    same(weights(net), merge(start, ends, f_old, squares(seen), 0.6))
    same(rule.past, past, 0)
    # the domain goes on: all its steps count at its end
    seen += learn(router, second, loss, steps=5)
    ends = weights(net)
    router.consolidate()
    same(weights(net), merge(start, ends, f_old, squares(seen), 0.6))


def test_the_last_steps_alone():
    net = network()
    loss = loss_of(net)
    router = routed(net, FisherVariant(0.7, last=0.25, steps=12))
    first, second, _ = domains()
    f_old = squares(learn(router, first, loss)[9:])
    router.consolidate()
    start, seen = weights(net), learn(router, second, loss)
    ends = weights(net)
    router.consolidate()
    same(weights(net), merge(start, ends, f_old, squares(seen[9:]), 0.7))


@pytest.mark.parametrize("routing", ["shared", "denominator", "decoupled"])
def test_what_the_second_moment_was_fed_is_the_curvature(routing):
    "Against the squares of the gradients that a routed Adam was given."
    net = network()
    loss = loss_of(net)
    edit = dmr.Projection(rank=2, every=1)
    router = routed(net, FisherVariant(0.7, curvature="seen"), edit, routing)
    v, fed, beta2 = {}, [], 0.999

    def note(adam, *_):
        "g̃² of this step, from v before and after it."
        after = {n: router.second_moment(n) for n in router.parameters()}
        step = {n: x - beta2 * v.get(n, 0 * x) for n, x in after.items()}
        fed.append({n: x / (1 - beta2) for n, x in step.items()})
        v.update({n: x.clone() for n, x in after.items()})

    router.optimizer.register_step_post_hook(note)
    curvature, start, raw = [], None, None
    for batch in list(domains())[:2]:
        fed.clear()
        raw = squares(learn(router, batch, loss))
        mean = {n: sum(x[n] for x in fed) / len(fed) for n in fed[0]}
        curvature.append(mean)
        ends = weights(net)
        router.consolidate()
        expected = ends
        if start is not None:
            expected = merge(start, ends, *curvature, 0.7)
        same(weights(net), expected, 1e-7)
        start = weights(net)
    edited = (curvature[1]["0.weight"] - raw["0.weight"]).abs().max()
    assert (edited > 1e-6) == (routing != "decoupled")


def test_one_pass_is_the_fisher_of_each_example():
    net = network()
    loss = loss_of(net)
    rule = FisherVariant(
        0.5, 0.0, "pass", loss_fn=loss, examples=500, samples=4
    )
    router = routed(net, rule)
    fishers, start = [], None
    for batch in list(domains())[:2]:
        learn(router, batch, loss, steps=4)  # each example once
        one = [tuple(x[i : i + 1] for x in batch) for i in range(48)]
        fishers.append(fisher_diagonal(dict(net.named_parameters()), loss, one))
        ends = weights(net)
        router.consolidate()
        if start is not None:
            same(weights(net), merge(start, ends, *fishers, 0.5, 0.0))
        start = weights(net)


def test_drawing_labels_leaves_the_random_stream_alone():
    net = network()
    loss = loss_of(net)

    def drawn(b):
        logits = net(b[0])
        label = torch.distributions.Categorical(logits=logits.detach()).sample()
        return nn.functional.cross_entropy(logits, label)

    rule = FisherVariant(0.5, 0.0, "pass", loss_fn=loss, fisher_fn=drawn)
    router = routed(net, rule)
    learn(router, next(domains()), loss)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    again = rule._measured()
    assert torch.equal(torch.rand(1), expected)
    same(rule._measured(), again, 0)


def test_the_chain_of_trained_weights():
    "The merged weights are looked at; training goes on from the others."
    ends, merged = {}, {}
    for chain in ("merged", "trained"):
        net = network()
        loss = loss_of(net)
        router = routed(net, FisherVariant(0.5, chain=chain))
        for batch in domains():
            router.consolidation.begin()
            learn(router, batch, loss)
            ends[chain] = weights(net)
            router.consolidate()
            merged[chain] = weights(net)
    plain = network()
    router = routed(plain, None)
    for batch in domains():
        learn(router, batch, loss_of(plain))
    same(ends["trained"], weights(plain), 0)
    different = merged["trained"]["0.weight"] - ends["trained"]["0.weight"]
    assert different.abs().max() > 1e-4
    assert not torch.equal(
        ends["merged"]["0.weight"], ends["trained"]["0.weight"]
    )


def test_only_some_weights_are_merged_by_curvature():
    def after(rule):
        net = network()
        router = routed(net, rule)
        for batch in list(domains())[:2]:
            learn(router, batch, loss_of(net))
            router.consolidate()
        return weights(net)

    whole, plain = after(FisherMerge(0.7)), after(Interpolate(0.7))
    mixed = after(FisherVariant(0.7, only=["3.*"]))
    same({"3.weight": mixed["3.weight"]}, {"3.weight": whole["3.weight"]})
    same({"0.weight": mixed["0.weight"]}, {"0.weight": plain["0.weight"]})
    with pytest.raises(ValueError, match=r"only='9\.\*'.*nothing was changed"):
        after(FisherVariant(0.7, only="9.*"))


@pytest.mark.parametrize("rise", [0.0, 0.2, 0.6])
def test_the_search_takes_the_smallest_weight_that_it_may(rise):
    net = network()
    loss = loss_of(net)
    rule = FisherVariant(loss_fn=loss, rise=rise, examples=500)
    router = routed(net, rule)
    first, second, _ = domains()
    f_old = squares(learn(router, first, loss))
    router.consolidate()
    start = weights(net)
    f_new = squares(learn(router, second, loss, steps=4))
    ends = weights(net)
    found = router.consolidate()["consolidation"]["weight"]
    merged = weights(net)

    def loss_at(state):
        with torch.no_grad():
            for name, p in net.named_parameters():
                p.copy_(state[name])
            return loss(second).item()

    limit = loss_at(ends) + rise * max(0.0, loss_at(start) - loss_at(ends))
    tried = [k / 10 for k in range(1, 11)]
    at = [loss_at(merge(start, ends, f_old, f_new, w)) for w in tried]
    expected = next(w for w, x in zip(tried, at) if x <= limit or w == 1)
    assert found == expected
    same(merged, merge(start, ends, f_old, f_new, expected))


def test_regression_mean_is_the_joint_regression():
    torch.manual_seed(0)
    X, Y = torch.randn(2, 30, 5).double(), torch.randn(2, 30, 4).double()
    fit = lambda x, y: torch.linalg.lstsq(x, y).solution.mT
    ends = [fit(x, y) for x, y in zip(X, Y)]
    grams = [x.mT @ x for x in X]
    for weight in (0.3, 0.5):
        counts = torch.tensor([1 - weight, weight], dtype=torch.float64)
        root = counts.sqrt()[:, None, None]
        exact = fit((root * X).flatten(0, 1), (root * Y).flatten(0, 1))
        merged = regression_mean(*ends, *grams, weight)
        torch.testing.assert_close(merged, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("weight", [0.2, 0.5, 0.8])
def test_the_kronecker_merge_solves_the_whole_system(weight):
    torch.manual_seed(0)
    root = lambda n: torch.randn(n, n, dtype=torch.float64)
    spd = lambda n: softened((r := root(n)) @ r.mT, damping=0.01)
    past, running = (spd(5), spd(3)), (spd(5), spd(3))
    old, new = torch.randn(2, 3, 5, dtype=torch.float64)
    F_p, F_n = (torch.kron(B, A) for A, B in (past, running))
    full = (1 - weight) * F_p + weight * F_n
    right = (1 - weight) * F_p @ old.flatten() + weight * F_n @ new.flatten()
    exact = torch.linalg.solve(full, right).reshape(3, 5)
    merged = kronecker_mean(old, new, past, running, weight)
    torch.testing.assert_close(merged, exact, rtol=1e-8, atol=1e-8)
    # no other product is nearer to the sum
    A, B = nearest_product(past, running)
    error = lambda A, B: (torch.kron(B, A) - F_p - F_n).norm().item()
    best = error(A, B)
    for _ in range(20):
        assert error(A + 1e-3 * root(5), B + 1e-3 * root(3)) >= best


def test_the_factors_are_those_of_the_definition():
    "One example at a time, through a network, against autograd by hand."
    net = network()
    loss, layers = loss_of(net), find_targets(net)
    x, y = next(domains(n=1))
    found = kronecker_factors(net, layers, loss, (x, y))
    hidden = net[2](net[1](net[0](x))).detach()
    logits = net(x).detach()
    g = logits.softmax(-1) - nn.functional.one_hot(y, 3)
    A, B = found["3.weight"]
    torch.testing.assert_close(A, hidden.mT @ hidden)
    torch.testing.assert_close(B, g.mT @ g)
    diagonal = torch.outer(B.diagonal(), A.diagonal())
    fisher = fisher_diagonal(dict(net.named_parameters()), loss, [(x, y)])
    torch.testing.assert_close(diagonal, fisher["3.weight"])


def test_kfac_knows_a_domain_by_its_examples_where_no_step_was_seen():
    "So it merges what another optimizer trained, as the others do not."
    net = network()
    loss = loss_of(net)
    router = routed(net, KFACMerge(0.6, 1e-3, loss_fn=loss, examples=500))
    first, second = list(domains())[:2]
    learn(router, first, loss, steps=4)
    router.consolidate()
    start = weights(net)
    router.observe(second)
    other = torch.optim.AdamW(net.parameters(), lr=0.02)
    for _ in range(4):
        other.zero_grad()
        loss(second).backward()
        other.step()
    ends = weights(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        router.consolidate()
    merged = net[0].weight.detach()
    way = ends["0.weight"] - start["0.weight"]
    share = ((merged - start["0.weight"]) * way).sum() / way.square().sum()
    assert 0.1 < share < 0.9


def test_kfac_merges_layers_by_factors_and_the_rest_by_the_diagonal():
    net = network()
    loss = loss_of(net)
    rule = KFACMerge(0.6, 1e-3, loss_fn=loss, examples=500)
    router = routed(net, rule)
    layers, factors, fishers = find_targets(net), [], []
    for batch in list(domains())[:2]:
        start = weights(net) if factors else None
        fishers.append(squares(learn(router, batch, loss, steps=4)))
        factors.append(kronecker_factors(net, layers, loss, batch))
        ends = weights(net)
        router.consolidate()
    diagonal = merge(start, ends, *fishers, 0.6)
    for name, p in weights(net).items():
        expected = diagonal[name]
        if name in layers:
            both = [
                tuple(softened(S, damping=1e-3) for S in f[name])
                for f in factors
            ]
            expected = kronecker_mean(start[name], ends[name], *both, 0.6)
        torch.testing.assert_close(p, expected, rtol=1e-7, atol=1e-9)


RULES = {
    "seen": lambda loss: FisherVariant(0.7, curvature="seen"),
    "last": lambda loss: FisherVariant(0.7, last=0.5, steps=12),
    "pass": lambda loss: FisherVariant(
        0.5, 0.0, "pass", loss_fn=loss, examples=16, chain="trained"
    ),
    "search": lambda loss: FisherVariant(loss_fn=loss, rise=0.2, examples=16),
    "regmean": lambda loss: RegMean(0.6, loss_fn=loss, examples=16),
    "kfac": lambda loss: KFACMerge(0.6, loss_fn=loss, examples=16),
}


@pytest.mark.parametrize("kind", RULES)
def test_saved_in_the_middle_of_a_domain_it_goes_on_bit_for_bit(kind):
    def make(seed=0):
        net = network(seed)
        loss = loss_of(net)
        return net, loss, routed(net, RULES[kind](loss))

    first, second, third = domains()
    net, loss, router = make()
    for batch in (first, second):
        learn(router, batch, loss)
        router.consolidate()
    router.consolidation.begin()
    learn(router, third, loss, steps=7)
    state = copy.deepcopy(
        (net.state_dict(), router.optimizer.state_dict(), router.state_dict())
    )
    other, other_loss, again = make(5)
    other.load_state_dict(state[0])
    again.optimizer.load_state_dict(state[1])
    again.load_state_dict(state[2])
    for r, f in ((router, loss), (again, other_loss)):
        learn(r, third, f, steps=5)
        r.consolidate()
        r.consolidation.begin()
    same(weights(other), weights(net), 0)
    assert again.memory() == router.memory() > 0


def test_several_processes_are_refused(monkeypatch):
    net = network()
    monkeypatch.setattr("dmr.routing.router.replicas", lambda *_: object())
    with pytest.raises(ValueError, match="one process's own examples"):
        routed(net, RegMean(loss_fn=loss_of(net)))


@pytest.mark.parametrize(
    "make, what",
    [
        (lambda: FisherVariant(curvature="pass"), "pass loss_fn"),
        (lambda: FisherVariant(curvature="no"), "gradients, factored, moment"),
        (lambda: FisherVariant(last=0.5), "needs steps"),
        (lambda: FisherVariant(rise=1.5, loss_fn=sum), "rise=1.5"),
        (lambda: FisherVariant(0.7, rise=0.1, odds=True), "leave odds out"),
        (lambda: FisherVariant(chain="x"), "'merged' or 'trained'"),
        (lambda: RegMean(1.5, loss_fn=sum), "weight=1.5 lies outside"),
        (lambda: RegMean(shrink=2, loss_fn=sum), "shrink=2 lies outside"),
        (lambda: KFACMerge(0.5), "pass loss_fn"),
    ],
)
def test_what_has_no_meaning_is_refused(make, what):
    with pytest.raises(ValueError, match=what):
        make()


def test_equal_importances_pull_to_the_start_of_the_domain():
    net = network()
    loss = loss_of(net)
    l2 = EWC(loss, lam=0.3, uniform=True, online=True, gamma=0.0)
    router = routed(net, None, l2, "shared")
    first, second, third = domains()
    for batch in (first, second):
        learn(router, batch, loss)
        router.consolidate()
    start = weights(net)
    learn(router, third, loss, steps=3)
    now = weights(net)
    pulls = {name: l2.pull(name) for name in now}
    same(pulls, {n: 0.3 * (now[n] - start[n]) for n in now}, 1e-12)


@pytest.mark.parametrize("frozen", [["0.weight"], ["0.weight", "0.bias"]])
@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("kind", ["pass", "regmean", "kfac"])
def test_a_frozen_weight_that_the_optimizer_holds_stays(kind, later, frozen):
    "From the start, or from the second domain on."
    net = network()
    loss = loss_of(net)
    router = routed(net, RULES[kind](loss))
    held = [p for n, p in net.named_parameters() if n in frozen]
    for domain, batch in enumerate(list(domains())):
        if domain == int(later):
            for p in held:
                p.requires_grad_(False).grad = None
            before = [p.clone() for p in held]
        router.consolidation.begin()
        for _ in range(6):
            router.observe(batch)
            router.optimizer.zero_grad()
            loss(batch).backward()
            router.optimizer.step()
        ends = weights(net)
        router.consolidate()
    assert all(torch.equal(a, b) for a, b in zip(before, held))
    assert not torch.equal(net[3].weight, ends["3.weight"])


def test_factors_and_grams_are_learned_from_a_past_that_is_shown():
    net = network()
    loss, layers = loss_of(net), find_targets(net)
    first, second = list(domains())[:2]
    known = kronecker_factors(net, layers, loss, first)
    start = weights(net)
    kfac = KFACMerge(0.6, loss_fn=loss, examples=500)
    mean = RegMean(0.6, loss_fn=loss, examples=500)
    for rule in (kfac, mean):
        same(weights(net), start, 0)
        router = routed(net, rule)
        router.protect([first], loss)
        same(weights(net), start, 0)
        for name, (A, B) in known.items():
            pair = rule.grams[name] if rule is mean else rule.factors[name]
            expected = A if rule is mean else (A, B)
            torch.testing.assert_close(pair, expected)
        assert not len(rule.sample)  # no text of the past is kept
        learn(router, second, loss, steps=4, batches=1)
        ends = weights(net)
        new = kronecker_factors(net, layers, loss, second)["3.weight"]
        router.consolidate()
        if rule is mean:
            G = [softened(x[0], 0.9, 1e-6) for x in (known["3.weight"], new)]
            pair = (start["3.weight"], ends["3.weight"])
            expected = regression_mean(*pair, *G, 0.6)
        else:
            both = (known["3.weight"], new)
            both = [tuple(softened(S, damping=1e-3) for S in x) for x in both]
            pair = (start["3.weight"], ends["3.weight"])
            expected = kronecker_mean(*pair, *both, 0.6)
        torch.testing.assert_close(net[3].weight.detach(), expected)
        router.close()
        net.load_state_dict(start)


@pytest.mark.parametrize("rule", [KFACMerge, RegMean])
def test_a_past_that_is_shown_leaves_the_random_stream_alone(rule):
    net = network()
    loss = lambda b: loss_of(net)(b) + 0 * torch.rand(())
    router = routed(net, rule(loss_fn=loss))
    batch = next(domains())
    torch.manual_seed(3)
    state = torch.get_rng_state()
    router.protect([batch], loss)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("rule", [KFACMerge, RegMean])
def test_a_past_without_a_layer_to_learn_it_is_refused(rule):
    net = network()
    loss = loss_of(net)
    router = routed(net, rule(loss_fn=loss, only="no.*"))
    with pytest.raises(ValueError, match="names no linear layer"):
        router.protect([next(domains())], loss)
    assert router.domains == 0 and not router.consolidation.before


@pytest.mark.parametrize("kind", ["regmean", "kfac", "pass"])
def test_an_exchanged_layer_counts_as_new(kind):
    "Its matrices are forgotten, those of the others are not."
    net = network()
    loss = loss_of(net)
    rule = RULES[kind](loss)
    first, second, third = domains()
    with routed(net, rule) as router:
        learn(router, first, loss)
        router.consolidate()
    net[3] = nn.Linear(8, 5).double()
    with pytest.warns(UserWarning, match="2 parameters that this"):
        router = routed(net, rule)
    for batch in (second, third):
        rule.begin()
        learn(router, batch, loss)
        ends = weights(net)
        router.consolidate()
        moved = {n for n, x in weights(net).items() if (x != ends[n]).any()}
        assert "0.weight" in moved
        assert ("3.weight" in moved) == (batch is third)
    state = router.state_dict()
    router.close()
    routed(net, RULES[kind](loss)).load_state_dict(state)
