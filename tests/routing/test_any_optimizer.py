"""Displacement and shared for every optimizer, against the obvious reference:
torch's own step on a copy, and the difference edited by hand.
"""

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from conftest import basis, gradients, layer, regression, run
from torch import nn

import dmr
from dmr.routing.moments import Differences, moments_of
from dmr.routing.router import MomentRouter

torch.set_num_threads(1)
ALPHA = 0.7
PLAIN = lambda group: 0.0
DECOUPLED = lambda group: group["lr"] * group["weight_decay"]

#: name -> class, options, the share that decoupled decay takes
OPTIMIZERS = {
    "muon": (torch.optim.Muon, {"weight_decay": 0.1}, DECOUPLED),
    "nadam": (
        torch.optim.NAdam,
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        DECOUPLED,
    ),
    "nadam-l2": (torch.optim.NAdam, {"weight_decay": 0.1}, PLAIN),
    "rmsprop": (
        torch.optim.RMSprop,
        {"weight_decay": 0.1, "momentum": 0.9, "centered": True},
        PLAIN,
    ),
    "adagrad": (torch.optim.Adagrad, {"weight_decay": 0.1}, PLAIN),
    "adadelta": (torch.optim.Adadelta, {"weight_decay": 0.1}, PLAIN),
    "adafactor": (torch.optim.Adafactor, {"weight_decay": 0.1}, DECOUPLED),
    "rprop": (torch.optim.Rprop, {}, PLAIN),
    "sgd": (torch.optim.SGD, {"weight_decay": 0.1}, PLAIN),
    "nesterov": (
        torch.optim.SGD,
        {"weight_decay": 0.1, "momentum": 0.9, "nesterov": True},
        PLAIN,
    ),
}
CASES = pytest.mark.parametrize("kind", OPTIMIZERS)


def made(kind, params, **more):
    cls, options, share = OPTIMIZERS[kind]
    return cls(params, **{"lr": 0.02, **options, **more}), share


def by_hand(W, grads, kind, routing, U, alpha=ALPHA):
    "The reference: no router, the difference is edited where it arises."
    W = nn.Parameter(W.detach().clone())
    optimizer, share = made(kind, [W])
    P = U @ U.T
    for g in grads:
        before = W.detach().clone()
        W.grad = g - alpha * g @ P if routing == "shared" else g.clone()
        optimizer.step()
        if routing == "displacement":
            s = share(optimizer.param_groups[0])
            moved = W.detach() - before + s * before
            W.data -= alpha * moved @ P
    return W.detach()


def routed(kind, routing, U, **options):
    model = layer()
    optimizer, _ = made(kind, model.parameters())
    method = dmr.Projection(bases={"weight": U})
    router = MomentRouter(model, optimizer, method, routing, ALPHA, **options)
    return model, optimizer, router


@CASES
@pytest.mark.parametrize("routing", ["shared", "displacement"])
def test_fifty_steps_against_the_difference_edited_by_hand(kind, routing):
    U = basis()
    model, optimizer, router = routed(kind, routing, U, track_step=1)
    start = model.weight.detach().clone()
    grads = gradients(model.weight.shape)
    # torch's Muon orthogonalises in bfloat16, which an edit's rounding flips
    wide = kind == "muon" and routing == "shared"
    torch.testing.assert_close(
        run(model, optimizer, grads),
        by_hand(start, grads, kind, routing, U),
        rtol=0.1 if wide else 1e-9,
        atol=1e-2 if wide else 1e-11,
    )
    assert torch.allclose(model.weight.grad, grads[-1], rtol=1e-12)
    assert router.last["step_norm"] > router.last["protected_step_norm"] > 0


@CASES
def test_full_strength_leaves_the_protected_part_to_decay_alone(kind):
    U = basis()
    model, optimizer, _ = routed(kind, "displacement", U)
    share = OPTIMIZERS[kind][2](optimizer.param_groups[0])
    for hook in list(optimizer._optimizer_step_pre_hooks.values()):
        hook.router.strength = dmr.Fixed(1.0)
    for g in gradients(model.weight.shape, 5):
        inside = (model.weight.detach() @ U).clone()
        run(model, optimizer, [g])
        torch.testing.assert_close(
            model.weight.detach() @ U,
            (1 - share) * inside,
            rtol=1e-9,
            atol=1e-12,
        )


