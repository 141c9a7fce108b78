"""Layers, directions and gradients that tests of several rooms share."""

import torch
from torch import nn


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
