"""The page of verdicts against a computation that shares no code with it."""

import runpy
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "independent.py"


def test_a_second_computation_from_the_protocol_agrees(capsys):
    assert not runpy.run_path(str(SCRIPT))["main"]()
    assert "163 numbers in 36 rows compared" in capsys.readouterr().out


def test_it_would_notice_a_digit(capsys):
    script = runpy.run_path(str(SCRIPT))
    rows = [list(row) for row in script["shown"]()]
    at = next(i for i, row in enumerate(rows) if row[0] == "C1")
    rows[at][3] = rows[at][3].replace("0.820", "0.822")
    script["main"].__globals__["shown"] = lambda: rows
    assert script["main"]()
    assert "C1: 0.8203 here, 0.822 on the page" in capsys.readouterr().out


def test_it_shares_no_code_with_the_package():
    assert "dmr" not in SCRIPT.read_text().split('"""', 2)[2]
