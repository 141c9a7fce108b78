"""The site: its configuration follows the notebooks, and a small book builds
into pages that are whole.
"""

import base64
import io
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image

from dmr.book import chapters as book
from dmr.book import (
    figures,
    finish,
    freshness,
    home,
    notebook,
    pages,
    reference,
    site,
)

ROOT = Path(__file__).resolve().parents[2]


# ---- the real book


def test_configuration_follows_the_notebooks():
    top, beside = (
        (ROOT / "_quarto.yml").read_text(),
        (ROOT / "nbs" / "_quarto.yml").read_text(),
    )
    fresh = book.site_configuration(top, book.read_book(ROOT / "nbs"))
    assert (top, beside) == fresh, (
        "run `python -m dmr.book.chapters` and commit _quarto.yml and"
        " nbs/_quarto.yml"
    )


def test_quarto_files_differ_by_the_prefix_only():
    strip = lambda x: (
        {k: strip(v) for k, v in x.items()}
        if isinstance(x, dict)
        else (
            [*map(strip, x)]
            if isinstance(x, list)
            else x.removeprefix("nbs/")
            if isinstance(x, str)
            else x
        )
    )
    top, beside = (
        yaml.safe_load((ROOT / f).read_text())
        for f in ("_quarto.yml", "nbs/_quarto.yml")
    )
    assert strip(top) == beside
    assert top["project"]["output-dir"] == "_docs" and top["execute"] == {
        "enabled": False
    }


def test_sidebar_lists_every_notebook_once():
    def hrefs(entries):
        for entry in entries:
            yield entry.get("href")
            yield from hrefs(entry.get("contents", []))

    listed = [
        h
        for h in hrefs(
            yaml.safe_load((ROOT / "nbs/_quarto.yml").read_text())["website"][
                "sidebar"
            ]["contents"]
        )
        if h
    ]
    notebooks = [
        p.relative_to(ROOT / "nbs").as_posix()
        for p in (ROOT / "nbs").rglob("*.ipynb")
        if ".ipynb_checkpoints" not in p.parts
    ]
    assert sorted(h for h in listed if h.endswith(".ipynb")) == sorted(
        notebooks
    )
    modules = {
        c.module.removeprefix("dmr.")
        for c in book.read_book(ROOT / "nbs")
        if c.module and not c.module.endswith("__")
    }
    assert {h for h in listed if h.startswith("reference/")} == {
        f"reference/{m}.qmd" for m in modules | {"index"}
    }


def test_every_public_name_says_what_it_is():
    symbols = [
        s
        for found in reference.public_modules(ROOT).values()
        for s in found
        if s.kind != "value"
    ]
    silent = [f"{s.module}.{s.name}" for s in symbols if not s.doc]
    assert not silent, f"no docstring: {silent}"


def test_every_figure_has_an_alternative_text():
    missing = []
    for chapter in book.read_book(ROOT / "nbs"):
        for cell in (c for c in chapter.cells if c.shown):
            for output in cell.outputs:
                if output.png and not figures.picture_alt(cell, output):
                    first = cell.text.splitlines()[0]
                    missing.append(f"{chapter.path}: {first}")
    assert not missing, f"add `#| fig-alt: …` or a title: {missing}"


def test_links_in_prose_lead_somewhere():
    broken = []
    for chapter in book.read_book(ROOT / "nbs"):
        here = (ROOT / "nbs" / chapter.path).parent
        for cell in chapter.cells:
            if cell.kind != "markdown":
                continue
            code = r"```.*?```|`[^`\n]*`|\$[^$]*\$"
            prose = re.sub(code, "", cell.text, flags=re.S)
            for link in re.findall(r"\]\((?![a-z]+:|#)([^)\s#]+)", prose):
                if not (here / link).exists():
                    broken.append(f"{chapter.path}: {link}")
    assert not broken, f"links to files that are not there: {broken}"


