"""What happens between domains:
bases grow, caps drop, streams end by themselves.
"""

import copy
import warnings

import pytest
import torch
from conftest import regression, train
from torch import nn

import dmr
from dmr.routing.router import MomentRouter

torch.set_num_threads(1)


def domain_of(seed, used=3):
    "A linear-regression domain whose inputs span `used` directions."
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(20, used, generator=generator)).Q
    x = torch.randn(64, used, generator=generator) @ directions.T
    return directions, x, torch.randn(64, 5, generator=generator)


def test_the_first_domain_is_still_protected_after_three():
    torch.manual_seed(0)
    model = nn.Linear(20, 5, bias=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    router = MomentRouter(
        model,
        optimizer,
        dmr.Projection(rank=3, max_rank=12, every=1),
        "displacement",
        1.0,
    )
    directions = {}
    for domain in range(3):
        directions[domain], x, y = domain_of(domain)
        for _ in range(20):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
        report = router.consolidate()
        assert report["layers"]["weight"] == {
            "rank": 3 * (domain + 1),
            "fan_in": 20,
            "added": 3,
            "captured": pytest.approx(1, abs=1e-4),
            "lost": 0.0,
        }
    U = router.modification.bases["weight"]
    torch.testing.assert_close(U.T @ U, torch.eye(9), atol=1e-5, rtol=0)
    for domain in range(3):  # every direction of every past domain lies inside
        torch.testing.assert_close(
            (U @ (U.T @ directions[domain])),
            directions[domain],
            atol=1e-3,
            rtol=0,
        )
    outputs = domain_of(0)[1] @ model.weight.T.detach()
    _, x, y = domain_of(3)
    for _ in range(20):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    drift = (
        domain_of(0)[1] @ model.weight.T.detach() - outputs
    ).norm() / outputs.norm()
    assert drift < 1e-3  # the first domain's outputs are where they were


def test_the_cap_drops_the_weakest_and_says_what_was_lost():
    model = nn.Linear(20, 5, bias=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    router = MomentRouter(
        model,
        optimizer,
        dmr.Projection(rank=3, max_rank=5, every=1),
        "decoupled",
        1.0,
    )
    for domain in range(2):
        _, x, y = domain_of(domain)
        for _ in range(5):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
        report = router.consolidate()["layers"]["weight"]
    assert report["rank"] == 5 and 0 < report["lost"] < 0.5


def test_layer_inputs_feed_the_sketch_in_training_passes_only():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten(), nn.Linear(12, 4))
    optimizer = torch.optim.AdamW(model.parameters())
    router = MomentRouter(
        model, optimizer, dmr.Projection(rank=2, every=3, source="inputs")
    )
    fed = lambda: {
        name: float(s.energy)
        for name, s in router.modification.sketches.items()
    }
    x = torch.randn(5, 2, 5)
    with torch.no_grad():
        model(x)
    model.eval()
    model(x).sum().backward()
    assert set(fed().values()) == {0.0}
    model.train()
    for step in range(4):
        before = fed()
        optimizer.zero_grad()
        model(x).square().sum().backward()
        grew = [fed()[name] > before[name] for name in before]
        assert all(grew) if step % 3 == 0 else not any(grew)
        optimizer.step()
    # two feedings of all patches
    expected = (
        torch.nn.functional.unfold(x[:, :, None], (1, 2)).square().sum() * 2
    )
    assert fed()["0.weight"] == pytest.approx(expected.item(), rel=1e-5)
    twin = copy.deepcopy(router)  # hooks go along, and feed the copy
    before = fed()
    for _ in range(2):
        twin.modification.counts = {}
        twin.model(x)
    assert (
        fed() == before
        and float(twin.modification.sketches["0.weight"].energy)
        > before["0.weight"]
    )
    router.consolidate()
    router.close()
    assert all(not m._forward_pre_hooks for m in model.modules())


def test_a_stream_without_boundaries_is_consolidated_every_so_many_steps():
    model, loss = regression()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        router = MomentRouter(
            model,
            optimizer,
            dmr.Projection(rank=1, every=1, consolidate_every=4),
        )
        router.warn_after = 2
        train(model, loss, optimizer, 10)
    assert (
        router.modification.bases["0.weight"].shape[1] == 2
        and router.modification.seen == 2
    )


def test_warnings_that_save_a_day():
    model, loss = regression()
    stranger = nn.Parameter(torch.zeros(3))
    with pytest.warns(
        UserWarning, match="1 parameters of the optimizer are not the model's"
    ):
        MomentRouter(
            model,
            torch.optim.Adam([*model.parameters(), stranger]),
            dmr.Projection(rank=1),
        )
    with pytest.warns(UserWarning, match="nothing to protect"):
        bare = nn.Embedding(5, 4)
        MomentRouter(
            bare, torch.optim.Adam(bare.parameters()), dmr.Projection(rank=1)
        )
    optimizer = torch.optim.Adam(model.parameters())
    router = MomentRouter(model, optimizer, dmr.Projection(rank=1))
    router.warn_after = 3
    with pytest.warns(UserWarning, match=r"3 steps without a consolidate\(\)"):
        train(model, loss, optimizer, 4)
    with pytest.warns(UserWarning, match="spans all of fan_in=6"):
        MomentRouter(
            model,
            torch.optim.Adam(model.parameters()),
            dmr.Projection(bases={"0.weight": torch.eye(6)}),
        )
