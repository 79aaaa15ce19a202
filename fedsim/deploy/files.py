"""``deploy``: all that the machines of a federation need, a folder for each.

    ca/          the authority's key and certificate: they stay where they were made
    superlink/   to the server
    nodes/I/     one to each node's machine
    client/      to whoever calls ``flwr run``
    compose.yaml the same as containers of one machine

A folder holds all it needs and works from wherever it is copied to. Without TLS and authentication, which must be
asked for, there are no keys and no certificates.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import NamedTuple

from fedsim.deploy.certificates import (
    Authority,
    certificate_pem,
    new_authority,
    new_key,
    private_openssh,
    private_pem,
    public_openssh,
    read_authority,
    server_certificate,
)
from fedsim.errors import UserError

TEMPLATES = Path(__file__).parent / "templates"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
COMPOSE_HOST = "superlink"  # the server's name among the containers of compose.yaml
LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
DNS_NAME = re.compile(rf"(?=.{{1,253}}$)(?!(.*\.)?\d+$){LABEL}(\.{LABEL})*")  # not 1.2.3.400
SERVER_TLS = "--ssl-ca-certfile ca.crt --ssl-certfile server.crt --ssl-keyfile server.key --enable-supernode-auth"
NODE_TLS = "--root-certificates ca.crt --auth-supernode-private-key node.key"


@dataclass(frozen=True)
class Federation:
    """What is to be deployed; the server is reached at the first of `hosts`."""

    nodes: int
    hosts: tuple[str, ...] = ("127.0.0.1",)
    port: int = 8000
    name: str = "federation"
    insecure: bool = False

    def __post_init__(self) -> None:
        if self.nodes < 1:
            raise UserError(f"nodes = {self.nodes} is out of range: it must be at least 1")
        most = 65535 - self.nodes
        if not 1 <= self.port <= most:
            raise UserError(f"port = {self.port} is out of range: it must be from 1 to {most}, a node's is 1 + I more")
        for host in self.hosts:
            if not _is_address(host) and not DNS_NAME.fullmatch(host):
                raise UserError(f"host = {host!r} is no DNS name or IP address: give it alone, without a port")
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name) or self.name == "default":
            raise UserError(f"name = {self.name!r} is no connection's name: use letters, digits, - or _; not 'default'")

    @property
    def address(self) -> str:
        """Where nodes and clients reach the SuperLink."""
        host = self.hosts[0]
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    @property
    def listen(self) -> str:
        """Where the SuperLink listens: on the loopback, unless it is to be reached from elsewhere."""
        if self.hosts[0] in LOOPBACK:
            return "::1" if self.hosts[0] == "::1" else "127.0.0.1"
        return "::" if ":" in self.hosts[0] else "0.0.0.0"


class File(NamedTuple):
    """A file's content and mode."""

    content: bytes
    mode: int = 0o644


Files = dict[str, File]


def deploy(federation: Federation, out: Path, ca: Path | None = None) -> None:
    """Write the files of `federation` into the new folder `out`, all or none; signed by an earlier one's `ca`/."""
    out = out.absolute()
    files = _scripts(federation, out)
    if not federation.insecure:
        files |= _secrets(federation, _authority(ca) if ca else new_authority())
    elif ca:
        raise UserError("ca: there are no certificates to sign with --insecure: leave out one of the two")
    write_new(out, files)


def _authority(folder: Path) -> Authority:
    try:
        return read_authority((folder / "ca.crt").read_bytes(), (folder / "ca.key").read_bytes())
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"ca = {folder} holds no ca.crt with its ca.key: give the ca/ of a deployment") from error


