"""torch's own optimizer inputs and the invariants of torch's optimizer tests,
with a router attached.
"""

import copy
import io
import sys
import types
import unittest

import pytest
import torch
from torch import nn

# torch's test module imports it, to print
sys.modules.setdefault(
    "expecttest", types.SimpleNamespace(TestCase=unittest.TestCase)
)
optimizers = pytest.importorskip("torch.testing._internal.common_optimizers")

import dmr  # noqa: E402
from dmr.routing.moments import REFUSED, STEPPED, SUPPORTED  # noqa: E402
from dmr.training.config import Muon32  # noqa: E402

torch.set_num_threads(1)
ROUTINGS = ["shared", "decoupled", "denominator", "displacement"]
ALPHA = 0.6
INFOS = {info.optim_cls: info for info in optimizers.optim_db}
INFOS[Muon32] = INFOS[torch.optim.Muon]
#: torch's own, and Muon in double precision.
TAKEN = {cls: None for cls in (*SUPPORTED, *STEPPED) if cls in INFOS}
MUONS = (torch.optim.Muon, Muon32)  # they take no biases


def means_something(cls, kwargs, routing):
    "Would the router take this optimizer with these settings?"
    alone = cls not in STEPPED or routing in ("shared", "displacement")
    return alone or (cls in MUONS and routing == "decoupled")


def inputs():
    "Every setting of torch's own tests, in every form that torch has."
    for cls in TAKEN:
        info = INFOS[cls]
        given = [
            (i.kwargs, i.desc) for i in info.optim_inputs_func(device="cpu")
        ]
        if cls in (torch.optim.Adam, torch.optim.AdamW):
            rate = torch.tensor(1e-3, dtype=torch.float64)
            given += [
                ({"lr": rate}, "tensor lr"),
                ({"betas": (0.0, 0.9)}, "no first moment"),
                ({"eps": 0.1}, "large eps"),
            ]
        forms = ["for-loop"] + [
            form
            for form in ("foreach", "fused")
            if form in info.supported_impls
        ]
        for kwargs, desc in given:
            for form in forms:
                if form == "foreach" and isinstance(
                    kwargs.get("lr"), torch.Tensor
                ):
                    continue  # torch refuses it outside capture
                one = form == "fused" or cls in MUONS  # that have one form
                options = {} if one else {"foreach": form == "foreach"}
                yield (
                    cls,
                    kwargs
                    | options
                    | ({"fused": True} if form == "fused" else {}),
                    f"{cls.__name__}-{desc}-{form}",
                )


CASES = [pytest.param(cls, kwargs, id=name) for cls, kwargs, name in inputs()]
ROUTED = [
    pytest.param(*case.values, routing, id=f"{case.id}-{routing}")
    for case in CASES
    for routing in ROUTINGS
    if means_something(*case.values, routing)
]
PLAIN_FORM = [case for case in ROUTED if case.id.split("-")[-2] == "loop"]


def of_form(case):
    "Is its step a function of moments that dmr knows?"
    cls, kwargs, _ = case.values
    momentum = kwargs.get("momentum", 0) > 0 and not kwargs.get("nesterov")
    return cls in SUPPORTED and (cls is not torch.optim.SGD or momentum)


KNOWN = [case for case in ROUTED if of_form(case)]
READ = [case for case in ROUTED if not of_form(case)]


def model(cls=None, seed=0):
    torch.manual_seed(seed)
    bias = cls not in MUONS
    layers = nn.Linear(5, 7, bias), nn.Tanh(), nn.Linear(7, 3, bias)
    return nn.Sequential(*layers).double()


def bases():
    generator = torch.Generator().manual_seed(1)
    draw = lambda n, r: (
        torch.linalg.qr(
            torch.randn(n, r, generator=generator, dtype=torch.float64)
        ).Q
    )
    return {"0.weight": draw(5, 2), "2.weight": draw(7, 3)}


def set_gradients(net, step):
    generator = torch.Generator().manual_seed(step)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype) + 0.1


def routed(cls, kwargs, routing, strength=ALPHA, net=None, **options):
    net = net or model(cls)
    kwargs = {
        key: x.clone() if isinstance(x, torch.Tensor) else x
        for key, x in kwargs.items()
    }
    optimizer = cls(net.parameters(), **kwargs)
    return (
        net,
        optimizer,
        dmr.MomentRouter(
            net,
            optimizer,
            dmr.Projection(bases=bases()),
            routing,
            strength,
            **options,
        ),
    )


def edited(net):
    "The gradients as a method would hand them to Adam."
    out = {}
    for name, p in net.named_parameters():
        U = bases().get(name)
        out[name] = p.grad if U is None else p.grad - ALPHA * p.grad @ U @ U.T
    return out


