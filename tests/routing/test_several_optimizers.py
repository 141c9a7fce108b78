"Several optimizers in one router: rounds, scalers, steps taken alone, errors."

import copy
import pickle

import pytest
import torch
from torch import nn

from dmr.methods.agem import AGEM
from dmr.methods.consolidation import FisherMerge
from dmr.methods.ogd import OGD
from dmr.methods.penalty import SI
from dmr.methods.projection import Projection
from dmr.methods.replay import ReplayBuffer, ReplayMix
from dmr.routing.consolidation import Interpolate
from dmr.routing.modification import Dense, Modification
from dmr.routing.router import MomentRouter
from dmr.routing.strength import OverlapAware

AdamW, Muon = torch.optim.AdamW, torch.optim.Muon


def net(dtype=torch.float64):
    torch.manual_seed(0)
    layers = nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh()
    return nn.Sequential(*layers, nn.Linear(4, 3)).to(dtype)


def loss(model, batch):
    return model(batch).square().sum(1).mean()


def divided(model):
    "The first layer, and the rest."
    return [*model[0].parameters()], [
        *model[2].parameters(),
        *model[4].parameters(),
    ]


def adams(model, **options):
    return [AdamW(part, lr=1e-2, **options) for part in divided(model)]


def muon_and_adam(model, lr=1e-2):
    hidden = [model[0].weight, model[2].weight]
    rest = [p for p in model.parameters() if not any(p is h for h in hidden)]
    return [Muon(hidden, lr=lr), AdamW(rest, lr=1e-3)]


def batches(domains=3, steps=4):
    generator = torch.Generator().manual_seed(1)
    shape = (domains, steps, 8, 6)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x * torch.linspace(0.2, 2, 6, dtype=torch.float64)


def train(model, optimizers, router, data):
    told = []
    for domain in data:
        for x in domain:
            router.observe(x, 8)
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss(model, x).backward()
            for optimizer in optimizers:
                optimizer.step()
            told.append(router.last)
        told.append(router.consolidate())
    return told


def same(a, b, tolerance=1e-11):
    for (name, p), q in zip(a.named_parameters(), b.parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=tolerance, msg=name)


def replay(kind):
    def make(model):
        buffer = ReplayBuffer(seed=0)
        options = {"fraction": None} if kind is ReplayMix else {}
        return kind(buffer, lambda x: loss(model, x), **options)

    return make


METHODS = {
    "projection": lambda model: Projection(rank=2, every=1),
    "every third": lambda model: Projection(rank=1, every=3),
    "by itself": lambda model: Projection(rank=1, every=1, consolidate_every=3),
    "si": lambda model: SI(c=0.5),
    "ogd": lambda model: OGD(lambda x: loss(model, x), vectors=4),
}


@pytest.mark.parametrize("routing", ["shared", "decoupled", "denominator"])
@pytest.mark.parametrize("method", METHODS)
def test_two_adams_are_one(method, routing):
    "Dealing the weights out to two equal optimizers changes nothing."
    results = []
    for split in (False, True):
        model = net()
        given = adams(model) if split else AdamW(model.parameters(), lr=1e-2)
        router = MomentRouter(
            model,
            given,
            METHODS[method](model),
            routing,
            OverlapAware(0.8, beta=0.5),
            track_step=2,
            track_inflation=True,
            consolidation=FisherMerge(0.6),
        )
        data = batches()
        told = train(model, router.optimizers, router, data)
        results.append((model, router, told))
    (one, mine, a), (two, other, b) = results
    same(one, two)
    assert mine.steps == other.steps == 12 and other._flight is None
    for x, y in zip(a, b):
        for key in x.keys() & {"alpha", "overlap", "step_norm", "inflation"}:
            assert x[key] == pytest.approx(y[key], abs=1e-11)
        assert x.keys() == y.keys()
    for name, f in mine.consolidation.past.items():
        torch.testing.assert_close(f, other.consolidation.past[name])
    for key, x in mine.modification.state_dict().items():
        y = other.modification.state_dict()[key]
        if isinstance(x, dict):
            assert x.keys() == y.keys(), key


