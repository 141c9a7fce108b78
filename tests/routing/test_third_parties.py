"""Optimizers of other libraries, routed, against the same optimizer on a copy
and its difference edited by hand in float64.

The libraries come with the extra `dev`, pinned: 44 MB to fetch, nearly all of
it bitsandbytes. Left out is torchao, which steps and is routed as well: peft
imports it wherever it is installed, and its messages about kernels that a CPU
does not have would then stand on every executed page with an adapter.
HeavyBall runs eagerly here; it would compile for minutes on a CPU.
"""

from importlib import import_module

import pytest
import torch
from conftest import basis, gradients, layer, run

import dmr
from dmr.methods.penalty import SI
from dmr.routing.consolidation import Interpolate
from dmr.routing.moments import Differences, moments_of
from dmr.routing.router import MomentRouter

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
torch.set_num_threads(1)
ALPHA, SIZE, RATE, DECAY = 0.7, 64, 0.01, 0.1
DOUBLE, SINGLE = torch.float64, torch.float32
NONE = lambda state: 0.0
ALWAYS = lambda state: RATE * DECAY
LATER = lambda state: RATE * DECAY if state else 0.0

#: name -> module and class, number type, share that decay takes given a state;
#: None: the class is not in dmr's table, and is run without decay
PARTIES = {
    "lion": ("lion_pytorch", "Lion", DOUBLE, ALWAYS),
    "soap": ("pytorch_optimizer", "SOAP", DOUBLE, LATER),
    "shampoo": ("pytorch_optimizer", "Shampoo", DOUBLE, None),
    "ademamix": ("pytorch_optimizer", "AdEMAMix", DOUBLE, None),
    "prodigy": ("pytorch_optimizer", "Prodigy", DOUBLE, None),
    "came": ("pytorch_optimizer", "CAME", DOUBLE, None),
    "mars": ("pytorch_optimizer", "MARS", DOUBLE, None),
    "adamw-8bit": ("bitsandbytes.optim", "AdamW8bit", SINGLE, ALWAYS),
    "lion-8bit": ("bitsandbytes.optim", "Lion8bit", SINGLE, ALWAYS),
    "heavyball-soap": ("heavyball", "SOAP", SINGLE, None),
    "heavyball-muon": ("heavyball", "Muon", SINGLE, None),
}
CASES = pytest.mark.parametrize("kind", PARTIES)
FREE = ["AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree"]


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    "HeavyBall's kernels as they are written, not compiled."
    utils = import_module("heavyball.utils")
    monkeypatch.setattr(utils, "compile_mode", None)


def setup(kind):
    "A square layer, its optimizer, and the share of its decay."
    module, name, dtype, share = PARTIES[kind]
    model = layer(SIZE, SIZE, dtype)
    cls, decay = getattr(import_module(module), name), DECAY if share else 0.0
    optimizer = cls(model.parameters(), lr=RATE, weight_decay=decay)
    return model, optimizer, share or NONE


def without(x, U, amount=ALPHA):
    "x (I - αP), in float64."
    x, U = x.double(), U.double()
    return x - amount * x @ U @ U.T


def by_hand(kind, grads, routing, U, alpha=ALPHA):
    "The reference: no router."
    model, optimizer, share = setup(kind)
    W = model.weight
    for g in grads:
        before = W.detach().double().clone()
        s = share(optimizer.state.get(W, {}))
        seen = without(g, U, alpha) if routing == "shared" else g
        W.grad = seen.to(W.dtype).clone()
        optimizer.step()
        if routing == "displacement":
            moved = W.detach().double() - (1 - s) * before
            W.data.copy_((1 - s) * before + without(moved, U, alpha))
    return W.detach()


def routed(kind, routing, alpha=ALPHA, **options):
    model, optimizer, _ = setup(kind)
    U = basis(SIZE, 4, dtype=model.weight.dtype)
    method = dmr.Projection(bases={"weight": U})
    router = MomentRouter(model, optimizer, method, routing, alpha, **options)
    return model, optimizer, router, U


