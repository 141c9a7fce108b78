"""A story page's figure fits a phone of 390 pixels without scrolling."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from dmr.book import chapters as book

ROOT = Path(__file__).resolve().parents[2]
#: A phone's width without its margins, 355, over the scale of book.css.
WIDEST = 455
#: The same in inches; a picture is up to 0.08 wider than its figure.
INCHES = 4.47
GUIDES = ("guides/00_one_model.ipynb", "guides/01_your_loop.ipynb")


@pytest.fixture(scope="module")
def phone_pages():
    found = book.read_book(ROOT / "nbs")
    return [c for c in found if c.path.startswith("why/") or c.path in GUIDES]


def code_of(page):
    "Its code; lines that begin with % or ! are the notebook's own."
    cells = (c.text for c in page.cells if c.is_code)
    return re.sub(r"(?m)^\s*[%!].*$", "", "\n".join(cells))


def name_of(node):
    "The last part of a called name, and what stands before it."
    if isinstance(node, ast.Attribute):
        before = node.value.id if isinstance(node.value, ast.Name) else ""
        return node.attr, before
    return (node.id, "") if isinstance(node, ast.Name) else ("", "")


def widths(code):
    "Width of each figure that code makes; none is given: infinite."
    for call in (n for n in ast.walk(ast.parse(code)) if type(n) is ast.Call):
        name, before = name_of(call.func)
        makes = before == "plt" and name in ("subplots", "figure")
        if not makes and name not in ("Figure", "NewFigure"):
            continue
        given = [k.value for k in call.keywords if k.arg == "figsize"]
        try:
            yield float(ast.literal_eval(given[0].elts[0]))
        except (IndexError, AttributeError, ValueError):
            yield float("inf")


@cache
def functions_of(module):
    "Source of each function of a module of the package."
    path = ROOT / f"{module.replace('.', '/')}.py"
    source = path.read_text() if path.is_file() else ""
    found = (n for n in ast.parse(source).body if type(n) is ast.FunctionDef)
    lines = source.splitlines()
    return {
        n.name: "\n".join(lines[n.lineno - 1 : n.end_lineno]) for n in found
    }


def called(code):
    "Name and source of the package's functions that code calls."
    tree, modules = ast.parse(code), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            modules |= {a.asname or a.name: node.module for a in node.names}
        elif isinstance(node, ast.Import):
            modules |= {a.asname: a.name for a in node.names if a.asname}
    for call in (n for n in ast.walk(tree) if type(n) is ast.Call):
        name, before = name_of(call.func)
        functions = functions_of(modules.get(before or name) or "")
        if name in functions:
            yield name, functions[name]


def test_pictures_of_the_story_fit_a_phone(phone_pages):
    wide = {
        f"{page.path}: {out.about_png['alt'][:40]}": out.about_png["width"]
        for page in phone_pages
        for cell in page.cells
        for out in cell.outputs
        if out.png and out.about_png["width"] > WIDEST
    }
    assert not wide, wide


def test_figures_of_the_story_are_made_for_a_phone(phone_pages):
    "Whether or not the page has been executed since."
    found = {}
    for page in phone_pages:
        code = code_of(page)
        for place, text in {page.path: code, **dict(called(code))}.items():
            found[place] = [*widths(text)]
    assert all(found[f"draw_{x}"] for x in ("curve", "way_back", "plane"))
    wide = {k: v for k, v in found.items() if max(v, default=0) > INCHES}
    assert not wide, wide


def test_letters_of_the_story_can_be_read_on_a_phone(phone_pages):
    "Of nine points or more, where code says so."
    pattern = r"fontsize=([\d.]+)"
    found = {p.path: re.findall(pattern, code_of(p)) for p in phone_pages}
    assert any(found.values())
    small = {k: v for k, v in found.items() if min(map(float, v or [9])) < 9}
    assert not small, small


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("plt.subplots(2, 1, figsize=(4.4, 7))", [4.4]),
        ("fig = plt.figure(figsize=(5 * n, 3))", [float("inf")]),
        ("plt.subplots()", [float("inf")]),
        ("fig.subplots(2)", []),
    ],
)
def test_a_width_is_read_from_code(code, expected):
    assert list(widths(code)) == expected


def test_the_style_of_figures_is_the_one_these_widths_are_for():
    style = (ROOT / "nbs/assets/book.css").read_text()
    scale = float(re.search(r"--width, 560\) \* ([\d.]+)px", style)[1])
    margin = float(re.search(r"--sd-pad: ([\d.]+)rem; } }", style)[1])
    assert WIDEST * scale <= 390 - 2 * 16 * margin + 0.5
