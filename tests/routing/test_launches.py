"""How many operations a routed step dispatches beside torch's own: few a
layer on a processor; on an accelerator, where equal layers are edited in one
product, none. A processor can be told to work as an accelerator does, which
is how the numbers of that path are checked.
"""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dmr
from dmr.book.performance import Watch
from dmr.routing import modification
from dmr.routing.modification import stacks
from dmr.routing.moments import moments_of
from dmr.routing.step import batches, new_step
from dmr.training.config import Lion, Muon32

torch.set_num_threads(1)
#: Operations that compute nothing: views, memory, numbers read by the host.
FREE = "view transpose t. detach unbind alias select empty _local_scalar"


class Counted(TorchDispatchMode):
    "Counts what is dispatched, views left out."

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("aten.")
        if not name.startswith(tuple(FREE.split())):
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def adamw(parameters, **options):
    return torch.optim.AdamW(parameters, lr=1e-3, foreach=True, **options)


def network(layers, size, dtype=torch.float32):
    torch.manual_seed(0)
    make = lambda: nn.Linear(size, size, bias=False, dtype=dtype)
    return nn.Sequential(*[make() for _ in range(layers)])


def bases_of(net, rank=4):
    draw = lambda p: torch.randn(p.shape[1], rank, dtype=p.dtype)
    return {n: torch.linalg.qr(draw(p)).Q for n, p in net.named_parameters()}


def dispatched(layers, size, routing, make=adamw, check=False):
    """Operations of one step, after a first one that makes the state. The
    check takes norms, one for each tensor on a processor alone.
    """
    net = network(layers, size)
    optimizer = make(net.parameters())
    if routing is not None:
        method = dmr.Projection(bases=bases_of(net))
        how = {"check_finite": check}
        dmr.MomentRouter(net, optimizer, method, routing, 0.9, **how)
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    with Counted() as counted:
        optimizer.step()
    return counted.seen


def added(layers, size, routing, **options):
    "Beside the plain optimizer's own."
    plain = dispatched(layers, size, None, **options)
    return (dispatched(layers, size, routing, **options) - plain).total()


def batched(monkeypatch, elements):
    "On a processor, layers of up to so many elements."
    for table in (modification.SMALL, modification.BATCHED):
        monkeypatch.setitem(table, "cpu", elements)


@pytest.fixture
def like_an_accelerator(monkeypatch):
    batched(monkeypatch, 2**22)


def test_the_plain_step_does_not_depend_on_the_number_of_layers():
    few, many = (dispatched(n, 32, None).total() for n in (4, 16))
    assert few == many > 0


def test_small_layers_of_one_shape_are_decoupled_at_one_price():
    few, many = (added(n, 32, "decoupled", check=True) for n in (4, 16))
    assert few == many > 0


#: Most operations that one more layer may add on a processor.
A_LAYER = {"shared": 4, "decoupled": 2, "displacement": 7}


@pytest.mark.parametrize("routing", A_LAYER)
@pytest.mark.parametrize("size", [32, 128])
def test_a_layer_more_adds_a_few(routing, size):
    few, many = (added(n, size, routing, check=True) for n in (4, 16))
    more = many - few
    assert 0 <= more <= 12 * A_LAYER[routing]


@pytest.mark.usefixtures("like_an_accelerator")
@pytest.mark.parametrize("routing", dmr.ROUTINGS)
@pytest.mark.parametrize("size", [32, 128])
def test_batched_the_price_does_not_depend_on_the_number_of_layers(
    routing, size
):
    few, many = (added(n, size, routing) for n in (4, 16))
    assert few == many > 0
    if routing != "displacement":  # whose norms are taken, see above
        few, many = (added(n, size, routing, check=True) for n in (4, 16))
        assert few == many > 0


#: Read off the weights, in the form that steps all of them at once.
READ_OFF = {
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, foreach=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-3, foreach=True),
}