@CASES
def test_two_domains_with_a_growing_basis(kind):
    model = layer()
    optimizer, share = made(kind, model.parameters())
    method = dmr.Projection(rank=2, every=1)
    router = MomentRouter(model, optimizer, method, "displacement", ALPHA)
    twin = nn.Parameter(model.weight.detach().clone())
    plain, _ = made(kind, [twin])
    for domain in range(3):
        bases = dict(method.bases)
        U = bases.get("weight", torch.zeros(12, 0, dtype=torch.float64))
        assert U.shape[1] == 2 * domain
        for g in gradients(model.weight.shape, 8, seed=domain):
            before, twin.grad = twin.detach().clone(), g.clone()
            plain.step()
            s = share(plain.param_groups[0])
            moved = twin.detach() - (1 - s) * before
            twin.data -= ALPHA * moved @ U @ U.T
            run(model, optimizer, [g])
        torch.testing.assert_close(model.weight, twin, rtol=1e-9, atol=1e-11)
        router.consolidate()


@CASES
def test_a_closure_and_nothing_else_changes_the_step(kind):
    results = []
    for closed in (False, True):
        model, optimizer, _ = routed(kind, "displacement", basis())
        for g in gradients(model.weight.shape, 6):

            def closure(model=model, g=g):
                model.weight.grad = g.clone()
                return 1.5

            if closed:
                assert optimizer.step(closure) == 1.5
            else:
                run(model, optimizer, [g])
        results.append(model.weight.detach())
    assert torch.equal(*results)


@CASES
@pytest.mark.parametrize("copied", ["deepcopy", "state_dict"])
def test_a_copy_and_a_state_go_on_as_the_original(kind, copied):
    grads = gradients((7, 12), 8)
    model, optimizer, router = routed(kind, "displacement", basis())
    run(model, optimizer, grads[:4])
    if copied == "deepcopy":
        parts = (model, optimizer, router)
        other, opt, twin = copy.deepcopy(parts)
        assert isinstance(twin.moments, Differences)
    else:
        other, opt, twin = routed(kind, "displacement", basis())
        other.load_state_dict(model.state_dict())
        opt.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        twin.load_state_dict(router.state_dict())
    mine = run(model, optimizer, grads[4:])
    # torch loads NAdam's float32 product as float64
    loose = 1e-6 if "nadam" in kind and copied == "state_dict" else 0.0
    torch.testing.assert_close(
        run(other, opt, grads[4:]), mine, rtol=loose, atol=loose
    )
    assert twin.steps == router.steps == 8


@CASES
def test_a_skipped_step_leaves_everything(kind):
    model, optimizer, router = routed(kind, "displacement", basis())
    run(model, optimizer, gradients(model.weight.shape, 3))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))  # makes its tensors
    before = str((model.weight, optimizer.state_dict(), router.state_dict()))
    model.weight.grad = torch.full_like(model.weight, float("inf"))
    scaler.step(optimizer)
    scaler.update()
    after = str((model.weight, optimizer.state_dict(), router.state_dict()))
    assert after == before


@CASES
def test_a_grad_scaler_changes_nothing(kind):
    results = []
    for scaled in (False, True):
        model, optimizer, _ = routed(kind, "displacement", basis())
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=scaled)
        for g in gradients(model.weight.shape, 5):
            optimizer.zero_grad()
            scaler.scale((model.weight * g).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append(model.weight.detach())
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("form", [{"fused": True}, {"foreach": True}])
@pytest.mark.parametrize("scaled", [False, True])
def test_forms_agree(form, scaled):
    results = []
    for options in ({"foreach": False}, form):
        model = layer()
        optimizer = torch.optim.Adagrad(model.parameters(), **options)
        method = dmr.Projection(bases={"weight": basis()})
        MomentRouter(model, optimizer, method, "displacement", ALPHA)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=scaled)
        for g in gradients(model.weight.shape, 5):
            optimizer.zero_grad()
            scaler.scale((model.weight * g).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append(model.weight.detach())
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-12)


