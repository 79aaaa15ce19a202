"""The files of a deployment: what lies where, who may read it, and whether those who read it understand it."""

from __future__ import annotations

import argparse
import configparser
import contextlib
import datetime
import os
import pwd
import re
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from flwr.cli.flower_config import parse_superlink_connection
from flwr.cli.supernode.register import try_load_public_key
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.cli.flower_supernode import _try_setup_client_authentication

from fedsim.deploy import certificates
from fedsim.deploy.certificates import Authority, certificate_pem, new_authority, new_key, private_pem
from fedsim.deploy.files import Federation, File, deploy, write_new
from fedsim.errors import UserError
from tests.federation.processes import client_environment

HOSTS = ("server.example", "192.0.2.7", "fd00::7")
ALWAYS = ("localhost", "127.0.0.1", "::1", "superlink")
ODD_NAME = 'R&D | 100% "mine" \\ it\'s $HOME `x` é\N{GRINNING FACE}'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A deployment of three nodes for a server with three names."""
    out = tmp_path_factory.mktemp("deploy") / "federation"
    deploy(Federation(3, HOSTS, 9000, "lab"), out)
    return out


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_each_machine_has_a_folder_with_all_it_needs(folder: Path) -> None:
    node = {"ca.crt", "node.key", "node.sh", "env.sh"}
    assert files(folder / "ca") == {"ca.key", "ca.crt"}
    assert files(folder / "superlink") == {
        *("ca.crt", "server.crt", "server.key", "superlink.sh", "env.sh", "fedsim-superlink.service")
    }
    assert sorted(os.listdir(folder / "nodes")) == ["0", "1", "2"]
    for number in range(3):
        assert files(folder / "nodes" / str(number)) == node | {f"fedsim-node-{number}.service"}
    keys = {f"keys/node-{number}.pub" for number in range(3)}
    assert files(folder / "client") == {"ca.crt", "config.toml", "env.sh", "register.sh"} | keys
    assert {path.name for path in folder.iterdir()} == {
        *("ca", "superlink", "nodes", "client", "compose.yaml", ".gitignore")
    }
    assert len({(folder / place / "ca.crt").read_bytes() for place in ("ca", "superlink", "nodes/1", "client")}) == 1


def test_private_keys_are_their_owners_alone(folder: Path) -> None:
    private = [path for path in folder.rglob("*") if path.is_file() and b"PRIVATE KEY" in path.read_bytes()]
    assert {path.name for path in private} == {"ca.key", "server.key", "node.key"}
    for path in private:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_private_file_is_private_from_its_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the most open umask, and without a change of mode: each file is made with the mode that it has."""
    monkeypatch.delattr(os, "chmod")
    before = os.umask(0)
    try:
        write_new(tmp_path / "out", {"a/key": File(b"secret", 0o600), "b/script": File(b"", 0o755)})
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").rglob("*")}
    assert modes == {"a": 0o700, "key": 0o600, "b": 0o700, "script": 0o755}


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").write_text("mine")
    with pytest.raises(UserError, match="exists and is not empty: give another -o"):
        deploy(Federation(1), taken)
    assert files(tmp_path) == {"taken/mine"}
    with pytest.raises(UserError, match="exists and is not empty"):
        deploy(Federation(1), taken / "mine")
    with pytest.raises(UserError, match="cannot be written"):
        deploy(Federation(1), taken / "mine" / "below")
    with pytest.raises(TypeError):
        write_new(tmp_path / "half", {"whole": File(b""), "broken": File(None)})  # type: ignore[arg-type]
    assert files(tmp_path) == {"taken/mine"}
    (tmp_path / "empty").mkdir()
    deploy(Federation(1), tmp_path / "empty")
    assert (tmp_path / "empty" / "ca" / "ca.key").exists()


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[int]:
    """A server with the deployment's certificate; its port."""
    with serving(folder / "superlink") as port:
        yield port


