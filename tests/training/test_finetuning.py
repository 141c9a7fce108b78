"""The continual loop for pretrained models: pairing of arms, stop and continue,
standard errors, the template, and the study file.
"""

import json
import math
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from tiny import SENTENCES, repeated_sentences

from dmr.text.load import Domain, Stream
from dmr.training.config import Config, generator_for
from dmr.training.finetuning import (
    UNUSED,
    FinetuneConfig,
    FinetuneRun,
    finetune_stream,
    window_errors,
)

torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "nbs/experiments/lora.ipynb"
STREAM = repeated_sentences()
BASE = {
    "model": "small",
    "prior": None,
    "context": 16,
    "batch": 2,
    "steps": 8,
    "lr": 1e-2,
    "eval_windows": 4,
    "eval_bytes": 48,
    "track_step": 2,
}
PROJECTION = {
    "modification": "projection",
    "rank": 2,
    "alpha": 0.9,
    "options": {"every": 2},
}
ARMS = {
    "vanilla": {},
    "shared": {**PROJECTION, "routing": "shared"},
    "decoupled": {**PROJECTION, "routing": "decoupled"},
    "adaptive": {**PROJECTION, "routing": "decoupled", "strength": "overlap"},
    "displacement": {**PROJECTION, "routing": "displacement"},
    "replay": {"modification": "replay", "routing": "shared", "fraction": 0.05},
    "fresh": {**PROJECTION, "protect": "A", "fresh": True, "state": "reset"},
    "all weights": {**PROJECTION, "lora_rank": None},
}


def run(**given):
    return finetune_stream(
        FinetuneConfig(**{**BASE, **given}), STREAM, progress=False
    )


def losses(result, stage):
    return [r["loss"] for r in result["records"] if r["stage"] == stage]


@pytest.fixture(scope="module")
def results():
    return {name: run(**arm) for name, arm in ARMS.items()}


def test_arms_of_a_seed_are_paired_and_part_after_the_first_boundary(results):
    """Same adapters and batches: equal before the first boundary, and different
    after it, arm by arm. (A fresh adapter was merged into its weight by then,
    which rounds.)
    """
    first = {
        name: [round(x, 6) for x in losses(r, 0)]
        for name, r in results.items()
        if name != "all weights"
    }
    assert len({tuple(x) for x in first.values()}) == 1
    assert len({tuple(losses(r, 1)) for r in results.values()}) == len(ARMS)
    assert losses(run(seed=1), 0) != losses(results["vanilla"], 0)


def test_training_learns_and_the_base_weights_stay(results):
    L = {s: losses(results["vanilla"], s) for s in (-1, 0)}
    assert L[0][0] < L[-1][0] - 0.05
    started = FinetuneRun(FinetuneConfig(**BASE), STREAM, progress=False)
    frozen = {
        n: p.clone()
        for n, p in started.model.named_parameters()
        if not p.requires_grad
    }
    started.run_stage()
    assert frozen and all(
        torch.equal(p, dict(started.model.named_parameters())[n])
        for n, p in frozen.items()
    )


@pytest.mark.parametrize(
    "asked, base",
    [
        ({"second_batch": 0.5}, {}),
        ({"merges": 2}, {"consolidation": "fisher"}),
        ({"after_merge": "both"}, {"consolidation": "fisher"}),
    ],
)
def test_controls_of_the_loop_are_no_empty_words_here(asked, base):
    "From the second domain on; before, nothing is merged and nothing mixed."
    with_it, without = run(**base, **asked), run(**base)
    assert losses(with_it, 0) == losses(without, 0)
    assert losses(with_it, 1) != losses(without, 1) or (
        "after_merge" in asked and losses(with_it, 2) != losses(without, 2)
    )


@pytest.mark.parametrize("arm", list(ARMS))
def test_killed_at_a_boundary_and_continued_is_bit_identical(
    arm, results, tmp_path
):
    given = {**BASE, **ARMS[arm], "checkpoint": str(tmp_path)}
    for stage in (1, 2):  # the process ends after each of the first two domains
        one = FinetuneRun(FinetuneConfig(**given), STREAM, progress=False)
        one.run_stage()
        assert one.stage == stage
        del one
    last = FinetuneRun(FinetuneConfig(**given), STREAM, progress=False)
    end = last.run()
    assert (
        end["records"] == results[arm]["records"]
        and end["metrics"] == results[arm]["metrics"]
    )
    kept = {k: v for k, v in end["stages"][-1].items() if not k.endswith("_s")}
    assert kept == {
        k: v
        for k, v in results[arm]["stages"][-1].items()
        if not k.endswith("_s")
    }


