"""Faults with a seed, thrown at a tiny real study, at what training leaves
behind, and at `dmr finetune`: files damaged at rest, processes ended at some
moment or just before a write, texts changed, a cluster taken apart.

Each fault ends in a verdict:

    healed    everything stands, bit for bit as undisturbed, timings apart
    noticed   what does not stand is named, and is made again or refused
    lost      a result is gone without a word
    doubled   a run stands twice in the table
    wrong     something counts that differs from the undisturbed one
    crashed   an error that does not say what it is about

`make faults` throws all of them and prints the table; the slow tests a few.
"""

import argparse
import csv
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import batches  # noqa: E402
import checkpoints  # noqa: E402
from damage import HOW, Verdict  # noqa: E402

VERDICTS = ("healed", "noticed", "lost", "doubled", "wrong", "crashed")
GOOD = VERDICTS[:2]
BYTES = HOW[:4]  # without another shape, which only text files can have


@dataclass(frozen=True)
class Kind:
    "Faults of one kind, thrown in turn, each time with another seed."

    name: str
    faults: tuple[str, ...]
    count: int  # how many are thrown, unless told otherwise
    # what they are thrown at, made once, and how one is thrown
    target: Callable[[], Any]
    throw: Callable[[Any, str, random.Random], Verdict]


def each_with(files: Iterable[str], how: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{h} {file}" for file in files for h in how)


def kinds(ground: Callable[[], batches.Ground]) -> Iterator[Kind]:
    "All kinds; `ground` makes the study when it is needed."
    at_rest = each_with(batches.FILES, HOW)
    yield Kind("study at rest", at_rest, 210, ground, batches.at_rest)
    tables = each_with(batches.TABLES, HOW)
    # of a table that is lost with all run folders nobody could know
    tables += tuple(f"{t} alone" for t in tables if t != "lost tiny.csv")
    yield Kind("table at rest", tables, 57, ground, batches.at_table)
    signals = each_with(batches.PARTS, ("KILL", "TERM", "INT"))
    signals += ("KILL all",)
    yield Kind("signal in a batch", signals, 30, ground, batches.in_batch)
    parts = tuple(batches.PARTS)
    at_write = ("kill at a write of a batch", parts, 27, ground)
    yield Kind(*at_write, batches.at_write)
    texts = ("flip", "cut")
    yield Kind("text changed in a batch", texts, 4, ground, batches.in_text)
    cluster = ("dask cluster", batches.CLUSTER, 22, ground)
    yield Kind(*cluster, batches.in_cluster)
    states = each_with(checkpoints.STATES, BYTES)
    for name in ("train", "finetune"):
        begun = lambda name=name: checkpoints.Interrupted(name)
        label, go = f"checkpoint of a {name} run", checkpoints.in_checkpoint
        yield Kind(label, states, 48, begun, go)
        label, go = f"kill at a write of a {name} run", checkpoints.killed_run
        yield Kind(label, ("KILL",), 12, begun, go)
    router = (*HOW, "killed")
    routed = checkpoints.Routed
    yield Kind("router's file", router, 60, routed, checkpoints.in_router)
    beside = each_with(checkpoints.BESIDE, BYTES)
    trained = checkpoints.Trained
    yield Kind(
        "Trainer's checkpoint", beside, 56, trained, checkpoints.in_trainer
    )
    killed = ("kill at a write of a Trainer", ("KILL",), 8, trained)
    yield Kind(*killed, checkpoints.killed_trainer)
    files = each_with(checkpoints.FOLDER, BYTES)
    tuned = checkpoints.Tuned
    yield Kind("dmr finetune at rest", files, 56, tuned, checkpoints.at_tuned)
    ends = ("KILL at a write", "KILL", "TERM", "INT")
    live = ("dmr finetune ended", ends, 16, tuned)
    yield Kind(*live, checkpoints.killed_tuned)


def tell(line: str) -> None:
    print(line, flush=True)


def throw(
    kind: Kind,
    count: int,
    seed: int = 0,
    say: Callable[[str], None] = tell,
    until: float = float("inf"),  # by time.monotonic()
) -> list[dict[str, Any]]:
    "Throw so many faults of a kind, as far as time allows; a row for each."
    rows, target = [], kind.target()
    for i in range(count):
        if time.monotonic() > until:
            break
        fault = kind.faults[i % len(kind.faults)]
        rng = random.Random(f"{kind.name} {fault} {seed} {i}")
        try:
            verdict, detail = kind.throw(target, fault, rng)
        except Exception as e:
            last = traceback.extract_tb(e.__traceback__)[-1]
            detail = f"{type(e).__name__}: {e} ({last.name}, {last.lineno})"
            verdict = "crashed"
        rows.append(dict(kind=kind.name, fault=fault, verdict=verdict))
        if verdict not in GOOD:
            say(f"{kind.name}, {fault}, number {i}: {verdict}: {detail}")
    return rows


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    "How many faults of each kind came to which verdict."
    out = []
    for kind in dict.fromkeys(r["kind"] for r in rows):
        n = Counter(r["verdict"] for r in rows if r["kind"] == kind)
        counts = {v: n[v] for v in VERDICTS}
        out.append(dict(kind=kind, faults=sum(n.values()), **counts))
    return out


def keep(counts: list[dict[str, Any]], path: Path) -> None:
    "Write a table; kinds in the file that were not thrown keep their rows."
    new = {row["kind"]: row for row in counts}
    old: dict[str, Any] = {}
    if path.exists():
        with path.open(newline="") as file:
            old = {row["kind"]: row for row in csv.DictReader(file)}
    order = [kind.name for kind in kinds(lambda: None)]  # type: ignore
    known = (name for name in order if name in {**old, **new})
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, counts[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**old, **new}[name] for name in known)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=0, help="another draw")
    parser.add_argument("--count", type=int, help="faults of each kind")
    parser.add_argument("--minutes", type=float, help="for each kind")
    parser.add_argument(
        "--kinds", default="", help="only kinds with one of these, by commas"
    )
    parser.add_argument(
        "--out", type=Path, help="CSV; rows of other kinds stay in it"
    )
    return parser.parse_args()


def main() -> int:
    args = options()
    warnings.simplefilter("ignore")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="dmr-faults-") as folder:

        @cache
        def ground() -> batches.Ground:
            made = batches.Ground(Path(folder) / "project")
            made.make()
            return made

        for kind in kinds(ground):
            if not any(word in kind.name for word in args.kinds.split(",")):
                continue
            begun, count = time.monotonic(), args.count or kind.count
            end = begun + 60 * args.minutes if args.minutes else float("inf")
            found = throw(kind, count, args.seed, until=end)
            rows += found
            took = time.monotonic() - begun
            print(f"{kind.name}: {len(found)} in {took:.0f} s", flush=True)
            if args.out and rows:
                keep(table(rows), args.out)
    counts = table(rows)
    print(f"{'kind':34}{'faults':>8}", *(f"{v:>9}" for v in VERDICTS))
    for row in counts:
        numbers = (f"{row[v]:>9}" for v in VERDICTS)
        print(f"{row['kind']:34}{row['faults']:>8}", *numbers)
    bad = sum(row[v] for row in counts for v in VERDICTS[2:])
    print(f"{len(rows)} faults; {bad} lost, doubled, wrong or crashed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
