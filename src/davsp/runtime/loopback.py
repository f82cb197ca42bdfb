"""Whether an address, or the name in a Host header, is this machine's own."""

import ipaddress

LOCAL = {"localhost", "127.0.0.1", "[::1]"}  # how a Host header names this machine


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches an address that is listened at."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def names_loopback(host: str) -> bool:
    """Whether a Host header, with or without a port, names this machine.

    A web page can have a browser on this machine ask a name of the page's own that leads to 127.0.0.1; its Host gives it away.
    """
    return host in LOCAL or host.rpartition(":")[0] in LOCAL