def stepped(net, optimizer, cls, kwargs, gradients):
    """torch's own step from the same parameters and state on these gradients:
    the parameters and the state after it.
    """
    twin = copy.deepcopy(net)
    kwargs = {
        key: x.clone() if isinstance(x, torch.Tensor) else x
        for key, x in kwargs.items()
    }
    plain = cls(twin.parameters(), **kwargs)
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for name, p in twin.named_parameters():
        p.grad = gradients[name].clone()
    plain.step()
    return {name: p.detach() for name, p in twin.named_parameters()}, {
        name: plain.state[p] for name, p in twin.named_parameters()
    }


@pytest.mark.parametrize("cls,kwargs,routing", KNOWN)
def test_each_moment_sees_what_its_routing_names(cls, kwargs, routing):
    """In every step: m and v are those of torch's own step on g or g̃, and
    where both see the same, so are the parameters.
    """
    net, optimizer, router = routed(cls, kwargs, routing)
    moments = SUPPORTED[cls]
    for step in range(7):  # past RAdam's warm-up
        set_gradients(net, step)
        raw = {name: p.grad.clone() for name, p in net.named_parameters()}
        on = {
            "raw": stepped(net, optimizer, cls, kwargs, raw),
            "edited": stepped(net, optimizer, cls, kwargs, edited(net)),
        }
        before = {
            name: p.detach().clone() for name, p in net.named_parameters()
        }
        optimizer.step()
        m_saw = "edited" if routing in ("shared", "decoupled") else "raw"
        v_saw = "edited" if routing in ("shared", "denominator") else "raw"
        for name, p in net.named_parameters():
            state = optimizer.state[p]
            # logging sees the raw gradient
            torch.testing.assert_close(
                p.grad, raw[name], rtol=1e-12, atol=1e-13
            )
            torch.testing.assert_close(
                state[moments.first],
                on[m_saw][1][name][moments.first],
                rtol=1e-10,
                atol=1e-12,
            )
            if moments.second:
                torch.testing.assert_close(
                    state[moments.second],
                    on[v_saw][1][name][moments.second],
                    rtol=1e-10,
                    atol=1e-14,
                )
            if routing == "shared" or name not in bases():
                torch.testing.assert_close(
                    p.detach(), on["edited"][0][name], rtol=1e-10, atol=1e-12
                )
            elif routing == "displacement":
                U, plain = bases()[name], on["raw"][0][name]
                lr = float(optimizer.param_groups[0]["lr"])
                u = moments.step(state, optimizer.param_groups[0])
                torch.testing.assert_close(
                    p.detach(),
                    plain + lr * ALPHA * u @ U @ U.T,
                    rtol=1e-10,
                    atol=1e-12,
                )
            # m from one, v from the other: the difference to torch's step with
            # the same v is a ⊙ (difference in m)
            else:
                same_v = on[v_saw]
                a = moments.gain(same_v[1][name], optimizer.param_groups[0])
                dm = state[moments.first] - same_v[1][name][moments.first]
                expected = (
                    same_v[0][name]
                    - float(optimizer.param_groups[0]["lr"]) * a * dm
                )
                torch.testing.assert_close(
                    p.detach(), expected, rtol=1e-9, atol=1e-12
                )
            assert not torch.equal(p, before[name])


def shrinks(optimizer, p):
    "The share that decay takes of a weight in the next step."
    group, state = optimizer.param_groups[0], optimizer.state[p]
    if isinstance(optimizer, torch.optim.ASGD):
        eta = float(state["eta"]) if state else group["lr"]
        return eta * group["lambd"]
    apart = group.get("decoupled_weight_decay") or isinstance(
        optimizer, (torch.optim.Muon, torch.optim.Adafactor)
    )
    return float(group["lr"]) * group["weight_decay"] if apart else 0.0


