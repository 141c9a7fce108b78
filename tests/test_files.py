"Files are written whole or not at all."

import pytest

import dmr.files as files
from dmr.files import read_checkpoint, write_checkpoint


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "state.pt", {"n": 1})

    def full_disk(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(tmp_path / "state.pt", {"n": 2})
    assert read_checkpoint(tmp_path / "state.pt") == {"n": 1}
    assert [f.name for f in tmp_path.iterdir()] == ["state.pt"]
