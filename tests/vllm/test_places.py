"""Where a model's weights are, by what vLLM and the user say."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import streamload
from streamload.errors import NotFoundError, OptionError
from streamload.loader import open_stream
from streamload.vllm.config import ExtraConfig
from streamload.vllm.places import Place, keep, place_of, secondary_place
from tests.checkpoints import raw_checkpoint
from tests.hubserver import Hub
from tests.servers import S3Bucket

_LOAD = SimpleNamespace(download_dir=None, ignore_patterns=["original/**/*"])


def model(name: str, revision: str | None = None, weights: str = "") -> Any:
    """What vLLM knows of one."""
    return SimpleNamespace(model=name, revision=revision, model_weights=weights)


def place(config: dict[str, Any], model: Any, *, given_uri: bool = True) -> Place:
    return place_of(ExtraConfig.parse(config), _LOAD, model, given_uri=given_uri, ranks=1)


def names(found: Place) -> list[str]:
    """The tensors that are read from there."""
    read: list[str] = []
    for uri in found.uris():
        with open_stream(uri, found.options_with(order="file")) as stream:
            read += [found.prefix + name for name, _ in stream]
    return read


def one(name: str) -> bytes:
    """A file with one tensor."""
    return raw_checkpoint({name: ("F32", (2,))})


def test_who_says_where(tmp_path: Path) -> None:
    pulled = model(str(tmp_path), weights="s3://models/llama")
    assert place({}, model(str(tmp_path))).uri == str(tmp_path)
    assert place({}, pulled).uri == "s3://models/llama"
    assert place({"uri": "gs://models/llama"}, pulled).uri == "gs://models/llama"
    # A draft model, or one that is put in the place of the first.
    other = place({"uri": "runai+s3://models/llama", "source": "runai"}, model(str(tmp_path)), given_uri=False)
    assert (other.uri, "source" in other.arguments) == (str(tmp_path), False)
    assert place({}, model("/no/such/folder", "v1")).uri == "/no/such/folder"


def test_a_models_id_is_read_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    files: dict[str, bytes | None] = {f"{name}.safetensors": one(name) for name in ("model", "head", "ignored")}
    hub.repositories["org/model"].commit(files)
    load = SimpleNamespace(download_dir=str(tmp_path / "cache"), ignore_patterns=["ignored*"])
    primary = place_of(ExtraConfig.parse({"cache": True}), load, model("org/model", "main"), given_uri=True, ranks=1)
    assert primary.uri == "hf://org/model"
    assert sorted(names(primary)) == ["head", "model"]
    assert (tmp_path / "cache").is_dir()
    source = SimpleNamespace(
        model_or_path="org/model", revision="main", subfolder=None, prefix="x.", allow_patterns_overrides=["he*"]
    )
    assert names(secondary_place(source, primary, load, model("org/model", "main"))) == ["x.head"]


def test_files_of_ones_own_choice(s3_bucket: S3Bucket, tmp_path: Path) -> None:
    for name in ("b", "a", "z"):
        s3_bucket.put(f"m/{name}.safetensors", one(name))
        (tmp_path / f"{name}.safetensors").write_bytes(one(name))
    s3_bucket.put("m/a.pt", b"")
    for where in (f"{s3_bucket.uri}/m", str(tmp_path)):
        chosen = {"uri": where, "files": ["z*", "[ab].safetensors"]}
        assert names(place(chosen, model(str(tmp_path)))) == ["z", "a", "b"]
        with pytest.raises(NotFoundError, match=r"no file matches y\*"):
            place(chosen | {"files": "y*"}, model(str(tmp_path))).uris()
        only_first = Place(where, {}, ("y*", "a.*s", "b*"), first=True)
        assert names(only_first) == ["a"]
    with pytest.raises(OptionError, match=r"a\.pt is wanted, and streamload reads safetensors only"):
        Place(f"{s3_bucket.uri}/m", {}, ("a.pt",)).uris()


def test_what_is_unwanted_is_left_out_unless_it_is_all(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(one(name))
    catalog = streamload.inspect(tmp_path).plan.catalog
    assert [file.key for file in keep(catalog, lambda name: name == "a").files] == ["b.safetensors"]
    assert keep(catalog, lambda name: True) == catalog
