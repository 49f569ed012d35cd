"""Certificates that TLS accepts for the right host only, and keys that Flower reads and nobody else."""

from __future__ import annotations

import datetime
import os
import socket
import ssl
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from typer.testing import CliRunner

from fedlora.cli import app
from fedlora.errors import UserError
from fedlora.sites import keys
from fedlora.sites.settings import load


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("server")
    keys.server_init(folder, ["fed.example.org", "127.0.0.1", "::1"])
    return folder


@contextmanager
def listening(folder: Path) -> Iterator[int]:
    """A TLS server that says hello once to everybody."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                try:
                    with context.wrap_socket(connection, server_side=True) as secure:
                        secure.sendall(b"hello")
                except OSError:
                    pass

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(5)


def dial(port: int, ca: Path, host: str) -> bytes:
    context = ssl.create_default_context(cafile=str(ca))
    with (
        socket.create_connection(("127.0.0.1", port)) as plain,
        context.wrap_socket(plain, server_hostname=host) as secure,
    ):
        return secure.recv(5)


def test_tls_accepts_the_named_hosts_and_no_others(server: Path, tmp_path: Path) -> None:
    keys.server_init(tmp_path, ["127.0.0.1"])
    with listening(server) as port:
        for host in ("127.0.0.1", "fed.example.org"):
            assert dial(port, server / "ca.pem", host) == b"hello"
        with pytest.raises(ssl.SSLCertVerificationError, match=r"[Hh]ostname mismatch"):
            dial(port, server / "ca.pem", "other.example.org")
        with pytest.raises(ssl.SSLCertVerificationError, match="certificate verify failed"):
            dial(port, tmp_path / "ca.pem", "127.0.0.1")  # another authority of the same name


def test_an_expired_certificate_is_refused_and_renewed(tmp_path: Path) -> None:
    keys.server_init(tmp_path, ["127.0.0.1"], days=-1)
    authority = (tmp_path / "ca.pem").read_bytes()
    expired = keys.read_certificate(tmp_path / "server.pem")
    assert "expired on" in str(keys.certificate_problem(expired))
    with (
        listening(tmp_path) as port,
        pytest.raises(ssl.SSLCertVerificationError, match="certificate has expired"),
    ):
        dial(port, tmp_path / "ca.pem", "127.0.0.1")
    keys.server_init(tmp_path, ["127.0.0.1"], renew=True)
    assert (tmp_path / "ca.pem").read_bytes() == authority
    with listening(tmp_path) as port:
        assert dial(port, tmp_path / "ca.pem", "127.0.0.1") == b"hello"


def test_a_certificate_is_renewed_for_the_names_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no --host is given"):
        CliRunner().invoke(app, ["server", "init", "--renew"], catch_exceptions=False)
    keys.server_init(tmp_path / "server", ["fed.example.org", "10.0.0.7"], days=3)
    before = keys.read_certificate(tmp_path / "server" / "server.pem")
    assert CliRunner().invoke(app, ["server", "init", "--renew"]).exit_code == 0
    after = keys.read_certificate(tmp_path / "server" / "server.pem")
    names = ["fed.example.org", "10.0.0.7", "localhost", "127.0.0.1"]
    assert keys.names_of(after) == keys.names_of(before) == names
    assert after.subject == before.subject
    assert after.not_valid_after_utc > before.not_valid_after_utc
    keys.server_init(tmp_path / "server", ["other.example.org"], renew=True)
    assert "fed.example.org" not in keys.names_of(keys.read_certificate(tmp_path / "server" / "server.pem"))


def test_what_certificates_say(server: Path) -> None:
    authority, own = (keys.read_certificate(server / name) for name in ("ca.pem", "server.pem"))
    assert keys.certificate_problem(own, authority) is None
    assert keys.certificate_problem(authority, own) == "another authority has signed it"
    constraints = authority.extensions.get_extension_for_class(x509.BasicConstraints).value
    assert (constraints.ca, constraints.path_length) == (True, 0)
    assert not own.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    names = own.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fed.example.org", "localhost"]
    assert {str(a) for a in names.get_values_for_type(x509.IPAddress)} == {"127.0.0.1", "::1"}
    left = own.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    assert 824 <= left.days <= 825


def test_private_keys_are_their_owner_s_alone(server: Path, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        keys.site_init(tmp_path / "north", "north", "h:1", ca=server / "ca.pem")
    finally:
        os.umask(before)
    for file in (server / "ca.key", server / "server.key", tmp_path / "north" / "site.key"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert keys.private_problem(tmp_path / "north" / "site.key") is None
    (tmp_path / "north" / "site.key").chmod(0o640)
    assert "chmod 600" in str(keys.private_problem(tmp_path / "north" / "site.key"))


def test_flower_reads_the_keys(server: Path, tmp_path: Path) -> None:
    register = pytest.importorskip("flwr.cli.supernode.register")
    keys.site_init(tmp_path, "north", "h:1")
    private = serialization.load_ssh_private_key((tmp_path / "site.key").read_bytes(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    public = keys.read_public(tmp_path / "site.pub")
    assert public.public_numbers() == private.public_key().public_numbers()
    assert register.try_load_public_key(tmp_path / "site.pub")


def test_the_list_of_allowed_keys(server: Path, tmp_path: Path) -> None:
    for name in ("north", "south"):
        keys.site_init(tmp_path / name, name, "h:1")
        keys.allow(server, tmp_path / name / "site.pub", name)
    keys.allow(server, tmp_path / "north" / "site.pub", "north")  # again: nothing changes
    assert set(keys.allowed(server)) == {"north", "south"}
    with pytest.raises(UserError, match="the name is already that of site 'north'"):
        keys.allow(server, tmp_path / "south" / "site.pub", "north")
    with pytest.raises(UserError, match="this key is already that of site 'north'"):
        keys.allow(server, tmp_path / "north" / "site.pub", "west")
    with pytest.raises(UserError, match=r"site\.key: no public key\s.*never site\.key"):
        keys.allow(server, tmp_path / "north" / "site.key", "east")
    with pytest.raises(UserError, match="cannot be a site's name"):
        keys.allow(server, tmp_path / "north" / "site.pub", "../north")
    form = serialization.PublicFormat.OpenSSH
    other = ed25519.Ed25519PrivateKey.generate().public_key().public_bytes(serialization.Encoding.OpenSSH, form)
    (tmp_path / "other.pub").write_bytes(other)
    with pytest.raises(UserError, match="not an ECDSA P-384 key"):
        keys.allow(server, tmp_path / "other.pub", "east")


def test_nothing_is_overwritten(server: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ca\.key exists already"):
        keys.server_init(server, ["h"])
    keys.site_init(tmp_path, "north", "h:1")
    with pytest.raises(UserError, match=r"site\.key exists already"):
        keys.site_init(tmp_path, "north", "h:1")


def test_what_is_wrong_is_said_before_anything_is_written(tmp_path: Path) -> None:
    place = tmp_path / "new"
    for host in ("https://fed.example.org", "fed:9092", "", "füd.example.org"):
        with pytest.raises(UserError, match="--host"):
            keys.server_init(tmp_path / f"s{len(host)}", [host])
    with pytest.raises(UserError, match=r"server\.address.*host:port"):
        keys.site_init(place, "north", "nowhere")
    (tmp_path / "bad.pem").write_text("-----BEGIN NOTHING-----")
    with pytest.raises(UserError, match="no certificate"):
        keys.site_init(place, "north", "h:1", ca=tmp_path / "bad.pem")
    assert not place.exists()


def test_the_site_file_is_ready_to_be_edited(server: Path, tmp_path: Path) -> None:
    written = keys.site_init(tmp_path, "north", "h:9092", ca=server / "ca.pem", train="x.csv", columns={"text": "t"})
    assert {file.name for file in written} == {"site.key", "site.pub", "ca.pem", "site.toml"}
    site = load(tmp_path)
    assert (site.name, site.server.address, site.data.text) == ("north", "h:9092", "t")
    assert Path(site.server.key) == tmp_path / "site.key"