@contextlib.contextmanager
def serving(superlink: Path) -> Iterator[int]:
    """A server with the certificate of `superlink` that greets all who trust it; its port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(superlink / "server.crt", superlink / "server.key")

    def serve(listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with contextlib.suppress(OSError), connection, context.wrap_socket(connection, server_side=True) as secure:
                secure.sendall(b"hello")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def greeted(port: int, host: str, authority: Path) -> bytes:
    """What the server at `port` says to a strict client that knows it as `host` and trusts `authority`."""
    context = ssl.create_default_context(cafile=authority)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    plain = socket.create_connection(("127.0.0.1", port), timeout=10)
    with plain, context.wrap_socket(plain, server_hostname=host) as secure:
        return secure.recv(5)


@pytest.mark.parametrize("host", [*HOSTS, *ALWAYS])
def test_the_servers_certificate_holds_for_each_of_its_names(folder: Path, server: int, host: str) -> None:
    assert greeted(server, host, folder / "client" / "ca.crt") == b"hello"


def test_the_servers_certificate_holds_for_no_other_name_and_no_other_authority(
    folder: Path, server: int, tmp_path: Path
) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        greeted(server, "other.example", folder / "client" / "ca.crt")
    deploy(Federation(1, HOSTS), tmp_path / "other")
    with pytest.raises(ssl.SSLCertVerificationError, match="CERTIFICATE_VERIFY_FAILED"):
        greeted(server, HOSTS[0], tmp_path / "other" / "client" / "ca.crt")


def test_only_the_authority_may_sign(folder: Path) -> None:
    authority, server = (
        x509.load_pem_x509_certificate((folder / name).read_bytes()) for name in ("ca/ca.crt", "superlink/server.crt")
    )
    server.verify_directly_issued_by(authority)
    assert authority.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not server.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    assert server.not_valid_after_utc < authority.not_valid_after_utc


def test_a_renewed_certificate_needs_nothing_new_from_those_who_trust_the_authority(
    folder: Path, tmp_path: Path
) -> None:
    deploy(Federation(4, ("moved.example",)), tmp_path / "renewed", folder / "ca")
    for name in ("ca/ca.crt", "ca/ca.key"):
        assert (tmp_path / "renewed" / name).read_bytes() == (folder / name).read_bytes()
    with serving(tmp_path / "renewed" / "superlink") as port:
        assert greeted(port, "moved.example", folder / "client" / "ca.crt") == b"hello"
    shutil.copy(tmp_path / "renewed" / "superlink" / "server.key", tmp_path / "ca.key")
    shutil.copy(folder / "ca" / "ca.crt", tmp_path)
    for wrong in (folder, tmp_path):
        with pytest.raises(UserError, match="holds no ca"):
            deploy(Federation(1), tmp_path / "none", wrong)


def test_flower_reads_each_nodes_key_pair(folder: Path) -> None:
    seen = set()
    for node in range(3):
        path = folder / "nodes" / str(node) / "node.key"
        read = argparse.Namespace(auth_supernode_private_key=str(path), auth_supernode_public_key=None)
        pair = _try_setup_client_authentication(read)
        assert pair is not None
        assert isinstance(pair[0].curve, ec.SECP384R1)
        public = try_load_public_key(folder / "client" / "keys" / f"node-{node}.pub")
        assert public == public_key_to_bytes(pair[1])
        seen.add(public)
    assert len(seen) == 3


def authority(key: CertificateIssuerPrivateKeyTypes, ca: bool = True, usage: bool = True, days: int = 1) -> Authority:
    """An authority, or what is none: of that key, without the right to sign, or expired where `days` are negative."""
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "lab")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - datetime.timedelta(days=9))
    builder = builder.not_valid_after(now + datetime.timedelta(days=days))
    builder = builder.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    if usage:
        builder = builder.add_extension(certificates._usage("key_cert_sign"), critical=True)
    return Authority(builder.sign(key, hashes.SHA256()), key)  # type: ignore[arg-type]


REFUSED: dict[str, tuple[Callable[[], Authority], str]] = {
    "RSA-1024": (lambda: authority(rsa.generate_private_key(65537, 1024)), "its key is not on the curve secp384r1"),
    "P-256": (lambda: authority(ec.generate_private_key(ec.SECP256R1())), "its key is not on the curve secp384r1"),
    "no CA": (lambda: authority(new_key(), ca=False), "it is not the certificate of an authority"),
    "no usage": (lambda: authority(new_key(), usage=False), "it is not the certificate of an authority"),
    "expired": (lambda: authority(new_key(), days=-1), r"it is valid from \d{4}-\d\d-\d\d to \d{4}-\d\d-\d\d"),
    "other key": (lambda: new_authority()._replace(key=new_key()), "the key is of another certificate"),
}


@pytest.mark.parametrize("refused", REFUSED)
def test_an_authority_that_no_node_should_trust_signs_nothing(tmp_path: Path, refused: str) -> None:
    make, reason = REFUSED[refused]
    certificate, key = make()
    (ca := tmp_path / "ca").mkdir()
    (ca / "ca.crt").write_bytes(certificate_pem(certificate))
    (ca / "ca.key").write_bytes(private_pem(key))
    with pytest.raises(
        UserError, match=rf"^ca = {ca} holds no ca.crt with its ca.key that can sign \({reason}\): give"
    ):
        deploy(Federation(1), tmp_path / "out", ca)
    assert not (tmp_path / "out").exists()
    (ca / "ca.key").write_bytes(b"-----BEGIN")
    with pytest.raises(UserError, match="one of them is not a PEM file without a password"):
        deploy(Federation(1), tmp_path / "out", ca)


def test_a_unit_runs_as_who_made_it_whatever_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where that user has no name."""
    for name in ("LOGNAME", "USER"):
        monkeypatch.setenv(name, "me\nExecStartPre=/bin/false")
    own = pwd.getpwuid(os.getuid()).pw_name
    for name, who in (("named", own), ("nameless", str(os.getuid()))):
        deploy(Federation(1), tmp_path / name)
        text = (tmp_path / name / "superlink" / "fedsim-superlink.service").read_text()
        assert f"\nUser={who}\nWorkingDirectory=" in text
        assert "ExecStartPre" not in text
        monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)


