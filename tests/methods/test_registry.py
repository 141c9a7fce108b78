"""The table says what the classes do, and every method is refused what breaks
it.
"""

import copy

import pytest
import torch
from conftest import BROKEN
from torch import nn

from dmr.methods.registry import FAMILIES, make
from dmr.routing.conformance import Problem, same, train, weights
from dmr.routing.router import MomentRouter
from dmr.routing.step import ROUTINGS

torch.set_num_threads(1)


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