#: Addresses of the first edition; each must still lead somewhere.
FIRST_EDITION = """
agem api batch book boundary callbacks cancellation claims cli clusters
conformance controls displacement experiments/adapters experiments/backbones
experiments/claims experiments/confirm experiments/conflict
experiments/continual_lm experiments/eight experiments/families
experiments/inflation_causal experiments/inflation_live
experiments/inflation_monte_carlo experiments/lora experiments/overlap
experiments/protocol experiments/regimes experiments/scale experiments/sixteen
families families/conflict families/penalty families/projection families/replay
figures finetuning freshness gpm guides/cluster guides/lightning guides/trainer
guides/your_loop guides/your_method guides/your_text hero identity index
inflation inputs leak live lora methods metrics mirror model modification
moments ogd penalty performance planes plans pretrained probes projection rates
readme reference replay report routing runs sharding site statistics streams
strength strength_law studies subspace synthetic tables templates time training
""".split()


def test_every_address_of_the_first_edition_leads_somewhere():
    chapters = book.read_book(ROOT / "nbs")
    moved = yaml.safe_load((ROOT / "nbs/moved.yml").read_text())
    made = [*book.OPENING_PAGES, *book.CLOSING_PAGES]
    there = {c.page for c in chapters} | {page for page, _ in made}
    there |= {
        f"reference/{c.module.removeprefix('dmr.')}"
        for c in chapters
        if c.module
    }
    astray = {old: new for old, new in moved.items() if new not in there}
    assert not astray, f"nbs/moved.yml leads to no page: {astray}"
    assert not set(moved) & there, "these are pages: take them out"
    lost = set(FIRST_EDITION) - set(moved) - there
    assert not lost, f"nbs/moved.yml lacks {lost}"


#: Modules whose chapters a machine of two cores executes in seconds.
FAST = (
    "dmr.book.chapters",
    "dmr.book.freshness",
    "dmr.book.home",
    "dmr.book.reference",
    "dmr.methods.projection",
    "dmr.routing.modification",
)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_page_is_fresh():
    stale = freshness.stale_chapters(ROOT)
    assert not stale, f"run `make book` and commit the notebooks: {stale}"
    changed = [
        difference
        for chapter in book.read_book(ROOT / "nbs")
        if chapter.module in FAST
        for difference in freshness.rerun(chapter.path, ROOT)
    ]
    assert not changed, "\n".join(changed)


# ---- a small book


def png():
    file = io.BytesIO()
    Image.new("RGB", (400, 200), "white").save(file, format="png")
    return base64.b64encode(file.getvalue()).decode()


def code(source, *outputs):
    return {
        "cell_type": "code",
        "execution_count": None,
        "id": f"c{abs(hash(source)) % 10**8}",
        "metadata": {},
        "outputs": list(outputs),
        "source": source,
    }


def prose(source):
    return {
        "cell_type": "markdown",
        "id": f"m{abs(hash(source)) % 10**8}",
        "metadata": {},
        "source": source,
    }


def printed(text):
    return {"output_type": "stream", "name": "stdout", "text": text}


def write(path, *cells):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps(
            {
                "cells": cells,
                "metadata": {
                    "kernelspec": {
                        "display_name": "python3",
                        "language": "python",
                        "name": "python3",
                    }
                },
                "nbformat": 4,
                "nbformat_minor": 5,
            }
        )
    )


MODULE = '''"""Damping."""

__all__ = ['damp']

def damp(
    u: float,  # the step
    alpha: float = 0.5,  # strength, in [0, 1]
) -> float:  # the damped step
    "Damp a step."
    return (1 - alpha) * u
'''


