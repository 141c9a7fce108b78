"""The base of the study `pretrained`: made once, found by its hash."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import dmr.training.base as base
from dmr.files import read_checkpoint, write_checkpoint
from dmr.studies.table import read_rows
from dmr.training.base import (
    BaseConfig,
    base_config,
    base_key,
    base_text,
    load_base,
    make_base,
)

torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]
TINY = base_config(
    {
        "stream": "synthetic:rho=0.5,domains=4",
        "domains": ["markov0", "markov1"],
        "cap": 20_000,
        "size": "nano",
        "context": 16,
        "batch": 4,
        "steps": 12,
        "written": 100,
    }
)


def made_file(folder):
    (path,) = folder.glob("bases/*/base.pt")
    return path


def test_a_stopped_training_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    whole = make_base(TINY, tmp_path / "a", progress=False, every=5)
    step, taken = base._BaseRun.train_step, []

    def stopping(run):
        if len(taken) == 8:
            raise KeyboardInterrupt
        taken.append(run.step)
        return step(run)

    monkeypatch.setattr(base._BaseRun, "train_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        make_base(TINY, tmp_path / "b", progress=False, every=5)
    with pytest.raises(FileNotFoundError, match="python -m dmr.training.base"):
        load_base(TINY, tmp_path / "b")
    monkeypatch.setattr(base._BaseRun, "train_step", step)
    again = make_base(TINY, tmp_path / "b", progress=False, every=5)
    assert again.weights == whole.weights
    assert torch.equal(again.written, whole.written)
    assert not list((tmp_path / "b").rglob("training*"))


def test_it_is_trained_once_and_says_so(tmp_path, capsys):
    first = make_base(TINY, tmp_path)
    assert "base: step 12/12" in capsys.readouterr().out
    before = made_file(tmp_path).stat().st_mtime_ns
    assert make_base(TINY, tmp_path).weights == first.weights
    assert made_file(tmp_path).stat().st_mtime_ns == before
    assert capsys.readouterr().out == ""


def test_it_learns_the_training_text_and_nothing_else():
    stream = base_text(TINY)
    run = base._BaseRun(TINY, stream)
    assert torch.equal(run.text, torch.cat([d.train for d in stream]))
    assert int(run.starts.max()) + TINY.context < len(run.text)


def test_other_settings_or_text_are_another_base():
    stream = base_text(TINY)
    key = base_key(TINY, stream)
    assert key == base_key(replace(TINY), base_text(TINY))
    assert key != base_key(replace(TINY, steps=13), stream)
    assert key != base_key(TINY, base_text(replace(TINY, cap=19_000)))


def test_a_file_that_is_another_base_is_refused(tmp_path):
    make_base(TINY, tmp_path, progress=False)
    path = made_file(tmp_path)
    good = read_checkpoint(path)
    write_checkpoint(path, good | {"key": "0" * 64})
    with pytest.raises(ValueError, match="holds the base 0000000000000000"):
        load_base(TINY, tmp_path)
    good["model"]["norm.weight"][0] += 1
    write_checkpoint(path, good)
    with pytest.raises(ValueError, match="its weights have the hash"):
        load_base(TINY, tmp_path)


def test_a_file_whose_written_text_was_changed_is_refused(tmp_path):
    made = make_base(TINY, tmp_path, progress=False)
    path = made_file(tmp_path)
    good = read_checkpoint(path)
    assert made.text == good["text"] != made.weights
    good["written"][0, 0] ^= 1
    write_checkpoint(path, good)
    with pytest.raises(ValueError, match="what it wrote has the hash"):
        load_base(TINY, tmp_path)


def test_the_hash_of_weights_knows_shapes_and_kinds():
    x = torch.arange(6, dtype=torch.float32)
    one = base.weights_hash({"x": x})
    assert one == base.weights_hash({"x": x.clone()})
    for other in (x.view(2, 3), x.view(torch.int32)):
        assert other.numpy().tobytes() == x.numpy().tobytes()
        assert base.weights_hash({"x": other}) != one


def test_what_it_writes_comes_in_windows_of_a_training(tmp_path):
    found = make_base(TINY, tmp_path, progress=False)
    assert found.written.dtype == torch.uint8
    assert found.written.shape == (-(-100 // 17), 17)


def test_the_command_makes_the_usual_base(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(base, "BaseConfig", lambda: TINY)
    assert base.main(["--cache", str(tmp_path)]) == 0
    assert "held-out nats per byte: markov0" in capsys.readouterr().out
    monkeypatch.setattr(base, "make_base", stop)
    assert base.main([]) == 130
    assert "goes on from the last checkpoint" in capsys.readouterr().out


def stop(*given, **named):
    raise KeyboardInterrupt


def test_a_finished_base_is_taken_from_a_file(tmp_path, monkeypatch, capsys):
    made = make_base(TINY, tmp_path / "a", progress=False)
    file = made_file(tmp_path / "a")
    monkeypatch.setattr(base, "_train", stop)
    taken = make_base(TINY, tmp_path / "b", file=file)
    assert (taken.weights, taken.text) == (made.weights, made.text)
    assert made_file(tmp_path / "b").read_bytes() == file.read_bytes()
    again = make_base(TINY, tmp_path / "b", file=file)  # it is there already
    assert again.weights == made.weights
    monkeypatch.setattr(base, "BaseConfig", lambda: TINY)
    given = ["--cache", str(tmp_path / "c"), "--from"]
    assert base.main([*given, str(file)]) == 0
    assert made.weights[:16] in capsys.readouterr().out


def test_a_base_that_was_trained_apart_does_not_pass_for_the_file(tmp_path):
    make_base(TINY, tmp_path / "a", progress=False)
    other = read_checkpoint(made_file(tmp_path / "a"))
    other["model"]["norm.weight"][0] += 1
    other["weights"] = base.weights_hash(other["model"])
    write_checkpoint(tmp_path / "other.pt", other)
    before = made_file(tmp_path / "a").read_bytes()
    with pytest.raises(ValueError, match="trained or written apart"):
        make_base(TINY, tmp_path / "a", file=tmp_path / "other.pt")
    assert made_file(tmp_path / "a").read_bytes() == before


def test_a_file_that_holds_no_such_base_is_not_taken(tmp_path, capsys):
    make_base(TINY, tmp_path / "a", progress=False)
    file, new = made_file(tmp_path / "a"), tmp_path / "b"
    with pytest.raises(ValueError, match="wanted was"):
        make_base(replace(TINY, seed=1), new, file=file)
    for lacking in ("losses", "model"):
        less = {k: v for k, v in read_checkpoint(file).items() if k != lacking}
        write_checkpoint(tmp_path / "less.pt", less)
        with pytest.raises(ValueError, match="is no base"):
            make_base(TINY, new, file=tmp_path / "less.pt")
    write_checkpoint(tmp_path / "x.pt", {"model": {}})
    with pytest.raises(ValueError, match="is no base"):
        make_base(TINY, new, file=tmp_path / "x.pt")
    (tmp_path / "x.txt").write_text("no checkpoint")
    with pytest.raises(ValueError, match=r"x\.txt is no base, or damaged"):
        make_base(TINY, new, file=tmp_path / "x.txt")
    with pytest.raises(FileNotFoundError, match="nothing.pt"):
        make_base(TINY, new, file=tmp_path / "nothing.pt")
    assert not list(new.rglob("*.pt"))
    given = ["--cache", str(new), "--from", str(tmp_path / "nothing.pt")]
    assert base.main(given) == 1
    assert "nothing.pt to take a base from" in capsys.readouterr().out


def test_the_usual_base_is_the_one_of_the_protocol():
    c = BaseConfig()
    assert c.domains == ["speeches", "factbook", "fortunes", "jargon"]
    assert (c.size, c.context, c.steps * c.batch * c.context) == (
        "small",
        64,
        5_120_000,
    )


def test_the_base_that_travels_is_the_one_of_the_runs():
    path = ROOT / "results/base.pt"
    found = read_checkpoint(path)
    assert found["config"] == asdict(BaseConfig())
    base._check_base(found, found["key"], path)
    for study in ("pretrained", "tuning_pretrained"):
        table = ROOT / "results" / f"{study}.csv"
        rows = [r for r in read_rows(table) if r["status"] == "ok"]
        assert {r["identity_base_weights"] for r in rows} <= {found["weights"]}
        assert {r["identity_base_written"] for r in rows} <= {found["text"]}
