"""The built site in a real browser: every page loads whole, from this machine
alone, fits a phone, and can be used by everyone.
"""

import functools
import gzip
import html
import json
import re
import shutil
import threading
import time
from collections import Counter
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[2]
BROWSER = (
    shutil.which("chromium")
    or shutil.which("chromium-browser")
    or shutil.which("google-chrome")
)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# bytes over the wire, fonts and KaTeX, which are cached, apart
TEXT_PAGE, INTERACTIVE_PAGE, GALLERY = 300_000, 500_000, 700_000

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def docs():
    from dmr.book import site

    _, problems = site.build(ROOT)
    assert not [p for p in problems if "rename one" not in p], problems
    return ROOT / "_docs"


@pytest.fixture(scope="module")
def files(docs):
    return {
        p.relative_to(docs).as_posix(): p.read_text(encoding="utf-8")
        for p in sorted(docs.rglob("*.html"))
    }


@pytest.fixture(scope="module")
def pages(files):
    "Without those that only lead to where a page stands now."
    leads_on = '<meta http-equiv="refresh"'
    return {name: t for name, t in files.items() if leads_on not in t}


@pytest.fixture(scope="module")
def address(docs):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(docs))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser():
    if BROWSER is None:
        pytest.skip(
            "NO BROWSER: install chromium to test the site (Debian: apt-get"
            " install chromium)"
        )
    sync_api = pytest.importorskip(
        "playwright.sync_api",
        reason="NO PLAYWRIGHT: pip install 'moment-routing[dev]'",
    )
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=BROWSER, args=FLAGS
        )
        yield chromium
        chromium.close()


WATCH = """
window.shift = 0;
new PerformanceObserver(list => {
  for (const e of list.getEntries())
    if (!e.hadRecentInput) window.shift += e.value;
}).observe({type: 'layout-shift', buffered: true});
"""
OVERFLOW = """() => {
  const boxes = '.table-scroll, pre, .chart-scroll, .katex-display, ' +
    '.katex-mathml, .anchorjs-link, #quarto-sidebar, .navbar-collapse';
  const sticks_out = e => e.getBoundingClientRect().right > innerWidth + 1
    && !e.ownerSVGElement && !e.closest(boxes);
  const wide = [...document.querySelectorAll('body *')].filter(sticks_out);
  return [document.documentElement.scrollWidth - innerWidth,
          wide.slice(0, 3).map(e => e.tagName + '.' + e.className + ' ' +
                                    e.textContent.slice(0, 40))];
}"""


def visit(context, url, problems):
    "Open a page and collect what goes wrong while it loads."
    page = context.new_page()
    host = urlsplit(url).netloc
    say = lambda text: problems.append(f"{url}: {text}")
    page.on(
        "console",
        lambda m: (
            say(f"console {m.type}: {m.text}")
            if m.type in ("error", "warning")
            else None
        ),
    )
    page.on("pageerror", lambda e: say(f"script error: {e}"))
    page.on("requestfailed", lambda r: say(f"request failed: {r.url}"))
    page.on(
        "response",
        lambda r: say(f"{r.status} {r.url}") if r.status >= 400 else None,
    )

    def request(r):
        target = urlsplit(r.url)
        if (
            target.scheme not in ("data", "blob", "file")
            and target.netloc != host
        ):
            problems.append(f"{url}: asks another host: {r.url}")

    page.on("request", request)
    page.goto(url, wait_until="load")
    return page


