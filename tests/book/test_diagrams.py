"Pictures of an idea: what their titles say is what they compute."

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
