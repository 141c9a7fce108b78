"""What merges the weights at a boundary."""

import copy
import warnings

import pytest
import torch
from conftest import basis, flat, regression, train
from torch import nn

import dmr
from dmr.methods.rivals import FisherVariant, RegMean
from dmr.routing.consolidation import Consolidation, Interpolate, Trained
from dmr.routing.router import MomentRouter

torch.set_num_threads(1)
ROUTINGS = ["shared", "decoupled", "denominator", "displacement"]


def test_interpolation_averages_with_the_last_boundary():
    model, loss = regression()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    router = MomentRouter(model, optimizer)
    first = train(model, loss, optimizer)
    router.consolidate(interpolate=0.3)
    # nothing to average with yet
    assert all(torch.equal(a, b) for a, b in zip(first, model.parameters()))
    second = train(model, loss, optimizer)
    router.consolidate(interpolate=0.3)
    for a, b, p in zip(first, second, model.parameters()):
        torch.testing.assert_close(p.detach(), a + 0.3 * (b - a))
    for bad in (0.0, 1.5, -1.0):
        with pytest.raises(ValueError, match="interpolate="):
            router.consolidate(interpolate=bad)


class Watched(Consolidation):
    "Keeps what it is shown, and merges by halves."

    def attach(self, trained):
        super().attach(trained)
        if trained.moments.second is None:
            raise ValueError("needs a second moment; pass AdamW")
        self.grads, self.steps, self.second = [], [], []

    def learn(self, grads):
        self.grads.append({n: g.clone() for n, g in grads.items()})
        self.steps.append(self.trained.steps)
        second = self.trained.second_moment("2.bias")
        self.second.append(None if second is None else second.clone())

    def anchor(self):
        kept = self.trained.parameters().items()
        self.before = {n: p.detach().clone() for n, p in kept}

    def merge(self):
        with torch.no_grad():
            for n, p in self.trained.parameters().items():
                p.lerp_(self.before[n], 0.5)
        return {"parameters": len(self.before)}

    def state_dict(self):
        return {"before": dict(self.before)}

    def load_state_dict(self, state):
        self.before = dict(state["before"])

    def memory(self):
        return 7


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("scaled", [False, True])
def test_a_consolidation_sees_raw_gradients_under_every_routing(
    routing, scaled
):
    model, loss = regression()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, fused=scaled)
    router = MomentRouter(
        model,
        optimizer,
        dmr.Projection(bases={"0.weight": basis(6, 2, dtype=torch.float32)}),
        routing,
        0.7,
        consolidation=Watched(),
    )
    router.anchor()
    first = [p.detach().clone() for p in model.parameters()]
    raw, factor = [], 8.0 if scaled else 1.0
    for step in range(4):
        optimizer.zero_grad()
        (loss() * factor).backward()
        skip = scaled and step == 1
        if scaled:
            optimizer.grad_scale = torch.tensor(factor)
            optimizer.found_inf = torch.tensor(float(skip))
        if not skip:
            raw.append([p.grad / factor for p in model.parameters()])
        optimizer.step()
    watched = router.consolidation
    assert len(watched.grads) == len(raw) == router.steps
    assert watched.steps == list(range(1, len(raw) + 1))
    assert watched.second[0] is None and watched.second[1] is not None
    names = [n for n, _ in model.named_parameters()]
    for seen, known in zip(watched.grads, raw):
        assert list(seen) == names
        for name, g in zip(names, known):
            torch.testing.assert_close(seen[name], g, rtol=1e-5, atol=1e-6)
    last = [p.detach().clone() for p in model.parameters()]
    assert router.consolidate()["consolidation"] == {"parameters": 4}
    for a, b, p in zip(first, last, model.parameters()):
        torch.testing.assert_close(p.detach(), (a + b) / 2)
    assert router.memory() == router.modification.memory() + 7


