"""az://, against Azurite: our listing with Microsoft's client, the reads with Run:ai's engine."""

from __future__ import annotations

import asyncio
import ctypes
import datetime
import ipaddress
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

import streamload
from streamload.errors import AccessError, CredentialsError, NotFoundError
from streamload.sources import Source, open_source
from streamload.sources.runai import RunaiBlobSource
from streamload.testing import SourceConformance
from tests.checkpoints import read_with_safetensors, same_tensor, varied_tensors, write_sharded
from tests.cloud.emulators import AZURE_ACCOUNT, AZURE_KEY, run_azurite

pytestmark = pytest.mark.cloud

# Where the plugin looks for the authorities that it trusts, and nowhere else.
_AUTHORITIES = "/etc/ssl/certs/ca-certificates.crt"
# From sched.h and mount.h.
_CLONE_NEWNS = 0x20000
_MS_BIND, _MS_REC, _MS_PRIVATE = 0x1000, 0x4000, 0x40000


@pytest.fixture(scope="module")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    """The port, and the certificate."""
    folder = tmp_path_factory.mktemp("azurite")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    _write_certificate(certificate, key)
    _trust_nobody_but(certificate)
    with run_azurite(certificate, key) as port:
        yield port, certificate


@pytest.fixture
def container(azurite: tuple[int, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A new container, and the environment in which everybody finds it."""
    from azure.storage.blob import BlobServiceClient

    port, certificate = azurite
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    # For the plugin, which takes no address: what lies under .localhost is this machine for its HTTP client.
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", AZURE_ACCOUNT)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", AZURE_KEY)
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT_SUFFIX", f"blob.localhost:{port}")
    # For Microsoft's client, which asks the system what that name means.
    connection = (
        f"DefaultEndpointsProtocol=https;AccountName={AZURE_ACCOUNT};AccountKey={AZURE_KEY};"
        f"BlobEndpoint=https://127.0.0.1:{port}/{AZURE_ACCOUNT};"
    )
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection)
    with BlobServiceClient.from_connection_string(connection) as client:
        yield client.create_container(f"container-{uuid.uuid4().hex}")


class TestAz(SourceConformance):
    @pytest.fixture(autouse=True)
    def _store(self, container: Any) -> None:
        self.container = container

    def open(self) -> Source:
        source = open_source(f"az://{self.container.container_name}/models/llama 3/")
        assert isinstance(source, RunaiBlobSource)
        source._small_view_bytes = 1000
        return source

    def put(self, key: str, content: bytes) -> None:
        self.container.upload_blob(f"models/llama 3/{key}", content, overwrite=True)

    def remove(self, key: str) -> None:
        self.container.delete_blob(f"models/llama 3/{key}")


def test_a_load(container: Any, tmp_path: Path) -> None:
    folder = write_sharded(tmp_path / "model", varied_tensors())
    for file in folder.iterdir():
        container.upload_blob(f"llama/{file.name}", file.read_bytes())
    with streamload.stream(f"az://{container.container_name}/llama", read_bytes=1 << 20) as stream:
        found = dict(stream)
    expected = read_with_safetensors(folder)
    assert found.keys() == expected.keys()
    assert all(same_tensor(found[name], expected[name]) for name in expected)
    assert stream.report.paths["by Run:ai's engine"] > 0


def test_a_container_that_is_not_there(container: Any) -> None:
    with pytest.raises(NotFoundError, match="the store answered 404 ContainerNotFound"):
        streamload.inspect(f"az://{container.container_name}-not/llama")


def test_a_key_that_is_not_accepted(container: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    connection = os.environ["AZURE_STORAGE_CONNECTION_STRING"].replace(AZURE_KEY, AZURE_KEY.swapcase())
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection)
    with pytest.raises(AccessError, match="the store answered 403") as raised:
        streamload.inspect(f"az://{container.container_name}/llama")
    assert AZURE_KEY.swapcase() not in str(raised.value)


def test_no_account(container: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CONNECTION_STRING", "ACCOUNT_NAME", "ACCOUNT_KEY", "ENDPOINT_SUFFIX"):
        monkeypatch.delenv(f"AZURE_STORAGE_{name}")

    async def scenario() -> None:
        async with open_source(f"az://{container.container_name}/llama") as source:
            with pytest.raises(CredentialsError, match="set AZURE_STORAGE_ACCOUNT_NAME"):
                await source.list()

    asyncio.run(scenario())


def _trust_nobody_but(certificate: Path) -> None:
    """Lay a certificate over the system's list, for this thread and what it starts from now on."""
    libc = ctypes.CDLL(None, use_errno=True)
    for failed in (
        libc.unshare(_CLONE_NEWNS),
        libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None),
        libc.mount(str(certificate).encode(), _AUTHORITIES.encode(), None, _MS_BIND, None),
    ):
        if failed:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), _AUTHORITIES)


def _write_certificate(certificate: Path, key: Path) -> None:
    """A certificate for this machine, signed by itself, and its key."""
    now = datetime.datetime.now(datetime.UTC)
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "azurite")])
    names = [
        x509.DNSName(f"{AZURE_ACCOUNT}.blob.localhost"),
        x509.IPAddress(ipaddress.IPv4Address("127.0.0.1")),
    ]
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(private, hashes.SHA256())
    )
    certificate.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    key.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
