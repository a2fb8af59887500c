"""How checkpoints are named and shown: no credential in sight."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamload.uris import scheme_of, scrub, scrub_uri

_SECRET = "wJalrXUtnFEMI/K7MDENG"


@pytest.mark.parametrize(
    ("uri", "scheme"),
    [
        ("s3://bucket/prefix", "s3"),
        ("S3://bucket", "s3"),
        ("file:///models", "file"),
        ("/models/llama", "file"),
        ("llama", "file"),
        ("C:/models", "file"),
        ("hub://org/name", "hub"),
        ("", "file"),
    ],
)
def test_scheme_of(uri: str, scheme: str) -> None:
    assert scheme_of(uri) == scheme


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("/models/llama", "/models/llama"),
        ("/models/a@b?c=d", "/models/a@b?c=d"),
        ("s3://bucket/prefix", "s3://bucket/prefix"),
        ("s3://bucket", "s3://bucket"),
        ("memory://", "memory://"),
        ("file:///models/llama", "file:///models/llama"),
        ("hub:///name", "hub:///name"),
        ("https://user:secret@host:8080/path", "https://host:8080/path"),
        ("https://us@er:sec@ret@host/path", "https://host/path"),
        (f"s3://user:{_SECRET}@models/llama", "s3://models/llama"),
        (f"http://user:{_SECRET}@127.0.0.1:1", "http://127.0.0.1:1"),
        ("http://user:hun@ter2#x@host", "http://host"),
        ("http://host:8080/a@b", "http://host:8080/a@b"),
        (
            "s3://arn:aws:s3:us-east-1:123456789012:accesspoint/name/a@b",
            "s3://arn:aws:s3:us-east-1:123456789012:accesspoint/name/a@b",
        ),
        ("s3://AKIAIOSFODNN7EXAMPLE/llama", "s3://***/llama"),
        ("s3://bucket/key?versionId=abc", "s3://bucket/key?versionId=abc"),
        ("s3://bucket/prefix?requestPayer=requester", "s3://bucket/prefix?requestPayer=requester"),
        ("https://host/key?X-Amz-Signature=abc&versionId=v1", "https://host/key?X-Amz-Signature=***&versionId=v1"),
        ("https://host/key?token", "https://host/key?token=***"),
        ("https://host/key#fragment", "https://host/key"),
        ("https://[bad/key?token=secret", "https://[bad/key?token=secret"),
    ],
)
def test_scrub_uri(uri: str, shown: str) -> None:
    assert scrub_uri(uri) == shown


@given(st.text())
def test_any_text_can_be_scrubbed_as_a_uri(text: str) -> None:
    assert isinstance(scrub_uri(text), str)
    assert isinstance(scrub_uri(f"s3://{text}"), str)


@given(st.text(st.characters(exclude_characters="/?#[]@\\", exclude_categories=["Cs", "Cc", "Z"]), min_size=8))
def test_a_password_is_never_shown(password: str) -> None:
    shown = scrub_uri(f"https://user:{password}@host/path")
    assert shown in ("https://host/path", "https://***@host/path")


@pytest.mark.parametrize(
    "text",
    [
        f"aws_secret_access_key = {_SECRET}",
        f"aws_secret_access_key={_SECRET}",
        f'{{"SecretAccessKey": "{_SECRET}"}}',
        f"aws_session_token: {_SECRET}",
        f'"SessionToken": "{_SECRET}"',
        f"Signature={_SECRET}",
        f"GET /key?X-Amz-Signature={_SECRET}&x=1",
        f"X-Amz-Security-Token={_SECRET}",
        f"Authorization: Bearer {_SECRET}",
        f"authorization: Basic {_SECRET}",
        f"Authorization: {_SECRET}",
        f"got Bearer {_SECRET} from there",
        f"cannot connect to http://user:{_SECRET.replace('/', '')}@proxy:3128",
        "cannot connect to http://user:wJalr@XUtn@proxy:3128",
        "AKIAIOSFODNN7EXAMPLE is not known",
        "ASIAIOSFODNN7EXAMPLE is not known",
        f"AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/x/y, Signature={_SECRET}",
    ],
)
def test_scrub_hides(text: str) -> None:
    shown = scrub(text)
    for secret in (_SECRET, _SECRET.replace("/", ""), "wJalr", "XUtn", "IOSFODNN7EXAMPLE"):
        assert secret not in shown
    assert "***" in shown


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nothing to hide",
        "the tensor model.layers.0.attn.weight has 3 bytes",
        "s3://bucket/key has ETag abc",
        "somebody@example.org",
        "/models/llama: No such file or directory (ENOENT)",
    ],
)
def test_scrub_leaves_the_rest(text: str) -> None:
    assert scrub(text) == text


def test_what_is_around_a_secret_stays() -> None:
    text = f"to http://user:{_SECRET.replace('/', '')}@proxy:3128: refused"
    assert scrub(text) == "to http://***@proxy:3128: refused"