@CASES
def test_its_step_is_read_off_the_weights_and_its_decay_known(kind):
    _, optimizer, _ = setup(kind)
    found = moments_of(optimizer)
    assert isinstance(found, Differences) and found.only_copy
    assert found.decay_known
    if PARTIES[kind][3] is not None:
        assert found.decay({"step": 1}, optimizer.param_groups[0]) > 0


@CASES
@pytest.mark.parametrize("routing", ["shared", "displacement"])
def test_thirty_steps_against_the_reference(kind, routing):
    model, optimizer, router, U = routed(kind, routing, track_step=1)
    start = model.weight.detach().clone()
    grads = gradients(start.shape, 30, start.dtype)
    mine = run(model, optimizer, grads)
    known = by_hand(kind, grads, routing, U)
    error = (mine - known).double().norm() / (known - start).double().norm()
    # single precision flips the last bit of an edited gradient, and so,
    # rarely, a sign or a step of an 8-bit state
    single = 1e-2 if routing == "shared" else 1e-5
    assert error < (1e-9 if start.dtype == DOUBLE else single)
    assert router.last["step_norm"] > router.last["protected_step_norm"] > 0


@CASES
def test_the_reference_is_not_the_plain_optimizer(kind):
    "So that the comparison above can fail."
    U = basis(SIZE, 4)
    grads = gradients((SIZE, SIZE), 5, PARTIES[kind][2])
    start = setup(kind)[0].weight.detach()
    plain = by_hand(kind, grads, "shared", U, alpha=0.0)
    for routing in ("shared", "displacement"):
        other = by_hand(kind, grads, routing, U) - plain
        assert other.norm() > 0.05 * (plain - start).norm()


@CASES
def test_full_strength_leaves_the_protected_part_to_decay_alone(kind):
    model, optimizer, _, U = routed(kind, "displacement", 1.0)
    share, W = setup(kind)[2], model.weight
    exact = {DOUBLE: 1e-10, SINGLE: 1e-5}[W.dtype]
    for g in gradients(W.shape, 8, W.dtype):
        inside = (W.detach() @ U).clone()
        s = share(optimizer.state.get(W, {}))
        run(model, optimizer, [g])
        torch.testing.assert_close(
            W.detach() @ U, (1 - s) * inside, rtol=exact, atol=exact
        )


@CASES
@pytest.mark.parametrize("routing", ["shared", "displacement"])
def test_merges_by_the_raw_gradients(kind, routing):
    rule = dmr.FisherMerge(0.6, damping=0.01)
    model, optimizer, router, _ = routed(kind, routing, consolidation=rule)
    ends, fishers = [], []
    for domain in range(2):
        grads = gradients((SIZE, SIZE), 8, model.weight.dtype, seed=domain)
        ends.append(run(model, optimizer, grads).double().clone())
        squares = [g.double().square() for g in grads]
        fishers.append(torch.stack(squares).mean(0))
        recorded = rule.recorder.fisher()["weight"].double()
        torch.testing.assert_close(recorded, fishers[-1], rtol=1e-5, atol=1e-9)
        router.consolidate()
    (old, new), (f_old, f_new) = ends, fishers
    a = 0.4 * (f_old + 0.01 * f_old.mean())
    b = 0.6 * (f_new + 0.01 * f_old.mean())
    torch.testing.assert_close(
        model.weight.detach().double(),
        (a * old + b * new) / (a + b),
        rtol=1e-5,
        atol=1e-6,
    )


#: Why two moments cannot be shown different gradients.
WHY = {
    "lion": "it has no second moment",
    "soap": "its second moment is of a turned gradient",
    "adamw-8bit": "its moments are kept in 8 bits",
    "lion-8bit": "it has no second moment",
}


@CASES
@pytest.mark.parametrize("routing", ["decoupled", "denominator"])
def test_two_moments_are_refused_with_the_reason(kind, routing):
    if kind == "heavyball-muon" and routing == "decoupled":
        return  # a name for displacement there
    model, optimizer, _ = setup(kind)
    method = dmr.Projection(bases={"weight": basis(SIZE, 4)})
    why = WHY.get(kind, "dmr does not know where|it has no second moment")
    with pytest.raises(ValueError, match=why):
        MomentRouter(model, optimizer, method, routing)
    assert not optimizer._optimizer_step_pre_hooks


