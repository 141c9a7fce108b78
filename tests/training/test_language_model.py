"""A language model beside its controls, as a run of a study."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import fits_its_template

from dmr.studies.table import tidy_run
from dmr.training.examples import general_texts
from dmr.training.finetune import save_small_llama
from dmr.training.language_model import (
    GENERAL,
    LANGUAGE_LIMITS,
    LanguageConfig,
    language_model,
    write_texts,
)
from dmr.verdict.language import beside, controls, dose, ends

ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "nbs/experiments/language_model.ipynb"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    work = tmp_path_factory.mktemp("language")
    (work / "texts").mkdir()
    for name, text in zip(("a", "b"), general_texts().values()):
        (work / "texts" / f"{name}.txt").write_text(text[:60_000])
    return LanguageConfig(
        model=str(save_small_llama(work / "model", width=32)),
        stream=str(work / "texts"),
        new="a",
        old="b",
        new_bytes=20_000,
        old_bytes=20_000,
        lr=1e-2,
        lora=2,
        steps=6,
        length=32,
        windows=4,
        looks=2,
    )


@pytest.fixture(scope="module")
def results(tiny, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    own = replace(tiny, keep="self", controls=False)
    run = lambda config: language_model(config, False, cache)
    both = {"method": "merge+projection", "rank": 4, "strength": 0.9}
    projected = replace(tiny, lora=None, **both)
    return {
        "sample": run(tiny), "self": run(own), "projected": run(projected),
        "alone": run(replace(projected, controls=False)),
    }  # fmt: skip


def row_of(result):
    row = tidy_run(result)
    return {**row, "seed": 0, "parameters": result["parameters"]}


def test_every_training_gives_its_points(results):
    points = results["sample"]["metrics"]["measured"]
    rates = {p["rate"] for p in points if p["lora"] is None}
    assert sorted(rates) == pytest.approx([1e-2 / 3, 1e-2, 3e-2])
    adapters = {p["rate"] for p in points if p["lora"] == 2}
    assert sorted(adapters) == pytest.approx([1e-1, 3e-1])
    kinds = [(p["kind"], p["rate"], p["lora"]) for p in points]
    assert sum(k == ("end", 1e-2, None) for k in kinds) == 1
    assert not [k for k in kinds if k[0] == "end" and k[2] is not None]
    averages = [p["at"] for p in points if p["kind"] == "average"]
    assert sorted({*averages}) == pytest.approx([k / 10 for k in range(1, 10)])


def test_what_is_lost_is_the_mean_of_texts_that_no_method_is_shown(results):
    m = results["sample"]["metrics"]
    (end,) = (
        p["changes"]
        for p in m["measured"]
        if p["kind"] == "end" and p["rate"] == 1e-2
    )
    assert m["learned"] == -end["new"] and m["lost_old"] == end["old"]
    assert m["lost"] == pytest.approx(sum(end[k] for k in GENERAL) / 2)
    # columns of every study are in nats
    assert m["forgetting"] == pytest.approx(m["lost"] * math.log(2))
    after = [r["loss"] for r in results["sample"]["records"]]
    assert m["learning_accuracy"] == pytest.approx(after[4])


def test_both_sources_train_alike_and_merge_apart(results):
    """The controls of a seed may stand beside a merge by written text."""

    def trained(result, kind):
        new = lambda p: [p["changes"][k] for k in ("new", *GENERAL)]
        return [
            new(p)
            for p in result["metrics"]["measured"]
            if (p["kind"], p["rate"], p["lora"]) == (kind, 1e-2, None)
        ]

    both = results["sample"], results["self"]
    one, other = (trained(r, "training") for r in both)
    assert one == other and len(one) == 2
    one, other = (trained(r, "end") for r in both)
    assert one != other


def test_a_method_with_steps_of_its_own_is_no_control(results):
    """Plain training runs beside a projection, and gives the controls."""
    plain, row = row_of(results["sample"]), row_of(results["projected"])
    ways = controls(row)
    known = {k: w for k, w in controls(plain).items() if "adapters" not in k}
    assert ways.keys() == known.keys()
    for name, way in ways.items():
        for one, other in zip(way, known[name], strict=True):
            assert one == pytest.approx(other, abs=1e-6), name
    assert ends(row) != ends(plain) and len(ends(row)) == 3
    assert dose([row]) == dose([plain])
    # without controls it stands beside those of another row, and ends alike
    alone = row_of(results["alone"])
    assert not controls(alone) and not dose([alone])
    assert ends(alone)["0.01"] == pytest.approx(ends(row)["0.01"])
    assert results["alone"]["parameters"]["rank"] == 4


def test_a_row_becomes_ways_through_the_plane(results):
    row, own = row_of(results["sample"]), row_of(results["self"])
    ways = controls(row)
    rates = [w for k, w in ways.items() if k.endswith("at other rates")]
    assert sorted(len(w) for w in rates) == [2, 3]  # adapters, all weights
    back = [w for k, w in ways.items() if k.endswith("averaged back")]
    assert {len(w) for w in back} == {11}
    early = [w for k, w in ways.items() if k.endswith("stopped early")]
    assert {len(w) for w in early} == {3}
    assert {w[0] for w in (*back, *early)} == {(0.0, 0.0)}
    assert list(ends(own)) == ["0.01"]
    found = beside([row], "0.01", {0: own})
    assert found.keys() == ways.keys()
    # it ends on the way back or beside it, where that has learned as much
    assert isinstance(found["plain, lr 0.01, averaged back"][0], float)
    assert {*dose([row])["0.01"]} == {0, 3, 6}


def test_a_stopped_run_goes_on_and_ends_alike(
    results, tiny, tmp_path, monkeypatch
):
    from dmr.training import finetune

    real, made = finetune._train, []

    def stopping(*given):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(given)
        return real(*given)

    config = replace(tiny, checkpoint=str(tmp_path / "kept"))
    monkeypatch.setattr(finetune, "_train", stopping)
    with pytest.raises(KeyboardInterrupt):
        language_model(config, False, tmp_path)
    made.clear()
    counting = lambda *given: made.append(given) or real(*given)
    monkeypatch.setattr(finetune, "_train", counting)
    again = language_model(config, False, tmp_path)
    assert len(made) == 3  # of five trainings
    whole = results["sample"]["metrics"]["measured"]
    assert again["metrics"]["measured"] == whole


def test_a_letter_is_not_cut_in_two(tiny, tmp_path):
    (tmp_path / "texts").mkdir()
    for name in "ab":
        file = tmp_path / "texts" / f"{name}.txt"
        file.write_text("schön und grün " * 4000)
    for size in range(20_000, 20_008):
        config = replace(
            tiny, stream=str(tmp_path / "texts"), new_bytes=size, old_bytes=size
        )
        for file in write_texts(config, tmp_path, tmp_path)[:2]:
            said = file.read_text(encoding="utf-8")
            assert "\ufffd" not in said and 0 <= size - len(said.encode()) < 2


def test_a_training_that_diverged_leaves_the_rest(tiny, tmp_path, monkeypatch):
    from dmr.training import finetune

    real = finetune._train

    def failing(bench, arm, *given):
        if arm.rate == 1e-2:
            raise FloatingPointError("not finite")
        return real(bench, arm, *given)

    monkeypatch.setattr(finetune, "_train", failing)
    result = language_model(tiny, False, tmp_path)
    assert "lost" not in result["metrics"]
    row = row_of(result)
    assert math.isnan(row["forgetting"])
    assert ends(row)["0.01"] is None and len(ends(row)) == 3
    values = {x for (x,) in beside([row], "0.01").values()}
    assert values == {"the method diverged"}
    other = beside([row], "0.0033")["plain, lr 0.0033, averaged back"]
    assert isinstance(other[0], float)


def test_texts_that_are_measured_are_not_shown():
    for words in ({"new": "factbook"}, {"old": "speeches"}, {"old": "cpp"}):
        with pytest.raises(ValueError, match="must all differ"):
            LanguageConfig(**words)


def test_a_domain_that_is_too_short_is_named(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"bytes of training text, and"):
        write_texts(replace(tiny, new_bytes=10**6), tmp_path, tmp_path)


def test_a_row_of_the_table(results):
    row = tidy_run(results["sample"])
    assert row["forgetting"] == results["sample"]["metrics"]["forgetting"]
    assert row["domains_total"] == 4 and row["identity_keep_tokens"] == 4096
    assert len(json.loads(row["measured"])) == 3 * 12 + 2 * 11
    start = results["sample"]["identity"]["base_weights"]
    assert row["identity_base_weights"] == start
    assert start == results["self"]["identity"]["base_weights"]


def test_the_template_takes_the_parameters_of_a_run():
    fits_its_template(LanguageConfig, LANGUAGE_LIMITS, TEMPLATE)