@pytest.mark.usefixtures("like_an_accelerator")
@pytest.mark.parametrize("kind", READ_OFF)
def test_batched_the_same_where_steps_are_read_off_the_weights(kind):
    how = {"make": READ_OFF[kind]}
    few, many = (added(n, 32, "displacement", **how) for n in (4, 16))
    assert few == many > 0


O = torch.optim
#: Every way in which a step is found, and what changes its denominator.
MADE = {
    "adam": lambda p: O.Adam(p, lr=1e-2, betas=(0.9, 0.99)),
    "adamw, fused": lambda p: O.AdamW(p, lr=1e-2, fused=True),
    "adamw, tensor lr": lambda p: O.AdamW(p, lr=torch.tensor(1e-2)),
    "amsgrad": lambda p: O.Adam(p, lr=1e-2, amsgrad=True),
    "maximize": lambda p: O.Adam(p, lr=1e-2, maximize=True),
    "radam": lambda p: O.RAdam(p, lr=1e-2, betas=(0.9, 0.8)),
    "adamax": lambda p: O.Adamax(p, lr=1e-2),
    "sgd": lambda p: O.SGD(p, lr=1e-2, momentum=0.9),
    "muon": lambda p: Muon32(p, lr=1e-2),
    "lion": lambda p: Lion(p, lr=1e-2, weight_decay=0.1),
    "nadam": lambda p: O.NAdam(p, lr=1e-2),
    "asgd": lambda p: O.ASGD(p, lr=1e-2, lambd=0.1),
}


def trained(kind, routing, strength=0.7, **options):
    """Weights, gradients and state after two domains of eight steps in
    float64: layers of two shapes, with learned bases, one turned off for a
    while, so that their counters differ.
    """
    torch.manual_seed(0)
    make = lambda i, o: nn.Linear(i, o, bias=False, dtype=torch.float64)
    net = nn.Sequential(*[make(6, 6) for _ in range(10)], make(6, 4))
    net.extend(make(4, 4) for _ in range(8))
    half = [p for i, p in enumerate(net.parameters()) if i % 2]
    rest = [p for i, p in enumerate(net.parameters()) if not i % 2]
    optimizer = MADE[kind]([{"params": half}, {"params": rest}])
    method = dmr.Projection(rank=2, every=1, **options)
    strength = dmr.OverlapAware(0.8, beta=0.5) if strength is None else strength
    router = dmr.MomentRouter(
        net, optimizer, method, routing, strength, track_step=1
    )
    lengths = []
    for step in range(16):
        for i, p in enumerate(net.parameters()):
            g = torch.randn_like(p)
            p.grad = None if i == 2 and step < 3 else g
        with Counted() as counted:
            optimizer.step()
        lengths.append(router.last["step_norm"])
        if step == 7:
            router.consolidate()
    kept = [x for s in optimizer.state.values() for x in s.values()]
    ends = [*net.parameters(), *[p.grad for p in net.parameters()], *kept]
    return ends, lengths, counted.seen["bmm.default"]


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("routing", ["shared", "decoupled", "displacement"])
def test_batched_and_one_by_one_take_the_same_way(kind, routing, monkeypatch):
    without = kind in ("sgd", "muon", "lion", "nadam", "asgd")
    if routing == "decoupled" and without and kind != "muon":
        pytest.skip("no second moment of its own")
    batched(monkeypatch, 0)
    alone, norms, none = trained(kind, routing)
    batched(monkeypatch, 2**22)
    together, lengths, products = trained(kind, routing)
    assert products > none == 0
    assert lengths == pytest.approx(norms, rel=1e-12)
    # what Muon makes orthogonal magnifies a rounding of its gradients
    close = 1e-9 if (kind, routing) == ("muon", "shared") else 1e-12
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(a, b, rtol=close, atol=close)