@pytest.mark.parametrize("width, scheme", [(1280, "light"), (360, "dark")])
def test_every_page_loads_whole_and_fits(
    browser, address, pages, width, scheme
):
    context = browser.new_context(
        viewport={"width": width, "height": 800},
        color_scheme=scheme,
        reduced_motion="reduce",
    )
    context.add_init_script(WATCH)
    problems = []
    for name in pages:
        page = visit(context, f"{address}/{name}", problems)
        page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
        page.wait_for_timeout(60)
        over, wide = page.evaluate(OVERFLOW)
        if over > 0 or wide:
            problems.append(f"{name}: {over} px too wide at {width}: {wide}")
        dark = page.evaluate(
            "document.documentElement.classList.contains('quarto-dark')"
        )
        if dark != (scheme == "dark"):
            problems.append(
                f"{name}: does not follow the reader's {scheme} scheme"
            )
        page.close()
    context.close()
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("width", [1280, 360])
def test_nothing_moves_while_a_page_loads(browser, address, pages, width):
    context = browser.new_context(
        viewport={"width": width, "height": 800}, reduced_motion="reduce"
    )
    context.add_init_script(WATCH)
    shifts = {}
    for name in pages:
        page = visit(context, f"{address}/{name}", [])
        page.wait_for_timeout(60)
        shifts[name] = page.evaluate("window.shift")
        page.close()
    context.close()
    assert max(shifts.values()) <= 0.1, {
        name: round(shift, 3) for name, shift in shifts.items() if shift > 0.1
    }


@pytest.mark.parametrize("width", [1280, 360])
def test_nothing_moves_when_fonts_come_late(browser, address, width):
    context = browser.new_context(
        viewport={"width": width, "height": 800}, reduced_motion="reduce"
    )
    context.add_init_script(WATCH)
    held, shifts = [], {}

    def hold(route):
        held.append(route.request.url)
        time.sleep(0.5)
        route.continue_()

    context.route("**/*.woff2*", hold)
    for name in (
        "index",
        "why/inflation",
        "why/strength_law",
        "routing/router",
        "experiments/claims",
        "reference/routing.router",
    ):
        page = visit(context, f"{address}/{name}.html", [])
        page.wait_for_timeout(300)
        shifts[name] = round(page.evaluate("window.shift"), 3)
        page.close()
    context.close()
    # what is left: letters of other widths in a line
    assert held and max(shifts.values()) <= 0.02, shifts


def test_no_code_and_no_output_is_clipped(browser, address, pages):
    clipped = """() => [...document.querySelectorAll('main pre')]
      .filter(e => e.clientWidth && e.scrollWidth > e.clientWidth + 1)
      .filter(e => !(e.matches('.columns') && e.tabIndex === 0))
      .map(e => e.textContent.slice(0, 60))"""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    found = {}
    for name in pages:
        page = visit(context, f"{address}/{name}", [])
        found[name] = page.evaluate(clipped)
        page.close()
    context.close()
    assert not {name: text for name, text in found.items() if text}


def test_a_term_shows_its_meaning_to_the_keyboard(browser, address):
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = visit(context, f"{address}/why/cancellation.html", [])
    card = page.locator(".term .card").first
    assert not card.is_visible()
    page.locator(".term a").first.focus()
    assert card.is_visible() and len(card.inner_text()) > 20
    context.close()


