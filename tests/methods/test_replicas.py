"Several processes with a copy of the model each."

import time

import pytest
import torch
import torch.nn.functional as F
from conftest import flat
from torch import nn

from dmr.methods.registry import FAMILIES, make
from dmr.routing.conformance import Problem
from dmr.routing.router import MomentRouter

torch.set_num_threads(1)


def replica(rank, store, names, out):
    """One of two processes with a copy of the model each, and examples of its
    own.
    """
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        store=torch.distributed.FileStore(store, 2),
        rank=rank,
        world_size=2,
    )
    for name in names:
        problem = Problem(torch.float64)
        model = nn.parallel.DistributedDataParallel(problem.model)
        # other examples in each process
        shift = [(x + 0.5 * rank, y) for x, y in problem.domains]
        options = {"fraction": 0.5} if "buffer" in FAMILIES[name].needs else {}
        options |= (
            {"every": 1, "rank": 2} if FAMILIES[name].kind == "control" else {}
        )
        options |= {"threshold": 0.7} if name in ("gpm", "sgp") else {}
        modification = make(
            name,
            loss_fn=problem.loss_fn,
            logit_fn=problem.logit_fn,
            seed=rank,
            **options,
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        with MomentRouter(
            model, optimizer, modification, FAMILIES[name].native, 0.7
        ) as router:
            for x, y in shift:
                for step in range(4):
                    batch = (x[8 * (step % 3) :][:8], y[8 * (step % 3) :][:8])
                    router.observe(batch, total=24)
                    optimizer.zero_grad()
                    F.cross_entropy(model(batch[0]), batch[1]).backward()
                    optimizer.step()
                router.consolidate()
        torch.save(flat(problem.model.parameters()), f"{out}/{name}-{rank}.pt")
    torch.distributed.barrier()  # nobody leaves while the other still writes
    # gloo's threads let go of their last tensors, or the process aborts at its
    # end
    time.sleep(0.2)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_replicas_stay_equal(tmp_path):
    torch.multiprocessing.spawn(
        replica,
        (str(tmp_path / "store"), list(FAMILIES), str(tmp_path)),
        nprocs=2,
    )
    for name in FAMILIES:
        a, b = (
            torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True)
            for rank in range(2)
        )
        assert torch.equal(a, b) and a.isfinite().all(), name
