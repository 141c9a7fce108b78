"""Several processes (gloo, CPU): the guide's own program, and what can go wrong
between processes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow
GUIDE = Path(__file__).parents[2] / "nbs" / "guides" / "06_cluster.ipynb"
TOLERANCE = 1e-9  # float64; sums are taken in another order


def torchrun(program, processes, *arguments):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        str(program),
        *arguments,
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    "The programs that the guide shows, as they stand there."
    folder, found = tmp_path_factory.mktemp("guide"), {}
    for cell in json.loads(GUIDE.read_text())["cells"]:
        magic, _, text = "".join(cell["source"]).partition("\n")
        if magic.startswith("%%writefile"):
            found[magic.split()[1]] = folder / magic.split()[1]
            found[magic.split()[1]].write_text(text)
    return found


@pytest.fixture(scope="module")
def guide(programs):
    return programs["train.py"]


def outcome(program, processes, *arguments):
    words = [program.stem, *(Path(a).name for a in arguments), str(processes)]
    out = program.parent / f"{'-'.join(words)}.pt"
    torchrun(program, processes, *arguments, "--out", str(out))
    return torch.load(out)


def assert_same(a, b):
    for name, w in b["weights"].items():
        assert (a["weights"][name] - w).norm() <= TOLERANCE * w.norm(), name
    for name, U in b["bases"].items():  # the same subspace
        assert a["bases"][name].shape == U.shape
        torch.testing.assert_close(
            torch.linalg.svdvals(a["bases"][name].T @ U),
            torch.ones(U.shape[1], dtype=U.dtype),
            rtol=0,
            atol=1e-7,
        )
    assert a["last"] == pytest.approx(b["last"], rel=1e-6)
    assert a["steps"] == b["steps"]


@pytest.mark.parametrize(
    "routing", ["shared", "decoupled", "denominator", "displacement"]
)
def test_several_processes_go_where_one_goes(guide, routing):
    one = outcome(guide, 1, "ddp", "--routing", routing)
    assert_same(outcome(guide, 2, "ddp", "--routing", routing), one)
    assert_same(outcome(guide, 2, "shard", "--routing", routing), one)


def test_four_shards_of_five_rows(guide):
    "One process holds no row of the last layer at all."
    assert_same(outcome(guide, 4, "shard"), outcome(guide, 1, "ddp"))


@pytest.mark.parametrize("how", ["ddp", "shard"])
def test_a_checkpoint_loads_into_another_number_of_processes(
    guide, how, tmp_path
):
    through = outcome(guide, 2, how, "--save", str(tmp_path / "checkpoint"))
    for processes in (1, 3) if how == "shard" else (1,):
        assert_same(
            outcome(
                guide, processes, how, "--resume", str(tmp_path / "checkpoint")
            ),
            through,
        )


def test_accelerate_goes_where_one_process_goes_and_resumes_in_another_number(
    programs, tmp_path
):
    pytest.importorskip("accelerate")
    program = programs["accelerated.py"]
    one = outcome(program, 1)
    assert_same(
        outcome(program, 2, "--save", str(tmp_path / "checkpoint")), one
    )
    assert_same(
        outcome(program, 1, "--resume", str(tmp_path / "checkpoint")), one
    )


CASES = """
import sys
import time
from unittest.mock import patch
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
import dmr
from dmr.methods.gpm import GPM
from dmr.routing.sharding import local

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
mesh = dist.init_device_mesh("cpu", (world,))


def make(shard, width=10):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(12, width), nn.Tanh(), nn.Linear(width, 4)
    ).double()
    if shard:
        fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def data(step, share=True):
    x = torch.randn(
        8,
        12,
        generator=torch.Generator().manual_seed(step),
        dtype=torch.float64,
    )
    return x[rank::world] if share else x


def everywhere(x):
    parts = [torch.empty_like(x) for _ in range(world)]
    dist.all_gather(parts, x.contiguous())
    return parts


def raises(kind, text, call):
    try:
        call()
    except kind as error:
        assert text in str(error), error
    else:
        raise AssertionError(f"no {kind.__name__}")


def non_finite_on_one_process_stops_all():
    for active in (False, True):
        model, optimizer = make(True)
        router = dmr.MomentRouter(
            model,
            optimizer,
            dmr.Projection(rank=2, every=1),
            strength=dmr.OverlapAware(0.5),
        )
        model(data(0)).square().mean().backward()
        if active:
            optimizer.step()
            router.consolidate()
        before = [local(p).clone() for p in model.parameters()]
        if rank == world - 1:
            local(model[0].weight.grad)[0, 0] = float("nan")
        raises(
            ValueError,
            "'0.weight'" if rank == world - 1 else "another process",
            optimizer.step,
        )
        assert all(
            torch.equal(local(p), b) for p, b in zip(model.parameters(), before)
        ) and router.steps == int(active)


