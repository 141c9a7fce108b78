"""Tables under attack: whatever happens to the file, no row that differs from
what was written passes, and no row is lost that a run's folder still has.
"""

import json
import random
import re
import shutil
import warnings
from pathlib import Path

import pytest
from test_studies import STUDY, plan_of
from tiny import filled, finish, project

from dmr.cli import main
from dmr.reporting.results import load_results
from dmr.studies.batch import Refused, _prepare_batch, runs_to_make
from dmr.studies.plan import accept, mend
from dmr.studies.run import OK
from dmr.studies.table import (
    CHECKSUM,
    Ledger,
    TableError,
    check_rows,
    checksum,
    read_rows,
    rows_text,
)
from dmr.studies.template import write_template
from dmr.verdict.tables import read_table

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
#: Tables that a notebook or a benchmark wrote, without checksums.
OTHERS = {
    "explore_folders",
    "faults",
    "inflation_causal",
    "inflation_live_synthetic",
    "inflation_live_text8",
    "inflation_monte_carlo",
    "performance",
    "performance_cuda",
    "readme",
    "stories",
}


def made(tmp_path):
    "A study of four finished runs with their rows and folders."
    folders = project(tmp_path, STUDY)
    finish(plan_of(folders))
    plan = plan_of(folders)
    _prepare_batch(plan, [], local=True)
    assert len(plan.ledger.rows()) == 4
    return folders, plan


@pytest.fixture(autouse=True)
def quiet():
    "Warnings are looked at where they are the point."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize(
    "path", sorted(RESULTS.glob("*.csv")), ids=lambda p: p.stem
)
def test_every_committed_table_is_whole(path):
    found = check_rows(path)
    assert found.rows and not found.damage
    assert found.sealed == (path.stem not in OTHERS)


def test_a_checksum_is_one_more_column_and_changes_no_other_byte(tmp_path):
    "What a program that does not know checksums reads is what it read before."
    import csv

    path = RESULTS / "longer.csv"
    lines = path.read_text(encoding="utf-8").splitlines()
    stripped = "\n".join(line.rpartition(",")[0] for line in lines) + "\n"
    old = tmp_path / "longer.csv"
    old.write_text(stripped, encoding="utf-8")
    rows = read_rows(path)
    assert read_rows(old) == rows and not check_rows(old).sealed
    Ledger(old, tmp_path / "longer.code.json").record([])
    assert old.read_bytes() == path.read_bytes()
    csv.field_size_limit(1 << 27)
    with path.open(newline="", encoding="utf-8") as file:
        plain = list(csv.DictReader(file))
    assert [checksum(r) for r in plain] == [r.pop(CHECKSUM) for r in plain]
    assert plain == rows