def test_displacement_of_two_adams():
    moved = []
    for split in (False, True):
        model = net()
        given = adams(model) if split else AdamW(model.parameters(), lr=1e-2)
        how = (Projection(rank=2, every=1), "displacement", 0.9)
        router = MomentRouter(model, given, *how, track_step=1)
        told = train(model, router.optimizers, router, batches())
        moved.append((model, told[-2]))
    same(moved[0][0], moved[1][0])
    for key, x in moved[0][1].items():
        assert x == pytest.approx(moved[1][1][key], abs=1e-11)


@pytest.mark.parametrize("routing", ["shared", "decoupled", "displacement"])
def test_muon_and_adamw_as_two_routers(routing):
    "At fixed strength each optimizer is routed as by a router of its own."
    one, two = net(), net()
    together = MomentRouter(
        one, muon_and_adam(one), Projection(rank=2, every=1), routing, 0.9
    )
    pair = muon_and_adam(two)
    parts = {"include": ["0.weight", "2.weight"]}, {"include": "4.weight"}
    apart = [
        MomentRouter(two, x, Projection(rank=2, every=1), routing, 0.9, **part)
        for x, part in zip(pair, parts)
    ]
    for domain in batches():
        for x in domain:
            for model, optimizers in ((one, together.optimizers), (two, pair)):
                model.zero_grad()
                loss(model, x).backward()
                for optimizer in optimizers:
                    optimizer.step()
        for router in (together, *apart):
            router.consolidate()
    for p, q in zip(one.parameters(), two.parameters()):
        assert torch.equal(p, q)
    meant = "shared" if routing == "shared" else "displacement"
    assert together.routings == [meant, routing]
    assert together.routing == routing


def test_the_overlap_is_taken_over_all_tensors():
    model = net()
    pair = muon_and_adam(model)
    method, strength = Projection(rank=2, every=1), OverlapAware(0.9, beta=0.0)
    router = MomentRouter(model, pair, method, "decoupled", strength)
    data = batches()
    train(model, pair, router, data[:1])
    model.zero_grad()
    loss(model, data[1, 0]).backward()
    grads = {
        n: p.grad for n, p in model.named_parameters() if n in method.bases
    }
    inside = sum((g @ method.bases[n]).square().sum() for n, g in grads.items())
    whole = sum(g.square().sum() for g in grads.values())
    for optimizer in pair:
        optimizer.step()
        assert router.last["overlap"] == pytest.approx(float(inside / whole))


def test_one_in_a_list_is_bit_for_bit_one():
    models = []
    for wrap in (lambda x: x, lambda x: [x], lambda x: (x,)):
        model = net(torch.float32)
        optimizer = AdamW(model.parameters(), lr=1e-2, fused=True)
        how = (Projection(rank=2, every=1), "decoupled", OverlapAware(0.9))
        router = MomentRouter(model, wrap(optimizer), *how)
        train(model, [optimizer], router, batches().float())
        models.append((model, repr(router)))
    for model, said in models[1:]:
        same(model, models[0][0], 0.0)
        assert said == models[0][1]


class Counts(Modification):
    "Halves what it is shown, and counts."

    def __init__(self):
        self.seen, self.more, self.ended = [], [], []

    def learn(self, grads):
        self.seen.append(set(grads))

    def learn_more(self, grads):
        self.more.append(set(grads))

    def edit(self, name, x):
        return Dense(x / 2)

    def end(self, grads=None):
        if grads is not None:
            self.ended.append({n: g.clone() for n, g in grads.items()})


