"""What merges the weights at a boundary."""

import pytest
import torch
from conftest import basis, regression, train

import dmr
from dmr.routing.consolidation import Consolidation, Interpolate
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
