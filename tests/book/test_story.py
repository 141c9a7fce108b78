"""The book that people finish: limits that the story keeps, and what leads to
it: search, glossary, reading order.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dmr.book import chapters as book
from dmr.book import notebook, pages
from dmr.book.glossary import link_terms, read_glossary
from dmr.book.search import part_of, reading_list, search_script

ROOT = Path(__file__).resolve().parents[2]
PAGES, WORDS, HOME_WORDS, IN_SHORT = 12, 18_000, 400, 100


@pytest.fixture(scope="module")
def chapters():
    return book.read_book(ROOT / "nbs")


@pytest.fixture(scope="module")
def story(chapters):
    return [c for c in chapters if c.part == "Story"]


def prose(chapter):
    return [c.text for c in chapter.cells if c.shown and not c.is_code]


def count_words(texts):
    "Words of prose: no code, no link's target, no rule of a table."
    text = re.sub(r"```.*?```", "", "\n".join(texts), flags=re.S)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    return sum(bool(re.search(r"\w", word)) for word in text.split())


# ---- the story's limits


def test_the_story_has_twelve_pages_in_order(story):
    assert [c.number for c in story] == [*range(1, PAGES + 1), None]
    assert story[-1].path == book.AFTERWORD
    for c in story[:-1]:
        needed = book.STORY[c.path]
        assert all(n < c.number for n in needed), f"{c.path} needs a later page"


def test_the_story_is_short(story, chapters):
    long = {c.path: count_words(prose(c)) for c in story}
    assert sum(long.values()) <= WORDS, long
    assert count_words(prose(chapters[0])) <= HOME_WORDS


def test_a_page_of_the_story_says_its_result_first(story):
    for c in story:
        short = [t for t in prose(c)[:2] if t.startswith("> **In short.**")]
        assert len(short) == 1, f"{c.path}: '> **In short.** …' comes second"
        assert count_words(short) <= IN_SHORT, c.path
        assert "In short" not in c.description, c.path


def test_a_page_of_the_story_has_a_picture(story):
    "The first is shown above the text, when the page has been executed."
    for c in story:
        shown = [x.text for x in c.cells if x.is_code and x.shown]
        assert any(re.search(r"\bshow\(", text) for text in shown), c.path


def test_the_lead_picture_stands_above_the_text(tmp_path, chapters):
    c = next(c for c in chapters if c.path == "why/01_cancellation.ipynb")
    made, pictures = pages.prepare_chapter(c, pages.Book(chapters), tmp_path)
    sources = [cell["source"] for cell in made["cells"]]
    assert 'title: "1. ' in sources[0] and "page 1 of 12" in sources[1]
    assert "In short" in sources[2] and pictures[0].file in sources[3]
    assert f"#{pictures[0].label}" in sources[3]


def test_no_picture_is_shown_twice_in_a_row(tmp_path, chapters):
    "A figure that comes before the first section leads the page as it is."
    c = next(c for c in chapters if c.path == "why/16_verdict.ipynb")
    made, pictures = pages.prepare_chapter(c, pages.Book(chapters), tmp_path)
    assert json.dumps(made).count(pictures[0].file) == 1


def test_the_story_names_no_page_by_an_old_number(story):
    for c in story:
        old = re.findall(r"(?i)\b(?:last|next) chapter|\bchapter \d", " ".join(
            prose(c)
        ))  # fmt: skip
        assert not old, f"{c.path}: {old}"


# ---- all pages


#: Pages with a line that cannot be broken: a hash, a figure's words.
TOO_LONG = {"training/05_pretrained.ipynb", "reporting/03_figures.ipynb"}


def test_shown_code_fits_80_columns(chapters):
    wide = []
    for c in chapters:
        for cell in (x for x in c.cells if x.shown):
            blocks = [cell.text]
            if not cell.is_code:
                blocks = re.findall(r"```.*?\n(.*?)```", cell.text, re.S)
            lines = [line for b in blocks for line in b.splitlines()]
            wide += [f"{c.path}: {x}" for x in lines if len(x) > 80]
    assert not [w for w in wide if w.split(":")[0] not in TOO_LONG], wide


def test_no_two_pages_share_a_title(chapters):
    labels = [c.label for c in chapters]
    labels += [title for _, title in (*book.OPENING_PAGES, *book.CLOSING_PAGES)]
    twice = {label for label in labels if labels.count(label) > 1}
    assert not twice, twice


#: Functions that draw the title, too; what it says is tested where they are
#: drawn, here or in the tests of their room.
TITLED = {
    "draw_age",
    "draw_curve",
    "draw_domains",
    "draw_forest",
    "draw_growth",
    "draw_plane",
    "draw_parts_apart",
    "draw_pretrained",
    "draw_routings",
    "draw_scores",
    "draw_settings",
    "draw_stages",
    "draw_strips",
    "draw_switches",
    "draw_valleys",
    "draw_way_back",
    "plot_plane",
    "plot_stream",
}
_TITLE = re.compile(
    r"(?:(?:title|finding)\s*=\s*|set_title\(\s*|suptitle\(\s*)\(?\s*"
    r"((?:f?\"[^\"]*\"\s*)+)"
)


def titles_of(text):
    "What a cell's figures are called, as far as it says so itself."
    found = _TITLE.findall(text)
    if "draw_parts(" in text:  # whose title is an argument
        found += re.findall(r"f?\"([^\"]*)\"", text)
    return found


def test_every_figure_states_a_finding_in_its_title(chapters):
    silent = set()
    for c in chapters:
        for cell in c.cells:
            draws = any(o.png for o in cell.outputs)
            draws = draws or "plt." in cell.text and "show(" in cell.text
            kept = cell.is_code and cell.shown and cell.exports_to is None
            if not (kept and draws):
                continue
            called = set(re.findall(r"\b(\w+)\(", cell.text))
            titles = map(str.split, titles_of(cell.text))
            if not called & TITLED and max(map(len, titles), default=0) < 5:
                silent.add(c.path)
    assert not silent, "titles of five words or more say more"


def title_of(fig):
    axes = [ax.get_title("left") or ax.get_title() for ax in fig.axes]
    return fig.get_suptitle() or next(t for t in axes if t)


def test_a_drawn_title_states_a_finding_in_two_lines():
    "On committed tables: many seeds, few seeds, adapters."
    from dmr.book.diagrams import draw_switches, draw_valleys
    from dmr.studies.study import find_project
    from dmr.verdict import drawings, planes, pretrained
    from dmr.verdict.tables import read_table

    pytest.importorskip("matplotlib")
    drawn = {"switches": draw_switches()[0], "valleys": draw_valleys()[0]}
    project = find_project(ROOT)
    studies = ("eight", "longer", "lora")
    tables = {name: read_table(name, project) for name in studies}
    for name, table in tables.items():
        for kind in ("plane", "age", "growth", "domains"):
            figure, _ = getattr(drawings, f"draw_{kind}")(table)
            drawn[f"{kind} of {name}"] = figure
    families = read_table("families", project)
    for method in ("projection", "ewc"):
        figure = planes.draw_routings(families, [method])[0]
        drawn[f"routings of {method}"] = figure
    both = (read_table(f"{x}pretrained", project) for x in ("", "tuning_"))
    drawn["pretrained"] = pretrained.draw_pretrained(*both)[0]
    for name, figure in drawn.items():
        title = title_of(figure)
        assert len(title.split()) >= 5 and title.count("\n") <= 1, (name, title)
        assert re.search(r"\d", title), f"{name}: no number in {title!r}"
        size = max(map(len, title.splitlines()))
        assert size <= 70, (name, size, title)


def test_checks_fold_but_for_short_ones():
    code = lambda text: notebook.Cell("code", text)
    long = code("a = 1\nb = 2\nc = 3\ntest_eq(a + b, c)")
    assert notebook.fold_summary(long) == "Checks, 4 lines"
    assert notebook.fold_summary(code("test_eq(1, 1)")) == ""
    printed = notebook.Output("stream", {"text/plain": "1"})
    shown = notebook.Cell("code", long.text, outputs=(printed,))
    assert notebook.fold_summary(shown) == ""
    said = notebook.read_cell(
        {"cell_type": "code", "source": "#| export\n#| fold\nx"}
    )
    assert notebook.fold_summary(said) == "Source, 1 lines"


# ---- search


@pytest.fixture(scope="module")
def search(chapters):
    "Ask the site's own script, with an entry a page."
    quickjs = pytest.importorskip(
        "quickjs", reason="NO JAVASCRIPT: pip install 'moment-routing[docs]'"
    )
    entries = [
        {
            "title": c.title,
            "section": "",
            "text": " ".join([c.description, *prose(c)]),
            "href": f"{c.page}.html",
            "part": part_of(c.page, chapters),
        }
        for c in chapters
    ]
    ranking = (ROOT / "nbs/assets/search.js").read_text("utf-8")
    engine = quickjs.Context()
    engine.eval("globalThis.window = globalThis")
    engine.eval(search_script(read_glossary(ROOT), ranking))
    engine.eval(f"const site = new Fuse({json.dumps(entries)})")

    def ask(query):
        call = f"JSON.stringify(site.search({json.dumps(query)}, {{limit: 9}}))"
        hits = json.loads(engine.eval(call))
        return [(h["item"]["href"][:-5], h["item"]["part"]) for h in hits]

    return ask


@pytest.mark.parametrize(
    "query, first",
    [
        ("kappa", "why/"),
        ("κ", "why/"),
        ("install", "index"),
        ("how do I install it", "index"),
        ("which routing", "index why/"),
        ("catastrophic forgetting", "index why/"),
        ("LoRA", "frameworks/lora"),
        ("replay", "index why/"),
        ("Lightning", "guides/lightning"),
        ("conformance", "routing/conformance"),
        ("papermill", "index why/ experiments/"),
    ],
)
def test_search_finds_the_right_part_first(search, query, first):
    hits = search(query)
    assert hits and hits[0][0].startswith(tuple(first.split())), hits


def test_search_orders_the_parts(search):
    (first, _), *others = search("projection")
    assert first == "methods/projection"  # its title is the query
    assert {part for _, part in others[:4]} <= {0, 2}  # story, or in the title
    bound = [part for _, part in search("second batch")]
    assert bound == sorted(bound) and len(set(bound)) > 1
    kappa, letter = search("kappa"), search("κ")
    assert {page for page, _ in kappa[:3]} & {page for page, _ in letter[:3]}
    assert search("qwertzuiop") == []


# ---- glossary, reading order


def test_terms_lead_to_pages(chapters):
    terms = read_glossary(ROOT)
    there = {c.page for c in chapters}
    assert not [t.name for t in terms if t.page not in there]
    assert len({t.anchor for t in terms}) == len(terms) > 30
    assert all(len(t.means.split()) <= 40 for t in terms)


def test_two_terms_cannot_share_a_form(tmp_path):
    (tmp_path / "nbs").mkdir()
    (tmp_path / "nbs/glossary.yml").write_text(
        "- {name: a, means: A.}\n- {name: b, means: B., forms: [A]}\n"
    )
    with pytest.raises(ValueError, match="'A' belongs to 'a' and to 'b'"):
        read_glossary(tmp_path)


def test_a_term_is_linked_once_and_can_be_reached_by_keyboard():
    page = (
        "<main><h2>Leaks</h2><p><code>leak</code> a leak,"
        ' <span class="math inline">\\(leak\\)</span> and a leak</p></main>'
    )
    made = link_terms(page, read_glossary(ROOT), "../")
    link = '<a href="../glossary.html#term-leak" aria-describedby="term-leak-'
    assert made.count(link) == 1 and made.count('role="tooltip"') == 1
    assert "<h2>Leaks</h2>" in made and "\\(leak\\)" in made


def test_reading_list_follows_the_parts(chapters):
    text = reading_list(chapters, "A book.")
    parts = re.findall(r"^## (.+)$", text, re.M)
    assert parts == [*book.PARTS, "Names"]
    listed = re.findall(r"\]\((\S+)\.llms\.md\)", text)
    assert [p for p in listed if p in {c.page for c in chapters}] == [
        c.page for c in chapters
    ]
    silent = [x for x in text.splitlines() if x.endswith(".llms.md)")]
    assert not silent, f"no line on what it is for: {silent}"


# ---- other tools


def test_quarto_knows_every_key_of_the_configuration(tmp_path):
    "By the names of Quarto's published schema, as smalldocs carries them."
    config = pytest.importorskip("smalldocs.config")
    for name in ("_quarto.yml", "nbs/_quarto.yml"):
        folder = tmp_path / Path(name).parent
        folder.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / "_quarto.yml")
        unread = ("html-math-method", "execute.enabled")
        warnings = config.load(folder).warnings
        odd = [w for w in warnings if not any(key in w for key in unread)]
        assert not odd, odd
    (tmp_path / "_quarto.yml").write_text("website: {tittle: dmr}\n")
    assert config.load(tmp_path).warnings  # the check can fail


def test_quarto_resources_are_relative():
    text = (ROOT / "nbs/_quarto.yml").read_text("utf-8")
    files = yaml.safe_load(text)["format"]["html"]["css"]
    assert all((ROOT / "nbs" / file).is_file() for file in files)
    assert "http" not in text and "url:" not in text


def test_nbdev_migrates_a_copy_without_loss(tmp_path):
    """nbdev's own migration leaves the notebooks' code as it is.

    nbdev 2 has `nbdev_migrate`, nbdev 3 `nbdev_migrate_config`, too; what is
    installed is run."""
    pytest.importorskip("nbdev")
    shutil.copy(ROOT / "settings.ini", tmp_path)
    shutil.copytree(ROOT / "nbs/routing", tmp_path / "nbs/routing")
    shutil.copytree(ROOT / "nbs/why", tmp_path / "nbs/why")
    programs = ("nbdev_migrate", "nbdev_migrate_config")
    there = [Path(sys.executable).with_name(p) for p in programs]
    there = [p for p in there if p.is_file()]
    assert there, f"nbdev is installed, and none of {programs}"
    for program in there:
        done = subprocess.run(
            [program], cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
    code = lambda path: [c.text for c in notebook.read_cells(path) if c.is_code]
    for path in (tmp_path / "nbs").rglob("*.ipynb"):
        assert code(path) == code(ROOT / path.relative_to(tmp_path)), path
