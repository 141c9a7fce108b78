"""The zoo of small stories, told again: what the table says comes out, and the
default keeps to its margins.
"""

import inspect

import pandas as pd
import pytest
import torch

import dmr
from dmr.verdict.stories import (
    ARMS,
    HELD_BACK,
    RATES,
    STORIES,
    harm,
    read_rows,
)

DEFAULT = "merge 0.8, keep 0.5"


def told(story, lr, arm, seed=0):
    "The row of the table."
    rows = pd.DataFrame(read_rows("results/stories.csv"))
    rows = rows[(rows.story == story) & (rows.arm == arm)]
    rows = rows[(rows.lr.astype(float) == lr) & (rows.seed.astype(int) == seed)]
    (row,) = rows[["before", "old", "new"]].astype(float).to_dict("records")
    return row


def told_again(story, lr):
    "Losses of plain Adam and of the default, held against their rows."
    torch.set_num_threads(1)
    ends = []
    for arm in ("plain", DEFAULT):
        found = STORIES[story](ARMS[arm], lr, 0)
        assert found == pytest.approx(told(story, lr, arm), abs=0.02)
        ends.append(found)
    return ends


def test_the_default_is_the_one_that_the_stories_chose():
    known = inspect.signature(dmr.FisherMerge).parameters
    assert (known["weight"].default, known["keep"].default) == (0.8, 0.5)
    assert len(STORIES) == 13 and set(HELD_BACK) < set(STORIES)


def test_a_story_told_again_ends_as_the_table_says():
    plain, ours = told_again("regression", 3e-3)
    assert harm(plain, ours)["kept"]
    assert ours["old"] < plain["old"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("story", [s for s in STORIES if s != "regression"])
def test_every_story_told_again_ends_as_the_table_says(story):
    told_again(story, RATES[story][1])
