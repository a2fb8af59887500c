"""Objects that were uploaded in parts: compared part by part, or said to be unverified, and why.

The server is real but for the answers to GetObjectAttributes: this one keeps the parts' sizes, and not their checksums.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from awscrt import checksums as crt
from safetensors.torch import save_file

import streamload
from streamload.errors import ChecksumError
from streamload.report import Report
from tests.faultproxy import Fault, Instead, Plan, run_fault_proxy
from tests.servers import S3Bucket

MIB = 1 << 20
PART_BYTES = 5 * MIB  # the least that S3 takes
NAME = "model.safetensors"


@dataclass
class Uploaded:
    """An object that was uploaded in parts."""

    bucket: S3Bucket
    parts: list[bytes]
    tag: str
    algorithm: str

    def attributes(self, *, page: int = 1000, lie: int | None = None, last: int | None = None) -> Instead:
        """Answers GetObjectAttributes as S3 does: so many parts at a time, one of them wrong, or some left out."""

        def instead(head: bytes) -> bytes | None:
            line, *fields = head.decode().split("\r\n")
            if "?attributes" not in line:
                return None
            headers = {name.lower(): value for name, value in (field.split(": ", 1) for field in fields if field)}
            after = int(headers.get("x-amz-part-number-marker", "0"))
            listed = list(enumerate(self.parts, 1))[:last]
            shown = listed[after : after + page]
            more = after + page < len(listed)
            body = f"<GetObjectAttributesResponse><ETag>{self.tag}</ETag><ObjectParts>"
            for number, part in shown:
                sums = crt.crc32c(part).to_bytes(4, "big"), hashlib.sha256(part).digest()
                value = bytearray(sums[self.algorithm == "SHA256"])
                value[0] ^= number == lie
                name, text = f"Checksum{self.algorithm}", base64.b64encode(value).decode()
                body += f"<Part><PartNumber>{number}</PartNumber><Size>{len(part)}</Size>"
                body += f"<{name}>{text}</{name}></Part>"
            body += f"<PartsCount>{len(self.parts)}</PartsCount><IsTruncated>{str(more).lower()}</IsTruncated>"
            body += f"<NextPartNumberMarker>{after + len(shown)}</NextPartNumberMarker></ObjectParts>"
            return _answer(200, body + "</GetObjectAttributesResponse>")

        return instead


def _answer(status: int, body: str) -> bytes:
    return f"HTTP/1.1 {status} Said\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file: Path = tmp_path_factory.mktemp("parts") / NAME
    generator = torch.Generator().manual_seed(3)
    save_file({f"layer.{number}": torch.randn(300_000, generator=generator) for number in range(10)}, file)
    return file.read_bytes()


@pytest.fixture
def uploaded(s3_bucket: S3Bucket, content: bytes) -> Uploaded:
    return _upload(s3_bucket, content, "CRC32C")


def _upload(s3_bucket: S3Bucket, content: bytes, algorithm: str) -> Uploaded:
    parts = [content[start : start + PART_BYTES] for start in range(0, len(content), PART_BYTES)]
    client, where = s3_bucket.client, {"Bucket": s3_bucket.name, "Key": f"m/{NAME}"}
    upload = client.create_multipart_upload(**where, ChecksumAlgorithm=algorithm)["UploadId"]
    done: list[dict[str, Any]] = []
    for number, part in enumerate(parts, 1):
        answer = client.upload_part(**where, UploadId=upload, PartNumber=number, Body=part, ChecksumAlgorithm=algorithm)
        name = f"Checksum{algorithm}"
        done.append({"PartNumber": number, "ETag": answer["ETag"], name: answer[name]})
    whole = client.complete_multipart_upload(**where, UploadId=upload, MultipartUpload={"Parts": done})
    return Uploaded(s3_bucket, parts, whole["ETag"].strip('"'), algorithm)


Load = Callable[..., Report]


@pytest.fixture
def load(uploaded: Uploaded, monkeypatch: pytest.MonkeyPatch) -> Load:
    return _loading(uploaded.bucket, monkeypatch)


def _loading(bucket: S3Bucket, monkeypatch: pytest.MonkeyPatch) -> Load:
    def load(instead: Instead, plan: Plan = lambda number, head: None, **options: Any) -> Report:
        endpoint = urlsplit(bucket.server.endpoint)
        with run_fault_proxy(str(endpoint.hostname), endpoint.port or 80, plan, instead) as proxy:
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
            with streamload.stream(f"{bucket.uri}/m", read_bytes=700_001, **options) as stream:
                assert len(dict(stream)) == 10
        return stream.report

    return load


@pytest.mark.parametrize("page", [1, 2, 1000])
def test_each_part_is_compared(uploaded: Uploaded, load: Load, page: int) -> None:
    assert len(uploaded.parts) == 3
    report = load(uploaded.attributes(page=page))
    assert report.verified == {"CRC32C of each uploaded part": report.total_bytes}
    assert report.unverified == {}


def test_a_flipped_bit_is_found_and_its_part_is_named(uploaded: Uploaded, load: Load, content: bytes) -> None:
    last = len(content) - 1
    flipped: list[bytes] = []

    def flip_last(number: int, head: bytes) -> Fault | None:
        if b"-%d\r\n" % last not in head:
            return None
        flipped.append(head)
        return Fault("flip", 10_000)

    with pytest.raises(ChecksumError, match="part 3 of 3") as caught:
        load(uploaded.attributes(), flip_last)
    assert len(flipped) == 1
    assert caught.value.object == NAME
    assert (caught.value.start, caught.value.end) == (2 * PART_BYTES, len(content))


def test_parts_of_unknown_checksums_are_not_verified(load: Load) -> None:
    """What this server itself answers."""
    report = load(lambda head: None)
    assert report.verified == {}
    (reason,) = report.unverified
    assert "the store does not tell the size and the CRC32C of every part" in reason


def test_a_refusal_is_the_reason(load: Load) -> None:
    report = load(_denied)
    (reason,) = report.unverified
    assert "s3:GetObjectAttributes" in reason


@pytest.mark.parametrize(("lie", "last", "why"), [(2, None, "do not make up"), (None, 2, "2 parts of 10485760 bytes")])
def test_a_list_of_parts_that_cannot_be_right_is_not_believed(
    uploaded: Uploaded, load: Load, lie: int | None, last: int | None, why: str
) -> None:
    report = load(uploaded.attributes(lie=lie, last=last))
    assert report.verified == {}
    (reason,) = report.unverified
    assert why in reason


# SHA-256, on request


def _flip(last: int, flipped: list[bytes]) -> Plan:
    """Spoils the answer that brings this byte."""

    def flip(number: int, head: bytes) -> Fault | None:
        if b"-%d\r\n" % last not in head:
            return None
        flipped.append(head)
        return Fault("flip", 10_000)

    return flip


@pytest.mark.parametrize("options", [{}, {"memory_bytes": 4 * MIB, "concurrency": 16}])
def test_the_sha256_of_the_whole_object(
    s3_bucket: S3Bucket, content: bytes, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    s3_bucket.client.put_object(Bucket=s3_bucket.name, Key=f"m/{NAME}", Body=content, ChecksumAlgorithm="SHA256")
    load = _loading(s3_bucket, monkeypatch)
    (reason,) = load(lambda head: None, **options).unverified
    assert "the store keeps a SHA-256 instead, which is compared with verify='sha256' only" in reason
    for verify in ("sha256", "require"):
        report = load(lambda head: None, verify=verify, **options)
        assert report.verified == {"SHA-256 of the whole object": report.total_bytes}
        assert report.unverified == {}
    flipped: list[bytes] = []
    with pytest.raises(ChecksumError, match="but that of the object is") as caught:
        load(lambda head: None, _flip(len(content) - 1, flipped), verify="sha256", **options)
    assert len(flipped) == 1
    assert (caught.value.object, caught.value.start, caught.value.end) == (NAME, 0, len(content))


def test_the_sha256_of_each_part(s3_bucket: S3Bucket, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded = _upload(s3_bucket, content, "SHA256")
    load = _loading(s3_bucket, monkeypatch)
    report = load(uploaded.attributes(page=2), verify="sha256")
    assert report.verified == {"SHA-256 of each uploaded part": report.total_bytes}
    assert report.unverified == {}
    flipped: list[bytes] = []
    with pytest.raises(ChecksumError, match="but that of part 3 of 3 is") as caught:
        load(uploaded.attributes(), _flip(len(content) - 1, flipped), verify="sha256")
    assert len(flipped) == 1
    assert (caught.value.start, caught.value.end) == (2 * PART_BYTES, len(content))
    for instead, why in (
        (uploaded.attributes(lie=2), "do not make up the object's"),
        (uploaded.attributes(last=2), "2 parts of 10485760 bytes are not"),
        (_denied, "its SHA-256 could not be had: access is refused; this needs s3:GetObjectAttributes"),
    ):
        report = load(instead, verify="sha256")
        (reason,) = report.unverified
        assert why in reason
        assert report.verified == {}


def _denied(head: bytes) -> bytes | None:
    denied = "<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
    return _answer(403, denied) if b"?attributes" in head else None