def damaged(text, how):
    "A table's text, damaged in a way that happens."
    lines = text.splitlines(keepends=True)
    if how == "half a last row":
        return text[: -len(lines[-1]) // 2]
    if how == "NUL":
        return text.replace("ok,", "o\0,", 1)
    if how == "doubled row":
        return text + lines[2]
    if how == "merged rows":
        lines[2] = lines[2].rstrip("\n")
    if how == "a changed digit":
        return text.replace("0.001", "0.002", 1)
    if how == "conflict":
        ours = ["<<<<<<< HEAD\n", lines[1], "=======\n", ">>>>>>> theirs\n"]
        lines[1:2] = ours
    if how == "lost quote":
        lines[2] = lines[2].replace(",ok,", ',"ok,', 1)
    if how == "lost cell":
        lines[3] = lines[3].replace(",ok,", ",", 1)
    if how == "lost checksum":
        lines[2] = lines[2].rpartition(",")[0] + ",\n"
    if how == "only the header":
        del lines[1:]
    if how == "lost header":
        del lines[0]
    if how == "a changed header":
        lines[0] = lines[0].replace("loss", "lass")
    if how == "checksums under another name":
        lines[0] = lines[0].replace(CHECKSUM, "checksun")
    return "".join(lines)


#: Damage -> line that must be named, and what is said.
DAMAGE = {
    "half a last row": (5, "cut short"),
    "NUL": (2, "NUL"),
    "doubled row": (6, "is the run of line 3 again"),
    "merged rows": (3, "rows have run together"),
    "a changed digit": (2, "does not fit its checksum"),
    "conflict": (2, "a merge"),
    "lost quote": (3, "is no CSV"),
    "lost cell": (4, "cut short"),
    "lost checksum": (3, "has no checksum"),
    "lost header": (1, "is no header"),
    "a changed header": (1, "fits none of the rows"),
    "checksums under another name": (1, "calls the checksums 'checksun'"),
    "bad UTF-8": (3, "UTF-8"),
    "emptied": (1, "empty"),
    "only the header": (1, "no row is left"),
}


def hurt(path, how):
    text = path.read_text(encoding="utf-8")
    data = damaged(text, how).encode()
    if how == "bad UTF-8":
        lines = text.encode().splitlines(keepends=True)
        lines[2] = lines[2].replace(b",ok,", b",\xff\xfe,", 1)
        data = b"".join(lines)
    path.write_bytes(b"" if how == "emptied" else data)
    assert path.read_text("utf-8", "replace") != text


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_table_is_refused_by_line_and_mended_from_folders(
    how, tmp_path
):
    folders, plan = made(tmp_path)
    table, whole = plan.ledger.table, plan.ledger.rows()
    hurt(table, how)
    line, said = DAMAGE[how]
    with pytest.raises(TableError, match="git checkout") as e:
        read_rows(table)
    first = str(e.value).splitlines()[0]
    assert first.startswith(f"tiny.csv:{line}:") and said in first
    # what still passes is what was written
    assert all(row in whole for row in check_rows(table).rows)
    assert main(["tables", *where(folders)]) == 1
    # the folders are whole: nothing is missing, and the table is as it was
    assert plan_of(folders).counts() == {OK: 4}
    damage = table.read_bytes()
    assert main(["tables", "--mend", *where(folders)]) == 0
    key = lambda row: row["run_id"]
    assert sorted(read_rows(table), key=key) == sorted(whole, key=key)
    (aside,) = table.parent.glob("tiny.csv.*.damaged")
    assert aside.read_bytes() == damage


def where(folders):
    return ["--runs", str(folders.runs), "--results", str(folders.results)]


@pytest.mark.parametrize("how", DAMAGE)
def test_without_folders_a_damaged_row_is_missing_and_never_trusted(
    how, tmp_path
):
    folders, plan = made(tmp_path)
    table, whole = plan.ledger.table, plan.ledger.rows()
    shutil.rmtree(folders.runs)
    folders.runs.mkdir()
    hurt(table, how)
    left = check_rows(table)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        plan = plan_of(folders)
    assert f"tiny.csv:{DAMAGE[how][0]}:" in str(told[0].message)
    assert plan.counts().get(OK, 0) == len(left.rows) < 5
    results = load_results("tiny", folders)
    assert len(results) == 4
    assert (results.status == "ok").sum() == len(left.rows)
    todo = runs_to_make(plan)
    if DAMAGE[how][0] == 1:  # a lost header must not cost every run
        before = table.read_bytes()
        with pytest.raises(Refused, match="git checkout"):
            _prepare_batch(plan, todo, local=True)
        assert table.read_bytes() == before
    else:
        _prepare_batch(plan, todo, local=True)
        assert read_rows(table) == left.rows
        assert all(row in whole for row in left.rows)


def first_rows(tmp_path, n=6):
    "A table of the first rows of a committed one: its path, bytes and rows."
    data = (RESULTS / "longer.csv").read_bytes()
    path = tmp_path / "longer.csv"
    path.write_bytes(b"".join(data.splitlines(keepends=True)[: n + 1]))
    return path, path.read_bytes(), read_rows(path)


def test_no_flipped_bit_passes(tmp_path):
    "300 bits of a committed table, one at a time."
    path, source, rows = first_rows(tmp_path)
    rows, draw, refused = filled(rows), random.Random(0), 0
    places = [draw.randrange(len(source)) for _ in range(200)]
    header = source.index(b"\n")
    places += [draw.randrange(header) for _ in range(100)]
    for at in places:
        data = bytearray(source)
        data[at] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        found = check_rows(path)
        refused += bool(found.damage)
        assert all(row in rows for row in filled(found.rows))
        assert found.damage or filled(found.rows) == rows
    assert refused > 270  # the others hit a column that is empty everywhere


def test_no_cut_passes(tmp_path):
    "What is left of a table cut anywhere are its first rows, unchanged."
    path, source, rows = first_rows(tmp_path)
    draw = random.Random(1)
    for _ in range(100):
        path.write_bytes(source[: draw.randrange(len(source))])
        found = check_rows(path)
        assert found.rows == rows[: len(found.rows)]


def test_a_table_of_another_kind_is_read_by_line_and_never_written(
    tmp_path, monkeypatch, capsys
):
    folders = project(tmp_path, STUDY)
    folders.results.mkdir()
    path = folders.results / "speed.csv"
    path.write_text("measure,value\nstep,2\nstep,3,4\nmemo")
    with pytest.raises(TableError, match="speed.csv:3: .*run together"):
        read_rows(path)
    before = path.read_bytes()
    assert main(["tables", "--mend", *where(folders)]) == 1
    monkeypatch.chdir(tmp_path)
    assert "speed.csv:4:" in capsys.readouterr().out
    assert path.read_bytes() == before
    path.write_text("measure,value\nstep,2\nstep,3")  # the end of "3.25"
    assert check_rows(path).damage == {3: "has no end: it is cut short"}


def test_a_run_that_ended_well_is_kept_of_two_rows(tmp_path):
    "As a merge of two branches leaves it, where one tried again."
    who = dict(cell="1", stream_hash="", code="c")
    rows = [{**who, "status": "failed"}, {**who, "status": "ok", "loss": 1}]
    path = tmp_path / "t.csv"
    path.write_text(rows_text(rows, sealed=True))
    (kept,) = check_rows(path).rows
    assert kept["status"] == "ok"
    path.write_text(rows_text(rows[::-1], sealed=True))
    (kept,) = check_rows(path).rows
    assert kept["status"] == "ok"


def test_any_text_survives_its_cell(tmp_path):
    odd = 'a "b", \n\u2028\x1c\x0b\x85 = é½'
    row = dict(
        cell="1", stream_hash="", code="c", error=odd, more="x\ry\0\ud800"
    )
    ledger = Ledger(tmp_path / "t.csv", tmp_path / "t.json")
    ledger.record([row])
    (again,) = read_rows(ledger.table)
    assert again["error"] == odd and again["more"] == "x\ny\ufffd?"
    before = ledger.table.read_bytes()
    ledger.record([])
    assert ledger.table.read_bytes() == before


def test_a_new_column_leaves_old_checksums_alone(tmp_path):
    ledger = Ledger(tmp_path / "t.csv", tmp_path / "t.json")
    ledger.record([dict(cell="1", stream_hash="", code="c", loss=1)])
    (old,) = re.findall(r"\w{16}$", ledger.table.read_text().rstrip())
    ledger.record([dict(cell="2", stream_hash="", code="c", gain=2)])
    head, first, _ = ledger.table.read_text().splitlines()
    assert head.endswith(f",gain,{CHECKSUM}") and first.endswith(f",,{old}")


CODES = [
    *("", "[]", '{"codes": 3}', '{"codes": {}', "[" * 100_000),
    '{"codes": {"a": {"template": [1]}}, "accepted": []}',
    '{"codes": {}, "accepted": [{"part": [], "old": {}, "new": "a"}]}',
    '{"codes": {}, "accepted": [], "seal": "0"}',
]


@pytest.mark.parametrize("content", CODES)
def test_a_lost_record_of_the_code_is_said_and_costs_no_run(
    content, tmp_path, monkeypatch
):
    "Results by blessed code, on another machine, without `code.json`."
    folders, plan = made(tmp_path)
    write_template(
        tmp_path / "nbs/experiments/tiny.ipynb",
        "lr = 1e-3\nmode = 'plain'\nseed = 0\narm = ''",
        "print('new')",
    )
    shutil.rmtree(folders.runs)
    folders.runs.mkdir()
    plan = plan_of(folders)
    blessed = accept(plan, "only a message")
    assert blessed
    assert plan_of(folders).counts() == {OK: 4}
    codes = plan.ledger.codes
    codes.write_text(content) if content else codes.unlink()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        plan = plan_of(folders)
    assert "does not know the code behind 4 results" in str(told[0].message)
    before = codes.read_text() if content else None
    with pytest.raises(Refused, match="tiny.code.json does not know"):
        _prepare_batch(plan, runs_to_make(plan), local=True)
    assert (codes.read_text() if content else None) == before
    plan.ledger.accept(blessed)
    if content:
        (aside,) = codes.parent.glob("tiny.code.json.*.damaged")
        assert aside.read_text() == content
    assert json.loads(codes.read_text())["accepted"] == blessed


def test_no_flipped_bit_of_the_code_record_passes(tmp_path):
    "A blessing counts as it was given, or the whole record counts as lost."
    ledger = Ledger(tmp_path / "t.csv", tmp_path / "t.code.json")
    ledger.update(lambda v: v["codes"].update({"c0de": {"template": "ab12"}}))
    ledger.accept([dict(part="template", old="ab12", new=None, reason="é")])
    whole, data = ledger.versions(), ledger.codes.read_bytes()
    assert whole["codes"] and whole["accepted"]
    plain = lambda v: {k: v[k] for k in ("codes", "accepted")}
    lost = 0
    for at in range(len(data)):
        flipped = bytearray(data)
        flipped[at] ^= 1 << at % 8
        ledger.codes.write_bytes(flipped)
        found = plain(ledger.versions())
        assert found in (plain(whole), dict(codes={}, accepted=[]))
        lost += found != plain(whole)
    assert lost > len(data) / 2
    older = json.dumps(plain(whole))  # of earlier times, without a seal
    ledger.codes.write_text(older)
    assert ledger.versions() == plain(whole)


def test_verdicts_refuse_a_damaged_table(tmp_path):
    from dmr.studies.study import find_project

    (tmp_path / "results").mkdir()
    for name in ("longer.csv", "longer.code.json"):
        shutil.copy(RESULTS / name, tmp_path / "results")
    folders = find_project(ROOT, results=tmp_path / "results")
    assert read_table("longer", folders).rows
    hurt(tmp_path / "results/longer.csv", "a changed digit")
    with pytest.raises(TableError, match="longer.csv:6: does not fit"):
        read_table("longer", folders)


def test_mending_a_whole_table_changes_nothing(tmp_path):
    folders, plan = made(tmp_path)
    before = plan.ledger.table.read_bytes()
    assert not mend("tiny", folders).damage
    assert plan.ledger.table.read_bytes() == before
    assert not list(folders.results.glob("*.damaged"))
