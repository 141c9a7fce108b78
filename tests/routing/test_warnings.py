"""A warning shows the user's line, whatever lies between it and the router."""

import warnings

import pytest
import torch
from torch import nn

import dmr
from dmr.methods.gpm import GPM

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


class Unknown(torch.optim.SGD):
    "Has a step of its own, so its decay is not known."

    def step(self, closure=None):
        return super().step(closure)


def full_at_once():
    model = nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    given = dmr.Projection(bases={"weight": torch.eye(4)})
    dmr.MomentRouter(model, optimizer, given)  # spans all


def full_at_a_boundary():
    model, optimizer, router = make(dmr.Projection(rank=1, every=1), "shared")
    router.modification.cap = lambda target: target.fan_in
    for seed in range(5):
        torch.manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        router.consolidate()  # spans all too


def nothing_to_protect():
    model = nn.Embedding(4, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    dmr.MomentRouter(model, optimizer, dmr.Projection(rank=1))  # nothing


def hidden_inputs():
    model = nn.MultiheadAttention(4, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    edit = dmr.Projection(rank=1, source="inputs")
    dmr.MomentRouter(model, optimizer, edit)  # cannot be seen


def missed_layers():
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 1)])
    optimizer = torch.optim.AdamW(model.parameters())
    run = lambda x: model[0](x).sum()
    router = dmr.MomentRouter(model, optimizer, GPM(run, samples=4))
    batch = torch.ones(4, 4)
    router.observe(batch)
    run(batch).backward()
    optimizer.step()
    router.consolidate()  # no input reached


def unknown_decay():
    model = nn.Linear(4, 1)
    optimizer = Unknown(model.parameters(), 0.1, weight_decay=0.1)
    given = dmr.Projection(rank=1)
    dmr.MomentRouter(model, optimizer, given, "displacement")  # decay included


def short_memory():
    model = nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.5, 0.5))
    merge = dmr.FisherMerge(curvature="moment")
    router = dmr.MomentRouter(
        model, optimizer, None, "decoupled", consolidation=merge
    )
    for _ in range(30):
        backward(model)
        optimizer.step()
    router.consolidate()  # end only


def unknown_past():
    model = nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    merge = dmr.FisherMerge()
    router = dmr.MomentRouter(model, optimizer, consolidation=merge)
    router.anchor()
    backward(model)
    optimizer.step()
    router.consolidate()  # merges nothing


@pytest.mark.parametrize("deeper", [False, True])
@pytest.mark.parametrize(
    "do, words",
    [
        (full_at_once, "spans all"),
        (full_at_a_boundary, "spans all too"),
        (nothing_to_protect, "nothing to protect"),
        (hidden_inputs, "cannot be seen"),
        (missed_layers, "no input reached"),
        (unknown_decay, "decay included"),
        (short_memory, "end only"),
        (unknown_past, "merges nothing"),
    ],
)
def test_each_of_them_shows_the_line_whatever_lies_between(
    do, words, deeper, monkeypatch
):
    for name in ("__init__", "consolidate") if deeper else ():
        inner = torch.enable_grad()(getattr(dmr.MomentRouter, name))
        monkeypatch.setattr(dmr.MomentRouter, name, inner)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        do()
    line = {"nothing to protect": "nothing"}.get(words, words)
    found = [w for w in said if words.removesuffix(" too") in str(w.message)]
    places = {(w.filename, w.lineno) for w in found}
    assert places == {(__file__, line_of(line))}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_of_weights_too_coarse_for_an_edit(dtype):
    model = nn.Linear(4, 4).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    given = dmr.Projection(bases={"weight": torch.eye(4)[:, :2]})
    dmr.MomentRouter(model, optimizer, given)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            model(torch.ones(2, 4, dtype=dtype)).sum().backward()
            optimizer.step()  # coarse
    words = f"'weight' is protected in {str(dtype)[6:]}"
    assert said_at(said, words) == (__file__, line_of("coarse"))


@pytest.mark.parametrize(
    "dtype, strength", [(torch.float32, 1.0), (torch.bfloat16, 0.0)]
)
def test_not_of_weights_that_are_fine_or_not_edited(dtype, strength):
    model = nn.Linear(4, 4).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    given = dmr.Projection(bases={"weight": torch.eye(4)[:, :2]})
    dmr.MomentRouter(model, optimizer, given, strength=strength)
    model(torch.ones(2, 4, dtype=dtype)).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_of_an_average_with_weights_that_nobody_kept():
    model, optimizer, router = make(None, None)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for weight in (None, 0.5, 0.5):
            backward(model)
            optimizer.step()
            router.consolidate(interpolate=weight)  # not kept
    assert said_at(said, "averages nothing") == (__file__, line_of("not kept"))


def test_not_of_an_average_at_the_very_first_boundary():
    model, optimizer, router = make(None, None)
    backward(model)
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        router.consolidate(interpolate=0.5)
