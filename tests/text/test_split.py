"""The split of a domain into training and test text, and what leaks."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmr.text import load
from dmr.text.load import MAX_LEAK, leak, split


@given(
    st.lists(st.binary(min_size=1, max_size=60), min_size=20, max_size=60),
    st.integers(10, 500),
)
@settings(max_examples=60, deadline=None)
def test_split_properties(documents, cap):
    try:
        train, test, about = split(documents, cap=None)
    except ValueError:
        share = sum(map(len, documents)) // 10
        assert not any(len(document) <= share for document in documents)
        return
    counted = sum(len(document) + 2 for document in documents)
    assert len(train) + len(test) <= counted
    assert (len(train) + len(test) == counted) == (about["dropped"] == 0)
    assert about["leak"] <= MAX_LEAK or about["flagged"]
    assert split(documents[::-1], cap=None)[2] == about
    small = split(documents, cap)
    assert (
        small[2] == about
        and len(small[0]) == min(cap, len(train))
        and len(small[1]) == min(cap // 10, len(test))
    )


def test_leak_counts_by_hand():
    words = [f"w{i}" for i in range(40)]
    test, train = " ".join(words[:20]).encode(), " ".join(words[5:]).encode()
    # 9 grams in the test text; those that start at word 5, 6, 7 or 8 are in the
    # training text
    assert leak([test], [train]) == pytest.approx(4 / 9)
    assert leak([test, b"other words " * 10], [train]) == pytest.approx(4 / 18)
    assert leak([], [train]) == 0 and leak([test], []) == 0


def test_a_large_domain_is_thinned_by_hash(monkeypatch):
    # 67 MB, of which 32 can be used
    documents = [os.urandom(8).hex().encode() * 70_000 for _ in range(60)]
    seen = []
    grams = load.twelve_grams
    monkeypatch.setattr(
        load,
        "twelve_grams",
        lambda text: seen.append(len(text)) or grams(text[:100]),
    )
    train, _, about = split(documents, cap=1000)
    assert (
        len(train) == 1000
        and about["documents"] == 60
        and sum(seen) < 34_000_000
    )
