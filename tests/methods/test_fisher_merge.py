"""Merging by curvature: closed forms, every setting, every way to keep it."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import dmr
from dmr.methods.consolidation import (
    FisherMerge,
    _steps_taken,
    merge,
    running_share,
)
from dmr.routing.consolidation import Interpolate, Trained


class Bowl(nn.Module):
    "½ Σ h (w - c)², a quadratic with a diagonal Hessian."

    def __init__(self, n=6, dtype=torch.float64):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(n, dtype=dtype))

    def forward(self, h, c):
        return 0.5 * (h * (self.w - c) ** 2).sum()


def network(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 3)
    ).to(dtype)


def adamw(model, **options):
    options = {"lr": 1e-2, "betas": (0.9, 0.95)} | options
    return torch.optim.AdamW(model.parameters(), **options)


def train(model, optimizer, steps=12, seed=0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(16, 8, generator=draw).to(dtype)
        (model(x) - x[:, :3]).square().mean().backward()
        optimizer.step()


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def recorded(model, optimizer, modification=None, routing="decoupled", **more):
    "A router with a FisherMerge, and the raw gradients of every step."
    seen = []

    def keep(opt, args, kwargs):
        named = model.named_parameters()
        seen.append({n: p.grad.clone() for n, p in named if p.grad is not None})

    optimizer.register_step_pre_hook(keep)
    router = dmr.MomentRouter(
        model,
        optimizer,
        modification,
        routing,
        consolidation=FisherMerge(**more),
    )
    return router, seen


def squares(seen, dtype=torch.float64):
    names = seen[0]
    stack = lambda n: torch.stack([s[n].to(dtype) for s in seen])
    return {n: stack(n).square().mean(0) for n in names}


@pytest.mark.parametrize("domains", [2, 5])
@pytest.mark.parametrize("weight, odds", [(0.5, False), (0.7, True)])
def test_quadratics_merge_to_the_minimiser_of_the_sum(domains, weight, odds):
    """Through the router: each domain ends at its own minimum with its own
    Hessian as curvature, and the result solves the sum in closed form.
    """
    torch.manual_seed(0)
    H = torch.rand(domains, 6, dtype=torch.float64) + 0.1
    c = torch.randn(domains, 6, dtype=torch.float64)
    model = Bowl()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    rule = FisherMerge(weight, damping=0.0, keep=1.0, odds=odds)
    router = dmr.MomentRouter(
        model, optimizer, routing="shared", consolidation=rule
    )
    for h, minimum in zip(H, c):
        model.w.grad = h.sqrt()  # one step whose square is the Hessian
        optimizer.step()
        with torch.no_grad():
            model.w.copy_(minimum)
        router.consolidate()
    odd = weight / (1 - weight) if odds else 1.0
    counts = torch.full((domains, 1), odd, dtype=torch.float64)
    counts[0] = 1.0
    exact = (counts * H * c).sum(0) / (counts * H).sum(0)
    torch.testing.assert_close(model.w.detach(), exact, rtol=1e-12, atol=1e-12)


def test_zero_curvature_interpolates_and_damping_goes_that_way():
    old, new = {"w": torch.zeros(4)}, {"w": torch.ones(4)}
    none = {"w": torch.zeros(4)}
    assert merge(old, new, none, none, 0.3)["w"].eq(0.3).all()
    f_old, f_new = {"w": torch.ones(4)}, {"w": torch.full((4,), 9.0)}
    sharp = merge(old, new, f_old, f_new, 0.5, damping=0.0)["w"]
    soft = merge(old, new, f_old, f_new, 0.5, damping=100.0)["w"]
    assert sharp.eq(0.9).all() and (soft - 0.5).abs().max() < 0.03


@pytest.mark.parametrize("routing", dmr.ROUTINGS)
def test_the_router_merges_as_the_free_function(routing):
    "Curvature from raw gradients, whatever the routing makes of them."
    model = network()
    optimizer = adamw(model)
    router, seen = recorded(
        model, optimizer, dmr.Projection(rank=2, every=1), routing, weight=0.6
    )
    train(model, optimizer)
    before, f_old = weights(model), squares(seen)
    router.consolidate()
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    seen.clear()
    train(model, optimizer, seed=1)
    after = weights(model)
    report = router.consolidate()
    expected = merge(before, after, f_old, squares(seen), weight=0.6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(
            p.detach(), expected[name], rtol=1e-5, atol=1e-6
        )
    assert 0 < report["consolidation"]["share"] < 1


def test_curvature_does_not_depend_on_the_batch_size():
    "Two runs at a minimum that differ in nothing but the batch."
    found = {}
    for batch in (8, 64):
        draw = torch.Generator().manual_seed(0)
        model = nn.Linear(6, 1, bias=False)
        nn.init.zeros_(model.weight)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
        rule = FisherMerge(samples=batch)
        router = dmr.MomentRouter(model, optimizer, consolidation=rule)
        for _ in range(400):
            optimizer.zero_grad()
            x = torch.randn(batch, 6, generator=draw)
            noise = torch.randn(batch, 1, generator=draw)
            (model(x) - noise).square().mean().backward()
            optimizer.step()
        router.consolidate()
        found[batch] = rule.past["weight"].mean().item()
    assert abs(found[8] / found[64] - 1) < 0.1
    total = FisherMerge(samples=8, reduction="sum")
    assert dmr.methods.consolidation.per_sample(8, "sum") == 1 / 8
    assert total.reduction == "sum"


def test_the_second_moment_gives_its_running_share():
    model = network(dtype=torch.float64)
    optimizer = adamw(model, betas=(0.9, 0.99))
    router, seen = recorded(model, optimizer, curvature="moment")
    train(model, optimizer, dtype=torch.float64)
    router.consolidate()
    seen.clear()
    train(model, optimizer, steps=30, seed=1, dtype=torch.float64)
    (found,) = [router.consolidation.recorder.fisher()]
    window = 0.99 ** torch.arange(29, -1, -1, dtype=torch.float64)
    for name in found:
        g = torch.stack([s[name] for s in seen]).square()
        mean = torch.einsum("t,t...->...", window, g) / window.sum()
        torch.testing.assert_close(found[name], mean, rtol=1e-9, atol=1e-14)


def second_moments(model, optimizer):
    named = model.named_parameters()
    return {n: optimizer.state[p]["exp_avg_sq"].clone() for n, p in named}


def test_the_second_moment_of_a_run_without_a_break_keeps_its_last_bit():
    model = network()
    optimizer = adamw(model)
    router, _ = recorded(model, optimizer, curvature="moment")
    start = {n: None for n, _ in model.named_parameters()}
    for steps in (12, 20, 7):
        train(model, optimizer, steps=steps, seed=steps)
        found = router.consolidation.recorder.fisher()
        end = second_moments(model, optimizer)
        for n, v in end.items():
            own = running_share(v, start[n], 0.95, steps)
            assert torch.equal(found[n], own)
        router.consolidate()
        start = end


def window_mean(seen, beta2=0.95):
    "The weighted mean of g² that Adam's second moment is, by name."
    steps = len(seen)
    w = beta2 ** torch.arange(steps - 1, -1, -1, dtype=torch.float64)
    stack = lambda n: torch.stack([s[n].double() for s in seen]).square()
    mean = lambda n: torch.einsum("t,t...->...", w, stack(n)) / w.sum()
    return {n: mean(n) for n in seen[0]}


@pytest.mark.parametrize("steps", [5, 30])  # fewer, and more, than before
@pytest.mark.parametrize("how", ["cleared", "warm", "new router"])
def test_a_domain_is_measured_alone_whatever_the_optimizer_did_before(
    how, steps
):
    model = network(dtype=torch.float64)
    optimizer = adamw(model)
    if how == "warm":
        train(model, optimizer, steps=20, dtype=torch.float64)
    router, seen = recorded(model, optimizer, curvature="moment")
    if how != "warm":
        train(model, optimizer, steps=12, dtype=torch.float64)
        router.consolidate()
    if how == "cleared":
        optimizer.state.clear()
    if how == "new router":
        merge = router.consolidation
        router.close()
        router = dmr.MomentRouter(model, optimizer, consolidation=merge)
    seen.clear()
    train(model, optimizer, steps=steps, seed=1, dtype=torch.float64)
    found = router.consolidation.recorder.fisher()
    for name, f in window_mean(seen).items():
        torch.testing.assert_close(found[name], f, rtol=1e-7, atol=1e-14)


def test_a_state_cleared_within_a_domain_counts_from_there():
    model = network(dtype=torch.float64)
    optimizer = adamw(model)
    router, seen = recorded(model, optimizer, curvature="moment")
    train(model, optimizer, steps=12, dtype=torch.float64)
    router.consolidate()
    train(model, optimizer, steps=8, seed=1, dtype=torch.float64)
    optimizer.state.clear()
    seen.clear()
    train(model, optimizer, steps=6, seed=2, dtype=torch.float64)
    found = router.consolidation.recorder.fisher()
    for name, f in window_mean(seen).items():
        torch.testing.assert_close(found[name], f, rtol=1e-9, atol=1e-14)


def test_a_weight_without_a_gradient_gains_no_curvature():
    torch.manual_seed(0)
    body, heads = nn.Linear(8, 4), [nn.Linear(4, 1) for _ in range(2)]
    model = nn.ModuleList([body, *heads])
    optimizer = adamw(model)
    rule = FisherMerge(0.5, curvature="moment", keep=1.0)
    router = dmr.MomentRouter(model, optimizer, consolidation=rule)
    past = []
    for domain, head in enumerate((0, 1, 1)):
        draw = torch.Generator().manual_seed(domain)
        for _ in range(9):
            optimizer.zero_grad()
            x = torch.randn(16, 8, generator=draw)
            heads[head](body(x).tanh()).square().mean().backward()
            optimizer.step()
        router.consolidate()
        past.append(rule.past["1.weight"].clone())
    assert torch.equal(past[0], past[1]) and torch.equal(past[0], past[2])
    assert rule.past["2.weight"].norm() > 0


def test_an_optimizer_may_count_in_numbers_or_in_tensors_or_not_at_all():
    model = network()
    optimizer = adamw(model)
    weights = dict(model.named_parameters())
    for name, step in (("0.weight", 3), ("0.bias", torch.tensor(4.0))):
        optimizer.state[weights[name]]["step"] = step
    optimizer.state[weights["3.bias"]]["other"] = 5
    counted = _steps_taken(Trained(model, optimizer))
    assert counted == {"0.weight": 3, "0.bias": 4}


def test_an_older_state_without_counters_goes_on():
    model = network()
    optimizer = adamw(model)
    router, _ = recorded(model, optimizer, curvature="moment")
    train(model, optimizer)
    router.consolidate()
    train(model, optimizer, seed=1, steps=5)
    recorder = router.consolidation.recorder
    known, state = recorder.fisher(), copy.deepcopy(router.state_dict())
    del state["consolidation"]["recorder"]["begun"]
    router.load_state_dict(state)
    for name, f in recorder.fisher().items():
        assert torch.equal(f, known[name])


@pytest.mark.parametrize(
    "make, routing, why",
    [
        (
            lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
            "shared",
            "no second",
        ),
        (lambda p: torch.optim.Adamax(p), "decoupled", "keeps a maximum"),
        (lambda p: torch.optim.AdamW(p), "shared", "sees the edited gradient"),
        (lambda p: torch.optim.AdamW(p), "denominator", "sees the edited"),
        (
            lambda p: torch.optim.Adam(p, weight_decay=0.1),
            "decoupled",
            "weight_decay is L2",
        ),
    ],
)
def test_an_unfaithful_second_moment_is_refused(make, routing, why):
    model = network()
    with pytest.raises(ValueError, match=why):
        dmr.MomentRouter(
            model,
            make(model.parameters()),
            dmr.Projection(rank=2),
            routing,
            consolidation=FisherMerge(curvature="moment"),
        )


def test_a_second_moment_with_a_short_memory_says_so():
    model = network()
    optimizer = adamw(model, betas=(0.9, 0.5))
    router, _ = recorded(model, optimizer, curvature="moment")
    train(model, optimizer, steps=40)
    with pytest.warns(UserWarning, match="remembers 2 steps, and this domain"):
        router.consolidate()


def test_row_and_column_means_take_little_memory():
    kinds = {}
    for kind in ("gradients", "factored"):
        model = nn.Linear(100, 50, bias=False)
        optimizer = adamw(model)
        router, _ = recorded(model, optimizer, curvature=kind)
        model(torch.randn(4, 100)).square().sum().backward()
        optimizer.step()
        kinds[kind] = router.memory()
        router.consolidate()
        assert router.consolidation.past["weight"].shape == (50, 100)
    assert kinds == {"gradients": 4 * 5000, "factored": 4 * 150}


@pytest.mark.parametrize("curvature", ["gradients", "factored", "moment"])
@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
def test_saved_in_the_middle_of_a_domain_it_goes_on_bit_for_bit(how, curvature):
    def made():
        model = network()
        optimizer = adamw(model)
        rule = FisherMerge(curvature=curvature)
        return [
            model,
            optimizer,
            dmr.MomentRouter(model, optimizer, consolidation=rule),
        ]

    parts = made()
    train(*parts[:2])
    parts[2].consolidate()
    train(*parts[:2], seed=1)
    if how == "state_dict":
        again = made()
        for part, own in zip(again, parts):
            part.load_state_dict(copy.deepcopy(own.state_dict()))
    else:
        copied = (
            copy.deepcopy
            if how == "deepcopy"
            else lambda x: pickle.loads(pickle.dumps(x))
        )
        again = copied(parts)
    for model, optimizer, router in (parts, again):
        train(model, optimizer, seed=2)
        router.consolidate()
        train(model, optimizer, seed=3)
        router.consolidate()
    for p, q in zip(parts[0].parameters(), again[0].parameters()):
        assert torch.equal(p, q)


def test_half_precision_weights_merge_in_float32():
    model = network(dtype=torch.bfloat16)
    optimizer = adamw(model)
    router, seen = recorded(model, optimizer, weight=0.5)
    train(model, optimizer, dtype=torch.bfloat16)
    before, f_old = weights(model), squares(seen, torch.float32)
    router.consolidate()
    seen.clear()
    train(model, optimizer, seed=1, dtype=torch.bfloat16)
    after, f_new = weights(model), squares(seen, torch.float32)
    router.consolidate()
    expected = merge(before, after, f_old, f_new)
    for name, p in model.named_parameters():
        assert p.dtype == torch.bfloat16
        torch.testing.assert_close(
            p.detach(), expected[name], rtol=1e-2, atol=1e-3
        )


def test_tied_weights_merge_once_and_frozen_ones_stay():
    torch.manual_seed(0)
    table = nn.Embedding(5, 4)
    head = nn.Linear(4, 5, bias=False)
    head.weight = table.weight
    model = nn.Sequential(table, nn.Linear(4, 4).requires_grad_(False), head)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.1
    )
    router = dmr.MomentRouter(model, optimizer, consolidation=FisherMerge())
    frozen = model[1].weight.clone()
    for seed in (0, 1):
        draw = torch.Generator().manual_seed(seed)
        for _ in range(5):
            optimizer.zero_grad()
            rows = torch.randint(5, (9,), generator=draw)
            nn.functional.cross_entropy(model(rows), rows).backward()
            optimizer.step()
        router.consolidate()
    assert set(router.consolidation.past) == {"0.weight"}
    assert torch.equal(frozen, model[1].weight) and head.weight is table.weight


def test_storage_elsewhere_merges_the_same_to_its_precision():
    found = {}
    for storage in (None, "cpu", torch.bfloat16):
        model = network()
        optimizer = adamw(model)
        router, _ = recorded(model, optimizer, storage=storage)
        for seed in (0, 1):
            train(model, optimizer, seed=seed)
            router.consolidate()
        found[storage] = weights(model), router.memory()
    assert found[torch.bfloat16][1] == found[None][1] / 2
    for name, p in found[None][0].items():
        assert torch.equal(p, found["cpu"][0][name])
        torch.testing.assert_close(
            p, found[torch.bfloat16][0][name], atol=1e-2, rtol=0
        )


@pytest.mark.parametrize("storage", ["meta", torch.bfloat16])
def test_what_is_loaded_goes_where_it_is_kept(storage):
    "The meta device stands for a second one, which holds no numbers."
    model = network()
    optimizer = adamw(model)
    router, _ = recorded(model, optimizer)
    train(model, optimizer)
    router.consolidate()
    state = copy.deepcopy(router.state_dict())
    router.close()
    router, _ = recorded(model, optimizer, storage=storage)
    router.load_state_dict(state)
    rule = router.consolidation
    for kept in (*rule.before.values(), *rule.past.values()):
        assert storage in (kept.device.type, kept.dtype)


def test_non_finite_curvature_changes_nothing():
    model = network()
    optimizer = adamw(model)
    router, _ = recorded(model, optimizer)
    train(model, optimizer)
    router.consolidate()
    train(model, optimizer, seed=1)
    router.consolidation.recorder.sums["0.weight"][0, 0] = float("inf")
    before, past = weights(model), copy.deepcopy(router.consolidation.past)
    with pytest.raises(ValueError, match="nothing was merged"):
        router.consolidate()
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert all(
        torch.equal(past[n], f) for n, f in router.consolidation.past.items()
    )


def test_a_model_with_an_unknown_past_is_told_of_protect():
    model = network()
    optimizer = adamw(model)
    router, _ = recorded(model, optimizer)
    router.anchor()  # the start is known, its curvature is not
    train(model, optimizer)
    before = weights(model)
    with pytest.warns(UserWarning, match="call router.protect"):
        router.consolidate()
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    scratch = network()
    optimizer = adamw(scratch)
    router, _ = recorded(scratch, optimizer)
    train(scratch, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        router.consolidate()


def test_a_state_of_another_consolidation_is_refused():
    model = network()
    optimizer = adamw(model)
    router, _ = recorded(model, optimizer)
    state = router.state_dict()
    router.close()
    other = dmr.MomentRouter(
        model, optimizer, None, "decoupled", consolidation=Interpolate(0.5)
    )
    with pytest.raises(ValueError, match="consolidation='FisherMerge'"):
        other.load_state_dict(state)


def test_parameters_in_groups_and_several_rates():
    model = network()
    groups = [
        {"params": model[0].parameters(), "lr": 1e-2},
        {"params": model[3].parameters(), "lr": 1e-3},
    ]
    optimizer = torch.optim.AdamW(groups)
    router, _ = recorded(model, optimizer)
    for seed in (0, 1):
        train(model, optimizer, seed=seed)
        router.consolidate()
    assert set(router.consolidation.past) == {
        "0.weight", "0.bias", "3.weight", "3.bias",
    }  # fmt: skip


def test_the_summary_says_what_the_merge_keeps():
    model = nn.Linear(64, 64, bias=False)
    optimizer = adamw(model)
    router, _ = recorded(model, optimizer)
    model(torch.randn(4, 64)).square().sum().backward()
    optimizer.step()
    router.consolidate()
    last = router.summary().splitlines()[-1]
    # θ_p and F_p, 64 · 64 numbers of four bytes each
    assert last.endswith("curvature='gradients'), 32.0 KiB kept")


@pytest.mark.parametrize(
    "given",
    [{"damping": "x"}, {"damping": -1.0}, {"keep": None}, {"weight": "a"}],
)
def test_a_wrong_setting_is_named(given):
    ((name, value),) = given.items()
    with pytest.raises(ValueError, match=name) as error:
        FisherMerge(**given)
    assert repr(value) in str(error.value) or f"{value:g}" in str(error.value)


#: Settings that torch's optimizers need here; the rest have their defaults.
NEEDED = {"SGD": {"lr": 0.01, "momentum": 0.9}, "Muon": {"weight_decay": 0.1}}
REFUSED = {"LBFGS", "SparseAdam"}  # by the router, with any method
EVERY = [
    name
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)
    if cls is not torch.optim.Optimizer and name not in REFUSED
]


def accepted():
    "Every optimizer of torch with every routing that it allows."
    for name in EVERY:
        for routing in dmr.ROUTINGS:
            try:
                merging(name, routing)
            except ValueError:  # this routing needs a second moment
                continue
            yield pytest.param(name, routing, id=f"{name}-{routing}")


def merging(name, routing, dtype=torch.float64):
    "Two matrices, and a router that merges; gradients are seen raw."
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6, False), nn.Linear(6, 3, False))
    model = model.to(dtype)
    cls = getattr(torch.optim, name)
    optimizer = cls(model.parameters(), **NEEDED.get(name, {}))
    method = dmr.Projection(rank=2, every=1)
    router, seen = recorded(model, optimizer, method, routing, weight=0.6)
    router.strength = dmr.Fixed(0.7)
    return model, optimizer, router, seen


@pytest.mark.parametrize("name, routing", list(accepted()))
def test_every_optimizer_of_torch_merges_by_raw_gradients(name, routing):
    """Whatever the optimizer and whatever the routing make of a gradient, its
    own square is what counts, and the weights are those of the free function.
    """
    model, optimizer, router, seen = merging(name, routing)
    train(model, optimizer, dtype=torch.float64)
    router.consolidate()  # from here on the projection edits
    before, f_old = weights(model), squares(seen)
    seen.clear()
    plain = copy.deepcopy(router)
    train(model, optimizer, seed=1, dtype=torch.float64)
    after, f_new = weights(model), squares(seen)
    known = router.consolidation.recorder.fisher()
    for key, f in f_new.items():
        torch.testing.assert_close(known[key], f, rtol=1e-12, atol=0.0)
    router.consolidate()
    expected = merge(before, after, f_old, f_new, weight=0.6)
    for key, p in model.named_parameters():
        torch.testing.assert_close(
            p.detach(), expected[key], rtol=1e-12, atol=1e-15
        )
    plain.strength = dmr.Fixed(0.0)  # the routing did edit something
    train(plain.model, plain.optimizer, seed=1, dtype=torch.float64)
    assert (after["0.weight"] - plain.model[0].weight).norm() > 1e-6


def test_every_optimizer_is_routed_in_two_ways_at_least():
    routings = {}
    for case in accepted():
        routings.setdefault(case.values[0], set()).add(case.values[1])
    assert sorted(routings) == sorted(EVERY)
    every = {"shared", "displacement"}
    assert all(every <= kinds for kinds in routings.values())
    four = {name for name, kinds in routings.items() if len(kinds) == 4}
    assert {"Adam", "AdamW", "RAdam", "Adamax"} <= four


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_merged_by_the_curvature_of_its_embedding(tied):
    "Two names, one tensor, or two with the same numbers, as files hold them."
    torch.manual_seed(0)
    old, new = ({"embed": torch.randn(5, 3)} for _ in range(2))
    for state in (old, new):
        x = state["embed"]
        state["head"] = x if tied else x.clone()
    fishers = [{"embed": torch.rand(5, 3)} for _ in range(2)]
    merged = merge(old, new, *fishers)
    assert torch.equal(merged["embed"], merged["head"])
    plain = (old["embed"] + new["embed"]) / 2
    assert not torch.allclose(merged["head"], plain)
