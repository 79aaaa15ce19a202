"""``run.py deploy``: the files of a federation, a folder for each machine.

    ca/          key and certificate of the authority, not to be copied
    superlink/   for the server
    nodes/I/     for the machine of node I
    client/      for users who call ``flwr run``
    compose.yaml the same federation as containers on one machine

Each folder is self-contained and can be copied anywhere. ``--insecure`` omits TLS and authentication, with all keys and
certificates.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import NamedTuple

import tomli_w

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
MOST_NODES = 65534  # the SuperLink and each node have a different port
COMPOSE_HOST = "superlink"  # the server's name among the containers of compose.yaml
LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
CONNECTION = re.compile("[A-Za-z0-9][A-Za-z0-9_-]*")
DNS_NAME = re.compile(rf"(?=.{{1,253}}$)(?!(.*\.)?\d+$){LABEL}(\.{LABEL})*")  # not 1.2.3.400
SERVER_TLS = "--ssl-ca-certfile ca.crt --ssl-certfile server.crt --ssl-keyfile server.key --enable-supernode-auth"
NODE_TLS = "--root-certificates ca.crt --auth-supernode-private-key node.key"


@dataclass(frozen=True)
class Federation:
    """A federation to deploy; nodes and clients reach the server at the first of `hosts`."""

    nodes: int
    hosts: tuple[str, ...] = ("127.0.0.1",)
    port: int = 8000
    name: str = "federation"
    insecure: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.nodes <= MOST_NODES:
            raise UserError(f"nodes = {self.nodes} is out of range: it must be from 1 to {MOST_NODES}")
        most = 65535 - self.nodes
        if not 1 <= self.port <= most:
            raise UserError(
                f"port = {self.port} is out of range: it must be from 1 to {most}, since node I uses port + 1 + I"
            )
        for host in self.hosts:
            if not _is_server_address(host) and not DNS_NAME.fullmatch(host):
                raise UserError(
                    f"host = {host!r} is not a DNS name or IP address of a server: give it without a port, "
                    "as the nodes reach it"
                )
        if not CONNECTION.fullmatch(self.name) or self.name == "default":
            raise UserError(
                f"name = {self.name!r} is not a connection name: use letters, digits, - or _, beginning with a letter "
                "or digit; not 'default'"
            )

    @property
    def address(self) -> str:
        """The host and port at which nodes and clients reach the SuperLink."""
        return f"{_bracketed(self.hosts[0])}:{self.port}"

    @property
    def listen(self) -> str:
        """The address to listen on: the loopback interface for a loopback host, else all interfaces."""
        host = self.hosts[0]
        if host.lower() == "localhost":
            return "127.0.0.1"
        if not _is_server_address(host):
            return "0.0.0.0"
        address = ip_address(host)
        if address.is_loopback:
            return host
        return "::" if address.version == 6 else "0.0.0.0"


class File(NamedTuple):
    """A file's content and mode."""

    content: bytes
    mode: int = 0o644


Files = dict[str, File]


def deploy(federation: Federation, out: Path, ca: Path | None = None) -> None:
    """Write the files of `federation` atomically to the new folder `out`; `ca` is the ca/ of an earlier deployment.

    Scripts and settings contain the path of `out`, so it must consist of printable characters.
    """
    out = out.absolute()
    if not str(out).isprintable():
        raise UserError(f"out = {str(out)!r} has a character that cannot be printed: give another -o")
    files = _scripts(federation, out)
    if not federation.insecure:
        files |= _secrets(federation, _authority(ca) if ca else new_authority())
    elif ca:
        raise UserError("ca: there are no certificates to sign with --insecure: leave out one of the two")
    write_new(out, files)


def _authority(folder: Path) -> Authority:
    try:
        return read_authority((folder / "ca.crt").read_bytes(), (folder / "ca.key").read_bytes())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"ca = {folder} holds no ca.crt with its ca.key that can sign ({reason}): give the ca/ of a deployment, or "
            "leave it out for a new authority"
        ) from error