def replay_is_the_mean_over_replicas():
    inner, _ = make(False)
    model = DistributedDataParallel(inner)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss = lambda x: inner(x).square().mean()
    mix = dmr.ReplayMix(
        dmr.ReplayBuffer(seed=rank, capacity=3), loss, fraction=None
    )
    router = dmr.MomentRouter(model, optimizer, mix, "decoupled", 0.5)
    for step in range(6):
        x = data(step)
        router.observe(x)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if step == 2:
            router.consolidate()
    kept = everywhere(mix.buffer.memory[""])
    assert not torch.equal(kept[0], kept[1])  # its own examples
    for p in inner.parameters():
        a, b = everywhere(p.detach())[:2]
        assert torch.equal(a, b)  # and one model
    mix.prepare()
    mine = mix._g["0.weight"]
    a, b = everywhere(mine)[:2]
    assert torch.equal(a, b)


def input_sketches_merge():
    bases = {}
    for how in ("one", "ddp", "shard", "hybrid"):
        model, optimizer = make(how == "shard")
        if how == "hybrid":  # every process holds all rows, and sees other data
            fully_shard(
                model,
                mesh=dist.init_device_mesh(
                    "cpu", (world, 1), mesh_dim_names=("replicate", "shard")
                ),
            )
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        wrapped = DistributedDataParallel(model) if how == "ddp" else model
        router = dmr.MomentRouter(
            wrapped,
            optimizer,
            dmr.Projection(rank=3, every=1, source="inputs"),
            strength=0.0,
        )
        for step in range(4):
            optimizer.zero_grad()
            wrapped(data(step, how != "one")).square().mean().backward()
            optimizer.step()
            if step == 1:
                # saved in the middle of a domain: what the others have seen is
                # in it, once
                state = router.state_dict()
                router.load_state_dict(state)
                sums = state["edit"]["sketches"]["0.weight"]["sums"]
                x = torch.cat([data(i, False) for i in (0, 1)])
                torch.testing.assert_close(sums, x.T @ x, rtol=1e-9, atol=1e-12)
        router.consolidate()
        bases[how] = router.modification.bases["0.weight"]
    for how in ("ddp", "shard", "hybrid"):
        s = torch.linalg.svdvals(bases["one"].T @ bases[how])
        torch.testing.assert_close(s, torch.ones_like(s), rtol=0, atol=1e-7)
        a, b = everywhere(bases[how])[:2]
        assert torch.equal(a, b)


def interpolation_and_its_state():
    results = {}
    for shard in (False, True):
        model, optimizer = make(shard)
        router = dmr.MomentRouter(
            model, optimizer, dmr.Projection(rank=2, every=1)
        )
        for step in range(4):
            optimizer.zero_grad()
            model(data(step, False)).square().mean().backward()
            optimizer.step()
            if step % 2:
                router.consolidate(interpolate=0.5)
        results[shard] = [
            p.full_tensor() if shard else p.detach() for p in model.parameters()
        ]
        state = router.state_dict()
        router.load_state_dict(state)
        again = router.state_dict()
        for name, x in state["consolidation"]["before"].items():
            assert torch.equal(x, again["consolidation"]["before"][name])
            assert x.shape == dict(model.named_parameters())[name].shape
    for a, b in zip(results[False], results[True]):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def merging_and_its_state():
    "A merge by curvature: split rows and copies give what one process gives."
    for curvature in ("gradients", "moment"):
        results = {}
        for how in ("one", "ddp", "shard"):
            model, optimizer = make(how == "shard")
            wrapped = DistributedDataParallel(model) if how == "ddp" else model
            router = dmr.MomentRouter(
                wrapped,
                optimizer,
                dmr.Projection(rank=2, every=1),
                "displacement",
                consolidation=dmr.FisherMerge(
                    0.6, damping=0.1, curvature=curvature
                ),
            )
            for step in range(6):
                optimizer.zero_grad()
                x = data(step, how != "one")
                wrapped(x).square().mean().backward()
                optimizer.step()
                if step % 2:
                    report = router.consolidate()
            results[how] = [
                p.full_tensor() if how == "shard" else p.detach()
                for p in model.parameters()
            ]
            assert 0 < report["consolidation"]["share"] <= 1
            state = router.state_dict()
            router.load_state_dict(state)
            again = router.state_dict()["consolidation"]
            for part in ("before", "past"):
                for name, x in state["consolidation"][part].items():
                    assert torch.equal(x, again[part][name])
                    shape = dict(model.named_parameters())[name].shape
                    assert x.shape == shape
        for how in ("ddp", "shard"):
            for a, b in zip(results["one"], results[how]):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    optimizer.step()  # the last ones are sharded
    if rank == world - 1:
        local(model[0].weight).data[0, 0] = float("nan")
    mine = "'0.weight'" if rank == world - 1 else "another process"
    raises(ValueError, mine, router.consolidate)
    assert router.domains == 3