def test_a_checkpoint_holds_no_copy_of_the_frozen_weights(tmp_path):
    one = FinetuneRun(
        FinetuneConfig(**BASE, **PROJECTION, checkpoint=str(tmp_path)),
        STREAM,
        progress=False,
    )
    one.run_stage()
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    assert all("lora_" in name for name in saved["moving"])
    with pytest.raises(ValueError, match="is of a run with lr=0.01"):
        FinetuneRun(
            FinetuneConfig(
                **{**BASE, **PROJECTION, "lr": 1e-3}, checkpoint=str(tmp_path)
            ),
            STREAM,
            progress=False,
        )


def test_figures_are_in_bytes_and_have_errors(results):
    r = results["vanilla"]
    m = r["metrics"]
    assert m["forgetting_bpb"] == pytest.approx(m["forgetting"] / math.log(2))
    assert all(
        m[f"{k}_se"] > 0
        for k in ("forgetting", "learning_accuracy", "final_average")
    )
    assert [len(s["loss_se"]) for s in r["stages"]] == [3, 3, 3]
    assert not set(UNUSED) & set(r["parameters"])
    json.dumps(r)


def test_errors_by_hand():
    # three stages, three texts
    L = torch.randn(
        4, 3, 7, generator=generator_for(0, "losses"), dtype=torch.float64
    )
    got, x = window_errors(L), L.numpy()
    se = lambda d: d.std(ddof=1) / np.sqrt(7)
    best0 = 1 + x[1:3, 0].mean(-1).argmin()
    by_hand = (
        np.sqrt(se(x[3, 0] - x[best0, 0]) ** 2 + se(x[3, 1] - x[2, 1]) ** 2) / 2
    )
    assert got["forgetting_se"] == pytest.approx(by_hand)
    assert got["learning_accuracy_se"] == pytest.approx(
        np.sqrt(sum(se(x[1 + j, j]) ** 2 for j in range(3))) / 3
    )
    assert "prior_lost" not in got


def test_the_prior_text_is_measured_and_never_trained_on(monkeypatch):
    import dmr.training.finetuning as finetuning

    text = torch.tensor(
        list(b"a text that no domain has. " * 30), dtype=torch.uint8
    )
    beside = Stream("beside", [Domain("general", STREAM[0].train, text)])
    monkeypatch.setattr(
        finetuning, "load_stream", lambda name, cap, domains: beside
    )
    with_prior, without = run(prior="general"), run()
    assert [
        r["eval_domain"] for r in with_prior["records"] if r["stage"] == 0
    ] == [*SENTENCES, "general"]
    for stage in (0, 1, 2):
        assert losses(with_prior, stage)[:3] == losses(without, stage)
    m = with_prior["metrics"]
    before, after = losses(with_prior, -1)[3], losses(with_prior, 2)[3]
    assert (
        m["prior_lost"] == pytest.approx(after - before)
        and m["prior_lost_se"] > 0
    )
    assert (
        m["forgetting"] == without["metrics"]["forgetting"]
        and m["final_average"] == without["metrics"]["final_average"]
    )
    with pytest.raises(ValueError, match="is a domain of the stream"):
        run(prior="prose")


def test_the_template_takes_the_parameters_of_a_run():
    from dmr.studies.template import read_template

    template = read_template(TEMPLATE)
    own = {f.name: f for f in fields(FinetuneConfig) if f.name not in UNUSED}
    assert set(template.parameters) == set(own)
    assert all(p.help for p in template.parameters.values())


@pytest.mark.timeout(300)
def test_the_template_runs_under_bare_papermill(tmp_path):
    papermill = pytest.importorskip("papermill")
    import nbformat

    for name, sentence in SENTENCES.items():
        (tmp_path / "text" / name).mkdir(parents=True)
        for part in range(30):
            (tmp_path / "text" / name / f"{part:02}.txt").write_text(
                sentence.decode() * 40
                + f"\n{name} {part} "
                + name[part % 4] * 300
            )
    parameters = {
        "stream": str(tmp_path / "text"),
        "domains": None,
        "prior": None,
        "cap": 20_000,
        "steps": 4,
        "context": 16,
        "eval_windows": 4,
        "eval_bytes": 48,
        "modification": "projection",
        "rank": 2,
        "routing": "shared",
        "arm": "shared projection",
    }
    out = tmp_path / "out.ipynb"
    papermill.execute_notebook(
        str(TEMPLATE),
        str(out),
        parameters,
        progress_bar=False,
        cwd=str(tmp_path),
    )
    data = [
        o.data
        for c in nbformat.read(out, 4).cells
        if c.cell_type == "code"
        for o in c.outputs
        if "data" in o
    ]
    found = [
        d["application/vnd.dmr.result+json"]
        for d in data
        if "application/vnd.dmr.result+json" in d
    ]
    assert len(found) == 1 and len([d for d in data if "image/png" in d]) == 1
    assert found[0]["schema"] == 1 and len(found[0]["records"]) == 12
    assert {k: found[0]["parameters"][k] for k in parameters} == parameters


