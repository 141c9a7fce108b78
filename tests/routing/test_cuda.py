"""The same numbers on a GPU: every method against the CPU, no wait for the
device, CUDA graphs, checkpoints that change places.
"""

import io

import pytest
import torch
from test_conformance import MODIFICATIONS as CONFORMING
from torch import nn

import dmr
from dmr.methods.controls import CurrentBasis
from dmr.routing.conformance import Problem, meaningful, train, trainer, weights

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU that torch can use"
)
# one gradient of four logits has three directions: asked for more, the control
# of the running domain may take any, on each device another
MODIFICATIONS = CONFORMING | {
    "current": lambda p: CurrentBasis(rank=1, every=1, refresh=3)
}
# float64; products are summed in another order, and Adam's root magnifies it
# where gradients are tiny
TOLERANCE = 1e-7


def through_two_domains(make, routing, device, strength):
    problem, optimizer, router = trainer(
        make,
        routing,
        strength() if strength else 0.7,
        Problem(torch.float64, device),
        track_step=2,
    )
    for domain in (0, 1):
        train(problem, optimizer, router, domain, range(5))
        router.consolidate()
    train(problem, optimizer, router, 2, range(5))
    return {name: p.cpu() for name, p in weights(problem).items()}, router


@pytest.mark.parametrize("overlap", [False, True], ids=["fixed", "overlap"])
@pytest.mark.parametrize("name", MODIFICATIONS)
@pytest.mark.filterwarnings("ignore:the basis of")
def test_every_method_goes_where_it_goes_on_the_cpu(name, overlap):
    make = MODIFICATIONS[name]
    strength = (lambda: dmr.OverlapAware(0.8, beta=0.5)) if overlap else None
    for routing in meaningful(make(Problem())):
        there, router = through_two_domains(make, routing, "cuda", strength)
        here, reference = through_two_domains(make, routing, "cpu", strength)
        for key, p in here.items():
            assert (there[key] - p).norm() <= TOLERANCE * p.norm(), (
                routing,
                key,
            )
        assert router.last.keys() == reference.last.keys()
        for key, x in reference.last.items():
            assert router.last[key] == pytest.approx(x, rel=1e-5, abs=1e-9), (
                routing,
                key,
            )


@pytest.mark.parametrize("optimizer", ["foreach", "fused", "for-loop"])
@pytest.mark.parametrize("routing", dmr.ROUTINGS)
def test_every_form_of_adamw_in_single_precision(optimizer, routing):
    """Layers above and below the size from which products are taken one by one,
    against the CPU in double precision.
    """
    form = {
        "foreach": {"foreach": True},
        "fused": {"fused": True},
        "for-loop": {"foreach": False},
    }[optimizer]

    def through(device, dtype, **options):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(40, 64),
            nn.Tanh(),
            nn.Linear(64, 600),
            nn.Tanh(),
            nn.Linear(600, 600),
            nn.Linear(600, 8),
        )
        model.to(device, dtype)
        inner = torch.optim.AdamW(
            model.parameters(), lr=1e-3, betas=(0.9, 0.95), **options
        )
        bases = {
            f"{i}.weight": torch.linalg.qr(
                torch.randn(model[i].in_features, 5)
            )[0]
            for i in (0, 2, 4)
        }
        dmr.MomentRouter(
            model, inner, dmr.Projection(bases=bases), routing, 0.8
        )
        x = torch.randn(32, 40, generator=torch.Generator().manual_seed(1)).to(
            device, dtype
        )
        for _ in range(10):
            inner.zero_grad()
            model(x).square().mean().backward()
            inner.step()
        return [p.detach().cpu().double() for p in model.parameters()]

    for a, b in zip(
        through("cuda", torch.float32, **form), through("cpu", torch.float64)
    ):
        assert (a - b).norm() <= 1e-3 * b.norm()


