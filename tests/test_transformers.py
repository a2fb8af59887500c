"""Models of transformers: what from_pretrained makes here is what it makes by itself."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from aiohttp import web
from safetensors.torch import load_file, save_file
from transformers import core_model_loading

import streamload
from streamload.asking import AskedLoad
from streamload.errors import AccessError, CheckpointError, MismatchError, NotFoundError, OptionError, StreamloadError
from streamload.events import Event
from streamload.options import Options
from streamload.sources.local import LocalSource
from streamload.testing import FaultSource
from streamload.transformers import _resolve, from_pretrained
from tests.httpserver import FileServer, run_server
from tests.ranks_of_transformers import run_two_ranks
from tests.servers import S3Bucket

AUTO: Any = transformers.AutoModelForCausalLM
MIB = 1 << 20

COMMON = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 11,  # so that the files' order is not that of the layers
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "mixtral": {"num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    "phi3": {"num_hidden_layers": 2},  # what is fused in its files is cut in two places
}
# Of a load from a folder without an index: the listing, the header, two files looked at and read, and the checksum
# that is asked for and not kept.
BEFORE_DATA = 7


def write_model(folder: Path, kind: str, **more: Any) -> Path:
    torch.manual_seed(5)
    config = transformers.CONFIG_MAPPING[kind](**{**COMMON, **KINDS[kind], **more})
    model = AUTO.from_config(config)
    # Something that is in no config.
    model.generation_config.repetition_penalty = 1.25
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with a tiny random model of a kind."""
    made: dict[str, Path] = {}
    root = tmp_path_factory.mktemp("models")

    def model(kind: str) -> Path:
        if kind not in made:
            made[kind] = write_model(root / kind, kind)
        return made[kind]

    return model


def assert_same(ours: Any, theirs: Any) -> None:
    assert type(ours) is type(theirs)
    found, expected = ours.state_dict(), theirs.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert not ours.training
    assert ours.config.to_dict() | {"_name_or_path": None} == theirs.config.to_dict() | {"_name_or_path": None}
    if theirs.can_generate():
        assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()


def spoiled(monkeypatch: pytest.MonkeyPatch, **fault: Any) -> list[FaultSource]:
    """Have the next loads from disks go wrong."""
    made: list[FaultSource] = []

    def open_source(uri: str, **_: object) -> FaultSource:
        made.append(FaultSource(LocalSource(uri), **fault))
        return made[-1]

    monkeypatch.setattr("streamload.planning.open_source", open_source)
    return made


def no_thread_is_left() -> bool:
    # Those of transformers' own pool are told to end, and not waited for.
    for thread in threading.enumerate():
        if thread.name.startswith("ThreadPool"):
            thread.join()
    return not [thread for thread in threading.enumerate() if thread.name.startswith("streamload")]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_parameter_is_what_transformers_loads(models: Callable[[str], Path], kind: str) -> None:
    folder = models(kind)
    reports: list[streamload.Report] = []
    ours = from_pretrained(AUTO, folder, on_report=reports.append)
    assert_same(ours, AUTO.from_pretrained(folder))
    assert ours.name_or_path == ours.config.name_or_path == str(folder)
    tied = ours.get_input_embeddings().weight is ours.get_output_embeddings().weight
    assert tied == (kind == "qwen2")
    (report,) = reports
    assert (report.state, report.tensors) == ("done", report.total_tensors)
    assert no_thread_is_left()


