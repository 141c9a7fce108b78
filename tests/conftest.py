"""What tests of several rooms share: references written out, and broken
functions. Import them by name: `from conftest import PlainAdam`.
"""

import math

import pytest
import torch


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