@pytest.mark.parametrize("cls,kwargs,routing", READ)
def test_the_step_of_every_other_optimizer_is_edited(cls, kwargs, routing):
    """In every step the state is that of torch's own step, on g or g̃; under
    displacement P is taken from what torch's step did beside decay.
    """
    net, optimizer, router = routed(cls, kwargs, routing)
    # torch loads the float32 numbers of these two as float64; a rate in
    # float32 makes Muon's decay one, too
    numbers = cls in (torch.optim.NAdam, torch.optim.ASGD)
    numbers |= cls in MUONS and isinstance(kwargs.get("lr"), torch.Tensor)
    close = dict(
        rtol=1e-6 if numbers else 1e-11, atol=1e-8 if numbers else 1e-13
    )
    if cls is torch.optim.Muon and routing == "shared":
        # its bfloat16 magnifies an edit's rounding, up to a step's hundredth
        close = dict(rtol=0, atol=0.02 * float(kwargs.get("lr", 1e-3)))
    routing = router.routing  # for Muon decoupled is displacement
    for step in range(5):
        set_gradients(net, step)
        raw = {name: p.grad.clone() for name, p in net.named_parameters()}
        sees = edited(net) if routing == "shared" else raw
        after, state = stepped(net, optimizer, cls, kwargs, sees)
        named = dict(net.named_parameters())
        before = {name: p.detach().clone() for name, p in named.items()}
        shares = {name: shrinks(optimizer, p) for name, p in named.items()}
        mus = {
            n: float(optimizer.state[p].get("mu", 1)) for n, p in named.items()
        }
        optimizer.step()
        for name, p in named.items():
            torch.testing.assert_close(
                p.grad, raw[name], rtol=1e-12, atol=1e-13
            )
            expected, U = after[name], bases().get(name)
            taken = torch.zeros_like(p)
            if routing == "displacement" and U is not None:
                moved = expected - (1 - shares[name]) * before[name]
                taken = ALPHA * moved @ U @ U.T
            torch.testing.assert_close(p.detach(), expected - taken, **close)
            for key, x in state[name].items():
                x = x - mus[name] * taken if key == "ax" else x
                torch.testing.assert_close(
                    optimizer.state[p][key], x, check_dtype=False, **close
                )


@pytest.mark.parametrize("cls,kwargs", CASES)
def test_settings_without_a_meaning_are_refused_and_leave_the_optimizer_alone(
    cls, kwargs
):
    for routing in ROUTINGS:
        if not means_something(cls, kwargs, routing):
            net = model(cls)
            optimizer = cls(net.parameters(), **kwargs)
            fresh = str(optimizer.state)
            with pytest.raises(
                ValueError, match="choose 'displacement', or|no second moment"
            ):
                dmr.MomentRouter(
                    net, optimizer, dmr.Projection(bases=bases()), routing
                )
            assert (
                not optimizer._optimizer_step_pre_hooks
                and str(optimizer.state) == fresh
            )


@pytest.mark.parametrize(
    "cls",
    [
        info.optim_cls
        for info in optimizers.optim_db
        if info.optim_cls not in SUPPORTED and info.optim_cls not in STEPPED
    ],
)
def test_every_other_optimizer_of_torch_is_refused_with_its_reason(cls):
    net = nn.Linear(3, 3, bias=False)
    optimizer = cls(net.parameters())
    with pytest.raises(
        TypeError,
        match=f"{cls.__name__} cannot be routed: .*; use torch.optim.AdamW",
    ):
        dmr.MomentRouter(net, optimizer)
    assert cls.__name__ in REFUSED


@pytest.mark.parametrize("cls", TAKEN)
def test_error_inputs_raise_what_torch_raises(cls):
    for given in INFOS[cls].optim_error_inputs_func(
        device="cpu", dtype=torch.float64
    ):
        if (
            given.error_on is optimizers.OptimizerErrorEnum.CONSTRUCTION_ERROR
            and given.error_type is not UserWarning
        ):
            with pytest.raises(given.error_type, match=given.error_regex):
                cls(
                    given.optimizer_error_input.params,
                    **given.optimizer_error_input.kwargs,
                )
    net = model(cls)
    if "differentiable" in cls(net.parameters()).defaults:
        with pytest.raises(ValueError, match="cannot be routed"):
            dmr.MomentRouter(net, cls(net.parameters(), differentiable=True))


@pytest.mark.parametrize("cls,kwargs,routing", PLAIN_FORM)
def test_state_dict_round_trip_is_deterministic(cls, kwargs, routing):
    net, optimizer, router = routed(
        cls, kwargs, routing, dmr.OverlapAware(0.8, beta=0.5)
    )
    for step in range(3):
        set_gradients(net, step)
        optimizer.step()
    file = io.BytesIO()
    torch.save(
        [net.state_dict(), optimizer.state_dict(), router.state_dict()], file
    )
    other = routed(
        cls, kwargs, routing, dmr.OverlapAware(0.8, beta=0.5), net=model(cls, 9)
    )
    for part, state in zip(
        other, torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    ):
        part.load_state_dict(state)
    for step in range(3, 6):
        for each, opt in ((net, optimizer), other[:2]):
            set_gradients(each, step)
            opt.step()
    # torch's NAdam loads its float32 product as float64
    tolerance = 1e-6 if cls is torch.optim.NAdam else 0.0
    for p, q in zip(net.parameters(), other[0].parameters()):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
    assert router.last == other[2].last
    ours, theirs = (r.state_dict() for r in (router, other[2]))
    sums = theirs.pop("weights")
    for name, two in ours.pop("weights").items():
        assert two == pytest.approx(sums[name], rel=tolerance, abs=tolerance)
    assert str(ours) == str(theirs)


