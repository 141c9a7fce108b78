"""A sample of the faults that `make faults` throws, and whether the harness
itself would see a wrong number.
"""

import hashlib
import json
import random
import shutil
import sys
import warnings
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from attack import (
    FILES,
    HOW,
    Ground,
    Interrupted,
    at_rest,
    damage,
    in_checkpoint,
    judge_rest,
    table,
    throw,
)

from dmr.files import read_object, write_object

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    made = Ground(tmp_path_factory.mktemp("ground") / "project")
    made.make()
    return made


@pytest.mark.parametrize("file", FILES)
def test_no_damage_at_rest_passes(ground, file):
    each = (
        (file, how, 1000, lambda r, how=how: at_rest(ground, r, file, how))
        for how in HOW
    )
    verdicts = {r["fault"]: r["verdict"] for r in throw(each)}
    assert set(verdicts.values()) <= {"healed", "noticed"}, verdicts


def test_no_damage_in_a_checkpoint_passes():
    warnings.simplefilter("ignore")
    begun = Interrupted("train")
    each = (
        (
            "checkpoint",
            f"{how} {file}",
            1000,
            lambda r, h=how, f=file: in_checkpoint(begun, r, f, h),
        )
        for how in ("flip", "cut", "empty", "lost")
        for file in ("state.pt", "both")
    )
    verdicts = {r["fault"]: r["verdict"] for r in throw(each)}
    assert set(verdicts.values()) == {"healed"}, verdicts


def test_a_forged_result_is_seen_as_wrong(ground, tmp_path):
    "Result and marker changed together: the engine believes it, we do not."
    runs = tmp_path / "runs"
    shutil.copytree(ground.folders.runs, runs)
    folder = next(runs.glob("tiny/*/result.json")).parent
    result = json.loads((folder / "result.json").read_text())
    result["metrics"]["forgetting"] += 1e-9
    text = json.dumps(result)
    (folder / "result.json").write_text(text)
    marker = read_object(folder / "done.json")
    marker["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    write_object(folder / "done.json", marker)
    assert judge_rest(ground, runs, "result.json")[0] == "wrong"


def test_the_table_counts_every_fault():
    each = (("a", "b", seed, lambda r: ("healed", "")) for seed in range(3))
    broken = ("c", "d", 0, lambda r: 1 / 0)
    said = []
    rows = table(throw([*each, broken], said.append))
    assert [r["faults"] for r in rows] == [3, 1]
    assert rows[0]["healed"] == 3 and rows[1]["crashed"] == 1
    assert "ZeroDivisionError" in said[0]


@pytest.mark.parametrize("how", HOW)
def test_damage_is_the_same_for_a_seed(tmp_path, how):
    seen = set()
    for _ in range(2):
        path = tmp_path / "file"
        path.write_bytes(bytes(range(200)))
        damage(path, how, random.Random(3))
        seen.add(path.read_bytes() if path.exists() else None)
    assert len(seen) == 1 and bytes(range(200)) not in seen