def test_figures_with_sliders_follow_python(browser, address, pages):
    "The first frame without scripts, and after keys and presets with them."
    from dmr.book.sliders import frame

    drawn_in = re.compile(r'<figure class="[^"]*turn-figure')
    there = [name for name, t in pages.items() if drawn_in.search(t)]
    assert {Path(name).stem for name in there} >= {
        "inflation",
        "forgives",
        "repair",
        "displacement",
    }
    values = """f => Object.fromEntries([...f.querySelectorAll("input")].map(
      i => [i.name, i.dataset.list ? JSON.parse(i.dataset.list)[i.value]
                                   : +i.value]))"""
    drawn = """f => Object.fromEntries(
      [...f.querySelectorAll("[data-part]")].map(e => [e.dataset.part,
        {...Object.fromEntries([...e.attributes].map(a => [a.name, a.value])),
         text: e.textContent}]))"""
    number = lambda x: [float(v) for v in re.findall(r"-?[\d.]+", str(x))]

    def check(figure, places):
        kind = figure.get_attribute("data-kind")
        found = frame(kind, places)
        title = figure.locator(".figure-title")
        assert title.inner_text() == found["title"]
        shown = figure.evaluate(drawn)
        for part, fixed in found["parts"].items():
            for key, value in fixed.items():
                said = shown[part][key]
                if key == "text":
                    assert said == value, (kind, part)
                else:
                    assert number(said) == pytest.approx(
                        number(value), abs=0.11
                    ), (kind, part, key)
        for name, words in found["said"].items():
            slider = figure.locator(f'input[name="{name}"]')
            assert slider.get_attribute("aria-valuetext") == words

    for scripts in (False, True):
        context = browser.new_context(
            viewport={"width": 390, "height": 800}, java_script_enabled=scripts
        )
        for name in there:
            page = context.new_page()
            page.goto(f"{address}/{name}", wait_until="load")
            figure = page.locator(".turn-figure").first
            if not scripts:
                first = figure.locator("button").first
                places = json.loads(first.get_attribute("data-set"))
                assert not figure.locator("input").first.is_visible()
                title = figure.locator(".figure-title").text_content()
                kind = figure.get_attribute("data-kind")
                assert title == frame(kind, places)["title"]
                page.close()
                continue
            check(figure, figure.evaluate(values))
            for slider in figure.locator("input").all():
                before = slider.input_value()
                slider.focus()
                page.keyboard.press("ArrowLeft")
                assert slider.input_value() != before, name
                check(figure, figure.evaluate(values))
            for button in figure.locator("button").all():
                button.click()
                places = json.loads(button.get_attribute("data-set"))
                assert figure.evaluate(values) == places
                check(figure, places)
            page.close()
        context.close()


def test_maths_is_typeset(pages):
    raw = [
        name
        for name, text in pages.items()
        if re.search(r'class="math (?:inline|display)">\\[(\[]', text)
    ]
    assert not raw, f"formulas left as source: {raw}"
    assert sum('class="katex"' in text for text in pages.values()) >= 5
    assert not [name for name, text in pages.items() if "katex-error" in text]


def words_of(text):
    "Words of four letters and more, with how often they occur."
    return Counter(re.findall(r"[^\W\d_]{4,}", html.unescape(text)))


def texts(tag, page):
    "What stands in each element of a kind."
    found = re.findall(rf"<{tag}\b.*?</{tag}>", page, re.S)
    return [re.sub("<[^>]+>", "", x) for x in found]


def test_copies_have_what_their_pages_have(docs, pages):
    "Headings and prose; not what the site adds, nor figures and formulas."
    apart = re.compile(
        r"<figure\b.*?</figure>|<math\b.*?</math>|<details\b.*?</details>"
        r'|<span class="card".*?</span>|<a class="anchorjs-link.*?</a>',
        re.S,
    )
    lost = {}
    for name, text in pages.items():
        copy = (docs / name).with_suffix(".llms.md").read_text("utf-8")
        main = apart.sub("", re.search("<main.*?</main>", text, re.S)[0])
        there, prose = words_of(copy), words_of(" ".join(texts("p", main)))
        headings = [h for h in texts("h2", main) if words_of(h) - there]
        missing = (prose - there).total()
        if headings or missing > 0.05 * prose.total():
            lost[name] = missing, headings
    assert not lost, lost


def test_links_and_anchors_resolve(docs, pages):
    ids = {
        name: set(re.findall(r'\bid="([^"]+)"', text))
        for name, text in pages.items()
    }
    broken = []
    for name, text in pages.items():
        for href in {
            html.unescape(h)
            for h in re.findall(r'<a\b[^>]*\bhref="([^"]*)"', text)
        }:
            if re.match(r"[a-z]+:", href) or href in ("", "#"):
                continue
            path, _, anchor = unquote(href).partition("#")
            target = (
                (docs / name).parent / path.split("?")[0]
                if path
                else docs / name
            )
            target = (
                target / "index.html" if target.is_dir() else target
            ).resolve()
            if not target.is_file():
                broken.append(f"{name}: {href}")
            elif (
                anchor
                and target.suffix == ".html"
                and anchor
                not in ids[target.relative_to(docs.resolve()).as_posix()]
            ):
                broken.append(f"{name}: {href} has no such anchor")
    assert not broken, "\n".join(sorted(set(broken)))


