"""An SSH server for a test, and less to do for its hosts."""

import pytest
from fleet_cases import Sshd

from p2pfl.fleet import preflight


@pytest.fixture(autouse=True)
def nothing_to_import(monkeypatch):
    monkeypatch.setattr(preflight, "NEEDED", ())  # it would take seconds on every host


@pytest.fixture
def sshd(tmp_path):
    folder = tmp_path / "sshd"
    folder.mkdir()
    server = Sshd(folder)
    yield server
    server.close()
