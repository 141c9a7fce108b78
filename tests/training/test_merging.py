"""A run that merges its weights at boundaries: what it computes, and that it
goes on where it was stopped.
"""

import pytest
import torch
from tiny import repeated_sentences

from dmr.methods.consolidation import FisherMerge
from dmr.training.config import Config, check_config
from dmr.training.loop import ContinualRun, clear_moments, train_stream

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


VARIANT = "fisher_variant"


@pytest.mark.parametrize(
    "given, what",
    [
        ({"consolidation": "none", "merges": 2}, "merges=2 needs a consol"),
        (
            {"consolidation": "none", "after_merge": "first"},
            "after_merge='first' needs a consol",
        ),
        ({"merges": 13}, "merges=13 exceeds steps=12"),
        ({"after_merge": "none"}, "choose one of kept, first, both"),
        (
            {"optimizer": "sgd", "beta1": 0.0, "routing": "displacement"}
            | {"after_merge": "first"},
            "sgd keeps no first moment",
        ),
        ({"compile": True, "consolidation": "kfac"}, "leave compile out"),
        (
            {"merge": {"curvature": "moment"}, "after_merge": "both"},
            "'moment' is read off a second moment",
        ),
        (
            {"merge": {"curvature": "moment"}, "state": "reset"},
            "'moment' is read off a second moment",
        ),
        (
            {"consolidation": VARIANT, "merge": {"curvature": "seen"}}
            | {"after_merge": "both", "merges": 2},
            "'seen' is read off a second moment",
        ),
        (
            {"consolidation": VARIANT, "merge": {"labels": "model"}},
            "needs curvature='pass'",
        ),
        ({"consolidation": "regmean", "merge": {"keep": 1}}, "does not fit"),
    ],
)
def test_what_has_no_meaning_in_a_merge_is_refused(given, what):
    with pytest.raises(ValueError, match=what):
        check_config(Config(**BASE | {"consolidation": "fisher"} | given))


#: What a reviewer names, as a study would.
ARMS = {
    "SFA": {
        "consolidation": "interpolate",
        "merge": {"weight": 0.8},
        "merges": 4,
    },
    "four merges": {"consolidation": "fisher", "merges": 4},
    "first moment": {"consolidation": "fisher", "after_merge": "first"},
    "both moments": {"consolidation": "fisher", "after_merge": "both"},
    "L2 to the start": {
        "modification": "ewc",
        "routing": "shared",
        "alpha": 1.0,
        "options": {"uniform": True, "online": True, "gamma": 0, "lam": 0.01},
    },
    "mode-IMM": {
        "consolidation": VARIANT,
        "merge": {"curvature": "pass", "damping": 0, "labels": "model"}
        | {"chain": "trained", "examples": 8},
    },
    "edited": {
        "consolidation": VARIANT,
        "merge": {"curvature": "seen"},
        "modification": "projection",
        "rank": 2,
        "routing": "shared",
    },
    "last half": {"consolidation": VARIANT, "merge": {"last": 0.5}},
    "hidden": {"consolidation": VARIANT, "merge": {"only": ["blocks.*"]}},
    "ends": {
        "consolidation": VARIANT,
        "merge": {"only": ["embedding.*", "head.*"]},
    },
    "search": {"consolidation": VARIANT, "merge": {"rise": 0.1}},
    "RegMean": {"consolidation": "regmean", "merge": {"examples": 8}},
    "K-FAC": {"consolidation": "kfac", "merge": {"examples": 8}},
}


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_runs_and_goes_on_where_it_stopped(stream, tmp_path, arm):
    "A run in two sittings ends as one in one, and is no plain run."
    torch.set_num_threads(1)
    given = BASE | ARMS[arm]
    whole = losses(Config(**given), stream)
    torch.set_num_threads(1)
    config = Config(**given, checkpoint=str(tmp_path))
    first = ContinualRun(config, stream, progress=False)
    first.run_stage()
    first.run_stage()
    first.router.close()
    assert losses(config, stream) == whole
    assert torch.tensor(whole).isfinite().all()
    n = len(stream)
    plain = losses(Config(**BASE), stream)
    if "modification" not in given or arm == "L2 to the start":
        assert whole[: 2 * n] == plain[: 2 * n]  # the first domain is free
    assert whole[2 * n :] != plain[2 * n :]


def test_one_merge_a_domain_is_the_merge_at_its_end(stream):
    once = losses(Config(**BASE, consolidation="fisher", merges=1), stream)
    assert once == losses(Config(**BASE, consolidation="fisher"), stream)


def test_merges_inside_a_domain_come_evenly_spaced(stream, monkeypatch):
    "And none in the first domain."
    seen = []

    def pull(self):
        seen.append((self.trained.domains, self.trained.steps))
        return {}

    monkeypatch.setattr(FisherMerge, "pull", pull)
    losses(Config(**BASE, consolidation="fisher", merges=3), stream)
    domains = range(1, len(stream))
    assert seen == [(d, 12 * d + at) for d in domains for at in (4, 8)]


def test_a_search_leaves_its_weight_in_the_record(stream):
    config = Config(**BASE, consolidation=VARIANT, merge={"rise": 0.3})
    stages = train_stream(config, stream, progress=False)["stages"]
    found = [s.get("merge_weight") for s in stages]
    assert found[0] is None and all(0 < x <= 1 for x in found[1:])


@pytest.mark.parametrize("which", ["kept", "first", "both"])
def test_what_becomes_of_the_moments(which):
    layer = torch.nn.Linear(2, 2)
    adam = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    adam.step()
    before = {k: x.clone() for k, x in adam.state[layer.weight].items()}
    clear_moments(adam, which)
    after = adam.state.get(layer.weight, {})
    if which == "both":
        assert not after
        return
    assert after["step"] == before["step"]
    assert torch.equal(after["exp_avg_sq"], before["exp_avg_sq"])
    kept = torch.equal(after["exp_avg"], before["exp_avg"])
    assert kept == (which == "kept")
    assert kept or not after["exp_avg"].any()


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
