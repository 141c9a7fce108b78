"""The verdict page against a computation that shares no code with it."""

import ast
import random
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import independent_verdict as second  # noqa: E402

PAGE = second.text()


def wrong(page):
    "What is said of a page that differs or is not accounted for."
    lines, found, _ = second.compare(page)
    off = [f"{a} for {b}" for a, b, _ in lines if not second.agrees(b, a)]
    return [*off, *found]


def test_every_number_of_the_page_is_found_again(capsys):
    assert not second.main()
    said = capsys.readouterr().out.splitlines()[-1]
    compared = re.fullmatch(
        r"(\d+) numbers compared, 0 wrong or in doubt", said
    )
    assert int(compared[1]) > 200


def test_it_would_notice_a_digit_anywhere():
    "Sixty pages, each with another digit or another word for a number."
    rng, places = random.Random(0), [*second.tokens(PAGE)]
    for m in rng.sample(places, 60):
        if m[0].lower() in second.VALUES:
            start, end = m.span()
            others = {"seven", "twelve"} - {m[0].lower()}
        else:
            start = rng.choice(
                [i for i in range(*m.span()) if PAGE[i].isdigit()]
            )
            end, others = start + 1, {*"0123456789"} - {PAGE[start]}
        other = rng.choice(sorted(others))
        assert wrong(PAGE[:start] + other + PAGE[end:]), (m[0], other)


def test_it_would_notice_a_new_number_and_says_where():
    said = "A merge saves 0.123 nats there. "
    (found,) = wrong(PAGE + "\n\nNew. " + said)
    assert "not accounted for: 0.123" in found and said.strip(" .") in found
    assert wrong(PAGE + "\n\nOn four texts it did not.")
    assert not wrong(PAGE + "\n\nOf one text, [a page](../2/03_new.ipynb).")


@pytest.mark.parametrize(
    ("ours", "shown", "same"),
    [
        (0.3805, "0.381", True),
        (0.3804, "0.381", False),
        (0.3804, "0.38", True),
        (-0.02, "−0.02", True),
        (8, "eight", True),
        ("8", "eight", True),
        ("0.5", "0.50", False),
        ("1350", "1,350", True),
        (0.65, "two thirds", True),
        (0.45, "two thirds", False),
        (38, "39", False),
        ("holds", "does not hold", False),
    ],
)
def test_numbers_agree_to_the_digits_that_are_shown(ours, shown, same):
    assert second.agrees(ours, shown) == same


def test_it_would_notice_the_wrong_word_for_a_claim(capsys):
    assert second.main(f"{PAGE}\n\nC1, holds: Adam.")
    said = capsys.readouterr().out
    assert "does not hold here, holds on the page: C1, holds" in said
    assert not wrong(f"{PAGE}\n\nC1, does not hold: Adam.")


def test_words_that_do_not_hold_any_more_are_found(monkeypatch):
    said = ("ended lowest at the smallest rate", lambda: [False])
    monkeypatch.setattr(second, "ENTRIES", [*second.ENTRIES, said])
    page = f"{PAGE}\n\nIt ended lowest at the smallest rate that ran."
    assert "do not hold" in wrong(page)[0]


def test_it_shares_no_code_with_the_package():
    tree = ast.parse(Path(second.__file__).read_text("utf-8"))
    names = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in (
            getattr(node, "module", None),
            *(a.name for a in node.names),
        )
        if name
    }
    assert "dmr" not in names and "independent" in names
