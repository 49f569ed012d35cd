"""Keys and certificates: the server's own authority and certificate, the sites' keys, and the list of allowed ones.

A site trusts one authority (``ca.pem``) and proves itself by an ECDSA P-384 key, as Flower's SuperNodes do. Private
keys never leave the folder they were made in and are readable by their owner alone.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedlora.errors import UserError
from fedlora.sites import settings

try:
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
except ImportError:  # pragma: no cover
    raise UserError("keys and certificates need Flower's libraries", "pip install 'fedlora[flower]'") from None

CA_KEY, CA, SERVER_KEY, SERVER = "ca.key", "ca.pem", "server.key", "server.pem"
ALLOWED = "allowed"
SITE_KEY, SITE_PUBLIC = "site.key", "site.pub"
CA_DAYS, SERVER_DAYS = 3650, 825
LOCAL = ("localhost", "127.0.0.1")
"""What the server's own programs dial."""
SKEW = datetime.timedelta(minutes=5)
"""Certificates begin a little in the past: clocks differ."""


# -- the server


def server_init(folder: Path, hosts: Sequence[str], *, days: int = SERVER_DAYS, renew: bool = False) -> list[Path]:
    """Makes the authority, a server certificate for these names and addresses, and the folder of allowed site keys.

    ``renew``: a new server certificate from the authority that is there, by default for the names of the one before.
    Returns the files written. Raises UserError rather than overwrite a key.
    """
    if renew and not hosts and (folder / SERVER).exists():
        hosts = names_of(read_certificate(folder / SERVER))
    if not hosts:
        raise UserError("no --host is given", "name what sites dial: a DNS name, an address, or both")
    names = [_general(host) for host in dict.fromkeys([*hosts, *LOCAL])]
    folder.mkdir(parents=True, exist_ok=True)
    if renew:
        authority, key = read_certificate(folder / CA), _private(folder / CA_KEY)
        written: list[Path] = []
    else:
        for name in (CA_KEY, CA, SERVER_KEY, SERVER):
            _absent(folder / name, "use another folder, or --renew for a new certificate from the same authority")
        key = ec.generate_private_key(ec.SECP384R1())
        authority = _authority(key)
        written = [_secret(folder / CA_KEY, _pem(key)), _public(folder / CA, _certificate_pem(authority))]
    own = ec.generate_private_key(ec.SECP384R1())
    certificate = _server_certificate(own, hosts[0], names, days, authority, key)
    written += [_secret(folder / SERVER_KEY, _pem(own)), _public(folder / SERVER, _certificate_pem(certificate))]
    (folder / ALLOWED).mkdir(exist_ok=True)
    return [*written, folder / ALLOWED]


def names_of(certificate: x509.Certificate) -> list[str]:
    """The names and addresses that a certificate is for, in its order."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [str(name.value) for name in names if isinstance(name, (x509.DNSName, x509.IPAddress))]


def _authority(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    """A certificate that vouches for servers, and for no further authority."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedlora federation")])
    usage = _usage(key_cert_sign=True, crl_sign=True)
    builder = _begun(name, name, key.public_key(), CA_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(usage, critical=True)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    return builder.sign(key, hashes.SHA384())


def _server_certificate(
    key: ec.EllipticCurvePrivateKey,
    common: str,
    names: Sequence[x509.GeneralName],
    days: int,
    authority: x509.Certificate,
    signer: ec.EllipticCurvePrivateKey,
) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common[:64])])
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    vouching = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    builder = _begun(name, authority.subject, key.public_key(), days)
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(digital_signature=True), critical=True)
    builder = builder.add_extension(usage, critical=False)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    return builder.add_extension(vouching, critical=False).sign(signer, hashes.SHA384())


