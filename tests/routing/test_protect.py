"""A past that was never trained here: what `protect` learns, and what it leaves
alone.
"""

import warnings

import pytest
import torch
from torch import nn

import dmr


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 3)
    )


def batches(seed=0, n=6):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 8, generator=draw) for _ in range(n)]


def loss_on(model):
    return lambda x: (model(x) - x[:, :3]).square().mean()


def made(model, source="gradients", routing="displacement"):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    projection = dmr.Projection(rank=2, every=1, source=source)
    rule = dmr.FisherMerge()
    router = dmr.MomentRouter(
        model, optimizer, projection, routing, consolidation=rule
    )
    return optimizer, router


def test_it_knows_what_a_domain_of_the_same_gradients_would_have_taught():
    model = network().eval()
    optimizer, router = made(model)
    router.protect(batches(), loss_on(model))
    other = network().eval()
    still = torch.optim.AdamW(other.parameters(), lr=0.0, weight_decay=0.0)
    trained = dmr.MomentRouter(
        other,
        still,
        dmr.Projection(rank=2, every=1),
        "displacement",
        consolidation=dmr.FisherMerge(),
    )
    for x in batches():
        still.zero_grad()
        loss_on(other)(x).backward()
        still.step()
    trained.consolidate()
    for name, U in trained.modification.bases.items():
        torch.testing.assert_close(router.modification.bases[name], U)
    for name, f in trained.consolidation.past.items():
        torch.testing.assert_close(router.consolidation.past[name], f)


@pytest.mark.parametrize("source", ["gradients", "inputs"])
def test_nothing_else_changes(source):
    model = network()
    optimizer, router = made(model, source)
    model[0].weight.grad = torch.ones(16, 8)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    router.protect(iter(batches()), loss_on(model))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert model[0].weight.grad.eq(1).all() and model[3].weight.grad is None
    assert not optimizer.state and router.steps == 0 and model.training
    assert all(U.shape[1] == 2 for U in router.modification.bases.values())


def test_the_first_boundary_merges_with_the_protected_past():
    losses = {}
    for known in (False, True):
        model = network()
        optimizer, router = made(model)
        old, new = batches(0), batches(1)
        if known:
            router.protect(old, loss_on(model))
        start = {n: p.detach().clone() for n, p in model.named_parameters()}
        for x in new:
            optimizer.zero_grad()
            loss_on(model)(x).backward()
            optimizer.step()
        end = {n: p.detach().clone() for n, p in model.named_parameters()}
        report = router.consolidate()
        moved = any(
            not torch.equal(end[n], p) for n, p in model.named_parameters()
        )
        losses[known] = moved, "consolidation" in report
        assert any(not torch.equal(start[n], end[n]) for n in start)
    assert losses == {False: (False, False), True: (True, True)}


def test_wrong_batches_change_nothing():
    model = network()
    _, router = made(model)
    with pytest.raises(ValueError, match="got no batch"):
        router.protect([], loss_on(model))
    bad = [torch.full((4, 8), float("nan"))]
    with pytest.raises(ValueError, match="has NaN or infinite values"):
        router.protect(bad, loss_on(model))
    assert router.domains == 0 and not router.consolidation.past
    assert all(U.shape[1] == 0 for U in router.modification.bases.values())


def test_random_draws_and_running_means_are_put_back():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))
    _, router = made(model)
    before = {n: x.clone() for n, x in model.named_buffers()}
    state = torch.get_rng_state()
    router.protect(batches(), lambda x: model(x).square().mean())
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[n], x) for n, x in model.named_buffers())


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ValueError])
def test_half_of_a_past_is_none(stop):
    "What the batches before the bad one taught is dropped."
    model = network()
    optimizer, router = made(model)

    def broken():
        yield from batches(n=2)
        raise stop("enough")

    with pytest.raises(stop):
        router.protect(broken(), loss_on(model))
    sketches = router.modification.sketches.values()
    assert all(not sketch.sums.any() for sketch in sketches)
    assert router.domains == 0 and not router.modification.shown
    fresh = made(network())[1]
    for one in (router, fresh):
        torch.manual_seed(1)  # for dropout
        one.protect(batches(1), loss_on(one.model))
    for name, U in fresh.modification.bases.items():
        assert torch.equal(U, router.modification.bases[name])
    for name, f in fresh.consolidation.past.items():
        assert torch.equal(f, router.consolidation.past[name])


