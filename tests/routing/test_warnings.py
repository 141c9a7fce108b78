"""A warning shows the user's line, whatever lies between it and the router."""

import warnings

import pytest
import torch
from torch import nn

import dmr

torch.set_num_threads(1)


class Whole(dmr.Modification):
    "Edits whole gradients, and cannot edit a step."

    acts_on_steps = False

    def edit(self, name, x):
        return dmr.Dense(0.5 * x)


def line_of(text):
    "The number of the one line of this file that ends so."
    with open(__file__) as file:
        lines = file.read().splitlines()
    (n,) = [i for i, s in enumerate(lines, 1) if s.endswith(f"# {text}")]
    return n


def make(modification, routing, cls=torch.optim.AdamW):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizer = cls(model.parameters(), lr=1e-2)
    router = dmr.MomentRouter(model, optimizer, modification, routing)
    return model, optimizer, router


def said_at(said, words):
    (one,) = [w for w in said if words in str(w.message)]
    return one.filename, one.lineno


def backward(model):
    model(torch.ones(2, 4)).sum().backward()


def test_of_whole_gradients_under_decoupled_routing():
    model, optimizer, _ = make(Whole(), "decoupled")
    backward(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        optimizer.step()  # whole
    assert said_at(said, "edits whole") == (__file__, line_of("whole"))


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.Adam])
@pytest.mark.parametrize("wrapped", [False, True])
def test_of_a_new_optimizer_under_decoupled_routing(cls, wrapped):
    old = make(dmr.Projection(rank=2, every=1), "decoupled", cls)
    backward(old[0])
    old[1].step()
    old[2].consolidate()
    old[2].close()
    bases = old[2].modification.bases
    edit = dmr.Projection(rank=2, every=1, bases=bases)
    model, optimizer, _ = make(edit, "decoupled", cls)
    if wrapped:  # a scheduler wraps the step once more
        torch.optim.lr_scheduler.StepLR(optimizer, 10)
    backward(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        optimizer.step()  # new
    assert said_at(said, "optimizer is new") == (__file__, line_of("new"))


def test_of_parameters_of_nobody():
    model, stranger = nn.Linear(4, 1), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([*model.parameters(), stranger])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        dmr.MomentRouter(model, optimizer, dmr.Projection(rank=1))  # strange
    assert said_at(said, "not the model's") == (__file__, line_of("strange"))


def test_of_parameters_that_came_late():
    model, optimizer, _ = make(dmr.Projection(rank=1), "shared")
    late = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [late]})
    backward(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        optimizer.step()  # late
    assert said_at(said, "never routed") == (__file__, line_of("late"))
