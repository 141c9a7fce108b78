"""The house: rooms that stand on one another, read from the imports."""

import ast
import json
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: Rooms by floor. A room imports only what stands on a floor below it.
FLOORS = (
    {"theory", "files", "extras"},
    {"routing"},
    {"methods", "text"},
    {"frameworks"},
    {"training"},
    {"studies"},
    {"reporting"},
    {"verdict"},
    {"book"},
    {"cli"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def modules():
    "Dotted names of the package's modules, and their files."
    for path in sorted((ROOT / "dmr").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] != "_modidx":
            yield ".".join(p for p in parts if p != "__init__"), path


def imported(name, path, known):
    "Modules that one imports, wherever in its text; for types alone, too."
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: 1 - node.level or None]
            base = ".".join(above) if node.level else ""
            home = ".".join(x for x in (base, node.module) if x)
            found = [home, *(f"{home}.{a.name}" for a in node.names)]
        else:
            continue
        yield from {f for f in found if f in known} - {name}


def graph():
    files = dict(modules())
    return {name: set(imported(name, p, files)) for name, p in files.items()}


def room(module):
    "`dmr.text.load` is in the room `text`, `dmr` itself in none."
    return module.split(".")[1] if "." in module else None


def test_every_module_has_a_room():
    assert {room(m) for m in graph()} - {None} == set(FLOOR)


def test_a_room_imports_only_rooms_below_it():
    up = [
        f"{module} -> {other}"
        for module, others in graph().items()
        for other in others
        if room(module) and room(other) and room(module) != room(other)
        if FLOOR[room(other)] >= FLOOR[room(module)]
    ]
    assert not up, up


def test_no_circle():
    left = {m: others - {"dmr"} for m, others in graph().items() if m != "dmr"}
    while free := {m for m, others in left.items() if not others & set(left)}:
        left = {m: others for m, others in left.items() if m not in free}
    assert not left, {m: sorted(o & set(left)) for m, o in left.items()}


def test_what_the_wheel_leaves_out_is_imported_by_nothing_in_it():
    "Only the command line names verdict and book, inside functions."
    outside = {"verdict", "book"}
    wrong = [
        f"{module} -> {other}"
        for module, others in graph().items()
        for other in others
        if room(other) in outside and room(module) not in outside | {"cli"}
    ]
    assert not wrong, wrong


def test_rooms_of_notebooks_and_tests_are_those_of_the_package():
    "A newcomer who opens any folder should guess right what belongs there."
    rooms = {r for r in FLOOR if (ROOT / "dmr" / r).is_dir()}
    made_of_notebooks = rooms - {"verdict", "book"}  # both in nbs/making/
    folders = {p.name for p in (ROOT / "nbs").iterdir() if p.is_dir()}
    assert made_of_notebooks <= folders
    tests = {p.name for p in (ROOT / "tests").iterdir() if p.is_dir()}
    # faults are thrown at several rooms at once
    assert tests - {"__pycache__", "faults"} <= rooms


#: Exported cells that are longer than their room allows: how many, and why.
PARAMETERS = "describes its parameters where they stand"
LONGER = {
    "methods/00_examples.ipynb": (1, PARAMETERS),
    "methods/01_subspace.ipynb": (2, PARAMETERS),
    "methods/02_projection.ipynb": (10, PARAMETERS),
    "methods/03_boundary.ipynb": (1, PARAMETERS),
    "methods/05_gpm.ipynb": (3, PARAMETERS),
    "methods/06_ogd.ipynb": (2, PARAMETERS),
    "methods/08_penalty.ipynb": (1, PARAMETERS),
    "methods/09_replay.ipynb": (6, PARAMETERS),
    "methods/10_controls.ipynb": (2, PARAMETERS),
    "methods/12_registry.ipynb": (1, PARAMETERS),
    "methods/14_sampling.ipynb": (1, PARAMETERS),
    "routing/08_router.ipynb": (8, PARAMETERS),
    "routing/09_probes.ipynb": (1, PARAMETERS),
    "training/03_config.ipynb": (1, "the list of a run's parameters"),
}


def exported_cells():
    "Page, its room's limit and the lines of each exported cell with code."
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        page = path.relative_to(ROOT / "nbs").as_posix()
        limit = 30 if page.startswith(("routing/", "methods/")) else 60
        for cell in json.loads(path.read_text())["cells"]:
            source = "".join(cell["source"])
            code = ("def ", "class ", "= {", "= (", "= [")
            if "#| export" in source and any(x in source for x in code):
                yield page, limit, source.count("\n")


def test_exported_cells_can_be_read():
    cells = exported_cells()
    long = Counter(page for page, limit, lines in cells if lines > limit)
    assert long == {page: count for page, (count, _) in LONGER.items()}
    assert max(lines for _, _, lines in exported_cells()) <= 70
