"""Figures of tables with known answers."""

import json

import numpy as np
import pytest
import simulated

from dmr.verdict.answers import ADAPTIVE, INTERPOLATION, SHARED
from dmr.verdict.drawings import (
    draw_age,
    draw_domains,
    draw_growth,
    draw_parts,
    draw_plane,
    draw_stages,
    learned_by_stage,
)
from dmr.verdict.tables import evidence


def test_the_figures_use_every_seed():
    def lose(row, L):
        # 2.0 to 4.0: mean 3.0 over five seeds
        L[-1, 0] = 2.0 + 0.5 * row["seed"]

    arms = {SHARED: 1.0, ADAPTIVE: 0.5}
    table = simulated.change(simulated.table(arms, seeds=5), lose)
    fig, alt = draw_age(table)
    rate = table.nominal[""]
    rows = [r for r in table.rows if r["parameters"]["lr"] == rate]
    plain = [
        json.loads(r["loss_matrix"]) for r in rows if r["arm"] == "vanilla"
    ]
    plain = np.array(plain)
    drawn = fig.axes[0].lines[0].get_ydata()
    assert len(drawn) == plain.shape[1] // 2 + 1
    for age, found in enumerate(drawn):
        ends = plain.shape[1] - age
        rise = [L[j + age, j] - L[j, j] for L in plain for j in range(ends)]
        assert found == pytest.approx(np.mean(rise))
    assert f"vanilla {drawn[-1]:.3f}" in alt and "(n=5, t)" in alt
    fig, alt = draw_growth(table)
    # bars for each arm
    assert len(fig.axes[0].containers) == 3 and "(n=5, t)" in alt
    fig, alt = draw_domains(table)
    assert len(fig.axes[0].containers) == 3 and "vanilla a" in alt


def test_arms_on_top_of_interpolation_have_a_panel_of_their_own():
    both = f"{SHARED} + {INTERPOLATION}"
    arms = {SHARED: 0.9, INTERPOLATION: 0.7, both: 0.6}
    fig, alt = draw_plane(simulated.table(arms))
    above, below = fig.axes
    # vanilla, the edit or the sum, interpolation alone
    assert len(above.containers) == 3 and len(below.containers) == 3
    assert alt.count(both) == 1 and len(fig.legends[0].get_texts()) == 3
    assert len(draw_plane(simulated.table({SHARED: 0.9}))[0].axes) == 1


def test_parts_stand_side_by_side_with_those_that_are_there():
    arms = {SHARED: 1.0, ADAPTIVE: 0.5}
    near = simulated.table(arms, noise=0.001)
    far = simulated.table({SHARED: 0.6}, noise=0.001)
    parts = {"near": evidence(near), "far": evidence(far), "later": None}
    both = [near.arms[a] for a in arms]
    fig, alt = draw_parts(parts, both, label="part", title="Near and far")
    for ax in fig.axes:
        heights = [np.asarray(c[0].get_ydata()) for c in ax.containers]
        assert heights[0] == pytest.approx([1.0, 0.6], abs=0.01)
        assert heights[1] == pytest.approx([0.5], abs=0.01)
    names = [t.get_text() for t in fig.axes[1].get_xticklabels()]
    assert names == ["near", "far"] and "later" not in alt
    assert f"{SHARED}, far, at equal learning: 0.6" in alt
    assert fig.get_suptitle() == "Near and far"
    assert draw_parts({"later": None}, both) is None


def test_later_domains_are_held_to_plain_trainings_of_their_seed():
    def stiffen(row, L):
        if row["arm"] == SHARED:
            L[np.diag_indices(len(L))] += 0.1 * np.arange(len(L)) - 0.25

    # without the change both are learned to 2.0
    table = simulated.change(simulated.table({SHARED: 1.0}, seeds=5), stiffen)
    found = learned_by_stage(table, SHARED)
    assert [x.n for x in found] == [5, 5, 5]
    assert [x.estimate for x in found] == pytest.approx([-0.25, -0.15, -0.05])
    fig, alt = draw_stages(table, {SHARED: "ours"})
    title = " ".join(fig.axes[0].get_title("left").split())
    title = title or " ".join(fig.axes[0].get_title().split())
    assert (
        title
        == "ours: domain 2 ends −0.15 against plain training's, domain 3 −0.05"
    )
    assert "ours -0.050" in alt
    assert draw_stages(table, {"nobody": "x"}) is None
