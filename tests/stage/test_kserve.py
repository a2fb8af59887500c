"""What KServe tells its storage initializer."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

import streamload
from streamload.sources.s3_settings import S3Settings
from streamload.stage.kserve import s3_settings
from tests.servers import S3Bucket
from tests.stage.models import same, source_of

_SECRET = {"type": "s3", "access_key_id": "id", "secret_access_key": "secret", "endpoint_url": "http://store:9000"}


@pytest.mark.parametrize(
    ("environment", "settings"),
    [
        ({}, S3Settings()),
        ({"STORAGE_CONFIG": "{}", "S3_VERIFY_SSL": ""}, S3Settings()),
        (
            {"STORAGE_CONFIG": json.dumps(_SECRET | {"region": "eu", "ca_bundle": "/ca.pem", "bucket": "models"})},
            S3Settings(
                access_key_id="id",
                secret_access_key="secret",
                endpoint_url="http://store:9000",
                region="eu",
                ca_bundle="/ca.pem",
            ),
        ),
        # What a service says beside its secret counts more, and both count more than the variables.
        (
            {
                "STORAGE_CONFIG": json.dumps({"type": "s3", "region": "eu", "verify_ssl": "0", "anonymous": "true"}),
                "STORAGE_OVERRIDE_CONFIG": json.dumps({"region": "us", "anonymous": "False"}),
                "S3_VERIFY_SSL": "1",
            },
            S3Settings(region="us", verify_tls=False),
        ),
        # Another kind of store.
        ({"STORAGE_CONFIG": json.dumps(_SECRET | {"type": "hdfs"})}, S3Settings()),
        (
            {"S3_VERIFY_SSL": "False", "awsAnonymousCredential": "True", "S3_USER_VIRTUAL_BUCKET": "true"},
            S3Settings(verify_tls=False, anonymous=True, virtual=True),
        ),
        ({"S3_VERIFY_SSL": "yes", "awsAnonymousCredential": "maybe"}, S3Settings()),
        (
            {"CA_BUNDLE_CONFIGMAP_NAME": "bundle", "CA_BUNDLE_VOLUME_MOUNT_POINT": "/etc/ssl/custom/"},
            S3Settings(ca_bundle="/etc/ssl/custom/cabundle.crt"),
        ),
        (
            {
                "CA_BUNDLE_CONFIGMAP_NAME": "bundle",
                "CA_BUNDLE_VOLUME_MOUNT_POINT": "/etc/ssl/custom",
                "AWS_CA_BUNDLE": "/ca.pem",
            },
            S3Settings(),
        ),
    ],
)
def test_what_it_means(environment: dict[str, str], settings: S3Settings) -> None:
    assert s3_settings(environment) == settings


@pytest.mark.parametrize("text", ["type: s3, secret", "[]", '"s3"'])
def test_another_programs_variable(text: str, caplog: pytest.LogCaptureFixture) -> None:
    assert s3_settings({"STORAGE_CONFIG": text}) == S3Settings()
    assert "STORAGE_CONFIG is no JSON object" in caplog.text
    assert "secret" not in caplog.text


def test_an_unverified_certificate_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        s3_settings({"S3_VERIFY_SSL": "0"})
    assert "certificate is not verified" in caplog.text


def test_staged_with_what_it_tells(s3_bucket: S3Bucket, clean_aws_env: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", pieces=2)
    for path in source.iterdir():
        s3_bucket.put(f"m/{path.name}", path.read_bytes())
    server = s3_bucket.server
    config = _SECRET | {"access_key_id": server.access_key, "endpoint_url": server.endpoint, "region": server.region}
    clean_aws_env.setenv("STORAGE_CONFIG", json.dumps(config))
    clean_aws_env.setenv("STORAGE_OVERRIDE_CONFIG", json.dumps({"secret_access_key": server.secret_key}))
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_DEFAULT_REGION"):
        clean_aws_env.delenv(name)
    streamload.stage_checkpoint(f"{s3_bucket.uri}/m", tmp_path / "folder")
    assert same(source, tmp_path / "folder")