@pytest.mark.parametrize("routing", dmr.ROUTINGS)
@pytest.mark.parametrize("form", ["foreach", "fused"])
def test_a_step_waits_for_nothing(routing, form):
    """With the finite check off, the host never waits for the device: torch
    raises where it would.
    """
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)]).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), **{form: True})
    projection, options = (
        dmr.Projection(rank=4, every=1),
        {
            "check_finite": False,
            "track_step": 1,
        },
    )
    router = dmr.MomentRouter(
        model, optimizer, projection, routing, dmr.OverlapAware(0.8), **options
    )
    x = torch.randn(16, 64, device="cuda")

    def step():
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    for _ in range(3):
        step()
    router.consolidate()
    for _ in range(3):
        step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (
        0 <= router.last["alpha"] <= 0.8
        and router.last["protected_step_norm"] >= 0
    )


@pytest.mark.parametrize("routing", dmr.ROUTINGS)
def test_a_recorded_graph_takes_the_steps_of_plain_ones(routing):
    "A whole training step in a CUDA graph, the strength following the overlap."

    def made():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 8)
        ).cuda()
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=1e-3, capturable=True
        )
        bases = {
            "0.weight": torch.eye(32)[:, :6],
            "2.weight": torch.eye(48)[:, :6],
        }
        router = dmr.MomentRouter(
            model,
            optimizer,
            dmr.Projection(bases=bases, every=10**9),
            routing,
            dmr.OverlapAware(0.8),
        )
        return model, optimizer, router

    data = torch.randn(
        12, 16, 32, generator=torch.Generator().manual_seed(1)
    ).cuda()
    x = data[0].clone()

    def step(model, optimizer):
        optimizer.zero_grad(set_to_none=False)
        (model(x) - x[:, :8].sin()).square().mean().backward()
        optimizer.step()

    plain, recorded = made(), made()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(4):
            x.copy_(data[i])
            step(*recorded[:2])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(*recorded[:2])
    for i in range(4, 12):
        x.copy_(data[i])
        graph.replay()
    for i in range(12):
        x.copy_(data[i])
        step(*plain[:2])
    for a, b in zip(recorded[0].parameters(), plain[0].parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "start, end", [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")]
)
@pytest.mark.parametrize("name", MODIFICATIONS)
@pytest.mark.filterwarnings("ignore:the basis of")
def test_a_state_moves_between_devices(name, start, end):
    """Saved in the middle of the second domain on one, read on the host,
    continued on the other.
    """
    make = MODIFICATIONS[name]
    whole, first = (
        trainer(make, problem=Problem(torch.float64, start)) for _ in range(2)
    )
    second = trainer(make, problem=Problem(torch.float64, end))
    for run in (whole, first):
        train(*run, 0, range(5))
        run[2].consolidate()
        train(*run, 1, range(4))
    file = io.BytesIO()
    torch.save(
        [
            first[0].model.state_dict(),
            first[1].state_dict(),
            first[2].state_dict(),
        ],
        file,
    )
    file.seek(0)
    model, optimizer, router = torch.load(
        file, weights_only=True, map_location="cpu"
    )
    second[0].model.load_state_dict(model)
    second[1].load_state_dict(optimizer)
    second[2].load_state_dict(router)
    for run in (whole, second):
        train(*run, 1, range(4, 6))
        run[2].consolidate()
        train(*run, 2, range(4))
    for a, b in zip(weights(whole[0]).values(), weights(second[0]).values()):
        assert (a.cpu() - b.cpu()).norm() <= TOLERANCE * a.cpu().norm()


def test_mixed_precision_with_a_scaler():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8)).cuda()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95)
    )
    router = dmr.MomentRouter(
        model, optimizer, dmr.Projection(rank=4, every=1), "decoupled", 0.9
    )
    scaler = torch.amp.GradScaler("cuda")
    losses = []
    for domain in range(2):
        x = torch.randn(64, 32, device="cuda") + domain
        for _ in range(20):
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.float16):
                loss = (model(x) - x[:, :8]).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
        report = router.consolidate()
    assert losses[19] < losses[0] and losses[39] < losses[20]
    assert (
        report["layers"]["0.weight"]["rank"] == 8
        and router.modification.bases["0.weight"].device.type == "cuda"
    )
