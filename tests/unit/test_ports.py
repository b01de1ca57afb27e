"""Whether something listens at an address."""

from __future__ import annotations

import socket

import pytest

from rlinf_lite.ports import connection_error


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "[::1]")])
def test_none_while_something_listens(family, host):
    if family == socket.AF_INET6 and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    with socket.create_server((host.strip("[]"), 0), family=family) as server:
        address = f"{host}:{server.getsockname()[1]}"
        assert connection_error(address, 5.0) is None
        assert connection_error(f"ray://{address}", 5.0) is None
    assert isinstance(connection_error(address, 5.0), ConnectionRefusedError)


def test_what_is_no_address_is_an_error_too():
    assert isinstance(connection_error("nonsense", 5.0), ValueError)
