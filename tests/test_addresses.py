"""What an address is."""

import pytest

from p2pfl.addresses import is_address


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("tcp://10.0.0.1:7000", True),
        ("tcp://some-host.example:1", True),
        ("tcp://[::1]:65535", True),
        ("tcp://[fe80::1%eth0]:7000", True),
        ("ipc:///tmp/a", True),
        ("tcp://[::x]:7000", False),
        ("tcp://[10.0.0.1]:7000", False),
        ("tcp://10.0.0.1:0", False),
        ("tcp://10.0.0.1:65536", False),
        ("tcp://10.0.0.1", False),
        ("tcp://eth0;10.0.0.1:7000", False),
        ("tcp://10.0.0.1:7000/a", False),
        ("http://10.0.0.1:7000", False),
        (7, False),
    ],
)
def test_what_is_an_address(text, good):
    assert is_address(text) is good
