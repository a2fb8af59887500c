"""What bad input gets: one readable line that names where and why, and exit code 1."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from streamload.testing.s3server import S3Server
from tests.checkpoint.files import entry, file_of
from tests.cli.models import FIRST, INDEX, SECOND, shard, write_index
from tests.cli.programs import Outcome, Program
from tests.servers import S3Bucket


def _refused(found: Outcome, *named: object) -> None:
    assert (found.code, found.out) == (1, "")
    for each in named:
        assert str(each) in found.error


class TestPlaces:
    def test_nothing_there(self, cli: Program, tmp_path: Path) -> None:
        _refused(cli("inspect", tmp_path / "nothing"), tmp_path / "nothing", "No such file or directory")

    def test_a_file_that_is_not_there(self, cli: Program, tmp_path: Path) -> None:
        _refused(cli("inspect", tmp_path / "a.safetensors"), "a.safetensors", "No such file or directory")

    def test_below_a_file(self, cli: Program, model: Path) -> None:
        _refused(cli("inspect", model / FIRST / "deeper"), "Not a directory")

    def test_an_empty_directory(self, cli: Program, tmp_path: Path) -> None:
        _refused(cli("inspect", tmp_path), tmp_path, "no files")

    def test_a_directory_of_something_else(self, cli: Program, tmp_path: Path) -> None:
        (tmp_path / "pytorch_model.bin").write_bytes(b"pickled")
        _refused(cli("inspect", tmp_path), tmp_path, "no file ends in .safetensors", "pytorch_model.bin")

    def test_neither_directory_nor_file(self, cli: Program) -> None:
        _refused(cli("inspect", "/dev/null"), "/dev/null", "neither a folder nor a regular file")

    def test_a_name_with_lines_in_it(self, cli: Program, tmp_path: Path) -> None:
        _refused(cli("inspect", tmp_path / "two\nlines\x1b[2J"), r"two\nlines\x1b[2J")


class TestIndex:
    def test_names_a_file_that_is_not_there(self, cli: Program, model: Path) -> None:
        (model / SECOND).unlink()
        _refused(cli("inspect", model), model, INDEX, SECOND)

    def test_names_a_tensor_that_is_not_there(self, cli: Program, model: Path) -> None:
        write_index(model, {"model.norm.weight": FIRST, "model.missing": FIRST})
        _refused(cli("inspect", model), model, INDEX, "model.missing")

    def test_names_the_wrong_file(self, cli: Program, model: Path) -> None:
        write_index(model, {"model.norm.weight": SECOND, "model.embed.weight": FIRST})
        _refused(cli("inspect", model), INDEX, "model.norm.weight", FIRST, SECOND)

    @pytest.mark.parametrize("path", ["../model.safetensors", "/etc/model.safetensors", "a/../../b.safetensors"])
    def test_names_a_path_that_leads_away(self, cli: Program, model: Path, path: str) -> None:
        write_index(model, {"model.norm.weight": path})
        _refused(cli("inspect", model), model, INDEX, path)

    def test_is_no_json(self, cli: Program, model: Path) -> None:
        (model / INDEX).write_text("{")
        _refused(cli("inspect", model), model, INDEX)


def _cut(content: bytes) -> bytes:
    return content[:-1]


def _extended(content: bytes) -> bytes:
    return content + b"\x00"


def _header(header: object, body: bytes = b"") -> Callable[[bytes], bytes]:
    return lambda _: file_of(json.dumps(header), body)


def _raw(content: bytes) -> Callable[[bytes], bytes]:
    return lambda _: content


_DUPLICATE = '{"a": %s, "a": %s}' % ((json.dumps(entry("U8", [1], 0, 1)),) * 2)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        pytest.param(_cut, "cut short", id="truncated"),
        pytest.param(_extended, "too long", id="over-long"),
        pytest.param(_raw(b""), "0 bytes", id="empty"),
        pytest.param(_raw(b"1234567"), "7 bytes", id="seven bytes"),
        pytest.param(_raw(file_of("{}", length=1 << 63)), "the header claims 9223372036854775808", id="2^63"),
        pytest.param(
            _raw((100).to_bytes(8, "little") + b"{}"), "the header claims 100 bytes", id="header past the end"
        ),
        pytest.param(_raw(file_of("[" * (1 << 20))), "the header", id="nesting"),
        pytest.param(_raw(file_of(b'{"\xff": 1}')), "the header", id="not UTF-8"),
        pytest.param(_raw(file_of("not JSON")), "the header", id="not JSON"),
        pytest.param(_raw(file_of(_DUPLICATE, b"1")), "'a' stands more than once", id="duplicate"),
        pytest.param(_header({"a": entry("U8", [1], 1, 2)}, b"12"), "no tensor owns", id="hole"),
        pytest.param(
            _header({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}, b"123"), "overlaps", id="overlap"
        ),
        pytest.param(_header({"a": entry("F32", [2], 0, 4)}, b"1234"), "should have 8 bytes", id="wrong size"),
        pytest.param(_header({"a": entry("F99", [2], 0, 4)}, b"1234"), "F99", id="unknown dtype"),
    ],
)
def test_a_file_that_does_not_stand(cli: Program, model: Path, spoil: Callable[[bytes], bytes], problem: str) -> None:
    (model / SECOND).write_bytes(spoil((model / SECOND).read_bytes()))
    found = cli("inspect", model)
    _refused(found, model, SECOND, problem)
    assert "bytes 0-" in found.error


class TestS3:
    def test_no_such_bucket(self, cli: Program, aws_env: S3Server) -> None:
        _refused(cli("inspect", "s3://there-is-none/model"), "s3://there-is-none/model", "no bucket 'there-is-none'")

    def test_no_such_key(self, cli: Program, s3_bucket: S3Bucket) -> None:
        uri = f"{s3_bucket.uri}/model/a.safetensors"
        _refused(cli("inspect", uri), uri, "no such object")

    def test_nothing_under_the_prefix(self, cli: Program, s3_bucket: S3Bucket) -> None:
        _refused(cli("inspect", f"{s3_bucket.uri}/model"), f"{s3_bucket.uri}/model", "no objects under this prefix")

    def test_no_safetensors_under_the_prefix(self, cli: Program, s3_bucket: S3Bucket) -> None:
        s3_bucket.put("model/README.md", b"#")
        _refused(cli("inspect", f"{s3_bucket.uri}/model"), "no file ends in .safetensors", "README.md")

    def test_a_truncated_file(self, cli: Program, s3_bucket: S3Bucket) -> None:
        s3_bucket.put("model/a.safetensors", shard({"a": ("F32", (10,))})[:-1])
        found = cli("inspect", f"{s3_bucket.uri}/model")
        _refused(found, f"{s3_bucket.uri}/model", "a.safetensors", "bytes 0-", "cut short")

    def test_an_index_that_names_a_missing_file(self, cli: Program, s3_bucket: S3Bucket) -> None:
        s3_bucket.put(f"model/{INDEX}", json.dumps({"weight_map": {"a": "b.safetensors"}}).encode())
        _refused(cli("inspect", f"{s3_bucket.uri}/model"), INDEX, "b.safetensors")

    def test_no_credentials(self, cli: Program, s3_bucket: S3Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        _refused(cli("inspect", f"{s3_bucket.uri}/model"), s3_bucket.uri, "no AWS credentials were found")

    def test_a_secret_that_does_not_fit(
        self, cli: Program, s3_bucket: S3Bucket, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE")
        found = cli("inspect", f"{s3_bucket.uri}/model")
        _refused(found, f"{s3_bucket.uri}/model", "the server answered 403")
        assert "AKIAIOSFODNN7EXAMPLE" not in found.err

    def test_no_permission(self, cli: Program, s3_bucket: S3Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
        with s3_bucket.server.client("iam") as iam:
            iam.create_user(UserName="nobody-at-the-command-line")
            key = iam.create_access_key(UserName="nobody-at-the-command-line")["AccessKey"]
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
        _refused(cli("inspect", f"{s3_bucket.uri}/model"), f"{s3_bucket.uri}/model", "AccessDenied")