def test_a_consolidation_is_saved_and_refuses_by_name():
    model, _ = regression()
    adam = lambda: torch.optim.Adam(model.parameters())
    router = MomentRouter(model, adam(), consolidation=Watched())
    router.anchor()
    with pytest.raises(ValueError, match="asks for a second merge"):
        router.consolidate(interpolate=0.5)
    state = router.state_dict()
    other = MomentRouter(model, adam(), consolidation=Watched())
    other.load_state_dict(state)
    assert set(other.consolidation.before) == set(router.consolidation.before)
    with pytest.raises(
        ValueError, match="consolidation='Watched', this router"
    ):
        MomentRouter(model, adam()).load_state_dict(state)
    with pytest.raises(
        TypeError, match="is no Consolidation; pass for example"
    ):
        MomentRouter(model, adam(), consolidation=0.5)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match="needs a second moment"):
        MomentRouter(model, sgd, consolidation=Watched())
    assert not sgd._optimizer_step_pre_hooks


def test_a_weight_given_once_is_a_weight_given_at_every_boundary():
    ends = []
    for once in (True, False):
        model, loss = regression()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        given = Interpolate(0.3) if once else None
        router = MomentRouter(model, optimizer, consolidation=given)
        for _ in range(3):
            train(model, loss, optimizer)
            router.consolidate(**({} if once else {"interpolate": 0.3}))
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends))


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=1e-2)


def test_an_average_now_and_then_starts_from_the_last_boundary():
    "Also where that boundary asked for none."
    model, loss = regression()
    optimizer = adam(model)
    router = MomentRouter(model, optimizer)
    train(model, loss, optimizer)
    router.consolidate(interpolate=0.5)
    last = train(model, loss, optimizer)
    router.consolidate()
    ends = train(model, loss, optimizer)
    router.consolidate(interpolate=0.5)
    for a, b, p in zip(last, ends, model.parameters()):
        assert torch.equal(p, torch.lerp(a, b, 0.5))


