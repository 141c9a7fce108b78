"""What the faults have in common: damage to a file, a process that ends
before its time, and results to compare.
"""

import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "kill"))

from dies import die_at_write

#: Verdict and what there is to say.
Verdict = tuple[str, str]
HOW = ("flip", "cut", "empty", "lost", "shape")
#: Entries of a result that differ from one time to the next.
TIMES = ("wall_s", "train_s", "eval_s", "tokens_per_s", "seconds")


def timeless(value: Any) -> Any:
    "A result without its timings, its surroundings and its folder."
    if isinstance(value, dict):
        apart = (*TIMES, "environment", "checkpoint", "folder")
        return {k: timeless(v) for k, v in value.items() if k not in apart}
    if isinstance(value, (list, tuple)):
        return [timeless(v) for v in value]
    return value


def damage(path: Path, how: str, rng: random.Random) -> None:
    "Damage one file."
    data = bytearray(path.read_bytes())
    if how == "lost":
        return path.unlink()
    if how == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    if how == "cut":
        data = data[: rng.randrange(len(data))]
    if how == "empty":
        data = bytearray()
    if how == "shape":
        others = ("[]", "null", "3", '"text"', "{}", '{"state": []}')
        data = bytearray(rng.choice(others).encode())
    path.write_bytes(data)


def kill_at(role: str, n: int, folder: Path, once: Path) -> dict[str, str]:
    "Environment in which a process dies before its n-th write; 0: counts."
    how = dict(role=role, n=n, under=str(folder), once=str(once))
    here = str(Path(__file__).parent / "kill")
    path = os.environ.get("PYTHONPATH", "")
    return dict(
        DMR_TEST_KILL=json.dumps(how),
        PYTHONPATH=os.pathsep.join(filter(None, (here, path))),
    )


def forked(
    act: Callable[[], Any],
    die: tuple[int, str, str] | None = None,  # see `die_at_write`
) -> int:  # its process id
    "Let a child process do something quietly; it may die at a write."
    if pid := os.fork():
        return pid
    code = 1
    try:
        nowhere = os.open(os.devnull, os.O_RDWR)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        if die:
            die_at_write(*die)
        act()
        code = 0
    finally:
        os._exit(code)


def ended(pid: int) -> int:
    "Exit code of a child; negative: the signal that killed it."
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