@pytest.mark.parametrize("kind", ["adam", "amsgrad", "adamax"])
def test_counters_on_a_device_become_a_column(kind, monkeypatch):
    "Steps formed with a column of counters are those formed one by one."
    torch.manual_seed(0)
    weights = [torch.randn(3, 2, dtype=torch.float64) for _ in range(4)]
    optimizer = MADE[kind]([nn.Parameter(w) for w in weights])
    group = optimizer.param_groups[0]
    for i, p in enumerate(group["params"]):  # each has another age
        for _ in range(i + 1):
            optimizer.zero_grad()
            p.grad = torch.randn_like(p)
            optimizer.step()
    form = moments_of(optimizer).step
    states = [optimizer.state[p] for p in group["params"]]
    alone = [form(state, group) for state in states]
    monkeypatch.setattr("dmr.routing.moments._number", lambda x: x)
    stacked = {k: torch.stack([s[k] for s in states]) for k in states[0]}
    stacked["step"] = stacked["step"].double().view(-1, 1, 1)
    together = form(stacked, group)
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-12, atol=0)


@pytest.mark.parametrize("routing", ["shared", "displacement"])
def test_batched_with_importances_and_an_adaptive_strength(
    routing, monkeypatch
):
    ways = []
    for elements in (0, 2**22):
        batched(monkeypatch, elements)
        ways.append(trained("adam", routing, None, importance=5.0)[0])
    for a, b in zip(*ways, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_processor_batches_no_step():
    net = network(8, 4)
    optimizer = adamw(net.parameters())
    router = dmr.MomentRouter(net, optimizer)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    names = {p: n for n, p in net.named_parameters()}
    step = new_step(optimizer, router.kinds[0], names)
    step.names = [*names.values()]
    assert batches(step) == ([], step.names)


def test_a_stack_has_a_bound_on_its_memory(like_an_accelerator):
    same = {str(i): torch.zeros(8, 8) for i in range(11)}
    found, alone = stacks(same, lambda name, x: None, most=5 * 64)
    assert [len(names) for names in found] == [5, 5] and alone == ["10"]
    found, alone = stacks(same, lambda name, x: None, most=64)
    assert not found and len(alone) == 11


@pytest.mark.usefixtures("like_an_accelerator")
@pytest.mark.parametrize("routing", ["shared", "decoupled", "displacement"])
def test_a_router_bounds_its_stacks(routing):
    "By an argument: what stacking holds at once, and not where it goes."
    ends, products, peaks = [], [], []
    for limit in (0, 4 * 32 * 32, 2**25):
        net = network(16, 32, torch.float64)
        optimizer = O.AdamW(net.parameters(), fused=True)
        method = dmr.Projection(bases=bases_of(net, 2))
        how = {"stack_limit": limit, "check_finite": False}
        router = dmr.MomentRouter(net, optimizer, method, routing, 0.9, **how)
        assert router.contents()["settings"]["stack_limit"] == limit
        for _ in range(3):
            for p in net.parameters():
                p.grad = torch.randn_like(p)
            with Watch() as watch, Counted() as counted:
                optimizer.step()
        ends.append([p.detach() for p in net.parameters()])
        products.append(counted.seen["bmm.default"])
        peaks.append(watch.peak)
    assert products[0] == 0 < products[2] and products[1] == 4 * products[2]
    for other in ends[1:]:
        for a, b in zip(ends[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    weight = 32 * 32 * 8
    assert peaks[0] <= 2 * weight and peaks[1] <= 14 * weight < peaks[2]


@pytest.mark.parametrize("limit", [-1, 0.5, True, None])
def test_a_limit_that_is_none(limit):
    net = network(1, 4)
    optimizer = adamw(net.parameters())
    with pytest.raises(ValueError, match=f"stack_limit={limit!r} is not a num"):
        dmr.MomentRouter(net, optimizer, stack_limit=limit)
    assert not optimizer._optimizer_step_pre_hooks
