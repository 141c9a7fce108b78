"""Figures: styles that can be told apart, the same bytes twice, a theme that
works in a kernel and without one.
"""

import base64
import itertools
import json
import subprocess
import sys

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

from dmr.reporting import figures

ROUTINGS = ["none", "shared", "decoupled", "denominator", "displacement"]


def luminance(colour):
    channel = lambda c: (
        c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4
    )
    r, g, b = (channel(int(colour[i : i + 2], 16) / 255) for i in (1, 3, 5))
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def seen_by(colour, deficiency):
    """A colour as somebody with a full red, green or blue deficiency sees it
    (Machado, Oliveira and Fernandes 2009), linear RGB.
    """
    m = {
        "protan": [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ],
        "deutan": [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ],
        "tritan": [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ],
    }[deficiency]
    linear = lambda c: (
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
    )
    encoded = lambda c: (
        12.92 * c if c <= 0.0031308 else 1.055 * c ** (1 / 2.4) - 0.055
    )
    rgb = [linear(int(colour[i : i + 2], 16) / 255) for i in (1, 3, 5)]
    return [
        encoded(min(1, max(0, sum(a * b for a, b in zip(row, rgb)))))
        for row in m
    ]


@pytest.mark.parametrize("deficiency", ["protan", "deutan", "tritan"])
def test_routings_differ_for_every_eye(deficiency):
    for a, b in itertools.combinations(ROUTINGS, 2):
        x, y = (seen_by(figures.PALETTE[name], deficiency) for name in (a, b))
        assert sum((p - q) ** 2 for p, q in zip(x, y)) ** 0.5 > 0.1, (
            f"{a} and {b} look alike with {deficiency}"
        )


def test_colours_stand_out_on_paper():
    for name, colour in figures.PALETTE.items():
        # 3:1 is what WCAG asks of graphics
        assert 1.05 / (luminance(colour) + 0.05) >= 2.9, (
            f"{name} is too pale on white"
        )


def test_equal_routing_equal_hue_and_arms_stay_apart():
    style = figures.arm_style
    styles = [
        style("vanilla", rate=0.5),
        style("vanilla"),
        style("vanilla", rate=1.5),
        style("shared"),
        style("decoupled"),
        style("decoupled", adaptive=True),
        style("denominator"),
        style("displacement"),
        style("shared", "replay"),
        style("decoupled", "replay"),
        style("interpolation", interpolate=0.3),
        style("shared", interpolate=0.3),
    ]
    assert len({tuple(s.values()) for s in styles}) == len(styles)
    assert style("shared", "ewc")["marker"] == figures.MARKERS["penalty"]
    assert style("vanilla", "none") == style("none")
    with pytest.raises(ValueError, match="routing='sideways' has no colour"):
        style("sideways")


def run_cells(*sources):
    cells = [nbformat.v4.new_code_cell(s) for s in sources]
    return (
        NotebookClient(
            nbformat.v4.new_notebook(cells=cells),
            timeout=120,
            kernel_name="python3",
        )
        .execute()
        .cells
    )


def test_notebook_figures_are_compact_named_and_reproducible():
    draw = (
        "fig, ax = plt.subplots(); ax.plot([0, 1]); ax.set_title('A finding');"
        " None"
    )
    cells = run_cells(
        "import matplotlib.pyplot as plt\nfrom dmr.reporting.figures import"
        " show, use_theme\nuse_theme()",
        draw,
        draw,
        "fig, ax = plt.subplots(); ax.plot([0, 1])\nshow(fig, 'One line"
        " rises.')",
    )
    first, second, told = (c.outputs[-1] for c in cells[1:])
    png = base64.b64decode(first.data["image/png"])
    assert png == base64.b64decode(second.data["image/png"])
    assert b"Software" not in png and len(png) < 40_000
    size = first.metadata["image/png"]
    assert figures.png_size(png) in {
        (2 * size["width"] + a, 2 * size["height"] + b)
        for a in (0, 1)
        for b in (0, 1)
    }
    assert first.data["text/plain"] == "Figure: A finding"
    assert told.metadata["image/png"]["alt"] == "One line rises."
    assert len(cells[3].outputs) == 1, (
        "show() must not leave a second copy for the inline back end"
    )