@pytest.fixture()
def project(tmp_path):
    nbs = tmp_path / "nbs"
    shutil.copytree(ROOT / "nbs/assets", nbs / "assets")
    shutil.copy(ROOT / "nbs/sources.yml", nbs / "sources.yml")
    documents = ("CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff")
    for name in ("settings.ini", "_quarto.yml", *documents):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "results").mkdir()
    (tmp_path / "results/table.csv").write_text("a,b\n1,2\n")
    (tmp_path / "dmr").mkdir()
    (tmp_path / "dmr/damping.py").write_text(MODULE)
    write(
        nbs / "index.ipynb",
        prose("# Home\n\n> What it is.\n\nText of the home page."),
    )
    figure = {
        "output_type": "display_data",
        "metadata": {"image/png": {"width": 200, "height": 100}},
        "data": {"image/png": png()},
    }
    write(
        nbs / "routing/10_damping.ipynb",
        prose(
            "# Damping: less of it\n\n> Make a step smaller.\n\nBy $a_1 < b$"
            " and\n\n$$u = (1-\\alpha) g$$\n\nuse `damp`.\n\n:::"
            ' {.claim data-verdict="does not hold"}\nC0: nothing'
            " happens.\n:::\n\n::: {.column-margin}\nBeside.\n:::"
        ),
        code("#| default_exp damping"),
        code("#| hide\nsecret = 1"),
        code("#| export\n" + MODULE.split("\n\n", 2)[2]),
        code(
            "damp(1.0)  # [not](a_link.ipynb)",
            printed("0.5\n\n"),
            printed("[nor](this.ipynb)\n"),
        ),
        code('#| fig-alt: A: "white" box\ndraw()', figure),
    )
    write(
        nbs / "experiments/03_eight.ipynb",
        prose(
            "# Study: eight domains\n\n> What happened.\n- skip_exec: true\n\n-"
            " kept: a list\n\nAs in arXiv:2103.09762v2, see"
            " [the chapter](../routing/10_damping.ipynb#why) and"
            " [the table](../../results/table.csv)."
        ),
        code("import dmr.damping\nseed = 7\ndmr.damping.damp(2.0)"),
        code(
            "written",
            {
                "output_type": "display_data",
                "metadata": {},
                "data": {
                    "text/markdown": (
                        "- [rows](../../results/table.csv)\n\n###"
                        ' C1: it falls\n\n<div class="claim boxed"'
                        ' data-verdict="does not hold">\n\n> quoted\n\n**does'
                        " not hold**\n\n- by *much*\n\n</div>\n"
                    )
                },
            },
        ),
        code(
            "frame",
            {
                "output_type": "display_data",
                "metadata": {},
                "data": {
                    "text/html": (
                        "<style scoped>.x {}</style><table border=1"
                        " class='dataframe'><tr><td>1</td></tr></table>"
                    )
                },
            },
        ),
    )
    (nbs / "moved.yml").write_text("old/damping: routing/damping\n")
    book.write_site_configuration(tmp_path)
    return tmp_path


