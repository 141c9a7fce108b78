"""Files: written whole or not at all, locked by one process at a time."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dmr.files import Busy, is_locked, locked, write_atomic


def test_a_file_is_whole_or_untouched(tmp_path):
    path = tmp_path / "a.txt"
    write_atomic(path, "old")
    script = (
        "import resource, signal, sys; from dmr.files import"
        " write_atomic\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        " resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\ntry:"
        " write_atomic(sys.argv[1], 'x' * 5000)\nexcept OSError as e:"
        " print(e.errno)"
    )
    out = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        capture_output=True,
        text=True,
    )
    assert out.stdout.strip().isdigit(), out.stderr
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


HOLD = """\
import sys, time
from dmr.files import locked
with locked(sys.argv[1]):
    print("have it", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def hold():
    "Starts processes that hold the lock of a path; ends them all."
    held = []

    def start(path: Path) -> subprocess.Popen:
        command = [sys.executable, "-c", HOLD, str(path)]
        held.append(subprocess.Popen(command, stdout=subprocess.PIPE))
        held[-1].stdout.readline()
        return held[-1]

    yield start
    for process in held:
        process.kill()
        process.wait()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_death_frees_a_lock(tmp_path, hold, kind):
    path = tmp_path if kind == "folder" else tmp_path / "lock"
    holder = hold(path)
    assert is_locked(path)
    with pytest.raises(Busy, match="locked by another"), locked(path, 0.2):
        pass
    holder.kill()
    holder.wait()
    assert not is_locked(path)
    with locked(path):
        assert is_locked(path)
    assert not is_locked(path)


def test_whoever_waits_gets_it_when_the_holder_dies(tmp_path, hold):
    holder = hold(tmp_path)
    threading.Timer(0.5, holder.kill).start()
    begin = time.monotonic()
    with locked(tmp_path, wait=30):
        assert 0.3 < time.monotonic() - begin < 20
    with locked(tmp_path, wait=float("inf")):
        pass


def test_asking_changes_nothing(tmp_path):
    assert not is_locked(tmp_path) and not is_locked(tmp_path / "lock")
    assert not list(tmp_path.iterdir())
    lock = tmp_path / "lock"
    lock.write_text("kept")
    before = lock.stat().st_mtime_ns
    assert not is_locked(lock)
    with locked(lock):
        assert is_locked(lock)
    assert (lock.read_text(), lock.stat().st_mtime_ns) == ("kept", before)


def test_a_folder_is_locked_beside_its_files(tmp_path):
    (tmp_path / "table.csv").write_text("a,b")
    with locked(tmp_path):
        pass
    assert (tmp_path / "table.csv").read_text() == "a,b"
    assert (tmp_path / ".lock").read_bytes() == b""


def test_who_asks_at_the_same_time_is_not_the_holder(tmp_path):
    lock, answers = tmp_path / "lock", []
    lock.touch()

    def ask():
        answers.extend(is_locked(lock) for _ in range(50))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sum(answers) <= 2, sum(answers)


def test_writers_take_turns(tmp_path):
    "Eight processes add to one number, each under the lock."
    count = """\
import sys
from pathlib import Path
from dmr.files import locked, write_atomic
path = Path(sys.argv[1], "n")
for _ in range(20):
    with locked(path.parent, wait=60):
        write_atomic(path, str(int(path.read_text()) + 1))
"""
    (tmp_path / "n").write_text("0")
    command = [sys.executable, "-c", count, str(tmp_path)]
    writers = [subprocess.Popen(command) for _ in range(8)]
    assert [w.wait(60) for w in writers] == [0] * 8
    assert (tmp_path / "n").read_text() == "160"
