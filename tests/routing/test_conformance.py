"""Every modification of the package against the shared conformance checks
(dmr.routing.conformance), under all routings.
"""

import pytest
import torch

import dmr
from dmr.methods.agem import AGEM
from dmr.methods.controls import CurrentBasis, LastTaskProjection, RandomBasis
from dmr.methods.gpm import GPM, NSCL, SGP
from dmr.methods.ogd import OGD
from dmr.methods.penalty import EWC, SI
from dmr.methods.registry import FAMILIES
from dmr.routing.conformance import CHECKS, Problem

torch.set_num_threads(1)

MODIFICATIONS = {
    "projection": lambda p: dmr.Projection(rank=2, every=1),
    "projection-energy": lambda p: dmr.Projection(
        energy=0.8, importance=5.0, max_rank=4, every=2
    ),
    "projection-bases": lambda p: dmr.Projection(
        bases={"0.weight": torch.eye(6)[:, :2]}
    ),
    "gpm": lambda p: GPM(p.loss_fn, threshold=0.8, samples=10, batch_size=4),
    "sgp": lambda p: SGP(p.loss_fn, scale=5.0, threshold=0.8, samples=10),
    "nscl": lambda p: NSCL(p.loss_fn, ratio=10.0, samples=10),
    "nscl-normalised": lambda p: NSCL(
        p.loss_fn, ratio=3.0, normalise=True, samples=10
    ),
    "ogd": lambda p: OGD(p.logit_fn, vectors=5),
    "agem": lambda p: AGEM(dmr.ReplayBuffer(seed=3), p.loss_fn, fraction=0.5),
    "replay": lambda p: dmr.ReplayMix(
        dmr.ReplayBuffer(seed=3), p.loss_fn, fraction=0.5
    ),
    "ewc": lambda p: EWC(p.loss_fn, lam=30.0, samples=6),
    "ewc-online": lambda p: EWC(
        p.loss_fn, lam=30.0, samples=6, online=True, gamma=0.9
    ),
    "ewc_scale": lambda p: EWC(p.loss_fn, form="rescale", samples=6),
    "si": lambda p: SI(c=3.0, xi=0.01),
    "si_scale": lambda p: SI(form="rescale", normalise="max"),
    "random": lambda p: RandomBasis(rank=2, every=1),
    "current": lambda p: CurrentBasis(rank=2, every=1, refresh=3),
    "last_task": lambda p: LastTaskProjection(rank=2, every=1),
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", MODIFICATIONS)
@pytest.mark.filterwarnings("ignore:the basis of")
def test_conforms(name, check):
    check(MODIFICATIONS[name])


def test_every_family_is_under_the_checks():
    made = {type(make(Problem())) for make in MODIFICATIONS.values()}
    assert set(FAMILIES) <= {name.split("-")[0] for name in MODIFICATIONS}
    functions = {"loss_fn": lambda b: b, "logit_fn": lambda b: b}
    assert {
        type(dmr.methods.registry.make(name, **functions)) for name in FAMILIES
    } <= made
