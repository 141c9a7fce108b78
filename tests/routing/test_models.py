"""Weights of every kind:
convolutions, attention, adapters, tied and late ones.
"""

import copy
import warnings

import pytest
import torch
from conftest import basis, gradients, layer, regression, train
from plain_adam import LR, Reference
from torch import nn

import dmr
from dmr.routing.modification import as_matrix
from dmr.routing.router import MomentRouter

torch.set_num_threads(1)
ROUTINGS = ["shared", "decoupled", "denominator", "displacement"]


def test_late_groups_frozen_and_missing_gradients():
    model, _ = regression(dtype=torch.float64)
    optimizer = torch.optim.Adam([model[0].weight], lr=LR)
    router = MomentRouter(
        model,
        optimizer,
        dmr.Projection(
            bases={"0.weight": basis(6, 2), "2.weight": basis(9, 3)}
        ),
        "decoupled",
        0.5,
    )
    model[0].weight.grad = torch.randn_like(model[0].weight)
    optimizer.step()
    optimizer.add_param_group(
        {
            "params": [model[2].weight],
            "lr": 3e-3,
            "betas": (0.5, 0.9),
            "weight_decay": 0.1,
        }
    )
    reference = Reference(
        model[2].weight.detach(),
        basis(9, 3) @ basis(9, 3).T,
        "decoupled",
        0.5,
        "adam",
        (0.5, 0.9),
        0.1,
        lr=3e-3,
    )
    model[0].weight.requires_grad_(False)
    frozen = model[0].weight.detach().clone()
    for g in gradients(model[2].weight.shape, 20):
        model[0].weight.grad, model[2].weight.grad = None, g.clone()
        optimizer.step()
        reference.step(g)
    torch.testing.assert_close(
        model[2].weight.detach(), reference.W, rtol=1e-10, atol=1e-12
    )
    assert torch.equal(frozen, model[0].weight) and router.steps == 21


@pytest.mark.parametrize("routing", ROUTINGS)
def test_lora_factors_are_routed_like_any_two_matrices(routing):
    "W + B A with W frozen: A's inputs are the layer's, B's are the adapter's."

    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Linear(12, 7, bias=False).requires_grad_(False)
            self.lora_A, self.lora_B = (
                nn.Linear(12, 4, bias=False),
                nn.Linear(4, 7, bias=False),
            )

        def forward(self, x):
            return self.base(x) + 2.0 * self.lora_B(self.lora_A(x))

    torch.manual_seed(0)
    model = Adapted().double()
    bases = {"lora_A.weight": basis(12, 3), "lora_B.weight": basis(4, 2)}
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=LR,
        betas=(0.9, 0.95),
        weight_decay=0.03,
    )
    MomentRouter(model, optimizer, dmr.Projection(bases=bases), routing, 0.7)
    start = {n: model.get_parameter(n).detach() for n in bases}
    references = {
        n: Reference(
            start[n], U @ U.T, routing, 0.7, "adamw", (0.9, 0.95), 0.03
        )
        for n, U in bases.items()
    }
    frozen = model.base.weight.detach().clone()
    for step in range(15):
        x = torch.randn(
            8,
            12,
            generator=torch.Generator().manual_seed(step),
            dtype=torch.float64,
        )
        optimizer.zero_grad()
        model(x).square().mean().backward()
        for n, reference in references.items():
            reference.step(model.get_parameter(n).grad)
        optimizer.step()
    for n, reference in references.items():
        torch.testing.assert_close(
            model.get_parameter(n).detach(), reference.W, rtol=1e-9, atol=1e-11
        )
    assert torch.equal(frozen, model.base.weight)
    other = Adapted()
    found = MomentRouter(
        other,
        torch.optim.AdamW(other.parameters()),
        dmr.Projection(rank=1),
        include="lora_*",
    )
    assert set(found.modification.bases) == set(bases)