def test_an_average_without_a_copy_of_the_last_boundary_is_spoken_of():
    model, loss = regression()
    optimizer = adam(model)
    router = MomentRouter(model, optimizer)
    train(model, loss, optimizer)
    router.consolidate()
    merge = router.consolidation
    assert not merge.before  # nobody has asked for a copy yet
    ends = train(model, loss, optimizer)
    with pytest.warns(UserWarning, match="averages nothing at this boundary"):
        router.consolidate(interpolate=0.5)
    assert torch.equal(flat(model.parameters()), flat(ends))
    later = train(model, loss, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        router.consolidate(interpolate=0.5)
    middle = torch.lerp(flat(ends), flat(later), 0.5)
    assert torch.equal(flat(model.parameters()), middle)


def test_a_copy_that_was_asked_for_once_is_renewed_at_every_boundary():
    model, _ = regression()
    merge = Interpolate()
    merge.attach(Trained(model, adam(model)))
    for draws in (merge.merge, merge.take_in):
        draws()
        assert not merge.before  # nobody has asked for it
    merge.anchor()
    for draws in (merge.merge, merge.take_in):
        with torch.no_grad():
            model[0].weight += 1
        draws()
        assert torch.equal(merge.before["0.weight"], model[0].weight)


MERGES = [lambda: Interpolate(0.5), lambda: dmr.FisherMerge(0.5)]


@pytest.mark.parametrize("make", MERGES)
def test_a_merge_that_knows_one_model_refuses_another(make):
    merge = make()
    model, loss = regression()
    optimizer = adam(model)
    with MomentRouter(model, optimizer, consolidation=merge) as router:
        train(model, loss, optimizer)
        router.consolidate()
        state = copy.deepcopy(router.state_dict())
    other, its = regression(1)
    optimizer = adam(other)
    with pytest.raises(ValueError, match="knows the weights of another model"):
        MomentRouter(other, optimizer, consolidation=merge)
    assert not optimizer._optimizer_step_pre_hooks and merge.trained is router
    MomentRouter(other, optimizer, consolidation=copy.deepcopy(merge)).close()
    other.load_state_dict(model.state_dict())
    again = MomentRouter(other, optimizer, consolidation=make())
    again.load_state_dict(state)  # a model that was loaded anew goes on
    optimizer = adam(model)  # and so does the same one with a new optimizer
    router = MomentRouter(model, optimizer, consolidation=merge)
    for here, f, r in ((model, loss, router), (other, loss, again)):
        start, ends = flat(here.parameters()), flat(train(here, f, r.optimizer))
        if here is model:
            r.consolidate()
            assert not torch.equal(flat(here.parameters()), ends)
            assert not torch.equal(flat(here.parameters()), start)


def half_known(seed, frozen):
    "Its second layer is trained and begins as in every other of them."
    model, _ = regression(frozen)
    nn.init.constant_(model[2].weight, 0.1)
    nn.init.zeros_(model[2].bias)
    model[0].requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    return model, torch.randn(2, 8, 6, generator=generator)


def test_another_base_with_the_same_trained_weights_is_another_model():
    "As adapters that all begin at zero."
    merge = dmr.FisherMerge()
    model, batches = half_known(0, frozen=0)
    last = lambda model: torch.optim.AdamW(model[2].parameters(), lr=1e-2)
    with MomentRouter(model, last(model), consolidation=merge) as router:
        router.protect(batches, lambda x: model(x).square().mean())
    other, _ = half_known(0, frozen=1)
    with pytest.raises(ValueError, match="knows the weights of another model"):
        MomentRouter(other, last(other), consolidation=merge)
    again, _ = half_known(0, frozen=0)
    MomentRouter(again, last(again), consolidation=merge).close()


def test_a_frozen_base_that_was_read_in_half_is_the_same_base():
    merge = dmr.FisherMerge()
    model, batches = half_known(0, frozen=0)
    last = lambda model: torch.optim.AdamW(model[2].parameters(), lr=1e-2)
    with MomentRouter(model, last(model), consolidation=merge) as router:
        router.protect(batches, lambda x: model(x).square().mean())
    again, _ = half_known(0, frozen=0)
    again[0].to(torch.bfloat16)
    MomentRouter(again, last(again), consolidation=merge).close()


@pytest.mark.parametrize(
    "make",
    [
        lambda loss: RegMean(loss_fn=loss),
        lambda loss: FisherVariant(curvature="pass", loss_fn=loss),
    ],
)
def test_a_merge_that_calls_a_loss_stays_with_the_model_of_that(make):
    "Or the loss runs the old object, and nothing of the new one is seen."
    model, _ = regression()
    merge = make(lambda x: model(x).square().mean())
    optimizer = adam(model)
    with MomentRouter(model, optimizer, consolidation=merge) as router:
        for _ in range(4):
            router.observe(x := torch.randn(8, 6))
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        router.consolidate()
    again, _ = regression()
    again.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="knows the weights of another model"):
        MomentRouter(again, adam(again), consolidation=merge)


KEEPING = [*MERGES, lambda: dmr.FisherMerge(0.5, storage=torch.bfloat16)]


@pytest.mark.parametrize("make", KEEPING)
def test_a_model_that_was_loaded_again_is_the_one_that_is_known(make):
    "As an object of its own, in a loop that goes on with the merge object."
    merge = make()
    model, loss = regression()
    optimizer = adam(model)
    with MomentRouter(model, optimizer, consolidation=merge):
        train(model, loss, optimizer)
        merge.trained.consolidate()
    other, its = regression(1)
    with pytest.raises(ValueError, match="knows the weights of another model"):
        MomentRouter(other, adam(other), consolidation=merge)
    other.load_state_dict(model.state_dict())
    optimizer = adam(other)
    router = MomentRouter(other, optimizer, consolidation=merge)
    start, end = flat(other.parameters()), flat(train(other, its, optimizer))
    router.consolidate()
    between = flat(other.parameters())
    assert not torch.equal(between, end) and not torch.equal(between, start)
    assert (between - start).norm() < (end - start).norm()
    other[0].weight.data += 1  # now it is not what the merge left
    last, _ = regression(2)
    last.load_state_dict(other.state_dict())
    router.close()
    with pytest.raises(ValueError, match="knows the weights of another model"):
        MomentRouter(last, adam(last), consolidation=merge)