@pytest.mark.parametrize("source", ["gradients", "inputs"])
def test_every_batch_counts_in_evaluation_mode_too(source):
    model = network().eval()
    optimizer = torch.optim.AdamW(model.parameters())
    projection = dmr.Projection(rank=2, every=10, source=source)
    router = dmr.MomentRouter(model, optimizer, projection)
    seen = batches()
    if source == "inputs":
        rows = torch.cat(seen)
    else:
        rows = torch.cat(
            [
                torch.autograd.grad(loss_on(model)(x), model[0].weight)[0]
                for x in seen
            ]
        )
    router.protect(seen, loss_on(model))
    V = torch.linalg.svd(rows.double()).Vh[:2].T.float()
    U = projection.bases["0.weight"]
    torch.testing.assert_close(U @ U.T, V @ V.T, atol=1e-4, rtol=0)


def test_no_weight_moves_even_in_the_middle_of_training():
    model = network()
    optimizer, router = made(model)
    router.protect(batches(0), loss_on(model))
    for x in batches(1):
        optimizer.zero_grad()
        loss_on(model)(x).backward()
        optimizer.step()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    state = {p: x["exp_avg"].clone() for p, x in optimizer.state.items()}
    router.protect(batches(2), loss_on(model))
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    for p, m in state.items():
        assert torch.equal(m, optimizer.state[p]["exp_avg"])
    for name, x in router.consolidation.before.items():
        assert torch.equal(x, before[name])


@pytest.mark.parametrize("curvature", ["gradients", "factored", "moment"])
def test_every_curvature_learns_from_what_is_shown(curvature):
    "The second moment of an optimizer that has taken no step knows nothing."
    model = network().eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rule = dmr.FisherMerge(curvature=curvature)
    router = dmr.MomentRouter(model, optimizer, consolidation=rule)
    router.protect(batches(), loss_on(model))
    square = torch.stack(
        [
            torch.autograd.grad(loss_on(model)(x), model[0].weight)[0] ** 2
            for x in batches()
        ]
    ).mean(0)
    if curvature == "factored":
        square = square.mean(1)[:, None] * square.mean(0) / square.mean()
    torch.testing.assert_close(rule.past["0.weight"], square)
    for x in batches(1):
        optimizer.zero_grad()
        loss_on(model)(x).backward()
        optimizer.step()
    assert 0 < router.consolidate()["consolidation"]["share"] < 1


def test_a_loaded_model_is_not_told_to_do_what_it_is_doing(recwarn):
    model = network()
    model.config = type("Config", (), {"_name_or_path": "a-model"})()
    _, router = made(model)
    router.protect(batches(), loss_on(model))
    assert not [w for w in recwarn if "call router.protect" in str(w.message)]


@pytest.mark.parametrize("source", ["gradients", "inputs"])
@pytest.mark.parametrize("rank", [None, 3])
def test_the_weights_leading_directions(source, rank):
    model = network()
    optimizer, router = made(model, source)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    report = router.protect_weights(rank)
    for name in ("0.weight", "3.weight"):
        V = torch.linalg.svd(before[name].double()).Vh[: rank or 2].T.float()
        U = router.modification.bases[name]
        torch.testing.assert_close(U @ U.T, V @ V.T, atol=1e-5, rtol=0)
        assert report["layers"][name]["rank"] == (rank or 2)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert not router.consolidation.past and not optimizer.state
    assert router.domains == 1


def test_weights_leave_a_domain_in_progress_alone():
    model = network()
    optimizer, router = made(model)
    loss_on(model)(batches()[0]).backward()
    optimizer.step()
    sums = router.modification.sketches["0.weight"].sums.clone()
    router.protect_weights()
    assert torch.equal(sums, router.modification.sketches["0.weight"].sums)
    assert router.modification.fed == 1


def test_a_control_of_the_weights_directions_shows_others():
    from dmr.methods.controls import RandomBasis

    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    control = RandomBasis(rank=2)
    dmr.MomentRouter(model, optimizer, control).protect_weights()
    V = torch.linalg.svd(model[0].weight.detach()).Vh[:2].T
    U = control.bases["0.weight"]
    assert U.shape == (8, 2)
    assert (U.T @ V).square().sum() < 1.9
    torch.testing.assert_close(
        (control.learned["0.weight"].T @ V).square().sum(), torch.tensor(2.0)
    )


@pytest.mark.parametrize(
    "modification",
    [None, dmr.Projection(bases={"0.weight": torch.eye(8)[:, :1]})],
    ids=["nothing", "given bases"],
)
def test_what_learns_nothing_from_weights_says_so(modification):
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    router = dmr.MomentRouter(model, optimizer, modification)
    with pytest.raises(TypeError, match="from weights alone|does not grow"):
        router.protect_weights()
    assert router.domains == 0