@CASES
def test_idle_routers_are_torch_bit_for_bit(kind):
    grads, results = gradients((7, 12), 5), []
    for routing in (None, "shared", "displacement"):
        model = layer()
        optimizer, _ = made(kind, model.parameters())
        if routing:
            method = dmr.Projection(rank=2)
            MomentRouter(model, optimizer, method, routing, track_step=2)
        results.append(run(model, optimizer, grads))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@CASES
def test_no_modification_measures(kind):
    model = layer()
    optimizer, share = made(kind, model.parameters())
    router = MomentRouter(model, optimizer, track_step=1)
    for g in gradients(model.weight.shape, 3):
        before = model.weight.detach().clone()
        run(model, optimizer, [g])
        s = share(optimizer.param_groups[0])
        u = (model.weight.detach() - (1 - s) * before) / 0.02
        assert router.last["step_norm"] == pytest.approx(u.norm().item())


@CASES
def test_memory_counts_one_copy_of_what_is_protected(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 7, False), nn.Linear(7, 5, False))
    optimizer, _ = made(kind, model.parameters())
    method = dmr.Projection(bases={"0.weight": basis(dtype=torch.float32)})
    router = MomentRouter(model, optimizer, method, "displacement", ALPHA)
    idle = router.memory()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert router.memory() - idle == model[0].weight.numel() * 4
    assert router._flight is None  # the copy itself is gone


def test_known_and_read_steps_agree():
    "AdamW with a step of its own is not known, and displaced all the same."

    class Own(torch.optim.AdamW):
        @torch.no_grad()
        def step(self, closure=None):
            return super().step(closure)

    results = []
    for cls in (torch.optim.AdamW, Own):
        model = layer()
        optimizer = cls(model.parameters(), lr=0.01, weight_decay=0.0)
        method = dmr.Projection(bases={"weight": basis()})
        router = MomentRouter(model, optimizer, method, "displacement", ALPHA)
        assert isinstance(router.moments, Differences) == (cls is Own)
        results.append(run(model, optimizer, gradients(model.weight.shape)))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


class Lion(torch.optim.Optimizer):
    "A third party's optimizer, as it might be."

    def __init__(self, params, lr=1e-3, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - group["lr"] * group["weight_decay"])
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                p.sub_(group["lr"] * m.lerp(p.grad, 0.1).sign())
                m.lerp_(p.grad, 0.01)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_third_partys_optimizer_and_its_unknown_decay(decay):
    model, twin, U = layer(), layer(), basis()
    optimizer = Lion(model.parameters(), 0.01, decay)
    method = dmr.Projection(bases={"weight": U})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        MomentRouter(model, optimizer, method, "shared", ALPHA).close()
        MomentRouter(model, optimizer, method, "displacement", ALPHA)
        grads = gradients(model.weight.shape, 9)
        run(model, optimizer, grads)
    assert [str(w.message)[:31] for w in said] == (
        ["dmr does not know how Lion appli"[:31]] if decay else []
    )
    plain, W = Lion(twin.parameters(), 0.01, decay), twin.weight
    for g in grads:
        before = W.detach().clone()
        run(twin, plain, [g])
        W.data -= ALPHA * (W.detach() - before) @ U @ U.T
    torch.testing.assert_close(model.weight, W, rtol=1e-10, atol=1e-12)


def test_asgd_takes_its_average_along():
    model, U = layer(), basis()
    optimizer = torch.optim.ASGD(model.parameters(), lr=0.05, t0=3)
    method = dmr.Projection(bases={"weight": U})
    MomentRouter(model, optimizer, method, "displacement", 1.0)
    lambd, inside, weights = 1e-4, model.weight.detach() @ U, []
    for g in gradients(model.weight.shape, 12):
        run(model, optimizer, [g])
        weights.append(model.weight.detach().clone())
    # protected directions are shrunk by decay and never stepped: so is ax
    ax = optimizer.state[model.weight]["ax"]
    shrunk = (1 - lambd * 0.05) ** 12
    torch.testing.assert_close(
        weights[-1] @ U, shrunk * inside, rtol=1e-6, atol=1e-8
    )
    torch.testing.assert_close(ax @ U, inside, rtol=2e-4, atol=1e-6)
    mean = torch.stack(weights[3:]).mean(0)  # averaging begins after t0
    assert (ax - mean).norm() < 0.1 * mean.norm()


