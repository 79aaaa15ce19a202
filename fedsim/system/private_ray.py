"""Settings of a Ray that serves its own user alone, on this machine alone."""

from __future__ import annotations

import secrets


def private_ray() -> dict[str, str]:
    """The environment variables with which a new Ray listens on the loopback interface and asks for a token.

    Without the first it listens on all interfaces; without the others it runs the code of whoever reaches its ports,
    also of other users of the machine. They are to be set before Ray is imported.
    """
    return {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # its only switch for that, whatever the system
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