@pytest.mark.parametrize("make", MERGES)
def test_a_merge_that_knows_nothing_yet_goes_to_any_model(make):
    merge = make()
    for seed in range(2):
        model, loss = regression(seed)
        optimizer = adam(model)
        with MomentRouter(model, optimizer, consolidation=merge):
            train(model, loss, optimizer)
    assert not merge.before


def head_of(model, out):
    "Another head, and a loss on it."
    torch.manual_seed(3)
    model[2] = nn.Linear(9, out)
    x = torch.randn(40, 6)
    return lambda: model(x).square().mean()


@pytest.mark.parametrize("make", MERGES)
def test_an_exchanged_head_counts_as_new(make):
    model, loss = regression()
    optimizer, merge = adam(model), make()
    with MomentRouter(model, optimizer, consolidation=merge) as router:
        train(model, loss, optimizer)
        router.consolidate()
    loss = head_of(model, 5)
    optimizer = adam(model)
    with pytest.warns(UserWarning, match="2 parameters that this .*'2.bias'"):
        router = MomentRouter(model, optimizer, consolidation=merge)
    ends = train(model, loss, optimizer)
    router.consolidate()
    body, head = flat(ends[:2]), flat(ends[2:])
    assert not torch.equal(flat(model[0].parameters()), body)
    assert torch.equal(flat(model[2].parameters()), head)
    ends = train(model, loss, optimizer)
    router.consolidate()  # from now on the head is merged as well
    assert not torch.equal(flat(model[2].parameters()), flat(ends[2:]))


@pytest.mark.parametrize("make", [*MERGES, lambda: None])
def test_a_shape_that_changes_within_a_router_changes_nothing(make):
    model, loss = regression()
    optimizer = adam(model)
    router = MomentRouter(model, optimizer, consolidation=make())
    given = {} if make() is not None else {"interpolate": 0.5}
    train(model, loss, optimizer)
    router.consolidate(**given)
    train(model, loss, optimizer)
    model[2].weight.data = torch.zeros(5, 9)
    now = flat(model.parameters())
    for _ in range(2):
        with pytest.raises(ValueError, match=r"'2.weight' has shape \(5, 9\)"):
            router.consolidate(**given)
    assert torch.equal(flat(model.parameters()), now) and router.domains == 1


@pytest.mark.parametrize("make", MERGES)
def test_a_layer_that_was_removed_is_forgotten_and_its_state_loads(make):
    torch.manual_seed(0)
    model = nn.ModuleDict({n: nn.Linear(6, 6) for n in ("body", "old", "new")})
    x, merge = torch.randn(9, 6), make()
    loss = lambda: model["new"](model["body"](x).tanh()).square().mean()
    optimizer = adam(model)
    with MomentRouter(model, optimizer, consolidation=merge) as router:
        both = lambda: loss() + model["old"](x).square().mean()
        train(model, both, optimizer)
        router.consolidate()
        older = copy.deepcopy(router.state_dict()["consolidation"])
    del model["old"]
    optimizer = adam(model)
    with pytest.warns(UserWarning, match="'old.bias', are gone"):
        router = MomentRouter(model, optimizer, consolidation=merge)
    train(model, loss, optimizer)
    state = copy.deepcopy(router.state_dict())
    assert "old" not in str(state["consolidation"].keys())
    router.close()
    again = MomentRouter(model, optimizer, consolidation=make())
    again.load_state_dict(state)
    known = {n for n, _ in model.named_parameters()}
    assert set(again.consolidation.before) == known
    again.consolidation.load_state_dict(older)  # names a layer that is gone
    assert set(again.consolidation.before) == known
    assert set(getattr(again.consolidation, "past", known)) == known
