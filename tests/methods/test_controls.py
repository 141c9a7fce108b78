"The controls have the ranks of the real thing, and other directions."

import pytest
import torch

import dmr
from dmr.methods.controls import CurrentBasis, RandomBasis
from dmr.routing.conformance import same, train, trainer

torch.set_num_threads(1)


@pytest.mark.parametrize(
    "options", [{"rank": 2}, {"energy": 0.7, "max_rank": 4}]
)
def test_controls_have_the_ranks_of_the_real_thing(options):
    ranks, bases = {}, {}
    kinds = {
        "real": dmr.Projection,
        "random": RandomBasis,
        "current": lambda **o: CurrentBasis(refresh=2, **o),
    }
    for kind, cls in kinds.items():
        # equal gradients
        problem, optimizer, router = trainer(
            lambda p, cls=cls: cls(every=1, **options), "shared", strength=0.0
        )
        ranks[kind] = []
        for domain in range(3):
            train(problem, optimizer, router, domain, range(5))
            active = {
                n: U.shape[1] for n, U in router.modification.bases.items()
            }
            ranks[kind].append(active)
            bases[kind] = {
                n: U.clone() for n, U in router.modification.bases.items()
            }
            router.consolidate()
    assert ranks["real"] == ranks["random"] == ranks["current"]
    assert any(ranks["real"][-1].values())
    for name, U in bases["real"].items():
        for kind in ("random", "current"):
            V = bases[kind][name]
            torch.testing.assert_close(
                V.T @ V, torch.eye(V.shape[1]), rtol=0, atol=1e-5
            )
            assert not torch.allclose(U @ U.T, V @ V.T, atol=1e-2)


def test_the_random_basis_draws_from_its_own_stream_and_keeps_what_it_drew():
    def bases(seed, disturb=0):
        torch.manual_seed(disturb)
        run = trainer(lambda p: RandomBasis(rank=1, every=1, seed=seed))
        out = []
        for domain in range(2):
            train(*run, domain, range(3))
            run[2].consolidate()
            out.append(run[2].modification.bases["0.weight"].clone())
        return out

    first, second = bases(0)
    assert torch.equal(first, second[:, :1]) and second.shape[1] == 2
    assert same(bases(0), bases(0, disturb=9)) and not same(bases(0), bases(1))