def test_flower_reads_the_connection(folder: Path) -> None:
    settings = tomllib.loads((folder / "client" / "config.toml").read_text())["superlink"]
    assert settings["default"] == "lab"
    connection = parse_superlink_connection(settings["lab"], "lab")
    assert (connection.address, connection.insecure) == ("server.example:9000", False)
    assert connection.root_certificates == str(folder / "client" / "ca.crt")


def test_the_connection_finds_its_certificate_wherever_the_folder_is_copied_to(folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / ODD_NAME
    shutil.copytree(folder / "client", moved)
    other = '[superlink.other]\nroot-certificates = "/another.crt"\n'  # which the user has added
    with (moved / "config.toml").open("a") as file:
        file.write(other)
    env = client_environment(moved)
    assert env["FLWR_HOME"] == str(moved)
    assert env["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    settings = tomllib.loads((moved / "config.toml").read_text())["superlink"]
    assert settings["lab"] == {"address": "server.example:9000", "root-certificates": str(moved / "ca.crt")}
    assert settings["other"] == {"root-certificates": "/another.crt"}


def test_a_deployment_works_in_a_folder_with_an_odd_name(tmp_path: Path) -> None:
    client = tmp_path / ODD_NAME / "client"
    deploy(Federation(1), client.parent)
    for _ in range(2):  # as written, and as rewritten by env.sh
        settings = tomllib.loads((client / "config.toml").read_text())["superlink"]["federation"]
        assert settings["root-certificates"] == str(client / "ca.crt")
        client_environment(client)


def test_env_sh_ignores_cdpath(folder: Path, tmp_path: Path) -> None:
    """With CDPATH, `cd` goes to another folder of that name and prints it."""
    (tmp_path / "client").mkdir()
    env = {**os.environ, "CDPATH": str(tmp_path), "FEDSIM_BIN": str(Path(sys.executable).parent)}
    command = ["bash", "-c", '. client/env.sh && printf %s "$FLWR_HOME"']
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout == str(folder / "client")


def test_a_script_without_flower_says_what_is_missing(folder: Path) -> None:
    for script in ("superlink/superlink.sh", "nodes/2/node.sh", "client/register.sh"):
        done = subprocess.run(
            ["bash", str(folder / script)], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "set FEDSIM_BIN to its bin folder" in done.stderr


def test_scripts_are_bash(folder: Path) -> None:
    scripts = sorted(folder.rglob("*.sh"))
    assert len(scripts) == 10
    for script in scripts:
        subprocess.run(["bash", "-n", str(script)], check=True)
        assert not re.search(r"@\w+@", script.read_text())
        assert os.access(script, os.X_OK) == (script.name != "env.sh")


def test_each_node_has_its_shard_and_its_port(folder: Path) -> None:
    for node in range(3):
        script = (folder / "nodes" / str(node) / "node.sh").read_text()
        assert f'--node-config "partition-id={node} num-partitions=3"' in script
        assert f"--port {9001 + node} " in script
        assert "${FEDSIM_SUPERLINK:-server.example:9000}" in script


@pytest.mark.parametrize(
    ("host", "listens", "address"),
    [
        ("127.0.0.1", "127.0.0.1", "127.0.0.1:8000"),
        ("localhost", "127.0.0.1", "localhost:8000"),
        ("::1", "::1", "[::1]:8000"),
        ("server.example", "0.0.0.0", "server.example:8000"),
        ("192.0.2.7", "0.0.0.0", "192.0.2.7:8000"),
        ("fd00::7", "::", "[fd00::7]:8000"),
        ("LocalHost", "127.0.0.1", "LocalHost:8000"),
        ("127.0.0.2", "127.0.0.2", "127.0.0.2:8000"),
    ],
)
def test_the_superlink_listens_beyond_the_loopback_interface_only_for_a_host_that_needs_it(
    host: str, listens: str, address: str, tmp_path: Path
) -> None:
    federation = Federation(1, (host,), insecure=True)
    assert (federation.listen, federation.address) == (listens, address)
    deploy(federation, tmp_path / "out")
    (port,) = yaml.safe_load((tmp_path / "out" / "compose.yaml").read_text())["services"]["superlink"]["ports"]
    assert port.removesuffix(":8000:8000").strip("[]") == listens  # containers are published to nobody else


def test_units_name_their_places_in_full(folder: Path) -> None:
    units = sorted(folder.rglob("*.service"))
    assert len(units) == 4
    for unit in units:
        read = configparser.ConfigParser(interpolation=None, strict=False)
        read.optionxform = str  # type: ignore[assignment, method-assign]
        read.read(unit)
        service = read["Service"]
        assert service["WorkingDirectory"] == str(unit.parent)
        assert service["Environment"] == f'"FEDSIM_BIN={Path(sys.executable).parent}"'
        assert (unit.parent / service["ExecStart"].removeprefix("/bin/bash ")).exists()
        assert service["Restart"] == "always"


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze here")
def test_systemd_understands_the_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", f"/{ODD_NAME}\\/bin/python")
    out = tmp_path / ODD_NAME
    deploy(Federation(1), out)
    units = [str(path) for path in out.rglob("*.service")]
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", *units], capture_output=True, text=True)
    assert [line for line in (done.stdout + done.stderr).splitlines() if "fedsim-" in line] == []


def test_containers_run_the_scripts(folder: Path) -> None:
    services = yaml.safe_load((folder / "compose.yaml").read_text())["services"]
    assert list(services) == ["superlink", "node-0", "node-1", "node-2"]
    places = {"superlink": "superlink", **{f"node-{node}": f"nodes/{node}" for node in range(3)}}
    for name, service in services.items():
        mount = service["volumes"][0]
        assert mount == f"./{places[name]}:/federation"
        script = service["command"].removeprefix("bash /federation/")
        assert (folder / places[name] / script).exists()
        for variable in {"FEDSIM_LISTEN", "FEDSIM_SUPERLINK"} & service["environment"].keys():
            assert f"${{{variable}:-" in (folder / places[name] / script).read_text()
    assert services["superlink"]["ports"] == ["0.0.0.0:9000:9000"]
    # The certificate holds for the name under which containers reach the server
    assert services["node-1"]["environment"]["FEDSIM_SUPERLINK"] == "superlink:9000"


def test_insecure_must_be_asked_for_and_has_no_keys(folder: Path, tmp_path: Path) -> None:
    for script in ("superlink/superlink.sh", "nodes/1/node.sh", "client/config.toml"):
        assert "insecure" not in (folder / script).read_text()
    out = tmp_path / "open"
    deploy(Federation(2, insecure=True), out)
    assert not [name for name in files(out) if re.search(r"\.(key|crt|pub)$|register", name)]
    for script in ("superlink/superlink.sh", "nodes/1/node.sh"):
        text = (out / script).read_text()
        assert "--insecure" in text
        assert not re.search("auth|ssl|certificates", text)
    settings = tomllib.loads((out / "client" / "config.toml").read_text())["superlink"]["federation"]
    assert settings == {"address": "127.0.0.1:8000", "insecure": True}
