"""An SSH server for a test."""

import pytest
from fleet_cases import Sshd


@pytest.fixture
def sshd(tmp_path):
    folder = tmp_path / "sshd"
    folder.mkdir()
    server = Sshd(folder)
    yield server
    server.close()
