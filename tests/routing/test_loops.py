"""Whatever the training loop does around a step:
closures, scalers, autocast, graphs, schedules, errors.
"""

import copy

import pytest
import torch
from conftest import basis, gradients, layer, regression, run, train
from plain_adam import LR, Reference
from torch import nn

import dmr
from dmr.routing.router import MomentRouter

torch.set_num_threads(1)
ROUTINGS = ["shared", "decoupled", "denominator", "displacement"]


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("keyword", [False, True])
def test_a_closure_is_routed_after_it_ran(routing, keyword):
    results = []
    for closed in (False, True):
        model, loss = regression()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        MomentRouter(
            model,
            optimizer,
            dmr.Projection(
                bases={"0.weight": basis(6, 2, dtype=torch.float32)}
            ),
            routing,
            0.7,
        )
        if not closed:
            results.append(train(model, loss, optimizer))
            continue
        calls = []

        def closure(model=model, loss=loss, optimizer=optimizer, calls=calls):
            optimizer.zero_grad()
            value = loss()
            value.backward()
            calls.append(1)
            return value

        for _ in range(10):
            value = (
                optimizer.step(closure=closure)
                if keyword
                else optimizer.step(closure)
            )
            assert value.requires_grad
        assert len(calls) == 10
        results.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_changes_nothing_and_skips_infinities(routing, fused):
    results = []
    for scaled in (False, True):
        model, loss = regression(dtype=torch.float64)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, fused=fused)
        strength = dmr.OverlapAware(0.9, beta=0.5)
        router = MomentRouter(
            model,
            optimizer,
            dmr.Projection(bases={"0.weight": basis(6, 2)}),
            routing,
            strength,
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for step in range(10):
            optimizer.zero_grad()
            scaler.scale(loss()).backward()
            # an overflow: this step must leave no trace
            if scaled and step == 5:
                kept = [p.detach().clone() for p in model.parameters()]
                moments = copy.deepcopy(optimizer.state_dict()["state"])
                average = strength.average.clone()
                true = model[0].weight.grad.clone()
                model[0].weight.grad[0, 0] = float("inf")
                scaler.step(optimizer)
                scaler.update(1024.0)
                assert all(
                    torch.equal(a, b) for a, b in zip(kept, model.parameters())
                )
                after = optimizer.state_dict()["state"]
                assert all(
                    torch.equal(moments[i][k], after[i][k])
                    for i in moments
                    for k in moments[i]
                )
                assert (
                    torch.equal(average, strength.average) and router.steps == 5
                )
                model[0].weight.grad = true
                for p in model.parameters():
                    assert p.grad is not None
                optimizer.zero_grad()
                scaler.scale(loss()).backward()
            scaler.step(optimizer)
            scaler.update(1024.0 if scaled else None)
        results.append([p.detach() for p in model.parameters()])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_accumulated_and_clipped_gradients_are_routed(
    routing,
):
    """Four backward passes and a clip before each step: one routed step on the
    clipped mean.
    """
    model, U = layer(), basis()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.03
    )
    reference = Reference(
        model.weight.detach(), U @ U.T, routing, 0.7, "adamw", (0.9, 0.95), 0.03
    )
    router = MomentRouter(
        model,
        optimizer,
        dmr.Projection(bases={"weight": U}),
        routing,
        0.7,
        track_step=1,
    )
    clipped = 0
    for step in range(12):
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        for _ in range(4):
            x, y = (
                torch.randn(8, n, generator=generator, dtype=torch.float64)
                for n in (12, 7)
            )
            ((model(x) - y).square().sum() / 32).backward()
        whole = model.weight.grad.clone()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        clipped += bool(norm > 5.0)
        reference.step(whole * min(1.0, 5.0 / (float(norm) + 1e-6)))
        optimizer.step()
    assert 0 < clipped < 12 and router.steps == 12
    torch.testing.assert_close(
        model.weight.detach(), reference.W, rtol=1e-9, atol=1e-11
    )


def test_under_a_recorded_graph_nothing_is_read_and_no_gradient_checked(
    monkeypatch,
):
    """A CUDA graph can read no number on the host: the finite check is off
    while one is recorded.
    """
    model, U = layer(), basis()
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    MomentRouter(
        model, optimizer, dmr.Projection(bases={"weight": U}), "decoupled", 0.7
    )
    model.weight.grad = torch.full_like(model.weight, float("nan"))
    with pytest.raises(ValueError, match="NaN or infinite"):
        optimizer.step()
    monkeypatch.setattr("dmr.routing.router.capturing", lambda: True)
    optimizer.step()
    assert bool(model.weight.isnan().all())