def test_small_book(project):
    written, problems = site.build(project)
    assert problems == []
    docs = project / "_docs"
    text = {
        p.relative_to(docs).as_posix(): p.read_text()
        for p in docs.rglob("*.html")
    }
    moved = text.pop("old/damping.html")
    assert 'url=../routing/damping.html"' in moved
    assert '"../routing/damping.html" + location.hash' in moved
    assert written == len(text) and {
        "index.html",
        "routing/damping.html",
        "experiments/eight.html",
        "reference/damping.html",
        "contents.html",
        "gallery.html",
        "glossary.html",
        "contributing.html",
        "changelog.html",
        "cite.html",
        "reference/index.html",
    } == set(text)
    damping, eight = (
        text["routing/damping.html"],
        text["experiments/eight.html"],
    )

    # what Quarto would read: each page that the configuration names is there
    prepared = project / "_proc"
    named = re.findall(r"href: (\S+)", (prepared / "_quarto.yml").read_text())
    assert "routing/damping.ipynb" in named and not [
        n for n in named if not (prepared / n).is_file()
    ]
    for folder in re.findall(
        r"- (assets/\S+\.css)", (prepared / "_quarto.yml").read_text()
    ):
        assert (prepared / folder).is_file()

    # maths: typeset, no script, no other host
    assert (
        damping.count('class="katex"') >= 2
        and "<math" in damping
        and r"\(" not in damping
    )
    assert "katex.min.js" not in damping and not any(
        finish.other_hosts(t) for t in text.values()
    )
    assert (docs / "assets/katex/fonts/KaTeX_Main-Regular.woff2").is_file()

    sheet = (docs / "assets/katex/katex.min.css").read_text()
    assert (
        "url(data:font/woff2" in sheet
        and "fonts/KaTeX_Main-Regular.woff2" not in sheet
        and "fonts/KaTeX_AMS-Regular.woff2" in sheet
    )

    # cells: hidden ones are gone, exported ones are shown under their module's
    # name, directives are not
    assert (
        "secret" not in damping
        and "default_exp" not in damping
        and "#|" not in damping
    )
    assert "0.5\n\n[nor]" in damping  # printed in two pieces, shown as one
    assert (
        'data-module="dmr.damping"' in damping and "the damped step" in damping
    )

    # figures: a file with its size, words for who cannot see it
    image = re.search(
        r'<img src="\.\./(figures/\w+\.webp)" width="200" height="100" alt="A:'
        r' &quot;white&quot; box"',
        damping,
    )
    assert image and (docs / image[1]).is_file()
    # the first picture of a page is fetched at once, on any page
    for page in (damping, text["gallery.html"]):
        first = re.search(r"<img [^>]*>", page)[0]
        assert 'fetchpriority="high"' in first and "lazy" not in first
    assert 'href="routing/damping.html#figure-3"' in text["gallery.html"]

    # links, across folders
    assert (
        'href="../routing/damping.html#why"' in eight
        and 'href="../results/table.csv"' in eight
        and (docs / "results/table.csv").is_file()
    )
    assert 'href="../reference/damping.html#damp"' in damping

    # in what code wrote, too
    assert eight.count('href="../results/table.csv"') == 2

    box = re.search(
        r'<div class="claim boxed" data-verdict="does not hold">(.*?)</div>',
        eight,
        re.S,
    )
    assert (
        box
        and "<blockquote>" in box[1]
        and "<strong>does not hold</strong>" in box[1]
        and "<em>much</em>" in box[1]
    )

    # a citation: link, card, entry in the list
    assert (
        '<a href="../cite.html#arxiv-2103-09762">arXiv:2103.09762v2</a>'
        in eight
        and "Gradient projection memory" in eight
    )
    assert 'id="arxiv-2103-09762"' in text["cite.html"]

    # boxes
    assert (
        re.search(
            r'<div[^>]*class="claim"[^>]*data-verdict="does not hold"', damping
        )
        and "column-margin" in damping
    )

    # opening and closing lines
    # the home page too
    assert "No execution of this page is on record" in text["index.html"]
    assert (
        "builds on" in eight
        and "No execution of this page is on record" in eight
    )
    assert (
        'href="../notebooks/experiments/03_eight.ipynb"' in eight
        and (docs / "notebooks/experiments/03_eight.ipynb").is_file()
    )

    # an instruction for nbdev is not text, a list is
    assert "skip_exec" not in eight and "kept: a list" in eight

    # tables scroll, without pandas' own style
    assert eight.count("table-scroll") == 1 and "scoped" not in eight

    # reference: signature, parameters, example with its stored output, users
    page = text["reference/damping.html"]
    assert (
        'id="damp"' in page
        and "strength, in [0, 1]" in page
        and "0.5" in page
        and "Eight domains" in page
    )
    assert "Damp a step." in text["reference/index.html"]

    # Markdown copies and their index
    assert "routing/damping.llms.md" in (docs / "llms.txt").read_text()
    assert (
        "Make a step smaller" in (docs / "routing/damping.llms.md").read_text()
    )
    copy = (docs / "reference/damping.llms.md").read_text()
    assert (
        "{=html}" not in copy and "```\n0.5\n\n[nor](this.ipynb)\n```" in copy
    )
    entries = json.loads((docs / "search.json").read_text())
    assert any("damp" == e["section"] or "damp" in e["href"] for e in entries)

    # the home page has its figure, and its table as a script
    assert (
        'id="hero-curve"' in text["index.html"]
        and "window.heroTable" in (docs / "assets/hero-table.js").read_text()
    )


def test_terms_search_and_reading_order_reach_the_site(project):
    (project / "nbs/glossary.yml").write_text(
        "- {name: step, means: What an optimizer does., page: routing/damping}"
    )
    assert site.build(project)[1] == []
    docs = project / "_docs"
    page = (docs / "routing/damping.html").read_text()
    assert page.count('class="cite term"') == 0  # in the description only
    file = project / "nbs/routing/10_damping.ipynb"
    file.write_text(file.read_text().replace("use `damp`", "step by `damp`"))
    site.build(project)
    page = (docs / "routing/damping.html").read_text()
    assert page.count('class="cite term"') == 1
    assert 'href="../glossary.html#term-step"' in page
    assert "What an optimizer does." in (docs / "glossary.html").read_text()
    entries = json.loads((docs / "search.json").read_text())
    parts = {e["href"].split("#")[0]: e["part"] for e in entries}
    assert parts["index.html"] == 0 and parts["routing/damping.html"] == 2
    assert parts["experiments/eight.html"] == 3
    script = (docs / "site_libs/fuse/fuse.min.js").read_text()
    assert script.startswith("window.searchSynonyms") and "class Fuse" in script
    order = (docs / "llms.txt").read_text()
    assert order.index("routing/damping") < order.index("experiments/eight")
    copy = (docs / "routing/damping.llms.md").read_text()
    assert '![A: "white" box](../figures/' in copy and "<figure" not in copy
    assert "<footer" not in copy and "No execution of this page" in copy


