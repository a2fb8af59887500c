"""What the loader's extra config can say; and the plugin where there is no vLLM."""

from __future__ import annotations

import logging
import subprocess
import sys
from typing import Any

import pytest

from streamload.errors import OptionError
from streamload.options import LoadOptions, default_memory_bytes
from streamload.vllm import register
from streamload.vllm.config import MODES, ExtraConfig
from streamload.vllm.places import below


def test_what_is_said_is_a_loads_option() -> None:
    given = {"uri": "s3://models/llama", "memory_bytes": "256MiB", "concurrency": 16, "verify": "require"}
    config = ExtraConfig.parse(given)
    assert (config.uri, config.mode) == ("s3://models/llama", "whole")
    assert LoadOptions(**config.arguments(1)) == LoadOptions(memory_bytes=256 << 20, concurrency=16, verify="require")


@pytest.mark.parametrize("mode", MODES)
def test_nothing_need_be_said(mode: Any) -> None:
    assert ExtraConfig.parse({}, mode=mode).mode == mode


def test_other_loads_variables_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that choose tensors; but those that say how to read do."""
    for name, value in {"INCLUDE": "model.*", "RANK": "3", "WORLD_SIZE": "8", "CONCURRENCY": "5"}.items():
        monkeypatch.setenv(f"STREAMLOAD_{name}", value)
    arguments = ExtraConfig.parse({}).arguments(1)
    assert {"include": (), "rank": None, "world_size": None}.items() <= arguments.items()
    assert "concurrency" not in arguments


def test_ranks_of_a_node_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_memory_bytes(1_000_000) < default_memory_bytes(1)
    assert ExtraConfig.parse({}).arguments(1_000_000)["memory_bytes"] == default_memory_bytes(1_000_000)
    assert ExtraConfig.parse({"memory_bytes": 1 << 30}).arguments(8)["memory_bytes"] == 1 << 30
    monkeypatch.setenv("STREAMLOAD_MEMORY_BYTES", "64MiB")
    assert "memory_bytes" not in ExtraConfig.parse({}).arguments(8)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["uri"], "model_loader_extra_config is a list, not an object of names and values"),
        ({"distributed": True}, "has no key 'distributed'; there are uri, mode, files, pattern, cast, "),
        ({"uri": 7}, "uri=7 is not a string"),
        ({"uri": ""}, "uri='' is not a string, and not empty"),
        ({"mode": "half"}, "mode='half' is not 'auto' or "),
        ({"mode": ["whole"]}, r"mode=\['whole'\] is not 'auto' or "),
        ({"memory_bytes": "lots"}, "memory_bytes='lots': 'lots' is not a number of bytes"),
        ({"memory_bytes": 7}, "memory_bytes=7 is not a whole number of at least"),
        ({"memory_bytes": True}, "memory_bytes=True is not"),
        ({"concurrency": "8"}, "concurrency='8' is not"),
        ({"deadline_s": -1}, "deadline_s=-1 is not seconds above zero"),
        ({"verify": "sometimes"}, "verify='sometimes' is not"),
        ({"files": []}, r"files=\[\] is not a glob or a list of globs"),
        ({"files": [7]}, r"files=\[7\] is not"),
        ({"enable_weights_track": "no"}, "enable_weights_track='no' is not true or false"),
        ({"cast": 1, "mode": "sharded"}, "cast=1 is not true or false"),
        ({"pattern": "r{rank}.safetensors"}, "pattern is given in the mode 'whole', and is for 'sharded'"),
        ({"files": "*.safetensors", "mode": "sharded"}, "files is given in the mode 'sharded'"),
    ],
)
def test_what_makes_no_sense_is_one_error(given: Any, said: str) -> None:
    with pytest.raises(OptionError, match=f"^(model_loader_extra_config.*)?{said}") as raised:
        ExtraConfig.parse(given)
    assert "\n" not in str(raised.value)


def test_keys_of_the_format_that_it_stands_for() -> None:
    given = {"distributed": True, "memory_limit": 64 << 20, "concurrency": 8}
    assert ExtraConfig.parse_foreign(given, mode="whole").options == {"memory_bytes": 64 << 20, "concurrency": 8}
    assert ExtraConfig.parse_foreign({"memory_limit": -1}, mode="sharded").options == {}
    with pytest.raises(OptionError, match="has no key 'distribute'"):
        ExtraConfig.parse_foreign({"distribute": True}, mode="whole")


def test_what_lies_below_a_uri() -> None:
    assert below("/models/llama/", "head.safetensors") == "/models/llama/head.safetensors"
    assert below("https://host/m?token=1", "head.safetensors") == "https://host/m/head.safetensors?token=1"


def test_without_vllm_a_warning_is_all(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        register()
    (record,) = caplog.records
    assert "there is no --load-format streamload" in record.getMessage()


def test_importing_the_plugin_imports_little() -> None:
    code = "import sys, streamload.vllm; print(sorted({'torch', 'vllm', 'tqdm'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")