def undecayed(cls):
    "Options under which nothing but the gradient moves a weight."
    if cls is torch.optim.Rprop:
        return {}
    lambd = {"lambd": 0.0} if cls is torch.optim.ASGD else {}
    return {"weight_decay": 0.0} | lambd


@pytest.mark.parametrize("cls,kwargs,routing", ROUTED)
def test_a_step_without_or_with_zero_gradients_is_none(cls, kwargs, routing):
    # decay moves parameters, and should
    net, optimizer, _ = routed(cls, kwargs | undecayed(cls), routing)
    before = [p.detach().clone() for p in net.parameters()]
    for zero in (False, True):
        for p in net.parameters():
            p.grad = torch.zeros_like(p) if zero else None
        optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(before, net.parameters()))


@pytest.mark.parametrize("cls,kwargs,routing", PLAIN_FORM)
def test_parameter_groups_keep_their_own_rates(cls, kwargs, routing):
    net = model(cls)
    if cls is torch.optim.Rprop:
        pytest.skip("its steps have sizes of their own")
    kwargs = kwargs | undecayed(cls)
    optimizer = cls(
        [
            {"params": net[0].parameters(), "lr": 0.0},
            {"params": net[2].parameters()},
        ],
        **kwargs,
    )
    dmr.MomentRouter(
        net, optimizer, dmr.Projection(bases=bases()), routing, ALPHA
    )
    still, moving = (
        net[0].weight.detach().clone(),
        net[2].weight.detach().clone(),
    )
    for step in range(3):
        set_gradients(net, step)
        optimizer.step()
    torch.testing.assert_close(
        net[0].weight.detach(), still, rtol=1e-14, atol=0
    )
    assert not torch.equal(net[2].weight, moving)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_schedulers_run_as_they_do_without_a_router(routing):
    rates = {}
    makers = [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.3),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
        # cycles betas, too
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
        lambda o: torch.optim.lr_scheduler.ChainedScheduler(
            [
                torch.optim.lr_scheduler.LinearLR(o),
                torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
            ]
        ),
    ]
    for which, make in enumerate(makers):
        for attached in (False, True):
            net = model()
            optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
            if attached:
                dmr.MomentRouter(
                    net,
                    optimizer,
                    dmr.Projection(bases=bases()),
                    routing,
                    ALPHA,
                )
            schedule, seen = make(optimizer), []
            for step in range(6):
                set_gradients(net, step)
                optimizer.step()
                schedule.step(
                    *(
                        [1.0]
                        if isinstance(
                            schedule, torch.optim.lr_scheduler.ReduceLROnPlateau
                        )
                        else []
                    )
                )
                seen.append(
                    (
                        optimizer.param_groups[0]["lr"],
                        optimizer.param_groups[0]["betas"],
                    )
                )
            rates[which, attached] = seen
        assert rates[which, True] == rates[which, False]


@pytest.mark.parametrize("cls,kwargs,routing", PLAIN_FORM)
def test_a_deep_copy_goes_the_same_way_and_apart(cls, kwargs, routing):
    net, optimizer, router = routed(cls, kwargs, routing)
    set_gradients(net, 0)
    optimizer.step()
    twin = copy.deepcopy(router)
    assert twin.model is not net and twin.optimizer is not optimizer
    set_gradients(net, 1)
    set_gradients(twin.model, 1)
    optimizer.step()
    kept = [p.detach().clone() for p in net.parameters()]
    twin.optimizer.step()
    assert all(
        torch.equal(p, q)
        for p, q in zip(net.parameters(), twin.model.parameters())
    )
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), kept))
    assert router.steps == twin.steps == 2


@pytest.mark.parametrize("cls", TAKEN)
def test_printing(cls):
    kwargs = {"momentum": 0.9} if cls is torch.optim.SGD else {}
    net = model(cls)
    optimizer = cls(net.parameters(), **kwargs)
    plain = repr(optimizer)
    router = dmr.MomentRouter(
        net, optimizer, dmr.Projection(bases=bases()), "shared", ALPHA
    )
    assert repr(optimizer) == plain
    assert (
        cls.__name__ in repr(router)
        and "shared" in repr(router)
        and "0.6" in repr(router)
    )
    lines = router.summary().splitlines()
    assert (
        any("0.weight" in line and "protected    2" in line for line in lines)
        and "KiB" in lines[1]
    )


@pytest.mark.parametrize("form", ["for-loop", "foreach", "fused"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_torchs_forms_agree_with_each_other(routing, form):
    results = []
    for options in (
        {"foreach": False},
        {"foreach": form == "foreach"} if form != "fused" else {"fused": True},
    ):
        net, optimizer, _ = routed(
            torch.optim.AdamW, options | {"lr": 1e-2}, routing
        )
        for step in range(20):
            set_gradients(net, step)
            optimizer.step()
        results.append([p.detach() for p in net.parameters()])
    for p, q in zip(*results):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