def test_figures_link_their_tables_and_what_made_them(project, monkeypatch):
    made = freshness.Execution(
        "ab12",
        "2026-11-22",
        "1f0c2d3",
        "2 cores",
        "Python 3.11",
        1.0,
        ("nbs/", "results/table.csv"),
    )
    monkeypatch.setattr(
        pages,
        "read_executions",
        lambda *_: {"routing/10_damping.ipynb": (made, False)},
    )
    assert site.build(project)[1] == []
    page = (project / "_docs/routing/damping.html").read_text()
    source = (
        '<a href="../results/table.csv">table.csv</a> (<code>dmr batch'
        " table</code>)"
    )
    assert re.search(
        r'<figcaption>[^\n]*<span class="origin">From'
        rf" {re.escape(source)}</span></figcaption>",
        page,
    )
    assert f'<span id="tables">Numbers from {source}.</span>' in page


def test_a_copy_keeps_what_stands_between_two_figures():
    moves = home.hero_html(home.hero_table())
    moves += '<script src="assets/hero.js" defer></script>'
    picture = figures.picture_html(
        figures.Picture("figures/a.webp", 2, 1, 'A "line"'), "../"
    )
    raw = "```{=html}\n%s\n```"
    parts = [raw % moves, "## Why\n\n$$x$$", raw % picture]
    parts.append("    printed = '<figure></figure>'")
    copy = finish._plain_copy("\n\n".join(parts))
    title = home._hero_title(home.hero_table())
    assert copy.split("\n\n") == [
        f"*Figure with sliders: {title}*",
        "## Why",
        "$$x$$",
        '![A "line"](../figures/a.webp)',
        parts[-1],
    ]


def test_a_wide_table_scrolls_and_wide_prose_wraps():
    box = '<div class="cell-output"><pre><code>{}</code></pre></div>'
    kind = lambda text: re.search(
        r'<pre tabindex="0"(?: class="([^"]*)")?',
        finish._make_accessible(box.format(text)),
    )[1]
    row = f"alpha{' ' * 60}R{' ' * 40}law\n"
    assert kind("found\n" + 3 * row) == "wide columns"
    assert kind("some words " * 12) == "long"
    assert kind(f"heading  \n{'some words ' * 12}\n  two") == "long"
    assert kind("x" * 90) == "wide" and kind("short  x\n" * 2) is None
    sheet = (ROOT / "nbs/assets/book.css").read_text()
    rule = re.search(r"pre\.columns \{([^}]*)\}", sheet)[1]
    assert "white-space: pre;" in rule and "overflow-x: auto;" in rule


