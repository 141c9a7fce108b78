"Pictures of an idea: what their titles say is what they compute."

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

pytest.importorskip("matplotlib")
from dmr.book import diagrams

MINIMA = (0.0, 0.0), (1.0, 1.0)


@pytest.mark.parametrize(
    "curvatures",
    [((8.0, 0.4), (0.3, 6.0)), ((1.0, 2.0), (5.0, 0.1)), ((1.0, 1.0),) * 2],
)
def test_the_valleys_title_is_the_loss_of_the_sum(curvatures):
    f_p, f_n = map(np.array, curvatures)
    at = f_n / (f_p + f_n)  # of the way, the minimum of the sum
    lowest = 0.5 * (f_p * at**2 + f_n * (1 - at) ** 2).sum()
    halfway = 0.125 * (f_p + f_n).sum()
    figure, alt = diagrams.draw_valleys(MINIMA, curvatures)
    ax = figure.axes[0]
    title = (ax.get_title("left") or ax.get_title()).replace("\n", " ")
    assert f"{lowest:.2f} together" in title
    assert title.endswith(f"{halfway:.2f}") and f"{halfway:.2f}" in alt


def test_merges_begin_at_the_past_and_end_at_the_new():
    way = diagrams.merges(MINIMA, ((8.0, 0.4), (0.3, 6.0)), [1e-9, 1.0])
    assert np.allclose(way, MINIMA, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9])
def test_what_a_routing_leaves_is_what_adam_does(alpha):
    from dmr.theory import adam_steps

    g = np.random.default_rng(1).normal(size=2000)
    edited, plain = (1 - alpha) * g, adam_steps(g).u[500:]
    steps = {
        "shared": adam_steps(edited).u,
        "decoupled": adam_steps(edited, g).u,
        "denominator": adam_steps(g, edited).u,
        "displacement": (1 - alpha) * adam_steps(g).u,
    }
    for routing, u in steps.items():
        left = diagrams.step_left(routing, alpha)
        assert np.allclose(u[500:], left * plain, rtol=1e-9)
    with pytest.raises(ValueError, match="'both' is unknown"):
        diagrams.step_left("both", alpha)


def test_the_switches_show_what_the_table_of_routings_says():
    figure, alt = diagrams.draw_switches(0.8)
    assert len(figure.axes) == 4
    for ax in figure.axes:
        routing, left = (ax.get_title("left") or ax.get_title()).split(": ")
        assert float(left) == pytest.approx(diagrams.step_left(routing, 0.8))
        edited = sum("tilde" in t.get_text() for t in ax.texts)
        sees = {"shared": 2, "displacement": 0}.get(routing, 1)
        assert edited == sees and f"{routing} {left}" in alt


PLACES = (0.9, 30, 2.0), (0.5, 60, 10.0), (0.95, 0, 1.0), (0.0, 45, 3.0)


@pytest.mark.parametrize("place", PLACES)
def test_the_script_takes_the_steps_that_python_takes(place):
    quickjs = pytest.importorskip("quickjs")
    context = quickjs.Context()
    script = Path(__file__).parents[2] / "nbs" / "assets" / "step.js"
    context.eval(script.read_text(encoding="utf-8"))
    x = np.array([0.6, -0.8])
    given = ", ".join(map(str, place))
    call = f"JSON.stringify(dmrSteps({given}, [0.6, -0.8]))"
    found = json.loads(context.eval(call))
    left = diagrams.protected_left(*place)
    assert set(found) == set(left)
    for name, M in diagrams.two_weight_steps(*place).items():
        assert np.allclose(found[name]["u"], M @ x, rtol=1e-9, atol=1e-12)
        assert found[name]["left"] == pytest.approx(left[name], rel=1e-9)


def test_the_first_frame_of_a_step_says_what_it_draws():
    page = diagrams.step_html((0.4, 0.25))
    angle, log_spread = diagrams.as_measured(0.4, 0.25)
    left = diagrams.protected_left(0.9, angle, 10**log_spread)
    for name in ("shared", "decoupled", "displacement"):
        assert f'id="step-{name}-left"' in page
        assert page.count(f"{left[name]:.2f}") >= 2  # title and bar
    svg = page[page.index("<svg") : page.index("</svg>") + 6]
    drawn = ElementTree.fromstring(svg)
    assert len(drawn.findall(".//line[@marker-end]")) == 4
    assert left["shared"] == pytest.approx(0.4, rel=0.05)
    assert left["decoupled"] == pytest.approx(0.25, rel=0.05)