def test_from_s3_each_byte_is_asked_for_once(models: Callable[[str], Path], s3_bucket: S3Bucket) -> None:
    for file in models("llama").iterdir():
        s3_bucket.put(f"llama/{file.name}", file.read_bytes())
    events: list[Event] = []
    reports: list[streamload.Report] = []
    uri = f"{s3_bucket.uri}/llama"
    ours = from_pretrained(AUTO, uri, on_event=events.append, on_report=reports.append, concurrency=4)
    assert_same(ours, AUTO.from_pretrained(models("llama")))
    (report,) = reports
    (size,) = (file.stat().st_size for file in models("llama").glob("*.safetensors"))
    reads = sorted((event.start, event.end) for event in events if event.kind == "read")
    data = sum(parameter.nbytes for parameter in ours.parameters())
    assert [end for _, end in reads] == [*(start for start, _ in reads[1:]), size]
    assert sum(report.verified.values()) == report.nbytes == data
    assert report.fetched_bytes - report.header_bytes == data
    with streamload.stream(uri, concurrency=4) as stream:
        list(stream)
    # The config and the generation config: each is looked at, and read.
    assert report.requests - report.reads == stream.report.requests - stream.report.reads + 4


def test_of_another_head_only_what_it_has_is_read(models: Callable[[str], Path]) -> None:
    reports: list[streamload.Report] = []
    automatic: Any = transformers.AutoModel
    # One that goes into the config, and one that does not.
    more = {"use_cache": False, "attn_implementation": "eager"}
    ours = from_pretrained(automatic, models("llama"), on_report=reports.append, dtype="float32", model_kwargs=more)
    theirs = automatic.from_pretrained(models("llama"), dtype=torch.float32, **more)
    assert ours.config._attn_implementation == theirs.config._attn_implementation == "eager"
    assert_same(ours, theirs)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    names = streamload.load(models("llama")).keys()
    assert reports[0].tensors == len(names) - 1
    assert "lm_head.weight" in names


