"""A sample of the faults that `make faults` throws, and whether the harness
itself would see a wrong number.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import threading
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from attack import GOOD, HOW, Kind, keep, kinds, table, throw
from batches import Ground, judge_live, judge_rest, judge_table
from checkpoints import Routed, judge_router
from cluster import Link
from damage import damage, ended, forked

from dmr.files import read_object, write_object
from dmr.routing.strength import Fixed
from dmr.studies.table import TableError, read_rows, rows_text

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DMR_CACHE", "")  # `Ground` sets it; here it is put back
        made = Ground(tmp_path_factory.mktemp("ground") / "project")
        made.make()
        yield made


@pytest.mark.parametrize(
    "name, count",
    [
        ("study at rest", 35),
        ("table at rest", 19),
        ("kill at a write of a batch", 1),
        ("checkpoint of a train run", 12),
        ("kill at a write of a train run", 2),
        ("router's file", 6),
    ],
)
def test_no_fault_passes(ground, name, count):
    warnings.simplefilter("ignore")
    kind = next(k for k in kinds(lambda: ground) if k.name == name)
    said = []
    rows = throw(kind, count, 1000, said.append)
    assert len(rows) == count and not said, said
    assert {r["verdict"] for r in rows} <= set(GOOD)


def test_a_forged_result_is_seen_as_wrong(ground, tmp_path):
    "Result and marker changed together: the engine believes it, we do not."
    shutil.copytree(ground.made, tmp_path, dirs_exist_ok=True)
    assert judge_live(ground, tmp_path, "healed", "") == ("healed", "")
    table_file = tmp_path / "results/tiny.csv"
    lines = table_file.read_text().splitlines(keepends=True)
    table_file.write_text("".join([*lines, lines[-1]]))
    with pytest.raises(TableError):  # a row twice: the fault counts as crashed
        judge_live(ground, tmp_path, "healed", "")
    table_file.write_text("".join(lines[:-1]))
    assert judge_live(ground, tmp_path, "healed", "")[0] == "lost"
    folder = next(tmp_path.glob("runs/tiny/*/result.json")).parent
    result = json.loads((folder / "result.json").read_text())
    result["metrics"]["forgetting"] += 1e-9
    text = json.dumps(result)
    (folder / "result.json").write_text(text)
    marker = read_object(folder / "done.json")
    marker["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    write_object(folder / "done.json", marker)
    assert judge_rest(ground, tmp_path, "result.json")[0] == "wrong"


def test_a_forged_row_and_a_row_that_went_are_seen(ground, tmp_path):
    "With a checksum that fits: no reader could tell, we do."
    shutil.copytree(ground.made / "results", tmp_path / "results")
    table_file = tmp_path / "results/tiny.csv"
    judge = lambda: judge_table(ground, tmp_path, "tiny.csv")[0]
    rows = read_rows(table_file)
    assert judge() == "healed"
    table_file.write_text(rows_text(rows[:1], sealed=True))
    assert judge() == "lost"
    table_file.write_text(rows_text([{**rows[0], "lr": 9}], sealed=True))
    assert judge() == "wrong"


def test_another_state_of_a_router_is_seen_as_wrong(tmp_path):
    routed = Routed()
    router = routed.back(routed.folder / "router.pt")
    router.strength = Fixed(0.25)
    router.save(tmp_path / "router.pt")
    assert judge_router(routed, tmp_path / "router.pt")[0] == "wrong"


def test_a_process_dies_before_the_write_that_is_asked_for(tmp_path):
    def three():
        for name in "abc":
            (tmp_path / f"in/{name}").write_text(name)

    (tmp_path / "in").mkdir()
    under, once = str(tmp_path / "in"), tmp_path / "once"
    assert ended(forked(three, (0, under, str(once)))) == 0
    assert once.read_bytes() == b"..."  # counted
    shutil.rmtree(tmp_path / "in")
    (tmp_path / "in").mkdir()
    once.unlink()
    die = (2, under, str(once))
    assert ended(forked(three, die)) == -signal.SIGKILL
    assert [*os.listdir(tmp_path / "in")] == ["a"]
    assert ended(forked(three, die)) == 0  # no other one dies


def test_a_link_can_be_cut_and_hang():
    server = socket.create_server(("127.0.0.1", 0))

    def echo():
        while True:
            end, _ = server.accept()
            threading.Thread(
                target=lambda end=end: end.sendall(end.recv(9)), daemon=True
            ).start()

    threading.Thread(target=echo, daemon=True).start()
    link = Link(f"tcp://127.0.0.1:{server.getsockname()[1]}")

    def call(wait=5.0):
        host, port = link.address.removeprefix("tcp://").split(":")
        with socket.create_connection((host, int(port)), 5) as end:
            end.settimeout(wait)
            end.sendall(b"hello")
            return end.recv(9)

    assert call() == b"hello"
    link.flows.clear()
    with pytest.raises(TimeoutError):
        call(0.5)
    link.mend()
    assert call() == b"hello"
    link.cut()
    with pytest.raises((OSError, AssertionError)):
        assert call() == b"hello"
    link.mend()
    assert call() == b"hello"
    link.close()


HEALS = Kind("a", ("b", "c"), 3, lambda: 0, lambda *_: ("healed", ""))


def test_the_table_counts_every_fault(tmp_path):
    breaks = replace(HEALS, name="d", throw=lambda *_: 1 / 0)
    said = []
    rows = throw(HEALS, 3, 0, said.append) + throw(breaks, 1, 0, said.append)
    assert [r["fault"] for r in rows] == ["b", "c", "b", "b"]
    counts = table(rows)
    assert [r["faults"] for r in counts] == [3, 1]
    assert counts[0]["healed"] == 3 and counts[1]["crashed"] == 1
    assert "ZeroDivisionError" in said[0] and len(said) == 1


def test_kinds_that_were_not_thrown_keep_their_rows(tmp_path):
    names = [kind.name for kind in kinds(lambda: None)]
    assert len({*names}) == len(names)
    row = lambda name, n: table([dict(kind=name, verdict="healed")] * n)
    keep(row(names[2], 5), tmp_path / "t.csv")
    keep(row(names[1], 4) + row(names[3], 2), tmp_path / "t.csv")
    keep(row(names[2], 7), tmp_path / "t.csv")
    lines = (tmp_path / "t.csv").read_text().splitlines()[1:]
    assert [line.split(",")[:2] for line in lines] == [
        [names[1], "4"],
        [names[2], "7"],
        [names[3], "2"],
    ]


def test_a_fault_is_the_same_for_a_seed():
    drawn = lambda _, fault, rng: ("healed", seen.append(rng.random()))
    seen: list = []
    for seed in (0, 0, 1):
        throw(replace(HEALS, throw=drawn), 4, seed)
    assert seen[:4] == seen[4:8] != seen[8:] and len({*seen}) == 8


@pytest.mark.parametrize("how", HOW)
def test_damage_is_the_same_for_a_seed(tmp_path, how):
    seen = set()
    for _ in range(2):
        path = tmp_path / "file"
        path.write_bytes(bytes(range(200)))
        damage(path, how, random.Random(3))
        seen.add(path.read_bytes() if path.exists() else None)
    assert len(seen) == 1 and bytes(range(200)) not in seen