SOURCES = {
    "why/06_leak": [set(), set()],
    "why/12_repair": [set()],
    "experiments/05_confirm": [{"confirm"}, {"confirm"}],
    "experiments/10_scale": [
        {"eight", "longer", "small"},
        {"longer"},
        {"small"},
    ],
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_figure_names_the_tables_behind_it_and_no_other(name):
    nbs = ROOT / "nbs"
    c = book.read_chapter(nbs / f"{name}.ipynb", nbs)
    read = json.loads((ROOT / freshness.RECORD).read_text())[c.path]["read"]
    used = sorted(Path(x).stem for x in read if x.endswith(".csv"))
    sources = pages._figure_sources(c, used)
    there = [
        source
        for cell, source in zip(c.cells, sources)
        if cell.shown and any(o.png for o in cell.outputs)
    ]
    linked = [set(re.findall(r"results/(\w+)\.csv", x)) for x in there]
    assert len(used) > 0 and linked == SOURCES[name]
    computed = [x == "Computed on this page" for x in there]
    assert computed == [not x for x in SOURCES[name]]


@pytest.mark.parametrize(
    "code_, used",
    [
        (["runs = read('a')", "draw(runs)"], {"a"}),
        (["runs = read('../results/a.csv')", "draw(x)"], set()),
        (["x = []", "for r in read('a'): x.append(r)", "draw(x)"], {"a"}),
        (["x, y = read('a'), read('b')", "draw(y)"], {"b"}),
        (["runs = read('a')\ndef f(): return runs", "draw(f())"], {"a"}),
        (["runs = read('a')\ndef f(runs): return runs", "draw(f(1))"], set()),
        (["for x in read('a'): x", "for x in y: draw(x)"], set()),
        (["x = read('a')\nimport m\nm.plot(x)", "m.draw()"], set()),
        (["x = {}\nx[1] = read('a')", "x = 1", "draw(x)"], set()),
        (["x = {}\nx[1] = read('a')", "draw(x)"], {"a"}),
        (["%matplotlib inline", "draw(read('a'))"], {"a"}),
    ],
)
def test_tables_are_found_through_names(code_, used):
    cells = [notebook.Cell("code", text) for text in code_]
    assert pages._tables_behind(cells, ["a", "b"])[-1] == used


def test_pictures_keep_the_colours_of_the_routings(tmp_path):
    "A curve is a few pixels among many; its colour must not become another's."
    import matplotlib.pyplot as plt

    from dmr.reporting.figures import PALETTE, figure_png, use_theme

    before = dict(plt.rcParams)
    use_theme()
    fig, (ax, other) = plt.subplots(1, 2)
    for k, colour in enumerate(PALETTE.values()):
        ax.plot([0, 1], [k, k + 1], color=colour, lw=1, marker="o", ms=4)
        ax.errorbar([0.5], [k], yerr=[0.2], color=colour, lw=0.6, alpha=0.7)
    other.imshow(
        [[0.1 * i + 0.03 * j for j in range(20)] for i in range(20)],
        cmap="cividis_r",
    )
    name, *_ = figures.store_picture(figure_png(fig), tmp_path)
    plt.close(fig)
    plt.rcParams.update(before)
    seen = {
        pixel
        for _, pixel in (
            Image.open(tmp_path / name).convert("RGB").getcolors(1 << 24)
        )
    }
    for routing, colour in PALETTE.items():
        want = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (
            min(max(abs(a - b) for a, b in zip(want, pixel)) for pixel in seen)
            <= 10
        ), routing


def test_every_table_in_results_says_what_makes_it():
    for path in (ROOT / "results").glob("*.csv"):
        study = (ROOT / f"nbs/experiments/studies/{path.stem}.yaml").is_file()
        made = pages.MADE_BY.get(path.stem)
        assert study != bool(made), (
            f"{path.name}: a study has its command, any other table needs an"
            " entry in dmr.book.pages.MADE_BY"
        )
        if made and made.startswith("experiments/"):
            template = (ROOT / f"nbs/{made}.ipynb").read_text()
            assert f"-p table results/{path.name}" in template, (
                f"{made} does not say how {path.name} is made"
            )


def test_a_second_build_replaces_the_first(project):
    site.build(project)
    (project / "nbs/experiments/03_eight.ipynb").unlink()
    book.write_site_configuration(project)
    site.build(project)
    assert not (project / "_docs/experiments/eight.html").exists()
    assert not (project / "_docs/notebooks/experiments").exists()


def test_what_cannot_be_read_stops_the_build(project):
    write(
        project / "nbs/routing/11_damping2.ipynb",
        prose("# Two\n\n> Two."),
        prose("$\\frac{1}{$"),
    )
    message = r"routing/damping2: ParseError.*\\\\frac"
    with pytest.raises(ValueError, match=message):
        site.build(project)


def test_problems_are_reported(project, capsys, monkeypatch):
    picture = {
        "output_type": "display_data",
        "metadata": {},
        "data": {"image/png": png(), "text/plain": "<Figure size 1x1>"},
    }
    write(
        project / "nbs/routing/11_plain.ipynb",
        prose("# Plain\n\n> P.\n\n[gone](12_gone.ipynb), arXiv:0000.00001"),
        code("draw_it()", picture),
    )
    monkeypatch.chdir(project)
    assert site.main(["build"]) == 0
    words = capsys.readouterr().err
    assert (
        "no alternative text: routing/11_plain.ipynb: the figure of the cell"
        " that begins 'draw_it()'"
        in words
        and "12_gone.ipynb" in words
    )
    assert (
        "routing/plain.html cites arXiv:0000.00001, which nbs/sources.yml lacks"
        in words
    )
    assert site.main(["build", "--strict"]) == 1


def test_quarto_is_asked_for_by_name(project, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.chdir(project)
    assert site.main(["build", "--quarto"]) == 1
    assert "quarto is not installed" in capsys.readouterr().err


# ---- freshness


def test_execute_records_and_changes_go_stale(project):
    (project / "nbs/experiments/03_eight.ipynb").unlink()
    write(
        project / "nbs/routing/11_sum.ipynb",
        prose("# Sum\n\n> S."),
        code("from pathlib import Path\nfrom dmr.damping import damp"),
        code("print(1 + 1, Path('../../results/table.csv').read_text()[:1])"),
        code("#| eval: false\nraise SystemExit"),
    )
    write(
        project / "nbs/routing/12_broken.ipynb",
        prose("# Broken\n\n> B."),
        code("1 / 0"),
    )
    before = (project / "nbs/routing/12_broken.ipynb").read_text()
    (project / "nbs/routing/11_sum.ipynb").write_text(
        (project / "nbs/routing/11_sum.ipynb")
        .read_text()
        .replace("from dmr.damping import damp", "pass")
    )
    with pytest.raises(
        RuntimeError,
        match="1 notebook.* failed(?s:.*)12_broken.ipynb: ZeroDivisionError",
    ):
        freshness.execute(
            ["routing/12_broken.ipynb", "routing/11_sum.ipynb"], project
        )
    assert (project / "nbs/routing/12_broken.ipynb").read_text() == before
    stored = json.loads((project / "nbs/routing/11_sum.ipynb").read_text())[
        "cells"
    ]
    assert (
        "".join(stored[2]["outputs"][0]["text"]) == "2 a\n"
        and "tags" not in stored[3]["metadata"]
    )

    stale = lambda: "routing/11_sum.ipynb" in freshness.stale_chapters(project)
    assert (
        not stale()
        and "routing/12_broken.ipynb" in freshness.stale_chapters(project)
    )
    assert freshness.rerun("routing/11_sum.ipynb", project) == []
    (project / "results/table.csv").write_text("b,a\n")
    assert stale()
    assert "text changed" in freshness.rerun("routing/11_sum.ipynb", project)[0]
    execution, is_stale = freshness.read_executions(project)[
        "routing/11_sum.ipynb"
    ]
    assert (
        is_stale
        and execution.wall_s > 0
        and re.fullmatch(r"\d{4}-\d\d-\d\d", execution.date)
    )


def test_data_read_through_functions_makes_a_page_stale(project):
    (project / "nbs/experiments/03_eight.ipynb").unlink()
    read = "def table(name): return Path(f'../../results/{name}.csv')\n"
    # none of them names a file, so only what they do tells what they depend on
    made = {
        "11_read": read + "print(table('table').read_text())",
        "12_absent": (
            read + "try: print(table('later').read_text())\nexcept"
            " FileNotFoundError: print('not yet')"
        ),
        "13_child": (
            "import subprocess, sys\nchild = \"print(open('../../results/' +"
            " 'table' +"
            " '.csv').read())\"\nprint(subprocess.run([sys.executable, '-c',"
            " child], capture_output=True, text=True, check=True).stdout)"
        ),
        "14_listed": (
            "print(len(list(Path('../..').resolve().joinpath('nbs').rglob('*.ipynb'))),"
            " 'notebooks')"
        ),
        "15_apart": (
            "Path('../../results', 'own' + '.csv').write_text('1')\nprint(1)"
        ),
    }
    for name, code_ in made.items():
        write(
            project / f"nbs/routing/{name}.ipynb",
            prose(f"# {name}\n\n> P."),
            code("from pathlib import Path"),
            code(code_),
        )
    assert len(
        freshness.execute([f"routing/{name}.ipynb" for name in made], project)
    ) == len(made)
    (project / "results/own.csv").unlink()
    read = {
        Path(path).stem: x.read
        for path, (x, _) in freshness.read_executions(project).items()
    }
    assert read == {
        "11_read": ("results/table.csv",),
        "12_absent": ("results/later.csv",),
        "13_child": ("results/table.csv",),
        "14_listed": ("nbs/",),
        "15_apart": (),
    }

    stale = lambda: [
        Path(p).stem
        for p in freshness.stale_chapters(project)
        if Path(p).stem in made
    ]
    assert stale() == []
    (project / "results/table.csv").write_text("a,b\n1,3\n")
    assert stale() == ["11_read", "13_child"]
    (project / "results/later.csv").write_text("a\n")
    assert stale() == ["11_read", "12_absent", "13_child"]
    write(project / "nbs/guides/new.ipynb", prose("# New\n\n> N."))
    assert stale() == ["11_read", "12_absent", "13_child", "14_listed"]


def test_modules_behind_modules_count(project):
    (project / "dmr/outer.py").write_text("from .damping import damp\n")
    chapter = lambda text: book.Chapter(
        "routing/11_a.ipynb", "A", cells=(notebook.read_cell(code(text)),)
    )
    hashed = lambda text: freshness.chapter_hash(chapter(text), project)
    direct, behind = "from dmr.damping import damp", "import dmr.outer"
    before = hashed(direct), hashed(behind), hashed("import torch")
    module = project / "dmr/damping.py"
    module.write_text(MODULE.replace("Damp a step.", "Say it otherwise."))
    assert (hashed(direct), hashed(behind), hashed("import torch")) == before
    module.write_text(MODULE.replace("1 - alpha", "2 - alpha"))
    after = hashed(direct), hashed(behind), hashed("import torch")
    assert [a != b for a, b in zip(after, before)] == [True, True, False]


def test_stale_page_says_so(project):
    chapter = next(
        c
        for c in book.read_book(project / "nbs")
        if c.path == "routing/10_damping.ipynb"
    )
    entry = freshness.Execution(
        freshness.chapter_hash(chapter, project),
        "2026-01-01",
        "abc1234",
        "2 cores",
        "Python 3.11",
        3.2,
    )
    (project / "nbs/_executed.json").write_text(
        json.dumps({"routing/10_damping.ipynb": vars(entry)})
    )
    site.build(project)
    page = project / "_docs/routing/damping.html"
    assert (
        "Executed from top to bottom on 2026-01-01" in page.read_text()
        and "have changed since" not in page.read_text()
    )
    file = project / "nbs/routing/10_damping.ipynb"
    file.write_text(file.read_text().replace("damp(1.0)", "damp(3.0)"))
    site.build(project)
    assert "have changed since" in page.read_text()


# ---- the figure on the home page


def test_the_hero_opens_at_a_measured_share_and_its_title_says_what_is_left():
    table = home.hero_table()
    first = {name: table[name][at] for name, at in table["first"].items()}
    assert first["kappa"] == 0.82 and table["kappa"][-1] == 1
    step = home._first(table)[0][table["first"]["steps"]]
    assert 0.1 < step < 0.4
    title = home._hero_title(table)
    assert f"an edit of 0.9 leaves {step:.2f} of" in title
    assert f">{title}</h2>" in home.hero_html(table)


def test_hero_table_is_the_law():
    from dmr.theory import transient_inflation

    table = home.hero_table()
    for i, j, k, n in ((0, 0, 0, 0), (4, 5, 1, 20), (9, 10, 3, 36)):
        alpha, kappa, beta2, steps = (
            home.ALPHAS[i],
            home.KAPPAS[j],
            home.BETA2S[k],
            home.STEPS[n],
        )
        expected = (1 - alpha) * float(
            transient_inflation(steps, beta2, alpha, kappa)
        )
        assert table["step"][i][j][k][n] == pytest.approx(
            1000 * expected, abs=0.51
        )
    assert (
        list(home.STEPS) == sorted(set(home.STEPS)) and home.STEPS[-1] == 10_000
    )