def test_schedulers_see_the_optimizer_they_know():
    model, U = layer(), basis()
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 10, gamma=0.5)
    reference = Reference(
        model.weight.detach(), U @ U.T, "displacement", 0.7, "adam", (0.9, 0.95)
    )
    MomentRouter(
        model,
        optimizer,
        dmr.Projection(bases={"weight": U}),
        "displacement",
        0.7,
    )
    for i, g in enumerate(gradients(model.weight.shape)):
        reference.lr = LR * 0.5 ** (i // 10)
        reference.step(g)
        run(model, optimizer, [g])
        schedule.step()
    torch.testing.assert_close(
        model.weight.detach(), reference.W, rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("strength", ["fixed", "overlap"])
@pytest.mark.parametrize("capturable", [False, True])
def test_a_compiled_step_is_routed(routing, strength, capturable):
    """The hooks run between the graphs. torch's own compiled step computes bias
    corrections in float32: betas that forgive it.
    """
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model, loss = regression(dtype=torch.float64)
        rate = torch.tensor(1e-2, dtype=torch.float64)
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=rate,
            betas=(0.5, 0.5),
            capturable=capturable and compiled,
        )
        how = 0.7 if strength == "fixed" else dmr.OverlapAware(0.7)
        router = MomentRouter(
            model,
            optimizer,
            dmr.Projection(bases={"0.weight": basis(6, 2)}),
            routing,
            how,
        )
        step = (
            torch.compile(
                lambda optimizer=optimizer: optimizer.step(), backend="eager"
            )
            if compiled
            else optimizer.step
        )
        for _ in range(6):
            optimizer.zero_grad()
            loss().backward()
            step()
        assert router.steps == 6
        results.append(([p.detach() for p in model.parameters()], router.last))
    for a, b in zip(results[0][0], results[1][0]):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-6)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("fan_in", [12, 200])
def test_a_step_inside_autocast_is_the_same_step(routing, fan_in):
    results = []
    for inside in (False, True):
        model = layer(fan_in, dtype=torch.float32)
        optimizer = torch.optim.Adam(model.parameters(), lr=LR)
        strength = dmr.OverlapAware(0.9)
        router = MomentRouter(
            model,
            optimizer,
            dmr.Projection(rank=2, every=2),
            routing,
            strength,
            track_step=1,
            track_inflation=True,
        )
        for i, g in enumerate(gradients(model.weight.shape, 12, torch.float32)):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
                run(model, optimizer, [g])
            if i == 5:
                router.consolidate()
        results.append(
            (
                model.weight.detach().clone(),
                optimizer.state[model.weight]["exp_avg"],
                router.state_dict(),
                router.last,
            )
        )
    assert str(results[0]) == str(results[1])
    assert all(
        torch.equal(a, b) for a, b in zip(results[0][:2], results[1][:2])
    )


@pytest.mark.parametrize("fan_in", [12, 200])  # exact, and sketched
def test_inputs_of_an_autocast_pass_feed_the_sketch(fan_in):
    torch.manual_seed(0)
    model, x = layer(fan_in, dtype=torch.float32), torch.randn(5, fan_in)
    optimizer = torch.optim.Adam(model.parameters())
    modification = dmr.Projection(rank=2, source="inputs")
    router = MomentRouter(model, optimizer, modification)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(x).sum().backward()
    optimizer.step()
    sketch = modification.sketches["weight"]
    want = x.T @ (x if sketch.exact else x @ sketch.probe)
    torch.testing.assert_close(sketch.sums, want, rtol=1e-5, atol=1e-5)
    assert router.consolidate()["layers"]["weight"]["added"] == 2


def test_replay_inside_autocast_runs_as_the_loop_does():
    model = layer(dtype=torch.float32)
    optimizer = torch.optim.Adam(model.parameters())
    seen = []

    def loss_fn(x):
        seen.append(torch.is_autocast_enabled("cpu"))
        return model(x).square().mean()

    router = MomentRouter(
        model,
        optimizer,
        dmr.ReplayMix(dmr.ReplayBuffer(capacity=4), loss_fn, fraction=None),
        strength=0.5,
    )
    router.observe(torch.randn(4, 12))
    router.consolidate()
    for inside in (False, True):
        router.observe(torch.randn(4, 12))
        model.weight.grad = torch.randn_like(model.weight)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            optimizer.step()
    assert seen == [False, True]