class Masters(torch.optim.Optimizer):
    "Steps float32 masters and copies them back, under a harmless name."

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            kept = self.state[p].setdefault("fp32", p.float().clone())
            p.copy_(kept.sub_(0.1 * p.grad))


def test_a_hidden_copy_is_found_in_the_first_step():
    model = layer(dtype=torch.bfloat16)
    optimizer = Masters(model.parameters())
    method = dmr.Projection(bases={"weight": basis(dtype=torch.float32)})
    router = MomentRouter(model, optimizer, method, "displacement", ALPHA)
    with pytest.raises(
        TypeError, match="'fp32' of 'weight' is the weight agai"
    ):
        run(model, optimizer, gradients(model.weight.shape, 1))
    router.close()
    MomentRouter(model, optimizer, method, "shared", ALPHA)
    run(model, optimizer, gradients(model.weight.shape, 2))


class Averages(torch.optim.SGD):
    "Steps a second sequence of weights, under a harmless name, as none knows."

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            z = self.state[p].setdefault("z", p.clone())
            p.lerp_(z.sub_(0.1 * p.grad), 1 / (self.state[p].get("k", 0) + 1))
            self.state[p]["k"] = self.state[p].get("k", 0) + 1


def test_a_hidden_copy_is_found_before_anything_is_protected():
    "In the second domain the two would differ, and could not be told apart."
    model, twin = layer(), layer()
    optimizer = Averages(model.parameters(), lr=0.1)
    method = dmr.Projection(rank=2, every=1)
    router = MomentRouter(model, optimizer, method, "displacement", 1.0)
    grads = gradients(model.weight.shape, 3)
    with pytest.raises(TypeError, match="'z' of 'weight' is the weight again"):
        run(model, optimizer, grads[:1])
    router.close()
    for routing in ("shared", None):  # where nothing is displaced
        model = layer()
        optimizer = Averages(model.parameters(), lr=0.1)
        how = (dmr.Projection(rank=2), routing) if routing else ()
        MomentRouter(model, optimizer, *how)
        run(model, optimizer, grads)
    plain = Averages(twin.parameters(), lr=0.1)
    torch.testing.assert_close(model.weight, run(twin, plain, grads))


def test_a_hidden_copy_is_found_in_a_run_that_goes_on():
    "The optimizer's state was there before the router."
    model = layer(dtype=torch.bfloat16)
    optimizer = Masters(model.parameters())
    run(model, optimizer, gradients(model.weight.shape, 3))
    method = dmr.Projection(bases={"weight": basis(dtype=torch.float32)})
    MomentRouter(model, optimizer, method, "displacement", ALPHA)
    with pytest.raises(TypeError, match="'fp32' of 'weight' is the weight ag"):
        run(model, optimizer, gradients(model.weight.shape, 1))


def test_an_optimizer_that_moves_before_its_closure_is_refused():
    class Sharp(torch.optim.SGD):
        def step(self, closure=None):
            with torch.no_grad():
                self.param_groups[0]["params"][0].add_(1.0)
            loss = closure()
            super().step()
            return loss

    model = layer()
    optimizer = Sharp(model.parameters(), lr=0.1)
    method = dmr.Projection(bases={"weight": basis()})
    MomentRouter(model, optimizer, method, "displacement", ALPHA)
    model.weight.grad = torch.ones_like(model.weight)
    with pytest.raises(TypeError, match="Sharp changes the weights and evalu"):
        optimizer.step(lambda: 0.0)


def test_muon_takes_decoupled_for_displacement():
    model, U = layer(), basis()
    optimizer, _ = made("muon", model.parameters())
    method = dmr.Projection(bases={"weight": U})
    router = MomentRouter(model, optimizer, method, "decoupled", ALPHA)
    assert router.routing == "displacement" and "displacement" in repr(router)
    start, grads = model.weight.detach().clone(), gradients((7, 12), 9)
    torch.testing.assert_close(
        run(model, optimizer, grads),
        by_hand(start, grads, "muon", "displacement", U),
        rtol=1e-9,
        atol=1e-11,
    )
    with pytest.raises(ValueError, match="it has no second moment; choose"):
        MomentRouter(*muon_again(), "denominator")
    with pytest.raises(ValueError, match="guard='clamp' bounds the leak"):
        MomentRouter(*muon_again(), "decoupled", guard="clamp")