def test_old_addresses_lead_on(browser, address, files, pages):
    "A reader of an old link arrives at the page, and at the same heading."
    old = sorted(set(files) - set(pages))
    assert len(old) > 100
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    for name, new in (
        ("cancellation.html", "why/cancellation.html"),
        ("reference/theory.html#inflation", "reference/theory.html#inflation"),
        (
            "reference/routing.html#MomentRouter",
            "reference/routing.router.html#MomentRouter",
        ),
    ):
        page.goto(f"{address}/{name}", wait_until="load")
        page.wait_for_url(f"{address}/{new}")
    context.close()


def test_weight(docs, pages):
    over = []
    for name, text in pages.items():
        parts = {
            (docs / name).parent / html.unescape(u)
            for u in re.findall(
                r'(?:src|href)="([^":]+\.(?:css|js|webp|png|svg))"', text
            )
        }
        files = [
            p.resolve()
            for p in parts
            if not {"katex", "fonts"} & set(p.parts) and p.is_file()
        ]
        wire = lambda data, kind: (
            len(data)
            if kind in (".webp", ".png")
            else len(gzip.compress(data, 6))
        )
        size = len(gzip.compress(text.encode(), 6)) + sum(
            wire(p.read_bytes(), p.suffix)
            for p in files
            if p.suffix != ".ipynb"
        )
        many = "hero-table.js" in text
        limit = INTERACTIVE_PAGE if many else TEXT_PAGE
        if name == "gallery.html":  # its pictures load as one scrolls
            assert text.count('loading="lazy"') > 60
            limit = GALLERY
        if size > limit:
            over.append(
                f"{name}: {size / 1000:.0f} kB, limit {limit / 1000:.0f}"
            )
    assert not over, "\n".join(over)


def test_first_view_is_quick(browser, address):
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    times = []
    for _ in range(5):
        page = visit(context, f"{address}/why/inflation.html", [])
        page.wait_for_function(
            "performance.getEntriesByName('first-contentful-paint').length"
        )
        times.append(
            page.evaluate(
                "performance.getEntriesByName('first-contentful-paint')[0].startTime"
            )
        )
        page.close()
    context.close()
    assert sorted(times)[1] <= 1000, f"first paint after {times} ms"


@pytest.mark.parametrize(
    "query, expected",
    [
        ("transient_inflation", "reference/theory.html"),
        ("protection that cancels", "why/cancellation.html"),
    ],
)
def test_search_finds(browser, address, query, expected):
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = visit(context, f"{address}/contents.html", [])
    page.fill("#quarto-search input", query)
    page.wait_for_selector(".search-result")
    found = page.eval_on_selector_all(
        ".search-result",
        "es => es.slice(0, 8).map(e => e.getAttribute('href'))",
    )
    context.close()
    assert any(expected in href for href in found), found


def test_sliders_move_the_curve_by_keyboard(browser, address):
    problems = []
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = visit(context, f"{address}/index.html", problems)
    state = lambda: [
        page.get_attribute("#hero-curve", "d"),
        page.get_attribute("#hero-dot", "cx"),
        page.inner_text("#hero-readout"),
        page.inner_text("#hero-title"),
    ]
    seen = [state()]
    for name in ("alpha", "kappa", "beta2", "steps"):
        page.focus(f"#hero-{name}")
        page.keyboard.press("ArrowLeft")
        seen.append(state())
        assert seen[-1][2] != seen[-2][2], (
            f"{name} leaves the readout as it was"
        )
        assert page.get_attribute(
            f"#hero-{name}", "aria-valuetext"
        ) == page.inner_text(f"output[for=hero-{name}]")
    assert (
        seen[1][0] != seen[0][0]
        and seen[2][0] != seen[1][0]
        and seen[3][0] != seen[2][0]
    ), "a slider leaves the curve as it was"
    assert all(a[3] != b[3] for a, b in zip(seen[:2], seen[1:3])), (
        "the title stays as it was"
    )
    assert seen[4][1] != seen[3][1], "the steps leave the dot where it was"
    context.close()
    assert not [p for p in problems if "rename one" not in p], problems


