"""OSF of peft leaks under AdamW; a router keeps its steps where they belong."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

import peft

import dmr
from dmr.frameworks.osf import KeepFrozen, osf_factors

torch.set_num_threads(1)


def adapted(dtype=torch.float64, rank=6):
    "A wide, a tall and a square layer: every way in which peft keeps factors."
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(12, 20, bias=False),
        nn.Tanh(),
        nn.Linear(20, 20, bias=False),
        nn.Tanh(),
        nn.Linear(20, 12, bias=False),
    ).to(dtype)
    names = ["0", "2", "4"]
    start = [net[i].weight.detach().clone() for i in (0, 2, 4)]
    config = peft.OSFConfig(target_modules=names, effective_rank=rank)
    return peft.get_peft_model(net, config), start


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def moved(model):
    "The change of each weight since OSF was put on it."
    layers = [m for m in model.modules() if hasattr(m, "osf_svd_params")]
    return [layer.get_delta_weight("default").detach() for layer in layers]


def leak(change, W, rank=6):
    "‖P_out ΔW‖ and ‖ΔW P_in‖ over ‖ΔW‖, from the weight itself, in float64."
    U, _, V = torch.linalg.svd(W.double(), full_matrices=False)
    d = change.double()
    sides = (U[:, :rank].mT @ d, d @ V[:rank].mT)
    return max(float(side.norm() / d.norm()) for side in sides)


def train(model, optimizer, steps=8, seed=1):
    "Leaks of each layer in each step."
    draw = torch.Generator().manual_seed(seed)
    dtype = trainable(model)[0].dtype
    found, before = [], moved(model)
    for _ in range(steps):
        x = torch.randn(32, 12, generator=draw).to(dtype)
        optimizer.zero_grad()
        (model(x) - x.roll(1, 1)).square().mean().backward()
        optimizer.step()
        after = moved(model)
        found.append([a - b for a, b in zip(after, before)])
        before = after
    return found


def leaks(make, route=None, dtype=torch.float64):
    model, start = adapted(dtype)
    optimizer = make(trainable(model))
    if route:
        route(model, optimizer)
    changes = train(model, optimizer)
    return [leak(d, W) for step in changes for d, W in zip(step, start)]


sgd = lambda params: torch.optim.SGD(params, lr=0.1)
adamw = lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.0)
decayed = lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)


def mended(model, optimizer, alpha=1.0):
    return dmr.MomentRouter(
        model, optimizer, KeepFrozen(), "displacement", alpha
    )


def test_pefts_osf_leaks_under_adamw_and_not_under_sgd():
    assert max(leaks(sgd)) < 1e-5
    assert min(leaks(adamw)) > 0.1  # in every layer, at every step


@pytest.mark.parametrize(
    "make", [adamw, decayed, torch.optim.NAdam, torch.optim.Adagrad]
)
def test_two_lines_stop_it(make):
    assert max(leaks(make, mended)) < 1e-6


def test_single_precision_leaks_its_rounding_only():
    assert max(leaks(adamw, mended, torch.float32)) < 1e-4


def test_an_edit_of_the_gradient_does_not():
    "peft has done that already."
    shared = lambda model, opt: dmr.MomentRouter(
        model, opt, KeepFrozen(), "shared"
    )
    assert min(leaks(adamw, shared)) > 0.1


def test_strength_is_the_share_taken():
    half = lambda model, opt: mended(model, opt, 0.5)
    # the first step starts from the same weights and moments
    before, after = leaks(adamw)[:3], leaks(adamw, half)[:3]
    for whole, left in zip(before, after):
        assert 0.4 * whole < left < 0.65 * whole


def test_the_frozen_directions_are_those_of_the_weight():
    model, start = adapted()
    layers = [m for m in model.modules() if hasattr(m, "osf_svd_params")]
    for layer, W in zip(layers, start):
        U, _, V = torch.linalg.svd(W, full_matrices=False)
        known = (U[:, :6] @ U[:, :6].mT, V[:6].mT @ V[:6])
        for (_, span, _), P in zip(osf_factors(layer), known):
            torch.testing.assert_close(span @ span.mT, P, rtol=0, atol=1e-5)


def test_resumed_it_goes_on_bit_for_bit():
    model, _ = adapted()
    optimizer = adamw(trainable(model))
    router = mended(model, optimizer)
    train(model, optimizer, 3)
    other, _ = adapted()
    again = adamw(trainable(other))
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    mended(other, again).load_state_dict(router.state_dict())
    for opt, net in ((optimizer, model), (again, other)):
        train(net, opt, 3, seed=2)
    for a, b in zip(moved(model), moved(other)):
        assert torch.equal(a, b)


def test_a_model_without_osf_is_refused():
    plain = nn.Linear(4, 2)
    with pytest.raises(ValueError, match="Linear has no OSF layer; make the"):
        mended(plain, torch.optim.AdamW(plain.parameters()))