def a_copy_that_alone_is_not_finite_stops_all():
    inner, optimizer = make(False)
    model = DistributedDataParallel(inner)
    method = dmr.Projection(rank=2, every=1)
    router = dmr.MomentRouter(
        model, optimizer, method, consolidation=dmr.FisherMerge()
    )
    model(data(0)).square().mean().backward()
    optimizer.step()
    if rank == world - 1:
        inner[0].weight.data[0, 0] = float("nan")
    mine = "'0.weight'" if rank == world - 1 else "another process"
    raises(ValueError, mine, router.consolidate)
    assert router.domains == 0 and method.fed


def a_look_sees_the_rows_of_all_gradients():
    "Also where one layer alone is routed: what one process sees, in parts."

    class Seeing(dmr.Modification):
        shards = True

        def look(self, steps):
            self.seen = {name: steps[name].clone() for name in steps}

        def edit(self, name, x):
            return dmr.Dense(0.5 * x) if name in self.targets else None

    seen = {}
    for shard in (False, True):
        model, optimizer = make(shard)
        router = dmr.MomentRouter(
            model, optimizer, Seeing(), "shared", include="2.weight"
        )
        model(data(0, False)).square().mean().backward()
        with patch.dict("dmr.routing.step.BATCHED", cpu=0):
            optimizer.step()
        seen[shard] = router.modification.seen
    assert list(seen[True]) == list(seen[False])
    assert len(seen[True]) == 4
    for name, g in seen[False].items():
        assert torch.equal(torch.cat(everywhere(seen[True][name])), g)


def inflation_is_measured_over_all_rows():
    seen = {}
    for shard in (False, True):
        model, optimizer = make(shard)
        router = dmr.MomentRouter(
            model,
            optimizer,
            dmr.Projection(rank=2, every=1),
            "shared",
            0.7,
            track_inflation=True,
        )
        for step in range(6):
            optimizer.zero_grad()
            model(data(step, False)).square().mean().backward()
            optimizer.step()
            if step == 2:
                router.consolidate()
        router.load_state_dict(router.state_dict())
        seen[shard] = router.inflation()["0.weight"]
    for key, value in seen[False].items():
        assert abs(seen[True][key] - value) < 1e-9 * abs(value), (key, seen)


def refusals():
    model, optimizer = make(True)
    loss = lambda batch: model(batch).square().mean()
    raises(
        ValueError,
        "needs whole weights",
        lambda: dmr.MomentRouter(
            model, optimizer, dmr.ReplayMix(dmr.ReplayBuffer(), loss)
        ),
    )
    raises(
        ValueError,
        "needs whole weights",
        lambda: dmr.MomentRouter(model, optimizer, GPM(loss)),
    )
    layer = nn.Linear(12, 4).double()
    layer.weight = nn.Parameter(
        distribute_tensor(layer.weight.detach(), mesh, [Shard(1)])
    )
    optimizer = torch.optim.AdamW(layer.parameters())
    raises(
        ValueError,
        "splits its input side",
        lambda: dmr.MomentRouter(layer, optimizer, dmr.Projection(rank=2)),
    )


for name in sys.argv[1:]:
    globals()[name]()
    dist.barrier()
    if rank == 0:
        print("passed", name)
time.sleep(0.2)  # as in the guide
dist.destroy_process_group()
"""


def test_between_two_processes(tmp_path):
    program = tmp_path / "cases.py"
    program.write_text(CASES)
    names = [
        line.split("(")[0].removeprefix("def ")
        for line in CASES.splitlines()
        if line.startswith("def ") and line.endswith("():")
    ]
    assert len(names) == 9
    assert torchrun(program, 2, *names).split() == [
        word for name in names for word in ("passed", name)
    ]
