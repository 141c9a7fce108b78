"""Streams made of installed text, and the table of runs on them."""

import csv

import pytest

from dmr.verdict import folders


def test_a_text_is_cut_and_free_of_nul(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first\x00")
    files = list(tmp_path.iterdir())
    assert folders.text_of(files) == "first\nsecond"
    assert folders.text_of(files, size=3) == "fir"


def test_docstrings_are_found_and_broken_files_skipped(tmp_path):
    (tmp_path / "a.py").write_text('"""One."""\ndef f():\n    "Two."\n')
    (tmp_path / "b.py").write_text("def f(:\n")
    assert folders.docstrings(tmp_path) == "One.\n\nTwo."


def test_rows_that_are_there_are_not_made_again(tmp_path, monkeypatch, capsys):
    made = []

    def one(folder, arm, seed):
        assert len(list(folder.iterdir())) == 2
        made.append((folder.name, arm, seed))
        return dict.fromkeys(folders.COLUMNS[3:], "1")

    texts = {"a": {"x": "text", "y": "more"}}
    monkeypatch.setattr(folders, "folders", lambda: texts)
    runs = [("a", "plain", 0), ("a", "plain", 1)]
    monkeypatch.setattr(folders, "wanted", lambda: iter(runs))
    monkeypatch.setattr(folders, "one", one)
    (tmp_path / "results").mkdir()
    monkeypatch.chdir(tmp_path)
    folders.main()
    folders.main()
    assert made == runs
    with open("results/explore_folders.csv", newline="") as file:
        assert [row["seed"] for row in csv.DictReader(file)] == ["0", "1"]


@pytest.mark.parametrize("arm", folders.ARMS)
def test_every_arm_is_a_configuration(arm):
    from dmr.training.config import Config, check_config

    options = {"modification": "none", "lr": 2e-3} | folders.ARMS[arm]
    check_config(Config(**options, stream="text8"))