def muon_again():
    model = layer()
    optimizer, _ = made("muon", model.parameters())
    return model, optimizer, dmr.Projection(bases={"weight": basis()})


def two_routers():
    "Muon for one matrix, AdamW for the rest, and a router for each."
    model, loss = regression(dtype=torch.float64)
    hidden = [model[0].weight]
    rest = [p for p in model.parameters() if p is not hidden[0]]
    muon = torch.optim.Muon(hidden, lr=0.02)
    adamw = torch.optim.AdamW(rest, lr=0.01, weight_decay=0.1)
    new = lambda: dmr.Projection(rank=2, every=1)
    first = MomentRouter(
        model, muon, new(), "decoupled", 1.0, include="0.weight"
    )
    second = MomentRouter(
        model, adamw, new(), "displacement", 1.0, exclude="0.weight"
    )
    return model, loss, {muon: first, adamw: second}


def test_two_routers_serve_muon_and_adamw_side_by_side():
    model, loss, routers = two_routers()
    shares = {"0.weight": 0.02 * 0.1, "2.weight": 0.01 * 0.1}
    bases = {}
    for _ in range(2):
        for _ in range(5):
            model.zero_grad()
            loss().backward()
            before = {
                n: p.detach().clone() for n, p in model.named_parameters()
            }
            for optimizer in routers:
                optimizer.step()
            for name, U in bases.items():
                after = dict(model.named_parameters())[name].detach()
                torch.testing.assert_close(
                    after @ U,
                    (1 - shares[name]) * before[name] @ U,
                    rtol=1e-9,
                    atol=1e-11,
                )
        for router in routers.values():
            router.consolidate()
            bases |= router.modification.bases
    assert sorted(bases) == ["0.weight", "2.weight"]


def test_an_optimizer_stepped_alone_leaves_the_others_router_alone():
    model, loss, routers = two_routers()
    (muon, first), (adamw, second) = routers.items()
    loss().backward()
    before = str((second.state_dict(), adamw.state_dict(), model[2].weight))
    muon.step()
    assert first.steps == 1 and second.steps == 0
    assert before == str(
        (second.state_dict(), adamw.state_dict(), model[2].weight)
    )


class ScheduleFree(Lion):
    "Known by its name."


O = torch.optim
#: First column of the table in the chapter on what optimizers forgive.
PRACTICE = {
    "SGD, momentum": [lambda p: O.SGD(p, momentum=0.9), O.SGD],
    "Adam, AdamW, RAdam, Adamax": [O.Adam, O.AdamW, O.RAdam, O.Adamax],
    "NAdam, 8-bit": [O.NAdam, Lion],
    "schedule-free": [ScheduleFree],
    "AMSGrad with state kept": [lambda p: O.Adam(p, amsgrad=True)],
    "Adafactor": [O.Adafactor],
    "Lion, sign descent": [Lion],
    "Muon": [O.Muon],
    "Shampoo": [Lion],
    "SOAP": [Lion],
}


def takes(make, routing):
    model = layer()
    method = dmr.Projection(bases={"weight": basis()})
    try:
        MomentRouter(model, make(model.parameters()), method, routing, 1.0)
    except (TypeError, ValueError):
        return False
    return True


def test_the_table_for_practitioners_is_what_the_router_takes():
    page = Path(__file__).parents[2] / "nbs" / "why" / "10_forgives.ipynb"
    cells = [
        "".join(c["source"]) for c in json.loads(page.read_text())["cells"]
    ]
    (text,) = [cell for cell in cells if "| what protects |" in cell]
    lines = [x.strip(" |").split(" | ") for x in text.splitlines() if "| " in x]
    rows = {name: said for name, _, said in lines[2:]}
    assert rows.keys() == PRACTICE.keys()
    for name, said in rows.items():
        for make in PRACTICE[name]:
            assert takes(make, "shared")
            assert takes(make, "displacement") == ("`displacement`" in said)
            assert takes(make, "decoupled") or "`decoupled`" not in said


def test_a_settled_table_of_moments():
    kinds = [made(kind, layer().parameters())[0] for kind in OPTIMIZERS]
    assert all(isinstance(moments_of(opt), Differences) for opt in kinds)
