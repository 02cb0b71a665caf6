"""molora as a command in a network that a test makes up: `python -m tests.serve.network PORT serve …`.

Names lead where NAMES says, one answer after the other and then the last again; others are unknown, numbers are read as
ever. Whoever connects to PUBLIC, at any port, reaches this port of loopback.
"""

import socket
import sys
from typing import Any

PUBLIC = "93.184.215.14"
NAMES: dict[str, list[list[str]]] = {
    "public.test": [[PUBLIC]],
    "inside.test": [["127.0.0.1"]],
    "router.test": [["192.168.1.1"]],
    "cloud.test": [["169.254.169.254"]],
    "six.test": [["::1"]],
    "mapped.test": [["::ffff:127.0.0.1"]],
    "both.test": [[PUBLIC, "127.0.0.1"]],
    "scoped.test": [["fe80::1%1"]],
    "changing.test": [[PUBLIC], ["127.0.0.1"]],
    "once.test": [[PUBLIC], ["127.0.0.1"]],
}
_look_up, _connect = socket.getaddrinfo, socket.create_connection


def look_up(host: str, port: int, family: int = 0, type: int = 0, proto: int = 0, flags: int = 0) -> list[Any]:
    if host not in NAMES:
        if host.rstrip(".") == "localhost":
            return _look_up("localhost", port, family, type, proto, flags)
        return _look_up(host, port, family, type, proto, flags | socket.AI_NUMERICHOST)
    answers = NAMES[host].pop(0) if len(NAMES[host]) > 1 else NAMES[host][0]
    return [(0, socket.SOCK_STREAM, 6, "", (address, port)) for address in answers]


if __name__ == "__main__":
    public_port = int(sys.argv.pop(1))

    def connect(address: tuple[str, int], **more: Any) -> socket.socket:
        return _connect(("127.0.0.1", public_port) if address[0] == PUBLIC else address, **more)

    socket.getaddrinfo, socket.create_connection = look_up, connect
    from molora.cli.commands import main

    main()
