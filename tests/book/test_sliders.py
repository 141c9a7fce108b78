"Figures with sliders: the page's script computes what Python computes."

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

pytest.importorskip("matplotlib")
from dmr.book import sliders
from dmr.theory import left_by_signs

ROOT = Path(__file__).resolve().parents[2]
_LAW = ("alpha", "kappa", "beta2", "steps")
_DESCENT = ("alpha", "angle", "spread", "turn")
PLACES = [
    *(
        ("law", dict(zip(_LAW, at)))
        for at in (
            (0.9, 0.82, 0.95, 150),
            (0.95, 1.0, 0.999, 10_000),
            (0.0, 0.0, 0.9, 1),
            (0.5, 0.31, 0.99, 70),
        )
    ),
    *(
        ("forgives", {"alpha": a, "kappa": k})
        for a, k in ((0.9, 0.82), (0.0, 0.3), (0.99, 1.0), (0.4, 0.0))
    ),
    *(
        ("valleys", {"weight": w, "ratio": r})
        for w, r in ((0.5, 100), (0.02, 1), (0.98, 300), (0.7, 7))
    ),
    *(
        ("descent", dict(zip(_DESCENT, at)))
        for at in (
            (0.9, 30, 10, 70),
            (1.0, 45, 300, -160),
            (0.0, 0, 1, 0),
            (0.55, 90, 3, 121),
        )
    ),
]


@pytest.fixture(scope="module")
def script():
    quickjs = pytest.importorskip(
        "quickjs", reason="NO JAVASCRIPT: pip install 'moment-routing[docs]'"
    )
    context = quickjs.Context()
    # the engine has no locales
    context.eval(
        "Number.prototype.toLocaleString = function () {"
        " return String(this).replace(/\\B(?=(\\d{3})+$)/g, ','); }"
    )
    context.eval((ROOT / "nbs/assets/sliders.js").read_text("utf-8"))
    return context


def numbers(value):
    return [float(x) for x in re.findall(r"-?\d+(?:\.\d+)?", str(value))]


@pytest.mark.parametrize("kind, values", PLACES)
def test_the_script_draws_the_frame_that_python_draws(script, kind, values):
    call = f"JSON.stringify(dmrFrames[{kind!r}]({json.dumps(values)}))"
    found = json.loads(script.eval(call))
    wanted = sliders.frame(kind, values)
    assert found["title"] == wanted["title"]
    assert found["said"] == wanted["said"]
    assert set(found["parts"]) == set(wanted["parts"])
    for part, places in wanted["parts"].items():
        assert set(found["parts"][part]) == set(places), part
        for name, value in places.items():
            drawn = found["parts"][part][name]
            if name == "text":
                assert drawn == value, part
            else:  # curves are rounded to a tenth
                assert numbers(drawn) == pytest.approx(
                    numbers(value), abs=0.1 + 1e-9 if name == "d" else 1e-6
                ), (part, name)


@pytest.mark.parametrize("kappa", [0.05, 1 / 3, 0.6, 0.82])
def test_the_curve_of_signs_is_what_signs_do(kappa):
    """Drawn gradients of two sizes, 32 of 96 directions protected: their signs
    leave what the figure says, and what the arcsine law says.
    """
    d, r, rng = 96, 32, np.random.default_rng(3)
    assert sliders._SHARE == r / d
    U = np.linalg.qr(rng.normal(size=(d, r)))[0]
    P = U @ U.T
    C = kappa / r * P + (1 - kappa) / (d - r) * (np.eye(d) - P)
    m = rng.multivariate_normal(np.zeros(d), C, 10_000, method="cholesky")
    size = lambda step: np.linalg.norm(np.sign(step) @ U)
    for alpha in (0.3, 0.7, 0.9, 0.99):
        drawn = size(m - alpha * m @ P) / size(m)
        shown = sliders._left(alpha, kappa)["signs, Lion"]
        assert shown == pytest.approx(drawn, abs=0.02)
        law = left_by_signs(C, U, alpha)
        assert shown == pytest.approx(law, abs=0.02)


FIRST = {kind: values for kind, values in reversed(PLACES)}


@pytest.mark.parametrize("kind", FIRST)
def test_the_first_frame_stands_without_a_script(kind):
    page = sliders.slider_html(kind, {"first": FIRST[kind]})
    frame = sliders.frame(kind, FIRST[kind])
    assert f">{frame['title']}</p>" in page
    svg = page[page.index("<svg") : page.index("</svg>") + 6]
    drawn = {
        e.get("data-part"): e
        for e in ElementTree.fromstring(svg).iter()
        if e.get("data-part")
    }
    assert set(drawn) == set(frame["parts"])
    for part, places in frame["parts"].items():
        for name, value in places.items():
            said = drawn[part].text if name == "text" else drawn[part].get(name)
            if name == "text":
                assert said == value
            else:
                assert numbers(said) == pytest.approx(numbers(value), abs=0.051)


@pytest.mark.parametrize("kind", FIRST)
def test_the_sliders_stand_where_the_first_frame_is(kind):
    page = sliders.slider_html(kind, {"first": FIRST[kind]})
    for tag in re.findall(r"<input [^>]*>", page):
        at = dict(re.findall(r'([\w-]+)="([^"]*)"', tag))
        place, low, high, by = (
            float(at[x]) for x in ("value", "min", "max", "step")
        )
        assert low <= place <= high and at["aria-label"]
        # a browser moves a value that lies between two steps
        assert (place - low) / by == pytest.approx(round((place - low) / by))
        listed = json.loads(at["data-list"] or "null")
        value = listed[int(place)] if listed else place
        assert value == FIRST[kind][at["name"]]
        said = sliders.frame(kind, FIRST[kind])["said"][at["name"]]
        assert at["aria-valuetext"] == said


def test_a_value_between_two_steps_is_refused():
    with pytest.raises(ValueError, match="kappa=0.823 .*between two steps"):
        sliders.slider_html("forgives", {"": {"alpha": 0.9, "kappa": 0.823}})
    with pytest.raises(ValueError, match=r"steps=149 is not on its slider"):
        values = dict(zip(_LAW, (0.9, 0.5, 0.95, 149)))
        sliders.slider_html("law", {"": values})