def test_convolutions_attention_and_transposed_linears():
    class Conv1D(nn.Module):  # the transposed linear layer of GPT-2
        def __init__(self, nf, nx):
            super().__init__()
            self.nf, self.weight = (
                nf,
                nn.Parameter(torch.randn(nx, nf, dtype=torch.float64)),
            )

    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(3, 5, 2, bias=False, dtype=torch.float64).to(
                memory_format=torch.channels_last
            ),
            "attention": nn.MultiheadAttention(
                6, 2, bias=False, dtype=torch.float64
            ),
            "turned": Conv1D(4, 7),
        }
    )
    bases = {
        "conv.weight": basis(12, 3),
        "attention.in_proj_weight": basis(6, 2),
        "turned.weight": basis(7, 2),
    }
    for routing in ROUTINGS:
        m = copy.deepcopy(model)
        params = {n: p for n, p in m.named_parameters() if n in bases}
        flat = {
            n: (
                (lambda x: x.T)
                if n == "turned.weight"
                else (lambda x: x.reshape(len(x), -1))
            )
            for n in bases
        }
        references = {
            n: Reference(
                flat[n](p.detach()),
                bases[n] @ bases[n].T,
                routing,
                0.6,
                "adam",
                (0.9, 0.95),
            )
            for n, p in params.items()
        }
        optimizer = torch.optim.Adam(m.parameters(), lr=LR, betas=(0.9, 0.95))
        MomentRouter(m, optimizer, dmr.Projection(bases=bases), routing, 0.6)
        for step in range(10):
            generator = torch.Generator().manual_seed(step)
            for n, p in params.items():
                p.grad = torch.randn(
                    p.shape, generator=generator, dtype=torch.float64
                )
                references[n].step(flat[n](p.grad))
            optimizer.step()
        for n, p in params.items():
            torch.testing.assert_close(
                flat[n](p.detach()), references[n].W, rtol=1e-9, atol=1e-11
            )


def test_discovered_layers_with_few_inputs_use_what_they_have():
    model, loss = regression()
    optimizer = torch.optim.Adam(model.parameters())
    router = MomentRouter(
        model, optimizer, dmr.Projection(rank=64, max_rank=64)
    )
    train(model, loss, optimizer, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = router.consolidate()
    assert (
        report["layers"]["0.weight"]["rank"] <= 6
        and report["layers"]["2.weight"]["rank"] <= 9
    )


def test_wrapped_models_keep_their_parameters_names():
    model, _ = regression()
    compiled = torch.compile(model, backend="eager")
    router = MomentRouter(
        compiled,
        torch.optim.AdamW(compiled.parameters()),
        dmr.Projection(rank=2),
    )
    assert set(router.state_dict()["shapes"]) == set(
        dict(model.named_parameters())
    )

    # as Accelerate wraps one
    class AcceleratedOptimizer(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer

    inner = torch.optim.AdamW(model.parameters())
    assert (
        MomentRouter(
            model, AcceleratedOptimizer(inner), dmr.Projection(rank=2)
        ).optimizer
        is inner
    )


def test_tied_weights_are_one_parameter_with_the_sum_of_their_gradients():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (
                nn.Linear(6, 6, bias=False),
                nn.Linear(6, 6, bias=False),
            )
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x).tanh())

    torch.manual_seed(0)
    model = Twice().double()
    U = basis(6, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, betas=(0.9, 0.95))
    router = MomentRouter(
        model,
        optimizer,
        dmr.Projection(bases={"a.weight": U}),
        "decoupled",
        0.7,
    )
    assert list(router.matrices) == ["a.weight"]
    reference = Reference(
        model.a.weight.detach(), U @ U.T, "decoupled", 0.7, "adam", (0.9, 0.95)
    )
    x = torch.randn(8, 6, dtype=torch.float64)
    for _ in range(5):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        reference.step(model.a.weight.grad)
        optimizer.step()
    torch.testing.assert_close(
        model.a.weight.detach(), reference.W, rtol=1e-10, atol=1e-12
    )


def test_layers_added_later_are_stepped_and_said_not_to_be_routed():
    model = nn.Sequential(layer(dtype=torch.float32))
    optimizer = torch.optim.Adam(model.parameters())
    MomentRouter(model, optimizer, dmr.Projection(rank=2))
    model.append(nn.Linear(7, 3))
    optimizer.add_param_group({"params": model[1].parameters()})
    with pytest.warns(
        UserWarning,
        match=(
            r"2 parameters of the optimizer, such as '1.weight', came into the"
            r" model after its router"
        ),
    ):
        model(torch.randn(4, 12)).sum().backward()
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()  # said once


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 2, 2)])
def test_a_process_without_rows_of_a_weight_has_an_empty_matrix(shape):
    assert as_matrix(torch.zeros(shape)).shape == (
        0,
        torch.Size(shape[1:]).numel(),
    )