def test_theme_outside_a_notebook():
    code = (
        "from dmr.reporting.figures import use_theme, figure_png; use_theme();"
        " import matplotlib.pyplot as p; print(len(figure_png(p.figure())))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"MPLBACKEND": "agg", "PATH": "/usr/bin"},
    )
    assert done.returncode == 0 and int(done.stdout) > 0, done.stderr


def test_missing_extra_is_named():
    code = (
        "import json, sys; sys.modules['seaborn'] = None\nfrom"
        " dmr.reporting.figures import use_theme\ntry: use_theme()\nexcept"
        " ModuleNotFoundError as e: print(json.dumps(str(e)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True
    )
    assert "moment-routing[experiments]" in json.loads(done.stdout)


def test_import_pulls_no_plotting():
    code = (
        "import sys, dmr.reporting.figures; print([m for m in ('matplotlib',"
        " 'seaborn', 'pandas', 'IPython') if m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True
        ).stdout.strip()
        == "[]"
    )


def nearest_rising(z):
    "Of all rising sequences the nearest to z, by the max-min formula."
    mean = lambda a, b: sum(z[a : b + 1]) / (b + 1 - a)
    n = range(len(z))
    return [max(min(mean(a, b) for b in n[k:]) for a in n[: k + 1]) for k in n]


@pytest.mark.parametrize("seed", range(20))
def test_names_move_apart_as_little_as_can_be(seed):
    "Against the formula in float64: order kept, no overlap, nearest."
    rng = np.random.default_rng(seed)
    y = list(
        rng.normal(size=int(rng.integers(1, 12))) * rng.choice([0.1, 1, 9])
    )
    gap = float(rng.choice([0.0, 0.3, 1.0]))
    new = figures.spread(y, gap)
    order = np.argsort(y, kind="stable")
    x = np.array(new)[order]
    assert (np.diff(x) >= gap - 1e-12).all()
    z = [y[i] - k * gap for k, i in enumerate(order)]
    assert x == pytest.approx(
        [v + k * gap for k, v in enumerate(nearest_rising(z))], abs=1e-12
    )
    assert np.mean(new) == pytest.approx(np.mean(y), abs=1e-12)  # centred


def test_names_with_room_stay_and_equal_ones_keep_their_order():
    assert figures.spread([3.0, 0.0, 1.5], 1.5) == [3.0, 0.0, 1.5]
    assert figures.spread([1.0, 1.0, 1.0], 0.5) == [0.5, 1.0, 1.5]
    assert figures.spread([], 1.0) == []
    nan = figures.spread([1.0, float("nan"), 1.0], 1.0)
    assert nan[0] == 0.5 and np.isnan(nan[1]) and nan[2] == 1.5
    for gap in (-1.0, float("nan")):
        with pytest.raises(ValueError, match=f"gap={gap}"):
            figures.spread([1.0], gap)


def test_every_drawing_moves_its_names_by_it():
    "Two curves that end at one height: a name above it, and one below."
    plt = pytest.importorskip("matplotlib.pyplot")
    from dmr.reporting.statistics import Point
    from dmr.verdict import drawings, planes

    def heights(label):
        fig, ax = plt.subplots()
        ax.set_ylim(0, 4)
        label(ax)
        plt.close(fig)
        return sorted(t.xyann[1] for t in ax.texts)

    one = heights(
        lambda ax: drawings._label_ends(
            ax, 1.0, {"a": (2.0, "k"), "b": (2.0, "k")}
        )
    )
    other = heights(
        lambda ax: planes._label_ends(
            ax, {n: (Point(1.0, 2.0), "k") for n in "ab"}
        )
    )
    for low, high in (one, other):
        assert high - low > 0.2 and low + high == pytest.approx(4.0)
