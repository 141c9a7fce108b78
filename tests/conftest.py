"""What tests of several rooms share: references written out, small layers,
broken functions. Import them by name: `from conftest import PlainAdam`.
"""

import math

import pytest
import torch
from torch import nn


class PlainAdam:
    "Adam on one tensor, as in the paper, float64."

    def __init__(self, lr, betas=(0.9, 0.999), eps=1e-8):
        self.lr, (self.b1, self.b2), self.eps = lr, betas, eps
        self.m = self.v = 0.0
        self.t = 0

    def step(self, to_m, to_v=None):
        self.t += 1
        self.m = self.b1 * self.m + (1 - self.b1) * to_m
        self.v = (
            self.b2 * self.v
            + (1 - self.b2) * (to_m if to_v is None else to_v) ** 2
        )
        return (
            self.lr
            * (self.m / (1 - self.b1**self.t))
            / ((self.v / (1 - self.b2**self.t)) ** 0.5 + self.eps)
        )


def flat(tensors):
    return torch.cat([x.detach().flatten() for x in tensors])


#: A user's functions that must be refused, and what is said.
BROKEN = {
    "vector": (
        lambda problem, batch: problem.model(batch[0])[0],
        "returned a tensor of shape",
    ),
    "nan": (
        lambda problem, batch: problem.loss_fn(batch) * math.nan,
        "returned nan",
    ),
    "number": (lambda problem, batch: 1.0, "returned float"),
}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    "An empty cache for this test alone."
    monkeypatch.setenv("DMR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def layer(fan_in=12, fan_out=7, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(fan_in, fan_out, bias=False, dtype=dtype)


def basis(fan_in=12, r=4, seed=1, dtype=torch.float64):
    "Orthonormal directions (fan_in, r), at most as many as there are inputs."
    generator = torch.Generator().manual_seed(seed)
    shape = (fan_in, min(r, fan_in))
    drawn = torch.randn(shape, generator=generator, dtype=dtype)
    return torch.linalg.qr(drawn).Q


def gradients(shape, steps=50, dtype=torch.float64, seed=2):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -1, shape[-1], dtype=dtype)
    return [
        torch.randn(*shape, generator=generator, dtype=dtype) * scale + 0.1
        for _ in range(steps)
    ]


def run(model, optimizer, grads):
    for g in grads:
        model.weight.grad = g.clone().to(model.weight.dtype)
        optimizer.step()
    return model.weight.detach()


def regression(seed=0, dtype=torch.float32, size=(6, 9, 3)):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(size[0], size[1], dtype=dtype),
        nn.Tanh(),
        nn.Linear(size[1], size[2], dtype=dtype),
    )
    x, y = (
        torch.randn(40, size[0], dtype=dtype),
        torch.randn(40, size[2], dtype=dtype),
    )
    return model, lambda: (model(x) - y).square().mean()


def train(model, loss, optimizer, steps=10):
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]
