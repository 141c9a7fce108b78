"""Identity: code in normal form, and the modules behind a template."""

import ast

import pytest

from dmr.studies.identity import code_digest, imported_names, module_hashes

SOURCES = [
    "x = f(1, b=2)",
    "def f(a, *b, c=1, **d):\n    return [i for i in a if i]",
    "async def g():\n    await h()\n",
    "x: int = 3\nx += 1",
    "with a as b, c: pass",
    "f'{x!r:>{w}} {y}'",
    "lambda *, a: a",
    "try:\n    pass\nexcept (A, B) as e:\n    raise C from e",
    "match x:\n    case {'a': [1, *r]} if r: pass\n    case _: pass",
    "a[1:2, ::3] = b @ c ** -d",
    "x = 1; y = None; z = ...; w = 1j; v = b'a'",
]


def test_code_in_normal_form_tells_code_from_layout():
    digests = [code_digest(s) for s in SOURCES]
    assert len(set(digests)) == len(SOURCES)
    for source, digest in zip(SOURCES, digests):
        assert code_digest(ast.unparse(ast.parse(source))) == digest
        assert code_digest(f"# note\n\n{source}\n\n'prose'  # more") == digest


def test_identity_follows_the_imports_of_the_real_package():
    found = module_hashes(["from dmr.training.loop import train_stream"])
    assert {
        "dmr.training.loop",
        "dmr.routing.router",
        "dmr.text.load",
        "dmr.training.model",
    } <= set(found)
    assert not {
        "dmr.reporting.report",
        "dmr.reporting.figures",
        "dmr.cli",
        "dmr.studies.batch",
        "dmr.book.site",
    } & set(found)


ROOMS = {
    "__init__": "_HOME = {'Router': 'step.router'}\nversion = '1'\n",
    "theory": "x = 1",
    "step/__init__": "from ..theory import x\n",
    "step/router": "from .core import route\nfrom . import probe",
    "step/core": "import dmr.theory",
    "step/probe": "from dmr.step.deep.inner import y",
    "step/deep/__init__": "",
    "step/deep/inner": "from ... import aside\ny = 1",
    "aside": "z = 1",
    "old/__init__": "def __getattr__(name): ...\ndef known(): ...",
    "old/one": "from dmr.old.two import x",
    "old/two": "x = 1",
    "other/__init__": "",
    "other/far": "x = 1",
}


@pytest.fixture
def rooms(tmp_path):
    "A package of nested rooms; gives the modules behind a source."
    for name, source in ROOMS.items():
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)

    def modules(source):
        found = module_hashes([source], folder=tmp_path)
        return {name.removeprefix("dmr.") for name in found}

    return modules


ROUTER = {
    "theory",
    "step",
    "step.router",
    "step.core",
    "step.probe",
    "step.deep",
    "step.deep.inner",
    "aside",
}


@pytest.mark.parametrize(
    "source, expected",
    [
        ("from dmr.step.router import Router", ROUTER),
        ("import dmr.step.router as r", ROUTER),
        ("from dmr.step import router", ROUTER),
        ("def f():\n    from dmr.step import router", ROUTER),
        ("from dmr import Router", ROUTER),
        ("import dmr", ROUTER),
        ("from dmr import *", ROUTER),
        ("from dmr import version", set()),
        ("from dmr.step import core", {"theory", "step", "step.core"}),
        # the __init__ of a room is read, and what it imports
        ("from dmr.step import x", {"theory", "step"}),
        ("import dmr.step", {"theory", "step"}),
        # what a room defines itself needs no module
        ("from dmr.old import known", {"old"}),
        # what only its __getattr__ knows may be any of them
        ("from dmr.old import unknown", {"old", "old.one", "old.two"}),
        ("import dmr.old", {"old", "old.one", "old.two"}),
        ("from dmr.other import missing", {"other"}),
        ("import torch", set()),
    ],
)
def test_imports_are_followed_through_rooms(rooms, source, expected):
    assert rooms(source) == expected


def test_relative_imports_count_from_where_they_stand():
    source = "from . import a\nfrom .b import c\nfrom ..d import e"
    inside = {"dmr.step", "dmr.step.a", "dmr.step.b", "dmr.step.b.c"}
    outside = {"dmr.d", "dmr.d.e"}
    for module in ("dmr.step.router", "dmr.step.__init__"):
        assert imported_names(source, "dmr", module) == inside | outside


def test_an_edit_of_a_room_changes_its_own_hash(tmp_path):
    (tmp_path / "__init__.py").write_text("")
    room = tmp_path / "room"
    room.mkdir()
    for name in ("__init__", "a", "b"):
        (room / f"{name}.py").write_text(f"x = '{name}'")
    source = ["from dmr.room.a import x"]
    before = module_hashes(source, folder=tmp_path)
    (room / "b.py").write_text("x = 'another'")
    assert module_hashes(source, folder=tmp_path) == before
    (room / "__init__.py").write_text("x = 'another room'")
    after = module_hashes(source, folder=tmp_path)
    assert {n for n in after if after[n] != before[n]} == {"dmr.room"}


def test_old_paths_of_the_first_edition_depend_on_everything():
    "A path without a file cannot be traced; no result stands by accident."
    found = set(module_hashes(["from dmr.boundary import BoundaryProjection"]))
    assert {"dmr.methods.boundary", "dmr.routing.router"} <= found
