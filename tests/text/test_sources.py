"""The table of sources, and how a text is cut into blocks."""

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from dmr.text.load import MAX_LEAK, list_streams
from dmr.text.sources import SOURCES, STREAMS, blocks


def test_table_of_sources():
    text8 = "shakespeare speeches bible factbook jargon fortunes python cpp"
    assert STREAMS["text8"] == text8.split()
    assert (
        STREAMS["text16"][:8] == STREAMS["text8"]
        and len(set(STREAMS["text16"])) == 16
    )
    assert "persian" in SOURCES and "persian" not in STREAMS["text16"]
    for name, source in SOURCES.items():
        assert (
            name == source.name
            and source.licence
            and source.text_licence
            and source.bytes > 500_000
        )
        assert (
            0 <= source.leak <= MAX_LEAK and source.leak <= source.leak_before
        )
        for digest in (
            source.sha256,
            *(archive.sha256 for archive in source.archives),
        ):
            assert len(digest) == 64 and int(digest, 16)
    assert len({source.sha256 for source in SOURCES.values()}) == 17
    rows = list_streams()
    assert [row["domain"] for row in rows] == list(SOURCES)
    assert {row["streams"] for row in rows} == {
        "text8, text16",
        "text16",
        "extra",
    }
    json.dumps(rows)


@given(st.binary(max_size=3000), st.integers(2, 300))
@settings(max_examples=60, deadline=None)
def test_blocks_join_to_the_text(text, size):
    cut = list(blocks(text, size))
    assert b"".join(cut) == text and all(
        0 < len(block) <= size for block in cut
    )
