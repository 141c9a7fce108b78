"""What a user can do wrong, by name and with the way out."""

import copy

import pytest
import torch
from conftest import basis, gradients, layer, regression, run, train
from plain_adam import LR
from torch import nn

import dmr
from dmr.routing.router import MomentRouter

torch.set_num_threads(1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_gradient_is_named_and_nothing_changes(value):
    model, loss = regression()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    router = MomentRouter(
        model,
        optimizer,
        dmr.Projection(rank=2, every=1),
        strength=dmr.OverlapAware(0.5),
    )
    train(model, loss, optimizer, 3)
    router.consolidate()
    train(model, loss, optimizer, 3)
    before = copy.deepcopy(
        (model.state_dict(), optimizer.state_dict(), router.state_dict())
    )
    model[2].bias.grad[1] = value
    with pytest.raises(
        ValueError,
        match=(
            "gradient of '2.bias' has NaN or infinite values; nothing was"
            " changed"
        ),
    ):
        optimizer.step()
    assert str(before) == str(
        (model.state_dict(), optimizer.state_dict(), router.state_dict())
    )
    router.check_finite = False
    optimizer.step()  # the opt-out
    assert not all(bool(p.isfinite().all()) for p in model.parameters())


def test_large_but_finite_gradients_pass():
    model, _ = regression()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    MomentRouter(model, optimizer, dmr.Projection(rank=2))
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e25)  # squares overflow float32
    optimizer.step()


def test_errors_name_the_value_and_the_way_out():
    model, _ = regression()
    adam = lambda: torch.optim.Adam(model.parameters())
    cases = [
        (
            ValueError,
            "routing='sideways' is unknown; choose one of shared, decoupled",
            lambda: MomentRouter(model, adam(), None, "sideways"),
        ),
        (
            ValueError,
            "guard='foam' is unknown",
            lambda: MomentRouter(model, adam(), None, guard="foam"),
        ),
        (
            ValueError,
            "alpha=2 lies outside",
            lambda: MomentRouter(
                model, adam(), dmr.Projection(rank=1), strength=2
            ),
        ),
        (
            TypeError,
            "no Modification; pass for example",
            lambda: MomentRouter(model, adam(), "gpm"),
        ),
        (
            ValueError,
            "rank=64 exceeds fan_in=6 of '0.weight'; pass rank<=6",
            lambda: MomentRouter(
                model, adam(), dmr.Projection(rank=64), include=["0.weight"]
            ),
        ),
        (
            ValueError,
            "rank=4 and energy=0.5: pass one of the two",
            lambda: dmr.Projection(rank=4, energy=0.5),
        ),
        (
            ValueError,
            "energy=0 protects nothing",
            lambda: dmr.Projection(energy=0.0),
        ),
        (
            ValueError,
            "energy=1.2 lies outside",
            lambda: dmr.Projection(energy=1.2),
        ),
        (
            ValueError,
            "rank=0 is not a positive whole number",
            lambda: dmr.Projection(rank=0),
        ),
        (
            ValueError,
            "not orthonormal",
            lambda: MomentRouter(
                model,
                adam(),
                dmr.Projection(bases={"0.weight": torch.ones(6, 2)}),
            ),
        ),
        (
            ValueError,
            r"has shape \(5, 2\); it must be \(fan_in, r\) = \(6, r\)",
            lambda: MomentRouter(
                model,
                adam(),
                dmr.Projection(bases={"0.weight": torch.eye(5)[:, :2]}),
            ),
        ),
        (
            ValueError,
            "bases name '0.bias'",
            lambda: MomentRouter(
                model,
                adam(),
                dmr.Projection(bases={"0.bias": torch.eye(9)[:, :2]}),
            ),
        ),
        (
            ValueError,
            "track_step=-1",
            lambda: MomentRouter(model, adam(), track_step=-1),
        ),
        (
            ValueError,
            "track_inflation=True",
            lambda: MomentRouter(model, adam()).inflation(),
        ),
    ]
    for kind, match, make in cases:
        with pytest.raises(kind, match=match):
            make()
    optimizer = adam()
    MomentRouter(model, optimizer)
    with pytest.raises(ValueError, match="routed already; call close"):
        MomentRouter(model, optimizer)
    with pytest.raises(
        ValueError, match=r"consolidate\(\) came before any optimizer step"
    ):
        MomentRouter(model, adam(), dmr.Projection(rank=1)).consolidate()


def test_sgd_refuses_the_names_that_mean_nothing():
    model = layer()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    for routing in ("decoupled", "denominator"):
        with pytest.raises(
            ValueError,
            match="no second moment.*choose 'shared' or 'displacement'",
        ):
            MomentRouter(
                model,
                optimizer,
                dmr.Projection(bases={"weight": basis()}),
                routing,
            )
    # and the optimizer is still plain
    run(model, optimizer, gradients(model.weight.shape, 2))


