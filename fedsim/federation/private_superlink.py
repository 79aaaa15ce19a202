"""A SuperLink that takes work from its own user alone: ``python -m fedsim.federation.private_superlink`` and its flags.

Flower's has no accounts: whoever reaches its port, also another user of the machine, can have it run code as the user
who started it. Here each request must come from a socket of that user, which the kernel tells for the loopback
interface. All that this uses of Flower beyond its public API is imported at the top.
"""

from __future__ import annotations

import os
import socket
import sys
from logging import WARNING
from pathlib import Path

import uvicorn
from flwr.supercore import log
from flwr.supercore.http_logging import get_uvicorn_log_config
from flwr.supercore.logger import console_handler
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan, _parse_superlink_lifespan_config
from flwr.superlink.main import create_app
from starlette.types import ASGIApp, Receive, Scope, Send

SOCKETS = Path("/proc/net/tcp")  # each with the user who has made it
CONNECTED = "01"  # sockets in other states may not name their user
Address = tuple[str, int]


def main() -> None:
    """Serve as ``flower-superlink`` does, but the user of this process alone."""
    config = _parse_superlink_lifespan_config()
    app = for_own_user(create_app(config, SuperLinkLifespan))
    log_config = get_uvicorn_log_config(console_handler.level)
    # Without proxy_headers, which would let a request say where it comes from
    uvicorn.run(app, host=config.host, port=config.port, log_config=log_config, proxy_headers=False)


def for_own_user(app: ASGIApp) -> ASGIApp:
    """`app`, but for requests of other users, which are refused."""

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or user_of(scope["client"], scope["server"]) == os.geteuid():
            await app(scope, receive, send)
            return
        log(WARNING, "Refused a request that is not of this SuperLink's user")
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body", "body": b"this SuperLink belongs to another user"})

    return guarded


def user_of(client: Address, server: Address) -> int | None:
    """The user whose socket at `client` is connected to `server` (IPv4); None if there is none."""
    ends = [_as_listed(client), _as_listed(server)]
    for line in SOCKETS.read_text().splitlines()[1:]:
        _, local, remote, state, _, _, _, user, *_ = line.split()
        if [local, remote] == ends and state == CONNECTED:
            return int(user)
    return None


def _as_listed(address: Address) -> str:
    host = int.from_bytes(socket.inet_aton(address[0]), sys.byteorder)
    return f"{host:08X}:{address[1]:04X}"


if __name__ == "__main__":
    main()