def test_first_frame_is_what_the_script_draws(browser, address):
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = visit(context, f"{address}/index.html", [])
    drawn, words, title = (
        page.get_attribute("#hero-curve", "d"),
        page.inner_text("#hero-readout"),
        page.inner_text("#hero-title"),
    )
    context.close()
    context = browser.new_context(
        viewport={"width": 1280, "height": 800}, java_script_enabled=False
    )
    page = visit(context, f"{address}/index.html", [])
    number = lambda path: [float(x) for x in re.findall(r"[\d.]+", path)]
    assert number(page.get_attribute("#hero-curve", "d")) == pytest.approx(
        number(drawn), abs=0.11
    )
    assert page.inner_text("#hero-readout") == words
    assert page.inner_text("#hero-title") == title
    context.close()


def test_readable_without_scripts_and_from_a_folder(browser, docs):
    problems = []
    context = browser.new_context(
        viewport={"width": 1280, "height": 800}, java_script_enabled=False
    )
    page = visit(context, (docs / "why/inflation.html").as_uri(), problems)
    assert (
        len(page.inner_text("main")) > 2000
        and page.locator("main .katex").count() > 5
    )
    assert page.locator("#quarto-sidebar a").first.is_visible()
    context.close()
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    visit(context, (docs / "reference/theory.html").as_uri(), problems)
    context.close()
    assert not [p for p in problems if "rename one" not in p], problems


def test_dark_and_light(browser, address):
    context = browser.new_context(
        viewport={"width": 1280, "height": 800}, color_scheme="light"
    )
    page = visit(context, f"{address}/why/inflation.html", [])
    background = lambda: page.evaluate(
        "getComputedStyle(document.body).backgroundColor"
    )
    light = background()
    page.click(".quarto-color-scheme-toggle")
    page.wait_for_function(
        "document.documentElement.classList.contains('quarto-dark')",
        timeout=5000,
    )
    dark = background()
    assert dark != light
    page.goto(f"{address}/contents.html")  # the choice holds on the next page
    assert background() == dark
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessible(browser, address, pages, scheme):
    axe = pytest.importorskip(
        "axe_playwright_python",
        reason="NO AXE: pip install 'moment-routing[dev]'",
    )
    script = (Path(axe.__file__).parent / "axe.min.js").read_text(
        encoding="utf-8"
    )
    context = browser.new_context(
        viewport={"width": 1280, "height": 800}, color_scheme=scheme
    )
    serious = []
    kinds = [
        "index.html",
        "why/inflation.html",
        "contents.html",
        "reference/index.html",
        "reference/reporting.figures.html",
        "gallery.html",
        "cite.html",
    ]
    chapters = [
        name
        for name in pages
        if not name.startswith("reference/") and name not in kinds
    ]
    names = kinds + chapters if scheme == "light" else kinds
    for name in names:
        page = visit(context, f"{address}/{name}", [])
        page.evaluate(script)
        found = page.evaluate(
            "axe.run(document, {resultTypes: ['violations'], rules: {'region':"
            " {enabled: false}}})"
        )
        for v in found["violations"]:
            if v["impact"] in ("serious", "critical"):
                where = [n["html"][:110] for n in v["nodes"][:2]]
                serious.append(
                    f"{name} ({scheme}): {v['id']} ×{len(v['nodes'])}: {where}"
                )
        page.close()
    context.close()
    assert not serious, "\n".join(serious)