def _begun(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    end = now + datetime.timedelta(days=days)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    builder = builder.serial_number(x509.random_serial_number())
    return builder.not_valid_before(min(now, end) - SKEW).not_valid_after(end)


def _usage(*, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )


def _general(host: str) -> x509.GeneralName:
    """An address as an address, anything else as a DNS name."""
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not host or ":" in host or "/" in host or any(character.isspace() for character in host):
        raise UserError(f"--host {host!r}: neither a name nor an address", "give it without scheme and port")
    try:
        return x509.DNSName(host)
    except ValueError:
        raise UserError(f"--host {host!r}: not an ASCII name", "write an international name in its xn-- form") from None


def allow(folder: Path, key: Path, name: str) -> Path:
    """Puts a site's public key on the list of allowed ones. Raises UserError for what is no such key, and rather than
    give a name that is taken to another key."""
    settings.require_name(name)
    public = read_public(key)
    if not (folder / ALLOWED).is_dir():
        raise UserError(f"{folder}: no server folder", "make one with: fedlora server init")
    for other, known in allowed(folder).items():
        if (other == name) != (known.public_numbers() == public.public_numbers()):
            raise UserError(
                f"{key}: {'the name' if other == name else 'this key'} is already that of site {other!r}",
                f"remove {folder / ALLOWED / other}.pub first, if that site is to go",
            )
    return _public(folder / ALLOWED / f"{name}.pub", _openssh(public, name))


def allowed(folder: Path) -> dict[str, ec.EllipticCurvePublicKey]:
    """The allowed sites' public keys by name."""
    return {file.stem: read_public(file) for file in sorted((folder / ALLOWED).glob("*.pub"))}


# -- a site


def site_init(
    folder: Path,
    name: str,
    address: str,
    *,
    ca: Path | None = None,
    train: str = "train.csv",
    columns: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
    rank: int | None = None,
) -> list[Path]:
    """Makes a site's key pair and its commented ``site.toml``; copies the server's ``ca.pem`` where it is given.

    Returns the files written. Raises UserError rather than overwrite a key or a ``site.toml``.
    """
    settings.require_name(name)
    columns = columns or {"text": "text", "label": "label"}
    text = settings.template(name, address, train, columns, labels=labels, rank=rank)
    settings.parse_text(text, settings.FILE)
    for file in (SITE_KEY, settings.FILE):
        _absent(folder / file, "use another folder, or remove it first")
    if ca is not None:
        read_certificate(ca)
    folder.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    written = [_secret(folder / SITE_KEY, private), _public(folder / SITE_PUBLIC, _openssh(key.public_key(), name))]
    if ca is not None and ca.resolve() != (folder / CA).resolve():
        shutil.copyfile(ca, folder / CA)
        written.append(folder / CA)
    (folder / settings.FILE).write_text(text)
    return [*written, folder / settings.FILE]


# -- reading


def read_certificate(path: Path) -> x509.Certificate:
    """A certificate in PEM; UserError for anything else."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", "copy ca.pem from the server's folder") from None
    except ValueError:
        raise UserError(f"{path}: no certificate", "copy ca.pem from the server's folder anew") from None


def read_public(path: Path) -> ec.EllipticCurvePublicKey:
    """A site's public key (OpenSSH, ECDSA P-384); UserError for anything else."""
    remedy = "give the site.pub that `fedlora site init` made (never site.key)"
    try:
        key = serialization.load_ssh_public_key(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", remedy) from None
    except (ValueError, UnsupportedAlgorithm):
        raise UserError(f"{path}: no public key", remedy) from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise UserError(f"{path}: not an ECDSA P-384 key", remedy)
    return key


def private_problem(path: Path) -> str | None:
    """Why a site's private key will not do, or None."""
    try:
        content = path.read_bytes()
    except OSError as error:
        return f"{path}: {error.strerror}"
    if path.stat().st_mode & 0o077:
        return f"{path} can be read by others: chmod 600 {path}"
    try:
        serialization.load_ssh_private_key(content, password=None)
    except (ValueError, UnsupportedAlgorithm):
        return f"{path}: no private key in OpenSSH's format"
    return None


def certificate_problem(certificate: x509.Certificate, authority: x509.Certificate | None = None) -> str | None:
    """Why a certificate is not valid now, or None."""
    now = datetime.datetime.now(datetime.UTC)
    if now < certificate.not_valid_before_utc:
        return f"not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
    if now > certificate.not_valid_after_utc:
        return f"expired on {certificate.not_valid_after_utc:%Y-%m-%d}"
    if authority is not None:
        try:
            certificate.verify_directly_issued_by(authority)
        except (ValueError, TypeError, InvalidSignature):
            return "another authority has signed it"
    return None


# -- files


def _private(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError):
        raise UserError(f"{path}: no private key", "make a new authority: fedlora server init") from None
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def _openssh(key: ec.EllipticCurvePublicKey, name: str) -> bytes:
    form = serialization.PublicFormat.OpenSSH
    return key.public_bytes(serialization.Encoding.OpenSSH, form) + f" {name}\n".encode()


def _certificate_pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _absent(path: Path, remedy: str) -> None:
    if path.exists():
        raise UserError(f"{path} exists already", remedy)


def _secret(path: Path, content: bytes) -> Path:
    """A file that only its owner may read, from its first byte on."""
    path.unlink(missing_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as out:
        out.write(content)
    return path


def _public(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    path.chmod(0o644)
    return path