def test_a_consumed_gradient_is_still_seen_after_the_step():
    "HeavyBall sets p.grad to None; SI multiplies the gradient by the path."
    model, optimizer, _ = setup("heavyball-soap")
    rule = SI()
    MomentRouter(model, optimizer, rule, "shared")
    grads = gradients((SIZE, SIZE), 4, SINGLE)
    expected = torch.zeros(SIZE, SIZE)
    for g in grads:
        before = model.weight.detach().clone()
        run(model, optimizer, [g])
        assert model.weight.grad is None
        expected -= g * (model.weight.detach() - before)
    (path,) = rule.state_dict()["path"].values()
    torch.testing.assert_close(path.float(), expected, rtol=1e-4, atol=1e-6)


def free(name):
    "A layer and its schedule-free optimizer, in training mode."
    model = layer(SIZE, SIZE)
    cls = getattr(import_module("schedulefree"), name)
    optimizer = cls(model.parameters(), lr=RATE, weight_decay=DECAY)
    optimizer.train()
    return model, optimizer


@pytest.mark.parametrize("name", FREE)
def test_schedule_free_is_edited_upstream_and_evaluated(name):
    "In both modes, and back again, the weights are the reference's."
    U = basis(SIZE, 4)
    model, optimizer = free(name)
    method = dmr.Projection(bases={"weight": U})
    MomentRouter(model, optimizer, method, "shared", ALPHA)
    twin, plain = free(name)
    start = twin.weight.detach().clone()
    for seed in range(2):
        for g in gradients((SIZE, SIZE), 12, seed=seed):
            run(model, optimizer, [g])
            run(twin, plain, [without(g, U)])
        trained = model.weight.detach().clone()
        torch.testing.assert_close(model.weight, twin.weight)
        optimizer.eval(), plain.eval()
        torch.testing.assert_close(
            model.weight, twin.weight, rtol=1e-9, atol=1e-12
        )
        assert (model.weight - trained).norm() > 1e-4 * start.norm()
        optimizer.train(), plain.train()


COPY = "holds a second copy of the weights"


@pytest.mark.parametrize("name", FREE)
def test_schedule_free_is_not_displaced_and_not_merged(name):
    model, optimizer = free(name)
    new = lambda: dmr.Projection(rank=2, every=1)
    refusing = pytest.raises(TypeError, match=f"{COPY}.*routing='shared'")
    with refusing:
        MomentRouter(model, optimizer, new(), "displacement")
    for rule in (dmr.FisherMerge(), Interpolate(0.5)):
        with pytest.raises(TypeError, match=f"{name} {COPY}.*would undo it"):
            MomentRouter(model, optimizer, new(), "shared", consolidation=rule)
    router = MomentRouter(model, optimizer, new(), "shared")
    run(model, optimizer, gradients((SIZE, SIZE), 3))
    before = str((model.weight, router.state_dict()))
    with pytest.raises(TypeError, match=COPY):
        router.consolidate(interpolate=0.5)
    assert before == str((model.weight, router.state_dict()))
    router.consolidate()  # nothing is merged


@pytest.mark.parametrize("name", ["SFAdamW", "MSAMLaProp"])
def test_hidden_weights_of_heavyball_are_known_by_name(name):
    model = layer(SIZE, SIZE, SINGLE)
    cls = getattr(import_module("heavyball"), name)
    optimizer = cls(model.parameters())
    method = dmr.Projection(bases={"weight": basis(SIZE, 4, dtype=SINGLE)})
    with pytest.raises(TypeError, match=COPY):
        MomentRouter(model, optimizer, method, "displacement")


def test_and_found_within_the_state_under_another_name():
    class Other(import_module("heavyball").SFAdamW):
        pass

    model = layer(SIZE, SIZE, SINGLE)
    optimizer = Other(model.parameters(), lr=RATE)
    method = dmr.Projection(bases={"weight": basis(SIZE, 4, dtype=SINGLE)})
    MomentRouter(model, optimizer, method, "displacement")
    with pytest.raises(TypeError, match="schedule_free_z.*the weight again"):
        run(model, optimizer, gradients((SIZE, SIZE), 1, SINGLE))