def test_a_row_of_the_table_gives_the_claims_what_they_read(results):
    from dmr.studies.identity import Identity
    from dmr.studies.table import row_of
    from dmr.verdict.tables import measure

    r = results["shared"]
    about = {
        "run_id": "x",
        "study": "lora",
        "part": "",
        "arm": "shared projection",
        "seed": 0,
        "cell": "c",
    }
    row = row_of(
        about, Identity(r["parameters"], "s", (), {}), {"state": "ok"}, r
    )
    m = measure(row)
    # losses in a row have six decimals
    assert m.forgetting == pytest.approx(
        r["metrics"]["forgetting"], rel=1e-5, abs=2e-6
    )
    assert m.learning_accuracy == pytest.approx(
        r["metrics"]["learning_accuracy"], rel=1e-5, abs=2e-6
    )
    assert (
        row["forgetting_se"] and json.loads(row["stage_values"])["loss_se"][0]
    )


def test_the_study_keeps_the_protocol():
    """Four domains, five seeds for the arms of the verdict, three rates of the
    control, H >= 3, 256 tokens a step.
    """
    from dmr.studies.study import read_study
    from dmr.verdict.answers import ADAPTIVE, REPLAY, SHARED

    study = read_study(ROOT / "nbs/experiments/studies/lora.yaml")
    seeds: dict[str, set] = {}
    for c in study.cells:
        p = c.parameters
        FinetuneConfig(**{k: v for k, v in p.items() if k != "checkpoint"})
        assert (
            len(p["domains"]) == 4
            and p["prior"] not in p["domains"]
            and p["model"] == "smollm2-135m"
        )
        assert (
            p["steps"] >= 60
            and p["steps"] * (1 - p["beta2"]) >= 3 - 1e-9
            and p["context"] * p["batch"] == 256
            and p["state"] == "kept"
        )
        seeds.setdefault(
            f"{c.arm} {p['lr']:g}" if p["modification"] == "none" else c.arm,
            set(),
        ).add(c.seed)
    control = [name for name in seeds if name.startswith("vanilla")]
    assert len(control) >= 3
    assert all(len(seeds[a]) >= 5 for a in (*control, SHARED, ADAPTIVE, REPLAY))
    assert all(len(x) in (2, 5) for x in seeds.values())


def test_defaults_are_within_the_ranges_of_the_loop():
    base = {
        k: v
        for k, v in asdict(FinetuneConfig()).items()
        if k in {f.name for f in fields(Config)}
    }
    assert Config(**base).horizon == FinetuneConfig().horizon
    for wrong in (
        {"lora_rank": 0},
        {"eval_bytes": 3},
        {"protect": "W"},
        {"joint": True},
        {"size": "base"},
        {"fresh": True},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            FinetuneConfig(**wrong)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_pinned_model_runs_through_the_loop(tmp_path):
    """Two domains of real text through SmolLM2: it learns the first, its prior
    ability is measured, and a boundary continues bit for bit.
    """
    given = {
        "domains": ["jargon", "bible"],
        "steps": 4,
        "context": 32,
        "eval_windows": 2,
        "eval_bytes": 64,
        **PROJECTION,
    }
    stopped = FinetuneRun(
        FinetuneConfig(**given, checkpoint=str(tmp_path)), progress=False
    )
    stopped.run_stage()
    assert (
        losses({"records": stopped.records}, 0)[0]
        < losses({"records": stopped.records}, -1)[0]
    )
    end, whole = (
        finetune_stream(FinetuneConfig(**given, **more), progress=False)
        for more in ({"checkpoint": str(tmp_path)}, {})
    )
    assert end["records"] == whole["records"]
    # two windows of 64 bytes; nothing learned would be above 4
    assert 1.0 < end["metrics"]["prior_before_bpb"] < 2.2
