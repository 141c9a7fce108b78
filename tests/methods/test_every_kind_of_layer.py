"""Every kind of layer with an input side: what is learned of it is what its
gradients span, and under displacement at full strength it stands still there.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import dmr
from dmr.routing.modification import find_targets

RANK = 2


class Read(nn.Module):
    "What a recurrent layer puts out, without its state."

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


class Twice(nn.GRUCell):
    "Two steps, so that the state is not always zero."

    def forward(self, x):
        return super().forward(x, super().forward(x))


def transposed(x, groups):
    "A weight (in, out / groups, *kernel) as one matrix a group, by loops."
    size = x.shape[0] // groups
    return [
        torch.stack(
            [x[i].flatten() for i in range(g * size, (g + 1) * size)], 1
        )
        for g in range(groups)
    ]


def lazy():
    model = nn.LazyLinear(5, bias=False)
    model(torch.zeros(1, 6))
    return model


#: kind -> its layer, an input, and the matrices (out, fan_in) in a tensor of
#: each weight's shape, written out by hand
KINDS = {
    "transposed": (
        lambda: nn.ConvTranspose2d(6, 4, 3, stride=2, bias=False),
        (5, 6, 4, 4),
        {"weight": lambda x: transposed(x, 1)},
    ),
    "transposed, groups": (
        lambda: nn.ConvTranspose1d(8, 6, 3, groups=2, bias=False),
        (5, 8, 7),
        {"weight": lambda x: transposed(x, 2)},
    ),
    "gru": (
        lambda: Read(nn.GRU(6, 5, bias=False, batch_first=True)),
        (4, 7, 6),
        {f"layer.weight_{s}_l0": lambda x: [x] for s in ("ih", "hh")},
    ),
    "lstm": (
        lambda: Read(
            nn.LSTM(
                6, 5, bias=False, batch_first=True, proj_size=4, num_layers=2
            )
        ),
        (4, 7, 6),
        {
            f"layer.weight_{s}_l{i}": lambda x: [x]
            for s in ("ih", "hh", "hr")
            for i in (0, 1)
        },
    ),
    "cell": (
        lambda: Twice(6, 5, bias=False),
        (4, 6),
        {"weight_ih": lambda x: [x], "weight_hh": lambda x: [x]},
    ),
    "lazy": (lazy, (9, 6), {"weight": lambda x: [x]}),
    "weight norm": (
        lambda: parametrizations.weight_norm(nn.Linear(6, 5, bias=False)),
        (9, 6),
        {"parametrizations.weight.original1": lambda x: [x]},
    ),
    "spectral norm": (
        lambda: parametrizations.spectral_norm(nn.Linear(6, 5, bias=False)),
        (9, 6),
        {"parametrizations.weight.original": lambda x: [x]},
    ),
}


def made(kind):
    torch.manual_seed(0)
    make, shape, matrices = KINDS[kind]
    return make().double(), shape, matrices


def train(model, optimizer, shape, seed, steps=6):
    "Some steps; the gradients of each, by name."
    draw = torch.Generator().manual_seed(seed)
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(shape, generator=draw, dtype=torch.float64)
        model(x).sin().square().mean().backward()
        named = model.named_parameters()
        seen.append({n: p.grad.clone() for n, p in named if p.grad is not None})
        optimizer.step()
    return seen


def names_of(name, parts):
    return (
        [name]
        if len(parts) == 1
        else [f"{name}[{i}]" for i in range(len(parts))]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_basis_is_that_of_all_gradients(kind):
    model, shape, matrices = made(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    router = dmr.MomentRouter(model, optimizer, dmr.Projection(RANK, every=1))
    seen = train(model, optimizer, shape, 1)
    router.consolidate()
    found = dict(router.modification.bases)
    for name, form in matrices.items():
        steps = [form(grads[name]) for grads in seen]
        for i, own in enumerate(names_of(name, steps[0])):
            rows = torch.cat([step[i] for step in steps])
            V = torch.linalg.svd(rows).Vh[:RANK].T
            U = found.pop(own)
            assert U.shape == (rows.shape[1], RANK)
            torch.testing.assert_close(U @ U.T, V @ V.T, atol=1e-9, rtol=0)
    assert not found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("routing", ["displacement", "decoupled"])
def test_protected_directions_stand_still_under_displacement(kind, routing):
    model, shape, matrices = made(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    projection = dmr.Projection(RANK, every=1)
    router = dmr.MomentRouter(
        model,
        optimizer,
        projection,
        routing,
        1.0,
        track_step=1,
        track_inflation=True,
    )
    train(model, optimizer, shape, 1)
    router.consolidate()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, optimizer, shape, 2)
    inside, all_of_it = 0.0, 0.0
    for name, form in matrices.items():
        after = dict(model.named_parameters())[name].detach()
        for i, moved in enumerate(form(after - before[name])):
            U = projection.bases[names_of(name, form(after))[i]]
            inside += float((moved @ U).norm())
            all_of_it += float(moved.norm())
    assert all_of_it > 1e-2
    assert (inside < 1e-13) is (routing == "displacement"), inside
    told = router.last["protected_step_norm"]
    assert (told < 1e-9) is (routing == "displacement")
    assert set(router.inflation()) == set(projection.bases)


@pytest.mark.parametrize("kind", ["transposed", "transposed, groups", "lazy"])
def test_an_old_input_is_answered_as_before(kind):
    "A domain whose inputs span two directions of each part."
    model, shape, _ = made(kind)
    channel = 1 if len(shape) > 2 else -1
    groups = getattr(model, "groups", 1)
    spanned = torch.zeros(shape[channel], dtype=torch.bool)
    spanned.view(groups, -1)[:, :2] = True
    view = [1] * len(shape)
    view[channel] = -1
    mask = spanned.double().view(view)
    old = lambda seed: (
        mask
        * torch.randn(
            shape,
            dtype=torch.float64,
            generator=torch.Generator().manual_seed(seed),
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    router = dmr.MomentRouter(
        model, optimizer, dmr.Projection(RANK, every=1), "displacement", 1.0
    )
    router.protect(map(old, range(4)), lambda x: model(x).square().mean())
    answer = model(old(9)).detach()
    train(model, optimizer, shape, 3)
    torch.testing.assert_close(model(old(9)), answer, atol=1e-12, rtol=0)
    full = torch.randn(shape, dtype=torch.float64)
    assert not torch.allclose(model(full), copy.deepcopy(made(kind)[0])(full))


def test_a_normalised_row_keeps_its_direction_on_what_is_protected():
    "Its length may change: that is one number a row, in another parameter."
    model, shape, _ = made("weight norm")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    router = dmr.MomentRouter(
        model, optimizer, dmr.Projection(RANK, every=1), "displacement", 1.0
    )
    train(model, optimizer, shape, 1)
    router.consolidate()
    (U,) = router.modification.bases.values()
    before = (model.weight @ U).detach()
    train(model, optimizer, shape, 2)
    after = (model.weight @ U).detach()
    cosine = torch.cosine_similarity(before, after, dim=1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))
    assert not torch.allclose(before, after)


@pytest.mark.parametrize("dim", [1, 0])
def test_a_norm_along_the_inputs_is_no_rescaling_of_rows(dim):
    layer = nn.Linear(4, 3)
    model = parametrizations.weight_norm(layer, dim=dim)
    assert bool(find_targets(model)) is (dim == 0)
    turned = parametrizations.weight_norm(nn.ConvTranspose1d(4, 3, 2), dim=dim)
    assert bool(find_targets(turned)) is (dim == 1)


def test_reading_a_parametrised_weight_changes_nothing():
    "Spectral normalisation iterates whenever its weight is read."
    model = parametrizations.spectral_norm(nn.Linear(4, 3))
    before = {n: x.clone() for n, x in model.named_buffers()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    projection = dmr.Projection(1, source="inputs")
    dmr.MomentRouter(model, optimizer, projection, "shared")
    for name, x in model.named_buffers():
        assert torch.equal(x, before[name])


def test_a_lazy_layer_is_refused_until_it_has_a_shape():
    model = nn.Sequential(nn.LazyLinear(4), nn.LazyLinear(2))
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match=r"'0\.weight'.*run one batch"):
        dmr.MomentRouter(model, optimizer, dmr.Projection(1))
    model(torch.zeros(1, 3))
    router = dmr.MomentRouter(model, optimizer, dmr.Projection(1))
    assert list(router.modification.bases) == ["0.weight", "1.weight"]


@pytest.mark.parametrize("kind", ["gru", "transposed", "weight norm"])
def test_input_bases_where_inputs_can_be_seen(kind):
    model, shape, matrices = made(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0)
    projection = dmr.Projection(RANK, every=1, source="inputs")
    with pytest.warns() if kind == "gru" else pytest.MonkeyPatch().context():
        dmr.MomentRouter(model, optimizer, projection)
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=draw, dtype=torch.float64)
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
    projection.consolidate()
    name = next(iter(matrices))
    rows = x.movedim(1, -1) if kind == "transposed" else x
    rows = rows.reshape(-1, shape[1 if kind == "transposed" else -1])
    V = torch.linalg.svd(rows, full_matrices=False).Vh[:RANK].T
    assert list(projection.bases) == [name]
    U = projection.bases[name]
    torch.testing.assert_close(U @ U.T, V @ V.T, atol=1e-9, rtol=0)
