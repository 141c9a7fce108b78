"""A run that merges its weights at boundaries: what it computes, and that it
goes on where it was stopped.
"""

import pytest
import torch
from tiny import repeated_sentences

from dmr.training.config import Config, check_config
from dmr.training.loop import ContinualRun, train_stream

BASE = {
    "steps": 12,
    "context": 16,
    "eval_windows": 4,
    "track_step": 0,
    "lr": 3e-3,
    "threads": 1,
}


@pytest.fixture(scope="module")
def stream():
    return repeated_sentences()


def losses(config, stream):
    records = train_stream(config, stream, progress=False)["records"]
    return [r["loss"] for r in records]


def test_a_merge_changes_what_comes_after_the_first_domain(stream):
    plain = losses(Config(**BASE), stream)
    merged = losses(Config(**BASE, consolidation="fisher"), stream)
    n = len(stream)
    assert plain[: 2 * n] == merged[: 2 * n]  # untrained, after the first
    assert plain[2 * n :] != merged[2 * n :]


def test_interpolation_is_the_same_by_either_name(stream):
    old = losses(Config(**BASE, interpolate=0.3), stream)
    new = Config(**BASE, consolidation="interpolate", merge={"weight": 0.3})
    assert losses(new, stream) == old


@pytest.mark.parametrize("curvature", ["gradients", "factored", "moment"])
def test_stopped_and_started_again_it_ends_the_same(
    stream, tmp_path, curvature
):
    merge = {"weight": 0.7, "curvature": curvature}
    config = Config(
        **BASE, consolidation="fisher", merge=merge, checkpoint=str(tmp_path)
    )
    torch.set_num_threads(BASE["threads"])
    whole = losses(Config(**BASE, consolidation="fisher", merge=merge), stream)
    torch.set_num_threads(BASE["threads"])
    first = ContinualRun(config, stream, progress=False)
    first.run_stage()
    first.run_stage()
    first.router.close()
    assert losses(config, stream) == whole


@pytest.mark.parametrize(
    "given, what",
    [
        ({"interpolate": 0.5}, "merge the weights twice"),
        ({"joint": True}, "joint=True trains on all domains at once"),
        ({"merge": {"weight": 0}}, "weight=0 would undo"),
        ({"merge": {"rank": 3}}, "does not fit"),
        (
            {"merge": {"curvature": "moment"}, "routing": "shared"},
            "sees the edited gradient",
        ),
    ],
)
def test_what_has_no_meaning_is_refused_before_anything_runs(given, what):
    with pytest.raises(ValueError, match=what):
        check_config(Config(**BASE | {"consolidation": "fisher"} | given))


def test_projection_and_merge_work_together(stream):
    config = Config(
        **BASE,
        consolidation="fisher",
        modification="projection",
        rank=2,
        routing="displacement",
        alpha=0.9,
    )
    assert torch.tensor(losses(config, stream)).isfinite().all()
