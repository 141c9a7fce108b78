"""The page of verdicts against a computation that shares no code with it."""

import runpy
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "independent.py"


def test_a_second_computation_from_the_protocol_agrees(capsys):
    assert not runpy.run_path(str(SCRIPT))["main"]()
    said = "218 numbers in 43 rows and 6 sentences compared"
    assert said in capsys.readouterr().out


def test_it_would_notice_a_digit(capsys):
    script = runpy.run_path(str(SCRIPT))
    rows = [list(row) for row in script["shown"]()]
    at = next(i for i, row in enumerate(rows) if row[0] == "C1")
    rows[at][3] = rows[at][3].replace("0.820", "0.822")
    script["main"].__globals__["shown"] = lambda: rows
    assert script["main"]()
    assert "C1: 0.8203 here, 0.822 on the page" in capsys.readouterr().out


def test_it_would_notice_a_sentence_that_is_wrong_or_gone(capsys):
    script = runpy.run_path(str(SCRIPT))
    page = "\n".join(script["texts"]())
    known = script["main"].__globals__
    known["texts"] = lambda: [page.replace("is 152 windows", "is 156 windows")]
    assert script["main"]()
    assert "152.0000 here, 156 on the page" in capsys.readouterr().out
    known["texts"] = lambda: [page.replace("windows, as many", "windows")]
    assert script["main"]()
    assert "the page has no sentence" in capsys.readouterr().out


def test_it_shares_no_code_with_the_package():
    assert "dmr" not in SCRIPT.read_text().split('"""', 2)[2]