def stand_in(name, module, base=torch.optim.Optimizer):
    "An optimizer of that name from a package that need not be installed."
    cls = type(name, (base,), {"step": lambda self, closure=None: None})
    cls.__module__ = module
    return cls


@pytest.mark.parametrize(
    "cls,why",
    [
        (
            stand_in("DeepSpeedCPUAdam", "deepspeed.ops.adam.cpu_adam"),
            "its parameters or their state are spread over processes",
        ),
        (stand_in("LBFGS", "somewhere"), "it evaluates the loss many times"),
        (stand_in("SparseAdam", "somewhere"), "its gradients are sparse"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_what_no_routing_can_serve_is_refused_with_a_reason(cls, why):
    model = layer()
    optimizer = cls(model.parameters(), {})
    with pytest.raises(
        TypeError,
        match=rf"{cls.__name__} cannot be routed: {why}.*; use torch.optim",
    ):
        MomentRouter(model, optimizer, dmr.Projection(rank=2), "shared")
    assert not optimizer._optimizer_step_pre_hooks and not optimizer.state


@pytest.mark.parametrize(
    "cls",
    [
        stand_in("AdamWScheduleFree", "schedulefree.adamw_schedulefree"),
        stand_in("Lookahead", "pytorch_optimizer"),
        stand_in("FP16_Optimizer", "apex"),
    ],
    ids=lambda x: x.__name__,
)
def test_a_second_copy_of_the_weights_refuses_displacement_alone(cls):
    model = layer()
    optimizer = cls(model.parameters(), {})
    with pytest.raises(
        TypeError, match="second copy of the weights.*choose routing='shared'"
    ):
        MomentRouter(model, optimizer, dmr.Projection(rank=2), "displacement")
    assert not optimizer._optimizer_step_pre_hooks and not optimizer.state
    MomentRouter(model, optimizer, dmr.Projection(rank=2), "shared").close()


def test_a_merge_looks_at_every_optimizer():
    "The second one may hold the copy that would undo it."
    model = torch.nn.ModuleDict({"a": layer(), "b": layer()})
    free = stand_in("AdamWScheduleFree", "schedulefree.adamw_schedulefree")
    both = [
        torch.optim.AdamW(model["a"].parameters()),
        free(model["b"].parameters(), {}),
    ]
    said = "^AdamWScheduleFree holds a second"
    merge = dmr.Interpolate(0.5)
    for optimizers in (both, both[::-1]):
        with pytest.raises(TypeError, match=said):
            MomentRouter(model, optimizers, consolidation=merge)
    router = MomentRouter(model, both)
    with pytest.raises(TypeError, match=said):
        router.consolidate(interpolate=0.5)


@pytest.mark.parametrize(
    "name,module,why",
    [
        ("Lion", "lion_pytorch.lion_pytorch", "its step is a sign"),
        ("SOAP", "soap", "dmr does not know"),
        ("AdamW8bit", "bitsandbytes.optim.adamw", "kept in 8 bits"),
        ("AdamW4bit", "torchao.optim.adam", "dmr does not know"),
    ],
)
def test_two_moments_are_refused_where_they_are_not_known(name, module, why):
    model, method = layer(), dmr.Projection(rank=2)
    optimizer = stand_in(name, module)(model.parameters(), {})
    for routing in ("decoupled", "denominator"):
        with pytest.raises(
            ValueError,
            match=f"{name} does not allow: .*{why}.*'displacement'",
        ):
            MomentRouter(model, optimizer, method, routing)
    assert not optimizer._optimizer_step_pre_hooks and not optimizer.state
    MomentRouter(model, optimizer, method, "displacement").close()


def test_deepspeed_is_refused_though_its_optimizer_is_none_of_torchs():
    class DeepSpeedZeroOptimizer_Stage3:
        pass

    DeepSpeedZeroOptimizer_Stage3.__module__ = "deepspeed.runtime.zero.stage3"
    with pytest.raises(
        TypeError,
        match=(
            "Stage3 cannot be routed: its parameters or their state are spread"
            " over processes, .* use torch.optim.AdamW"
        ),
    ):
        MomentRouter(layer(), DeepSpeedZeroOptimizer_Stage3())

    class DeepSpeedEngine(nn.Sequential):
        pass

    engine = DeepSpeedEngine(layer())
    with pytest.raises(
        TypeError,
        match=(
            r"flat shards of its own, which cannot be routed; use fully_shard"
            r" \(FSDP2\) and a torch optimizer"
        ),
    ):
        MomentRouter(engine, torch.optim.AdamW(engine.parameters()))


@pytest.fixture
def one_process():
    "A process group of this process alone."
    dist = torch.distributed
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    dist.init_process_group(
        "gloo", store=dist.HashStore(), rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")  # torch's own, about FSDP1
def test_torchs_own_sharded_optimizer_and_fsdp1_are_refused(one_process):
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = layer()
    with pytest.raises(
        TypeError,
        match=(
            "cannot be routed: its parameters or their state are spread over"
            " processes, .* use torch.optim.AdamW"
        ),
    ):
        MomentRouter(
            model,
            ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW),
            dmr.Projection(rank=2),
        )
    flat = FullyShardedDataParallel(
        nn.Sequential(layer()), device_id=torch.device("cpu")
    )
    with pytest.raises(
        TypeError,
        match=(
            r"flat parameters, in which no weight has an input side; use"
            r" fully_shard \(FSDP2\)"
        ),
    ):
        MomentRouter(
            flat, torch.optim.AdamW(flat.parameters()), dmr.Projection(rank=2)
        )


def test_sparse_and_complex_gradients_are_refused_by_name():
    model = nn.ModuleDict(
        {
            "table": nn.Embedding(5, 4, sparse=True),
            "head": nn.Linear(4, 3, bias=False),
        }
    )
    optimizer = torch.optim.AdamW(model.parameters())
    MomentRouter(
        model,
        optimizer,
        dmr.Projection(bases={"head.weight": torch.eye(4)[:, :2]}),
    )
    model["head"](model["table"](torch.tensor([1, 2]))).sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(
        TypeError,
        match=(
            "'table.weight' has a sparse gradient, which cannot be routed; use"
            " sparse=False"
        ),
    ):
        optimizer.step()
    assert (
        all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
        and not optimizer.state
    )

    model = nn.ModuleDict(
        {
            "head": nn.Linear(4, 3, bias=False),
            "phase": nn.Linear(4, 3, bias=False, dtype=torch.complex64),
        }
    )
    optimizer = torch.optim.AdamW(model.parameters())
    MomentRouter(
        model,
        optimizer,
        dmr.Projection(bases={"head.weight": torch.eye(4)[:, :2]}),
    )
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(
        TypeError,
        match=(
            "'phase.weight' is complex, and complex gradients cannot be routed;"
            " use real parameters"
        ),
    ):
        optimizer.step()
    assert (
        all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
        and not optimizer.state
    )


@pytest.mark.parametrize(
    "setting,said",
    [
        ({"differentiable": True}, "differentiable=False"),
        ({"nesterov": True}, "use nesterov=False"),
        ({"momentum": 0.0}, "momentum=0.9"),
    ],
)
def test_settings_that_turn_meaningless_later_stop_the_next_step(setting, said):
    model = layer()
    options = {} if "differentiable" in setting else {"momentum": 0.9}
    cls = torch.optim.AdamW if "differentiable" in setting else torch.optim.SGD
    optimizer = cls(model.parameters(), lr=LR, **options)
    MomentRouter(
        model,
        optimizer,
        dmr.Projection(bases={"weight": basis()}),
        "shared",
        0.7,
    )
    run(model, optimizer, gradients(model.weight.shape, 2))
    before, state = (
        model.weight.detach().clone(),
        copy.deepcopy(optimizer.state_dict()["state"]),
    )
    optimizer.param_groups[0].update(setting)
    with pytest.raises(ValueError, match=said):
        run(model, optimizer, gradients(model.weight.shape, 1))
    assert torch.equal(before, model.weight) and str(state) == str(
        optimizer.state_dict()["state"]
    )


@pytest.mark.parametrize("routing", ["shared", "decoupled", "denominator"])
def test_a_non_finite_replay_gradient_is_named_and_nothing_changes(routing):
    model = layer(dtype=torch.float32)
    optimizer = torch.optim.Adam(model.parameters())
    factor = 1.0
    replay = dmr.ReplayMix(
        dmr.ReplayBuffer(capacity=4),
        lambda x: model(x).mean() * factor,
        fraction=None,
    )
    router = MomentRouter(model, optimizer, replay, routing, 0.5)
    x = torch.randn(4, 12)
    router.observe(x)
    model.weight.grad = torch.randn_like(model.weight)
    optimizer.step()
    router.consolidate()
    router.observe(x)
    before = copy.deepcopy(
        (model.weight, model.weight.grad, optimizer.state_dict())
    )
    factor = float("nan")
    with pytest.raises(
        ValueError,
        match="replayed gradient of 'weight' has NaN or infinite values",
    ):
        optimizer.step()
    assert str(before) == str(
        (model.weight, model.weight.grad, optimizer.state_dict())
    )
    factor = 1.0
    optimizer.step()
    assert bool(model.weight.isfinite().all())
