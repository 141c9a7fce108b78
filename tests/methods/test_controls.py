"The controls have the ranks of the real thing, and other directions."

import pytest
import torch

import dmr
from dmr.methods.controls import CurrentBasis, LastTaskProjection, RandomBasis
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


@pytest.mark.parametrize("routing", ["shared", "decoupled"])
def test_the_preprints_own_arm_is_its_definition(routing):
    """Three domains against the obvious way in float64: a basis by the singular
    vectors of the last domain's gradients alone, λ = σ/σ_max, the unweighted
    mean of the shares as the signal, s̄ from 0 in each domain.
    """
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 5, bias=False), torch.nn.Linear(5, 4, bias=False)
    ).double()
    W = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, betas=(0.9, 0.95))
    router = dmr.MomentRouter(
        model,
        optimizer,
        LastTaskProjection(rank=2, every=1),
        routing,
        dmr.OverlapAware(0.5, beta=0.98, initial=0.0, restart=True),
    )
    size = {"0.weight": 100.0, "1.weight": 1.0}
    generator = torch.Generator().manual_seed(1)
    m, v = ({n: torch.zeros_like(w) for n, w in W.items()} for _ in range(2))
    U, lam, t = {}, {}, 0
    for domain in range(3):
        seen, average = {n: [] for n in W}, 0.0
        mix = {
            n: torch.randn(
                w.shape[1], w.shape[1], generator=generator, dtype=w.dtype
            )
            for n, w in W.items()
        }
        for _ in range(6):
            t += 1
            shares, g = [], {}
            for n, p in model.named_parameters():
                noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
                g[n] = p.grad = size[n] * noise @ mix[n]
                seen[n].append(g[n].clone())
                if domain:
                    inside = (g[n] @ U[n]).square().sum()
                    shares.append(float(inside / g[n].square().sum()))
            optimizer.step()
            alpha = 0.0
            if domain:
                signal = sum(shares) / len(shares)
                average = 0.98 * average + 0.02 * signal
                alpha = 0.5 * (1 - average)
                assert router.last["overlap"] == pytest.approx(signal, abs=1e-9)
                assert router.last["alpha"] == pytest.approx(alpha, abs=1e-9)
            for n in W:
                d = 0.0
                if domain:
                    d = g[n] @ U[n] @ torch.diag(lam[n]) @ U[n].T
                edited = g[n] - alpha * d
                to_v = edited if routing == "shared" else g[n]
                m[n] = 0.9 * m[n] + 0.1 * edited
                v[n] = 0.95 * v[n] + 0.05 * to_v**2
                root = (v[n] / (1 - 0.95**t)).sqrt() + 1e-8
                W[n] = W[n] - 1e-2 * m[n] / (1 - 0.9**t) / root
        report = router.consolidate()
        for n in W:
            _, sigma, Vh = torch.linalg.svd(torch.cat(seen[n]))
            U[n], lam[n] = Vh[:2].T, sigma[:2] / sigma[0]
            got = router.modification.bases[n]
            torch.testing.assert_close(
                got @ got.T, U[n] @ U[n].T, atol=1e-9, rtol=0
            )
            torch.testing.assert_close(
                router.modification._lam[n], lam[n], atol=1e-9, rtol=0
            )
            assert report["layers"][n]["rank"] == 2
    for n, w in W.items():
        got = model.get_parameter(n).detach()
        torch.testing.assert_close(got, w, rtol=1e-9, atol=1e-11)


def test_the_last_tasks_basis_needs_domains():
    for options in (
        {"bases": {"0.weight": torch.eye(6)[:, :2]}},
        {"rank": 2, "consolidate_every": 3},
    ):
        with pytest.raises(ValueError, match="its basis from the last domain"):
            LastTaskProjection(**options)
