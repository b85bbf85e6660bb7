"""The interface of an address."""

import socket

from cluster.runtime.trainers.interface import find_interface


def test_the_interface_that_has_an_address_is_found():
    assert find_interface("127.0.0.1") in {name for _, name in socket.if_nameindex()}


def test_an_address_of_another_machine_has_no_interface_here():
    assert find_interface("203.0.113.77") == ""  # 203.0.113.0/24 is for examples
