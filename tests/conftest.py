"""What tests of several rooms need."""

import pytest


@pytest.fixture
def cache(tmp_path, monkeypatch):
    "An empty cache for this test alone."
    monkeypatch.setenv("DMR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