def test_progress_is_shown_where_somebody_looks(monkeypatch, capsys):
    import sys

    model = network()
    _, router = made(model)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    router.protect(batches(), loss_on(model))
    assert "protect" in capsys.readouterr().err
    router.protect(batches(), loss_on(model), progress=False)
    assert not capsys.readouterr().err


def test_the_summary_says_how_much_is_covered():
    model = network()
    _, router = made(model)
    lines = router.summary().splitlines()
    whole = sum(p.numel() for p in model.parameters())
    share = (8 * 16 + 16 * 3) / whole
    assert lines[2].strip() == f"covers {share:.1%} of the trainable parameters"
    model[0].weight.requires_grad_(False)  # what is frozen does not count
    share = 48 / (whole - 8 * 16)
    assert f"covers {share:.1%}" in router.summary()
    wide = nn.Sequential(nn.Embedding(50, 4), nn.Linear(4, 2))
    projection = dmr.Projection(rank=1)
    optimizer = torch.optim.AdamW(wide.parameters())
    text = dmr.MomentRouter(wide, optimizer, projection).summary()
    assert "covers 3.8%" in text and "WARNING: less than half" in text


def of_sizes(past, parts, rule=dmr.FisherMerge, observed=True):
    "Warnings of a boundary after batches of `past`, then steps of `parts`."
    model = network().eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    router = dmr.MomentRouter(model, optimizer, consolidation=rule())
    draw = torch.Generator().manual_seed(0)
    take = lambda n: torch.randn(n, 8, generator=draw)
    router.protect(
        [{"x": take(past)} for _ in range(4)], lambda b: loss_on(model)(b["x"])
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):  # domains
            for _ in range(3):
                optimizer.zero_grad()
                for n in parts:
                    batch = {"x": take(n)}
                    if observed:
                        router.observe(batch)
                    loss_on(model)(batch["x"]).backward()
                optimizer.step()
            router.consolidate()
    return [str(w.message) for w in said if "protect() was" in str(w.message)]


def test_batches_of_another_size_than_in_training_are_spoken_of_once():
    assert len(of_sizes(1, [16])) == 1
    assert "0.062 times as large" in of_sizes(1, [16])[0]
    assert len(of_sizes(16, [1])) == 1
    assert len(of_sizes(4, [4, 4, 4])) == 1  # accumulated


def test_batches_of_the_same_size_or_of_no_meaning_are_not():
    assert not of_sizes(16, [16]) and not of_sizes(12, [4, 4, 4])
    assert not of_sizes(16, [12])
    assert not of_sizes(1, [16], observed=False)
    assert not of_sizes(1, [16], rule=lambda: dmr.Interpolate(0.5))


@pytest.mark.parametrize(
    "value, said",
    [
        (lambda x: {"loss": x.mean()}, "loss_fn returned dict"),
        (lambda x: x, r"a tensor of shape \(2, 3\)"),
        (lambda x: x.mean().item(), "returned float"),
        (lambda x: None, "returned NoneType"),
        (lambda x: x.mean().detach(), "reaches no parameter"),
    ],
)
def test_a_loss_that_is_none_is_named(value, said):
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.Adam(model.parameters())
    router = dmr.MomentRouter(model, optimizer, consolidation=dmr.FisherMerge())
    with pytest.raises(ValueError, match=said):
        router.protect([torch.ones(2, 4)], lambda x: value(model(x)))
    assert router.domains == 0


@pytest.mark.parametrize(
    "batches, loss_fn, said",
    [
        (lambda x: x.mean(), [torch.ones(2, 4)], "function is not several"),
        ({"x": torch.ones(2, 4)}, lambda b: b, "dict is not several batches"),
        ([torch.ones(2, 4)], torch.ones(3), "loss_fn=Tensor is no function"),
    ],
)
def test_arguments_that_were_exchanged_are_named(batches, loss_fn, said):
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.Adam(model.parameters())
    router = dmr.MomentRouter(model, optimizer, consolidation=dmr.FisherMerge())
    with pytest.raises(TypeError, match=said):
        router.protect(batches, loss_fn)


def test_reentrant_checkpointing_is_named_with_the_way_out():
    from torch.utils.checkpoint import checkpoint

    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 3))
    optimizer = torch.optim.Adam(model.parameters())
    router = dmr.MomentRouter(model, optimizer, consolidation=dmr.FisherMerge())
    first, last = model
    run = lambda x: checkpoint(last, first(x), use_reentrant=True).mean()
    with pytest.raises(ValueError, match="gradient_checkpointing_kwargs"):
        router.protect([torch.ones(2, 4)], run)