def _scripts(federation: Federation, out: Path) -> Files:
    """Scripts, units and settings by their path in the folder."""
    secure = not federation.insecure
    values = {
        "ADDRESS": federation.address,
        "LISTEN": federation.listen,
        "PUBLISH": _bracketed(federation.listen),
        "PORT": federation.port,
        "NODES": federation.nodes,
        "NAME": federation.name,
        "SERVER": SERVER_TLS if secure else "--insecure",
        "NODE_OPTIONS": NODE_TLS if secure else "--insecure",
    }
    env = _filled("env.sh", {})
    unit = _unit(out / "superlink", "fedsim-superlink", "SuperLink of fedsim", "superlink.sh")
    files = {
        ".gitignore": File(b"*\n"),  # keys must not be committed
        "superlink/env.sh": File(env),
        "superlink/superlink.sh": File(_filled("superlink.sh", values), 0o755),
        "superlink/fedsim-superlink.service": File(unit),
        "client/env.sh": File(env + (_filled("here.sh", values) if secure else b"")),
        "client/config.toml": File(_connection(federation, out / "client" / "ca.crt")),
    }
    if secure:
        files["client/register.sh"] = File(_filled("register.sh", values), 0o755)
    compose = _filled("compose.yaml", values)
    for node in range(federation.nodes):
        own = values | {"NODE": node, "OWN_PORT": federation.port + 1 + node}
        folder, name = f"nodes/{node}", f"fedsim-node-{node}"
        unit = _unit(out / folder, name, f"SuperNode {node} of fedsim", "node.sh")
        files[f"{folder}/env.sh"] = File(env)
        files[f"{folder}/node.sh"] = File(_filled("node.sh", own), 0o755)
        files[f"{folder}/{name}.service"] = File(unit)
        compose += _filled("compose-node.yaml", own)
    return files | {"compose.yaml": File(compose)}


def _secrets(federation: Federation, authority: Authority) -> Files:
    """Keys and certificates by their path in the folder."""
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
    """Write `files` atomically to `folder`, which must be empty or new; each is created with its final mode."""
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"out = {folder} exists and is not empty: give another -o, nothing is overwritten")
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            for name, file in files.items():
                for parent in reversed(Path(name).parents):
                    (part / parent).mkdir(mode=0o700, exist_ok=True)
                (part / name).touch(file.mode, exist_ok=False)
                (part / name).write_bytes(file.content)
            part.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise UserError(f"out = {folder} cannot be written: {error.strerror}; give another -o") from error


def _filled(template: str, values: Mapping[str, object]) -> bytes:
    """A template with each @NAME@ replaced by its value."""
    text = (TEMPLATES / template).read_text()
    return re.sub(r"@(\w+)@", lambda found: str(values[found[1]]), text).encode()


def _unit(folder: Path, name: str, description: str, script: str) -> bytes:
    """A systemd unit that runs a script in `folder`, with % escaped everywhere and \\ and " within quotes."""
    binaries = re.sub(r'[\\"]', r"\\\g<0>", str(Path(sys.executable).parent))
    about = {"UNIT": name, "DESCRIPTION": description, "SCRIPT": script, "USER": _user()}
    paths = {"FOLDER": str(folder).replace("%", "%%"), "BIN": binaries.replace("%", "%%")}
    return _filled("unit.service", about | paths)


def _user() -> str:
    """The name of the user of this process, or its number if it has none."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def _connection(federation: Federation, certificate: Path) -> bytes:
    """Flower's config.toml, with the SuperLink under the name of the connection."""
    trust = {"insecure": True} if federation.insecure else {"root-certificates": str(certificate)}
    connection = {"address": federation.address, **trust}
    return tomli_w.dumps({"superlink": {"default": federation.name, federation.name: connection}}).encode()


def _bracketed(host: str) -> str:
    """`host` in the form that precedes a port: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


def _is_server_address(host: str) -> bool:
    """Whether `host` is an IP address of a server: not unspecified or multicast, and without an IPv6 zone."""
    try:
        address = ip_address(host)
    except ValueError:
        return False
    zoned = isinstance(address, IPv6Address) and address.scope_id  # a certificate cannot have a zone
    return not (address.is_unspecified or address.is_multicast or zoned)