@pytest.mark.parametrize("routing", ["shared", "decoupled", "denominator"])
@pytest.mark.parametrize("to_none", [True, False])
def test_an_optimizer_that_is_stepped_alone(routing, to_none):
    "The other's gradients, moments and weights are as if it had no router."
    model = net()
    first, second = pair = adams(model)
    mine, other = ({id(p) for p in part} for part in divided(model))
    names = {n for n, p in model.named_parameters() if id(p) in mine}
    rest = {n for n, p in model.named_parameters() if id(p) in other}
    method = Counts()
    merge = FisherMerge(0.6)
    router = MomentRouter(
        model, pair, method, routing, 0.5, consolidation=merge
    )
    x = batches()[0]
    loss(model, x[0]).backward()
    raw = {n: p.grad.clone() for n, p in model.named_parameters()}
    kept = copy.deepcopy(second.state_dict())
    first.step()
    assert method.seen == [names] and not method.more
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, raw[n], rtol=0, atol=1e-15)
    assert second.state_dict() == kept and not merge.recorder.sums.keys() & rest
    for optimizer in pair:
        optimizer.zero_grad(set_to_none=to_none)
    loss(model, x[1]).backward()
    second.step()  # another round: the other way about
    assert router.steps == 2 and method.seen == [names, rest]
    # a gradient that was zeroed in place is gone, one that was let go is held
    assert set(method.ended[0]) == (names if to_none else set())
    for n, g in method.ended[0].items():
        torch.testing.assert_close(g, raw[n], rtol=0, atol=1e-15)
    first.step()  # joins: the gradients are the same
    assert router.steps == 2 and method.more == [names]
    assert set(method.ended[1]) == names | rest and router._flight is None


def test_gradients_may_go_between_the_steps():
    "A loop that clears each optimizer's gradients right after its step."
    models = []
    for early in (False, True):
        model = net()
        pair = muon_and_adam(model)
        how = (AGEM(ReplayBuffer(seed=0), lambda x, m=model: loss(m, x)),)
        router = MomentRouter(model, pair, *how, "decoupled", 0.9)
        for domain in batches():
            for x in domain:
                router.observe(x, 8)
                loss(model, x).backward()
                for optimizer in pair:
                    optimizer.step()
                    if early:
                        optimizer.zero_grad()
                model.zero_grad()
            router.consolidate()
        assert router.steps == 12
        models.append(model)
    same(*models, 0.0)