def test_little_memory_and_another_order_of_asking(models: Callable[[str], Path], tmp_path: Path) -> None:
    """What transformers puts together of a layer's experts is more than the limit, and asked for in parts."""
    folder = write_model(tmp_path / "experts", "mixtral", intermediate_size=1024, num_local_experts=8)
    reports: list[streamload.Report] = []
    ours = from_pretrained(AUTO, folder, memory_bytes=MIB, on_report=reports.append)
    assert_same(ours, AUTO.from_pretrained(folder))
    assert 0 < reports[0].peak_staged_bytes <= MIB
    assert reports[0].nbytes > 10 * MIB


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_what_was_not_foreseen_is_read_when_it_is_asked_for(
    models: Callable[[str], Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if transformers had changed where it is listened to: its own threads ask then, several at once."""
    from_pretrained(AUTO, models("llama"))
    spawn: Any = core_model_loading.spawn_materialize
    monkeypatch.setattr(core_model_loading, "spawn_materialize", spawn.__wrapped__)
    monkeypatch.setattr("streamload.transformers._foresee_in_transformers", lambda: None)
    reports: list[streamload.Report] = []
    ours = from_pretrained(AUTO, models(kind), on_report=reports.append)
    assert_same(ours, AUTO.from_pretrained(models(kind)))
    assert reports[0].reads == reports[0].tensors == reports[0].total_tensors
    spoiled(monkeypatch, fail_at=BEFORE_DATA + 3, times=None, error=lambda: AccessError("spoiled"))
    with pytest.raises(AccessError, match="spoiled"):
        from_pretrained(AUTO, models(kind))
    assert no_thread_is_left()


def test_a_quantized_checkpoint(models: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "fp8"
    shutil.copytree(models("llama"), folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in list(tensors.items()):
        if name.endswith("_proj.weight"):
            rows, columns = tensor.shape
            blocks = tensor.float().view(rows // 64, 64, columns // 64, 64)
            scales = blocks.abs().amax((1, 3)) / 448
            tensors[name] = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn).view(rows, columns)
            tensors[f"{name}_scale_inv"] = scales
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [64, 64]}
    (folder / "config.json").write_text(json.dumps(config))
    assert_same(from_pretrained(AUTO, folder), AUTO.from_pretrained(folder))
    config["quantization_config"] = {"quant_method": "torchao", "quant_type": "Int8WeightOnlyConfig"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="torchao has quantized are loaded by transformers from its own files"):
        from_pretrained(AUTO, folder)


def test_without_files_of_configs(models: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copy(models("llama") / "model.safetensors", tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json.*there is none beside the weights"):
        from_pretrained(AUTO, tmp_path)
    config = transformers.AutoConfig.from_pretrained(models("llama"))
    ours = from_pretrained(AUTO, tmp_path, model_kwargs={"config": config})
    shutil.copy(models("llama") / "config.json", tmp_path)
    assert_same(from_pretrained(AUTO, tmp_path), AUTO.from_pretrained(tmp_path))
    assert_same(from_pretrained(type(ours), tmp_path), AUTO.from_pretrained(tmp_path))
    for text, model_class, problem in (
        ("{", AUTO, "config.json: it is not valid JSON"),
        ("[]", AUTO, "config.json: it is no JSON object"),
        ('"llama"', type(ours), "config.json: it is no JSON object"),
        ('{"model_type": "nobody"}', AUTO, "config.json: .*has no model of type 'nobody'"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=problem):
            from_pretrained(model_class, tmp_path)
    assert no_thread_is_left()


def test_each_config_comes_from_its_file_unless_it_is_given(models: Callable[[str], Path]) -> None:
    folder = models("llama")
    generation_config: Any = transformers.GenerationConfig
    for given in (
        {"config": transformers.AutoConfig.from_pretrained(folder)},
        {"config": None},
        {"generation_config": generation_config(top_k=7)},
        {"generation_config": None},
    ):
        ours = from_pretrained(AUTO, folder, model_kwargs=given)
        assert_same(ours, AUTO.from_pretrained(folder, **given))
        assert (ours.generation_config.repetition_penalty == 1.25) == (given.get("generation_config") is None)


def test_a_generation_config_that_is_none(
    models: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(models("llama"), tmp_path, dirs_exist_ok=True)
    for content in (b"{", b"\xff{}"):
        (tmp_path / "generation_config.json").write_bytes(content)
        caplog.clear()
        assert_same(from_pretrained(AUTO, tmp_path), AUTO.from_pretrained(tmp_path))
        (told,) = (record.getMessage() for record in caplog.records if record.name == "streamload.transformers")
        one_line(told, str(tmp_path), "generation_config.json counts as not there: it is not valid JSON")
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"generation_config\.json: it is no JSON object"):
        from_pretrained(AUTO, tmp_path)


def test_where_the_generation_config_is_refused_it_counts_as_not_there(
    models: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    refused = {"/llama/generation_config.json": 403}

    async def refuse(request: web.Request) -> web.StreamResponse | None:
        return web.Response(status=refused[request.path]) if request.path in refused else None

    with run_server(FileServer(instead=refuse)) as server:
        for file in models("llama").iterdir():
            server.put(f"/llama/{file.name}", file.read_bytes())
        ours = from_pretrained(AUTO, f"{server.origin}/llama?sig=secret")
        assert_same(ours, AUTO.from_pretrained(models("llama"), generation_config=ours.generation_config))
        assert ours.generation_config.repetition_penalty != 1.25
        (told,) = (record.getMessage() for record in caplog.records if record.name == "streamload.sources")
        one_line(told, server.origin, "generation_config.json counts as not there: access is refused")
        assert "secret" not in told
        # Credentials that are not taken, and a file that is needed.
        for name, status in (("generation_config.json", 401), ("config.json", 403)):
            refused.clear()
            refused[f"/llama/{name}"] = status
            with pytest.raises(AccessError) as raised:
                from_pretrained(AUTO, f"{server.origin}/llama")
            one_line(raised.value, name, str(status))


def one_line(error: BaseException | str, *parts: str) -> None:
    assert "\n" not in str(error)
    for part in parts:
        assert part in str(error)


def test_tensors_that_are_missing_or_of_another_shape(models: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(models("mixtral"), tmp_path, dirs_exist_ok=True)
    whole = load_file(tmp_path / "model.safetensors")

    def save(tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})

    save({name: tensor for name, tensor in whole.items() if name != "model.norm.weight"})
    with pytest.raises(MismatchError) as raised:
        from_pretrained(AUTO, tmp_path)
    one_line(raised.value, str(tmp_path), "lacks 1 of the model's tensors: ['model.norm.weight']")
    assert raised.value.missing == ("model.norm.weight",)
    assert from_pretrained(AUTO, tmp_path, allow_missing=True).model.norm.weight.eq(1).all()

    save(whole | {"model.norm.weight": torch.ones(64, dtype=torch.bfloat16)})
    with pytest.raises(MismatchError) as raised:
        from_pretrained(AUTO, tmp_path)
    one_line(raised.value, str(tmp_path), "'model.norm.weight' has the shape [128], the checkpoint's is [64]")

    save({name: tensor for name, tensor in whole.items() if ".0.block_sparse_moe.experts.3.w2" not in name})
    with pytest.raises(MismatchError) as raised:
        from_pretrained(AUTO, tmp_path)
    one_line(raised.value, str(tmp_path), "layers.0.mlp.experts.down_proj", "[3, 128, 256]")
    assert no_thread_is_left()


def test_errors_of_the_source(
    models: Callable[[str], Path], tmp_path: Path, s3_bucket: S3Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NotFoundError) as not_found:
        from_pretrained(AUTO, f"{s3_bucket.uri}-not-there/llama")
    one_line(not_found.value, f"{s3_bucket.uri}-not-there/llama")
    shutil.copytree(models("llama"), tmp_path, dirs_exist_ok=True)
    os.truncate(tmp_path / "model.safetensors", 100_000)
    with pytest.raises(CheckpointError) as truncated:
        from_pretrained(AUTO, tmp_path)
    one_line(truncated.value, str(tmp_path), "model.safetensors")
    spoiled(monkeypatch, fail_at=BEFORE_DATA + 2, times=None, error=lambda: AccessError("spoiled"))
    with pytest.raises(AccessError) as refused:
        from_pretrained(AUTO, models("llama"), read_bytes=64 << 10)
    one_line(refused.value, str(models("llama")), "model.safetensors", "bytes ", "spoiled")
    assert no_thread_is_left()


def test_an_interrupt_ends_everything(models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    made = spoiled(monkeypatch, fail_at=BEFORE_DATA + 1, block=True)
    main = threading.get_ident()

    waiting = threading.Event()
    receive = AskedLoad._receive

    def telling(self: AskedLoad) -> bool:
        waiting.set()
        return receive(self)

    # Elsewhere the interrupt may hit a callback of the collector's, which swallows what it raises.
    monkeypatch.setattr(AskedLoad, "_receive", telling)

    def interrupt() -> None:
        made[0].blocked.result()
        waiting.wait()
        signal.pthread_kill(main, signal.SIGINT)

    def when_blocked(event: Event) -> None:
        # Events come on the engine's thread; the headers' before its source blocks.
        if event.kind == "header":
            threading.Thread(target=interrupt).start()

    with pytest.raises(KeyboardInterrupt) as raised:
        from_pretrained(AUTO, models("llama"), on_event=when_blocked)
    assert raised.value.__notes__ == [f"streamload.transformers: while {models('llama')} was loaded"]
    assert made[0].closed
    assert made[0].running == 0
    assert no_thread_is_left()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"rank": 0, "world_size": 2}, "rank is not for a model of transformers"),
        ({"tp": 0}, "tp=0 is no number of ranks"),
        ({"model_kwargs": {"device_map": "auto"}}, "'device_map': that is said by device="),
        ({"model_kwargs": {"trust_remote_code": True}}, "code that lies beside weights is never run"),
        ({"no_such": 1}, "there is no option 'no_such'"),
    ],
)
def test_options_without_meaning(models: Callable[[str], Path], options: dict[str, Any], problem: str) -> None:
    with pytest.raises(OptionError, match=problem):
        from_pretrained(AUTO, models("llama"), **options)


@pytest.mark.parametrize("said_by", ["argument", "environment"])
def test_each_rank_has_a_gpu_of_its_own(said_by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options: Options = {"device": "cuda"} if said_by == "argument" else {}
    if said_by == "environment":
        monkeypatch.setenv("STREAMLOAD_DEVICE", "cuda")
    for variable, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(variable, value)
    assert _resolve(options, distributed=True).device == "cuda:1"
    assert _resolve({"device": "cuda:2"}, distributed=True).device == "cuda:2"
    assert _resolve({"device": "cpu"}, distributed=True).device == "cpu"
    assert _resolve(options, distributed=False).device == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "one")
    with pytest.raises(OptionError, match=r"tp on device 'cuda': LOCAL_RANK='one' is not a number"):
        _resolve(options, distributed=True)
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(variable)
    with pytest.raises(OptionError, match=r"tp on device 'cuda' .* LOCAL_RANK, which is not set: torchrun sets it"):
        from_pretrained(AUTO, "nowhere", tp=2, **options)


def test_what_transformers_refuses_by_itself_names_the_uri(models: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="no_such_attention") as raised:
        from_pretrained(AUTO, models("llama"), model_kwargs={"attn_implementation": "no_such_attention"})
    assert not isinstance(raised.value, StreamloadError)
    assert str(models("llama")) in raised.value.__notes__[0]
    assert no_thread_is_left()


MEASURE = """
import gc, json, sys, warnings
from pathlib import Path
import torch, transformers
from streamload.transformers import from_pretrained

def status(field):
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024

small, large, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
from_pretrained(transformers.AutoModelForCausalLM, small)  # what is imported and allocated once
gc.collect()
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
model = from_pretrained(transformers.AutoModelForCausalLM, large, memory_bytes=limit)
gc.collect()
found = {"peak": status("VmHWM") - before, "held": status("VmRSS") - before}
found["nbytes"] = sum(parameter.nbytes for parameter in model.parameters())
print(json.dumps(found))
"""


def test_a_model_holds_little_more_than_itself(models: Callable[[str], Path], tmp_path: Path) -> None:
    large = write_model(tmp_path, "llama", hidden_size=1024, intermediate_size=2048, num_hidden_layers=4)
    program = [sys.executable, "-c", MEASURE, str(models("llama")), str(large), str(16 * MIB)]
    done = subprocess.run(program, check=True, stdout=subprocess.PIPE, text=True, timeout=600)
    found: dict[str, int] = json.loads(done.stdout)
    assert found["nbytes"] > 70 * MIB
    assert found["held"] <= 1.25 * found["nbytes"] + 16 * MIB
    assert found["peak"] <= 1.25 * found["nbytes"] + 16 * MIB + 16 * MIB


def test_two_ranks(models: Callable[[str], Path], s3_bucket: S3Bucket, tmp_path: Path) -> None:
    """Each rank has what transformers itself gives it, and has read no more; one that fails ends the other's load."""
    for file in models("llama").iterdir():
        s3_bucket.put(f"llama/{file.name}", file.read_bytes())
    shutil.copytree(models("llama"), tmp_path / "bad")
    os.truncate(tmp_path / "bad" / "model.safetensors", 100_000)
    places = [(str(models(kind)), str(models(kind))) for kind in sorted(KINDS)]
    places.append((f"{s3_bucket.uri}/llama", str(models("llama"))))
    every, (bad, good) = run_two_ranks(places, (str(tmp_path / "bad"), str(models("llama"))))
    assert [told.uri for told in every] == [uri for uri, _ in places] * 2
    for told in every:
        assert told.differing == []
        assert 0 < len(told.sharded) < told.parameters
        # What is replicated is read by both.
        assert told.sharded_bytes * 2 == told.whole_sharded_bytes
        assert told.delivered_bytes == told.nbytes
        assert told.tensors == told.total_tensors
        share = told.delivered_bytes / told.checkpoint_bytes
        assert share < 0.6, (told.uri, share)
    one_line(bad, "bad, model.safetensors")
    one_line(good, str(models("llama")), "rank 0 failed", "model.safetensors")
