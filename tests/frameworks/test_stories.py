"""Train here, save, load in another process, go on: equal, bit for bit, to one
process that trained both domains.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
SCRIPT = Path(__file__).with_name("stories.py")


def end_of(kind, folder, *processes):
    "Run the script once for each process; what the last one ends with."
    folder.mkdir()
    for domains in processes:
        done = subprocess.run(
            [sys.executable, str(SCRIPT), kind, domains, str(folder)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(folder / "end.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["bare", "trainer", "checkpoint", "lightning"])
def test_two_processes_end_as_one_does(kind, tmp_path):
    if kind == "lightning":
        pytest.importorskip("lightning")
    one = end_of(kind, tmp_path / "one", "12")
    two = end_of(kind, tmp_path / "two", "1", "2")
    assert (two["steps"], two["domains"]) == (12, 2)
    assert (one["steps"], one["domains"]) == (12, 2)
    for name, p in one["weights"].items():
        assert torch.equal(p, two["weights"][name]), name