def test_a_boundary_in_the_middle_of_a_round():
    model = net()
    pair = adams(model)
    router = MomentRouter(model, pair, SI(c=1.0), "decoupled", 1.0)
    loss(model, batches()[0, 0]).backward()
    pair[0].step()
    router.consolidate()
    Ω = router.modification.importance
    assert Ω["0.weight"].any() and not Ω["2.weight"].any()
    assert router._flight is None


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_skips_one_of_them(fused):
    "An infinity in Muon's gradients: AdamW is stepped, and routed."
    runs = []
    for scaled in (False, True):
        model = net(torch.float32)
        pair = muon_and_adam(model)
        pair[1].param_groups[0]["fused"] = fused
        pair[1]._step_supports_amp_scaling = fused
        strength = OverlapAware(0.9, beta=0.5)
        router = MomentRouter(
            model, pair, Projection(rank=2, every=1), "decoupled", strength
        )
        data = batches().float()
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=scaled)
        for domain in data:
            for i, x in enumerate(domain):
                model.zero_grad()
                scaler.scale(loss(model, x)).backward()
                if i == 2:
                    model[0].weight.grad[0, 0] = float("inf")
                if not scaled and i == 2:  # what the scaler will do
                    pair[1].step()
                    continue
                for optimizer in pair:
                    scaler.unscale_(optimizer)
                for optimizer in pair:
                    scaler.step(optimizer)
                scaler.update(64.0)
            router.consolidate()
        assert router.steps == 12 and strength.average.isfinite()
        runs.append(model)
    same(*runs, 1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_that_are_unscaled_too_late(fused):
    model = net(torch.float32)
    pair = muon_and_adam(model)
    pair[1].param_groups[0]["fused"] = fused
    pair[1]._step_supports_amp_scaling = fused
    MomentRouter(model, pair, Projection(rank=2), "decoupled", 0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for optimizers in (pair, pair[::-1]):
        model.zero_grad()
        scaler.scale(loss(model, batches()[0, 0].float())).backward()
        with pytest.raises(ValueError, match="unscale_"):
            for optimizer in optimizers:
                scaler.step(optimizer)
        scaler.update()
    for name in ("grad_scale", "found_inf"):  # left there by torch
        pair[1].__dict__.pop(name, None)
    # and the loop can go on
    model.zero_grad()
    scaler.scale(loss(model, batches()[0, 0].float())).backward()
    for step in (scaler.unscale_, scaler.step):
        for optimizer in pair:
            step(optimizer)


def test_a_gradient_that_is_not_finite():
    "The optimizer that is stepped raises; the other can go on."
    model = net()
    pair = muon_and_adam(model)
    router = MomentRouter(model, pair, Projection(rank=2), "decoupled", 0.9)
    loss(model, batches()[0, 0]).backward()
    model[0].weight.grad[0, 0] = float("nan")
    before = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match="'0.weight' has NaN"):
        pair[0].step()
    assert torch.equal(before, model[0].weight) and router.steps == 0
    pair[1].step()
    assert router.steps == 1


def test_learning_rate_schedules():
    "Each optimizer has a schedule of its own."
    models = []
    for scheduled in (True, False):
        model = net()
        pair = muon_and_adam(model)
        rates = (0.5, 0.9)
        schedules = [
            torch.optim.lr_scheduler.ExponentialLR(x, g)
            for x, g in zip(pair, rates)
        ]
        how = (Projection(rank=2, every=1), "decoupled", 0.9)
        router = MomentRouter(model, pair, *how)
        for domain in batches():
            for x in domain:
                model.zero_grad()
                loss(model, x).backward()
                for i, optimizer in enumerate(pair):
                    optimizer.step()
                    if scheduled:
                        schedules[i].step()
                    else:
                        optimizer.param_groups[0]["lr"] *= rates[i]
            router.consolidate()
        models.append(model)
    same(*models, 1e-14)


@pytest.mark.parametrize("merge", [FisherMerge(0.6), Interpolate(0.5)])
def test_saved_and_loaded_and_copied(merge):
    "A run that is cut in two ends where one that was not cut does."
    data = batches()

    def fresh():
        model = net()
        pair = muon_and_adam(model)
        router = MomentRouter(
            model,
            pair,
            Projection(rank=2, every=1),
            "decoupled",
            OverlapAware(0.9),
            track_inflation=True,
            consolidation=copy.deepcopy(merge),
        )
        return model, pair, router

    whole, first, second = fresh(), fresh(), fresh()
    train(*whole, data)
    train(*first, data[:2])
    second[0].load_state_dict(copy.deepcopy(first[0].state_dict()))
    for mine, theirs in zip(second[1], first[1]):
        mine.load_state_dict(copy.deepcopy(theirs.state_dict()))
    second[2].load_state_dict(first[2].state_dict())
    copied = copy.deepcopy(first)
    unpickled = pickle.loads(pickle.dumps(first[2]))
    unpickled = (unpickled.model, unpickled.optimizers, unpickled)
    for each in (second, copied, unpickled, first):
        train(*each, data[2:])
        same(whole[0], each[0], 0.0)
        assert each[2].summary() == whole[2].summary()
    said = whole[2].summary()
    assert "[Muon, AdamW]" in said and "  Muon: displacement" in said


def test_a_single_state_fits_several():
    "The state is of the model's parameters, whoever steps them."
    model = net()
    router = MomentRouter(
        model, AdamW(model.parameters()), Projection(rank=2, every=1)
    )
    train(model, router.optimizers, router, batches())
    state = router.state_dict()
    router.close()
    several = MomentRouter(model, adams(model), Projection(rank=2, every=1))
    several.load_state_dict(state)
    assert several.steps == 12
    several.close()
    for optimizer in several.optimizers:
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("restore", [True, False])
@pytest.mark.parametrize("routing", ["shared", "denominator"])
@pytest.mark.parametrize("several", [False, True])
def test_curvature_and_path_are_of_raw_gradients(restore, routing, several):
    "Also where p.grad is left edited: what is recorded is the raw gradient."
    model = net()
    given = adams(model) if several else AdamW(model.parameters(), lr=1e-2)
    method, merge = Counts(), FisherMerge(1.0)
    router = MomentRouter(
        model,
        given,
        method,
        routing,
        0.9,
        restore_grad=restore,
        consolidation=merge,
    )
    squares, raw = {}, []
    for x in batches()[0]:
        model.zero_grad()
        loss(model, x).backward()
        raw.append({n: p.grad.clone() for n, p in model.named_parameters()})
        for n, g in raw[-1].items():
            squares[n] = squares.get(n, 0) + g.square()
        for optimizer in router.optimizers:
            optimizer.step()
    for n, x in squares.items():
        torch.testing.assert_close(merge.recorder.sums[n], x)
    for mine, theirs in zip(raw, method.ended):
        assert all(torch.equal(g, theirs[n]) for n, g in mine.items())


def test_edited_gradients_stay_where_nothing_reads_them():
    model = net()
    U = torch.eye(6, dtype=torch.float64)[:, :2]
    how = (Projection(bases={"0.weight": U}), "shared", 1.0)
    router = MomentRouter(
        model, AdamW(model.parameters()), *how, restore_grad=False
    )
    loss(model, batches()[0, 0]).backward()
    pulled = model[0].weight.grad @ U
    router.optimizer.step()
    assert pulled.any() and (model[0].weight.grad @ U).abs().max() < 1e-12


def test_mistakes():
    model = net()
    muon, adam = muon_and_adam(model)
    make = lambda given, **more: MomentRouter(
        model, given, Projection(rank=2), **more
    )
    with pytest.raises(ValueError, match="optimizer=.. is empty"):
        make([])
    with pytest.raises(TypeError, match="str cannot be routed"):
        make([muon, "adamw"])
    with pytest.raises(TypeError, match="dict cannot be routed"):
        make({"muon": muon})
    with pytest.raises(ValueError, match="'0.weight' is in two of the"):
        make([muon, adam, AdamW([model[0].weight])])
    with pytest.raises(ValueError, match="'0.weight' is in two of the"):
        make([AdamW([model[0].weight]), muon, adam])
    with pytest.raises(ValueError, match="'2.weight' is in none of the"):
        make([Muon([model[0].weight]), adam])
    with pytest.raises(ValueError, match="Muon does not allow"):
        make([muon, adam], routing="denominator")
    with pytest.raises(ValueError, match="Muon has no second moment|Muon"):
        make([muon, adam], consolidation=FisherMerge(curvature="moment"))
    assert not muon._optimizer_step_pre_hooks
    model[2].weight.requires_grad_(False)  # frozen: in none, and rightly so
    make([Muon([model[0].weight]), adam]).close()
    model[2].weight.requires_grad_(True)
    router = make([muon, adam])
    with pytest.raises(ValueError, match="routed already"):
        MomentRouter(model, adam, Projection(rank=2))
    loss(model, batches()[0, 0]).backward()
    muon.step()
    for p in adam.param_groups[0]["params"]:
        p.grad.mul_(0.5)
    with pytest.raises(ValueError, match="the gradients of AdamW were changed"):
        adam.step()
    model.zero_grad()
    loss(model, batches()[0, 1]).backward()
    muon.step(), adam.step()
    assert router.steps == 2


def test_what_looks_at_all_parameters_says_that_it_sees_a_part(recwarn):
    model = net()
    logit = lambda x: model(x)[0, 0]
    words = "edits the steps of [AdamW, AdamW] one after the other"
    said = lambda: [w for w in recwarn if words in str(w.message)]
    MomentRouter(model, adams(model), OGD(logit), "shared")
    MomentRouter(model, AdamW(model.parameters()), OGD(logit), "displacement")
    MomentRouter(model, adams(model), Projection(rank=1), "displacement")
    assert not said()
    MomentRouter(model, adams(model), OGD(logit), "displacement")
    assert len(said()) == 1