def interrupted(optimizer):
    "A step that raises between the router's two halves."
    group = optimizer.param_groups[0]
    group["betas"], kept = (group["betas"][0], "wrong"), group["betas"]
    with pytest.raises(Exception):  # noqa: B017  torch's own error, whichever
        optimizer.step()
    group["betas"] = kept
    optimizer.state.clear()


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("to_none", [False, True])
def test_training_goes_on_after_an_interrupted_step(routing, to_none):
    results = []
    for broken in (False, True):
        model, U = layer(), basis()
        optimizer = torch.optim.Adam(model.parameters(), lr=LR)
        MomentRouter(
            model, optimizer, dmr.Projection(bases={"weight": U}), routing, 0.7
        )
        first, second = gradients(model.weight.shape, 2)
        if broken:
            model.weight.grad = first.clone()
            interrupted(optimizer)
            optimizer.zero_grad(set_to_none=to_none)
        model.weight.grad = (
            second.clone()
            if model.weight.grad is None
            else model.weight.grad.add_(second)
        )
        optimizer.step()
        torch.testing.assert_close(
            model.weight.grad, second, rtol=1e-12, atol=1e-13
        )
        results.append(model.weight.detach())
    assert torch.equal(*results)


def test_a_skipped_step_after_an_interrupted_one_changes_nothing():
    model = layer(dtype=torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, fused=True)
    MomentRouter(
        model,
        optimizer,
        dmr.Projection(bases={"weight": basis(dtype=torch.float32)}),
        "displacement",
        0.7,
    )
    model.weight.grad = torch.randn_like(model.weight)
    optimizer.step()
    handle = optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    handle.remove()
    before = model.weight.detach().clone()
    optimizer.grad_scale, optimizer.found_inf = (
        torch.tensor(2.0),
        torch.tensor(1.0),
    )
    optimizer.step()
    assert torch.equal(before, model.weight)


def test_an_interrupted_scaled_step_gives_the_scaled_gradient_back():
    model = layer(dtype=torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, fused=True)
    router = MomentRouter(
        model,
        optimizer,
        dmr.Projection(bases={"weight": basis(dtype=torch.float32)}),
        "shared",
        0.7,
    )
    g = torch.randn_like(model.weight)
    model.weight.grad = g * 8
    optimizer.grad_scale, optimizer.found_inf = (
        torch.tensor(8.0),
        torch.tensor(0.0),
    )
    handle = optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    handle.remove()
    router.close()
    torch.testing.assert_close(model.weight.grad, g * 8, rtol=1e-5, atol=1e-5)


def test_half_precision_gradients_are_unscaled_in_single_precision():
    model = layer(dtype=torch.float16)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, fused=True)
    U = basis(dtype=torch.float32)
    router = MomentRouter(
        model,
        optimizer,
        dmr.Projection(bases={"weight": U}),
        "decoupled",
        dmr.OverlapAware(0.9),
    )
    # below half precision once divided by the scale
    model.weight.grad = g = (torch.randn(model.weight.shape) * 1e-3).half()
    optimizer.grad_scale, optimizer.found_inf = (
        torch.tensor(65536.0),
        torch.tensor(0.0),
    )
    share = (g.float() @ U).square().sum() / g.float().square().sum()
    optimizer.step()
    assert router.last["overlap"] == pytest.approx(float(share), rel=1e-3)


def test_a_step_that_raises_leaves_the_raw_gradient():
    model, U = layer(), basis()

    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    MomentRouter(
        model, optimizer, dmr.Projection(bases={"weight": U}), "shared", 1.0
    )
    g = gradients(model.weight.shape, 1)[0]
    model.weight.grad = g.clone()
    optimizer.param_groups[0]["betas"] = (0.9, "wrong")
    with pytest.raises(Exception):  # noqa: B017  torch's own error, whichever
        optimizer.step()
    optimizer.param_groups[0]["betas"] = (0.9, 0.95)
    optimizer.state.clear()
    optimizer.step()
    torch.testing.assert_close(model.weight.grad, g, rtol=1e-12, atol=1e-13)