def _scripts(federation: Federation, out: Path) -> Files:
    """Scripts, units and settings by their place in the folder."""
    secure = not federation.insecure
    values = {
        "ADDRESS": federation.address,
        "LISTEN": federation.listen,
        "PORT": federation.port,
        "NODES": federation.nodes,
        "NAME": federation.name,
        "SERVER": SERVER_TLS if secure else "--insecure",
        "NODE_OPTIONS": NODE_TLS if secure else "--insecure",
    }
    env = _filled("env.sh", {})
    link = {"UNIT": "fedsim-superlink", "DESCRIPTION": "SuperLink of fedsim", "SCRIPT": "superlink.sh"}
    files = {
        ".gitignore": File(b"*\n"),  # keys are not for a repository
        "superlink/env.sh": File(env),
        "superlink/superlink.sh": File(_filled("superlink.sh", values), 0o755),
        "superlink/fedsim-superlink.service": File(_unit(out / "superlink", link)),
        "client/env.sh": File(env + (_filled("here.sh", {}) if secure else b"")),
        "client/config.toml": File(_connection(federation, out / "client" / "ca.crt")),
    }
    if secure:
        files["client/register.sh"] = File(_filled("register.sh", values), 0o755)
    compose = _filled("compose.yaml", values)
    for node in range(federation.nodes):
        own = values | {"NODE": node, "OWN_PORT": federation.port + 1 + node}
        files |= _node_scripts(f"nodes/{node}", own, out) | {f"nodes/{node}/env.sh": File(env)}
        compose += _filled("compose-node.yaml", own)
    return files | {"compose.yaml": File(compose)}


def _node_scripts(folder: str, values: Mapping[str, object], out: Path) -> Files:
    """One node's script and unit."""
    unit = f"fedsim-node-{values['NODE']}"
    about = {"UNIT": unit, "DESCRIPTION": f"SuperNode {values['NODE']} of fedsim", "SCRIPT": "node.sh"}
    return {
        f"{folder}/node.sh": File(_filled("node.sh", values), 0o755),
        f"{folder}/{unit}.service": File(_unit(out / folder, about)),
    }


def _secrets(federation: Federation, authority: Authority) -> Files:
    """Keys and certificates by their place in the folder."""
    hosts = tuple(dict.fromkeys((*federation.hosts, *LOOPBACK, COMPOSE_HOST)))
    server, trusted = new_key(), File(certificate_pem(authority.certificate))
    files = {
        "ca/ca.key": File(private_pem(authority.key), 0o600),
        "ca/ca.crt": trusted,
        "superlink/ca.crt": trusted,
        "superlink/server.crt": File(certificate_pem(server_certificate(server, hosts, authority))),
        "superlink/server.key": File(private_pem(server), 0o600),
        "client/ca.crt": trusted,
    }
    for node in range(federation.nodes):
        key = new_key()
        files[f"nodes/{node}/ca.crt"] = trusted
        files[f"nodes/{node}/node.key"] = File(private_openssh(key), 0o600)
        files[f"client/keys/node-{node}.pub"] = File(public_openssh(key))
    return files


def write_new(folder: Path, files: Files) -> None:
    """Write `files` into `folder`, which must not exist or be empty; private ones are so from their first byte."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"out = {folder} exists and is not empty: give another -o, nothing is overwritten")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            for name, file in files.items():
                _write(part, Path(name), file)
            part.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise UserError(f"out = {folder} cannot be written: {error.strerror}; give another -o") from error


def _write(root: Path, name: Path, file: File) -> None:
    for parent in reversed(name.parents):
        (root / parent).mkdir(mode=0o700, exist_ok=True)
    handle = os.open(root / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, file.mode)
    with open(handle, "wb") as stream:
        stream.write(file.content)


def _filled(template: str, values: Mapping[str, object]) -> bytes:
    """A file of fedsim/deployment/ with each @NAME@ replaced by its value."""
    text = (TEMPLATES / template).read_text()
    return re.sub(r"@(\w+)@", lambda found: str(values[found[1]]), text).encode()


def _unit(folder: Path, about: Mapping[str, str]) -> bytes:
    """A systemd unit; in paths a % would begin one of its specifiers."""
    place = {"FOLDER": str(folder), "BIN": str(Path(sys.executable).parent)}
    escaped = {name: path.replace("%", "%%") for name, path in place.items()}
    return _filled("unit.service", {**about, **escaped, "USER": getpass.getuser()})


def _connection(federation: Federation, certificate: Path) -> bytes:
    """Flower's config.toml: the SuperLink under the connection's name."""
    trust = "insecure = true" if federation.insecure else f"root-certificates = {json.dumps(str(certificate))}"
    lines = ("[superlink]", f'default = "{federation.name}"', "", f"[superlink.{federation.name}]")
    return "\n".join([*lines, f'address = "{federation.address}"', trust, ""]).encode()


def _is_address(host: str) -> bool:
    try:
        address = ip_address(host)
    except ValueError:
        return False
    return not (isinstance(address, IPv6Address) and address.scope_id)  # a zone has no place in a certificate
