"""A load's options: where each comes from, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import pytest

from streamload.errors import OptionError
from streamload.events import Progress
from streamload.host import HostLimits
from streamload.options import LoadOptions, Options, proxies, resolve
from streamload.plan import Ranks

_MIB, _GIB = 1 << 20, 1 << 30


def _resolve(environment: dict[str, str] | None = None, **given: Any) -> LoadOptions:
    return resolve(given, environment or {})[0]


def _origins(environment: dict[str, str] | None = None, **given: Any) -> dict[str, str]:
    return {option.name: option.origin for option in resolve(given, environment or {})[1]}


@pytest.fixture
def available(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    limits = HostLimits(available_bytes=2 * _GIB, bound_by="cgroup v2", open_files=1024, locked_bytes=None)
    monkeypatch.setattr("streamload.options.host_limits", lambda: limits)
    return monkeypatch


class TestLoadOptions:
    def test_are_frozen(self) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            LoadOptions().__setattr__("device", "cuda")

    def test_have_the_same_names_as_keyword_arguments(self) -> None:
        assert {field.name for field in dataclasses.fields(LoadOptions)} == Options.__optional_keys__

    @pytest.mark.parametrize("globs", [["a", "b"], ("a", "b"), iter(["a", "b"]), {"a": 1, "b": 2}])
    def test_globs_become_a_tuple(self, globs: Any) -> None:
        assert LoadOptions(include=globs).include == ("a", "b")

    @pytest.mark.parametrize(
        "given",
        [
            {"device": ""},
            {"device": 0},
            {"device": "meta"},
            {"device": "cuda:x"},
            {"device": "cuda:-1"},
            {"device": "cuda:٣"},
            {"include": "model.*"},
            {"include": b"model.*"},
            {"include": None},
            {"exclude": [1]},
            {"memory_bytes": 0},
            {"memory_bytes": -1},
            {"memory_bytes": (1 << 20) - 1},
            {"memory_bytes": "256MiB"},
            {"memory_bytes": 1e9},
            {"memory_bytes": True},
            {"read_bytes": 4095},
            {"read_bytes": 8.0},
            {"concurrency": 0},
            {"concurrency": 1025},
            {"concurrency": "many"},
            {"concurrency": None},
            {"concurrency": True},
            {"order": "random"},
            {"order": None},
            {"verify": "always"},
            {"verify": True},
            {"max_bytes_per_s": 0},
            {"max_bytes_per_s": -1},
            {"max_bytes_per_s": float("inf")},
            {"max_bytes_per_s": "1GB"},
            {"max_bytes_per_s": True},
            {"deadline_s": 0},
            {"deadline_s": -1.0},
            {"deadline_s": float("inf")},
            {"deadline_s": float("nan")},
            {"deadline_s": "1"},
            {"deadline_s": True},
            {"strict_memory": 1},
            {"strict_memory": None},
            {"s3_anonymous": 1},
            {"source": ""},
            {"runai_chunk_bytes": 4095},
            {"runai_request_timeout_s": 0},
            {"runai_virtual_addressing": "no"},
            {"progress": None},
            {"progress": "yes"},
            {"on_event": 7},
            {"placements": "guess"},
            {"placements": None},
            {"pp_size": 0, "rank": 0, "world_size": 1},
            {"uneven": "floor"},
            {"expert_parallel": 1},
        ],
    )
    def test_refuse(self, given: dict[str, Any]) -> None:
        name = next(iter(given))
        with pytest.raises(OptionError, match=f"^{name}="):
            LoadOptions(**given)

    @pytest.mark.parametrize(
        "given",
        [
            {"device": "cuda:1"},
            {"memory_bytes": 1 << 20},
            {"read_bytes": 4096},
            {"concurrency": 1},
            {"concurrency": 1024},
            {"concurrency": "auto"},
            {"order": "file"},
            {"verify": "off"},
            {"max_bytes_per_s": 1},
            {"max_bytes_per_s": 1e9},
            {"deadline_s": 0.5},
            {"deadline_s": 3},
            {"strict_memory": True},
            {"s3_anonymous": True},
            {"source": "runai"},
            {"runai_chunk_bytes": 16 << 20},
            {"runai_request_timeout_s": 1.5},
            {"runai_virtual_addressing": False},
            {"progress": print},
            {"on_event": print},
        ],
    )
    def test_accept(self, given: dict[str, Any]) -> None:
        ((name, value),) = given.items()
        assert getattr(LoadOptions(**given), name) == value


class TestRanks:
    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"rank": 0}, "rank=0 is given without world_size"),
            ({"world_size": 4}, "world_size is given without a rank"),
            ({"placements": {"*": "colwise"}}, "placements is given without a rank"),
            ({"pp_size": 2}, "pp_size is given without a rank"),
            ({"rank": 4, "world_size": 4}, "rank=4 is not a whole number from 0 to 3"),
            ({"rank": True, "world_size": 4}, "rank=True is not"),
            ({"rank": 0, "world_size": 4, "pp_size": 3}, "world_size=4 ranks cannot be pp_size=3 stages of one size"),
            ({"rank": Ranks(), "world_size": 1}, "world_size is for a rank that is a number"),
            ({"rank": "auto"}, "rank='auto'"),
            ({"rank": 0, "world_size": 1, "placements": {"*": "sideways"}}, "there is no style 'sideways'"),
            ({"rank": 0, "world_size": 1, "placements": {"*": 3}}, "not a glob and a placement"),
        ],
    )
    def test_refuse(self, given: dict[str, Any], message: str) -> None:
        with pytest.raises(OptionError, match=re.escape(message)):
            LoadOptions(**given)

    def test_neighbours_share_tensors_and_stages_share_layers(self) -> None:
        options = LoadOptions(rank=5, world_size=8, pp_size=2, expert_parallel=True)
        assert options.ranks == Ranks(tp_rank=1, tp_size=4, pp_rank=1, pp_size=2, ep_rank=1, ep_size=4)
        assert options.ranks_of_all()[5] == options.ranks
        assert len(set(options.ranks_of_all())) == 8
        assert LoadOptions().ranks is None
        assert LoadOptions().ranks_of_all() == ()

    def test_ranks_in_full(self) -> None:
        ranks = Ranks(tp_rank=1, tp_size=2, pp_rank=0, pp_size=3, ep_rank=1, ep_size=4)
        assert LoadOptions(rank=ranks).ranks == ranks
        assert len(LoadOptions(rank=ranks).ranks_of_all()) == 24
        same = Ranks(tp_rank=1, tp_size=2, ep_rank=1, ep_size=2)
        assert LoadOptions(rank=same).ranks_of_all() == (Ranks(0, 2, 0, 1, 0, 2), same)

    def test_as_torchrun_says(self) -> None:
        environment = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
        options, origins = resolve({"rank": "auto", "device": "cuda"}, environment)
        assert (options.rank, options.world_size, options.device) == (3, 8, "cuda:1")
        assert {origin.name: origin.origin for origin in origins}["rank"] == "environment (RANK)"
        assert resolve({"rank": "auto"}, environment)[0].device == "cpu"
        assert resolve({}, environment | {"STREAMLOAD_RANK": "auto"})[0].rank == 3
        assert resolve({"rank": "auto", "world_size": 4}, environment)[0].world_size == 4
        assert resolve({"rank": "auto", "world_size": None}, environment)[0].world_size == 8
        assert resolve({}, environment)[0].rank is None
        with pytest.raises(OptionError, match="WORLD_SIZE, which is not set"):
            resolve({"rank": "auto"}, {"RANK": "3"})
        with pytest.raises(OptionError, match="RANK='x' is not a number"):
            resolve({"rank": "auto"}, environment | {"RANK": "x"})


class TestResolve:
    def test_defaults(self) -> None:
        options = _resolve()
        assert dataclasses.replace(options, memory_bytes=None) == LoadOptions()
        assert set(_origins().values()) - {_origins()["memory_bytes"]} == {"default"}

    def test_the_environment(self) -> None:
        environment = {
            "STREAMLOAD_DEVICE": " cuda:1 ",
            "STREAMLOAD_INCLUDE": "model.*, lm_head.weight,",
            "STREAMLOAD_EXCLUDE": "",
            "STREAMLOAD_MEMORY_BYTES": "256MiB",
            "STREAMLOAD_STRICT_MEMORY": "yes",
            "STREAMLOAD_READ_BYTES": "8M",
            "STREAMLOAD_CONCURRENCY": "12",
            "STREAMLOAD_MAX_BYTES_PER_S": "1.5GB",
            "STREAMLOAD_ORDER": "file",
            "STREAMLOAD_DEADLINE_S": "2.5",
            "STREAMLOAD_VERIFY": "off",
            "STREAMLOAD_S3_ANONYMOUS": "true",
            "STREAMLOAD_SOURCE": "runai",
            "STREAMLOAD_RUNAI_CHUNK_BYTES": "16MiB",
            "STREAMLOAD_RUNAI_REQUEST_TIMEOUT_S": "7.5",
            "STREAMLOAD_RUNAI_VIRTUAL_ADDRESSING": "no",
            "STREAMLOAD_PROGRESS": "1",
            "STREAMLOAD_HTTP_HEADERS": "X-Token: t",
            "STREAMLOAD_RANK": "5",
            "STREAMLOAD_WORLD_SIZE": "8",
            "STREAMLOAD_PP_SIZE": "2",
            "STREAMLOAD_EXPERT_PARALLEL": "on",
            "STREAMLOAD_UNEVEN": "ceil",
            "STREAMLOAD_PATTERN": "{pp_rank}-{rank}.safetensors",
            "STREAMLOAD_SOMETHING_ELSE": "ignored",
        }
        assert _resolve(environment) == LoadOptions(
            device="cuda:1",
            include=("model.*", "lm_head.weight"),
            memory_bytes=256 * _MIB,
            strict_memory=True,
            read_bytes=8 * _MIB,
            concurrency=12,
            max_bytes_per_s=1_500_000_000,
            order="file",
            deadline_s=2.5,
            verify="off",
            s3_anonymous=True,
            source="runai",
            runai_chunk_bytes=16 * _MIB,
            runai_request_timeout_s=7.5,
            runai_virtual_addressing=False,
            progress=True,
            http_headers={"X-Token": "t"},
            rank=5,
            world_size=8,
            pp_size=2,
            expert_parallel=True,
            uneven="ceil",
            pattern="{pp_rank}-{rank}.safetensors",
        )
        origins = _origins(environment)
        assert origins.pop("on_event") == "default"
        # Of one repository, not of a process.
        for name in ("revision", "allow_patterns", "ignore_patterns", "download_dir", "cache"):
            assert origins.pop(name) == "default"
        assert origins.pop("placements") == "default"
        assert origins == {name: f"environment (STREAMLOAD_{name.upper()})" for name in origins}

    @pytest.mark.parametrize(
        ("variable", "meant"),
        [
            ("STREAMLOAD_MEMROY_BYTES", "STREAMLOAD_MEMORY_BYTES"),
            ("STREAMLOAD_MEMORY", "STREAMLOAD_MEMORY_BYTES"),
            ("STREAMLOAD_CONCURENCY", "STREAMLOAD_CONCURRENCY"),
            ("STREAMLOAD_DEADLINE", "STREAMLOAD_DEADLINE_S"),
            ("STREAMLOAD_verify", "STREAMLOAD_VERIFY"),
            ("STREAMLOAD_SERVICE_HOST", None),
            ("STREAMLOAD_PORT_80_TCP_ADDR", None),
            ("STREAMLOADER_ORDER", None),
            ("STREAMLOAD_ORDER", None),
            ("STREAMLOAD_STAGE_INCLUDE", None),
            ("STREAMLOAD_SERVE_SOURCE", None),
        ],
    )
    def test_misspelt_variables_are_told(
        self, caplog: pytest.LogCaptureFixture, variable: str, meant: str | None
    ) -> None:
        _resolve({variable: "file"})
        warnings = [record.getMessage() for record in caplog.records if record.name == "streamload.options"]
        assert warnings == ([f"{variable} is no option, and is ignored: is {meant} meant?"] if meant else [])

    def test_what_is_given_goes_before_the_environment(self) -> None:
        environment = {"STREAMLOAD_CONCURRENCY": "nonsense", "STREAMLOAD_ORDER": "file"}
        assert _resolve(environment, concurrency=3).concurrency == 3
        assert _origins(environment, concurrency=3)["concurrency"] == "argument"
        assert _origins(environment, concurrency=3)["order"] == "environment (STREAMLOAD_ORDER)"

    def test_the_process_environment_is_the_default_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("STREAMLOAD_CONCURRENCY", "7")
        assert resolve({})[0].concurrency == 7

    @pytest.mark.parametrize(
        ("variable", "text"),
        [
            ("STREAMLOAD_MEMORY_BYTES", "lots"),
            ("STREAMLOAD_READ_BYTES", ""),
            ("STREAMLOAD_CONCURRENCY", "many"),
            ("STREAMLOAD_STRICT_MEMORY", "maybe"),
            ("STREAMLOAD_DEADLINE_S", "soon"),
        ],
    )
    def test_refuses_an_environment_that_cannot_be_read(self, variable: str, text: str) -> None:
        with pytest.raises(OptionError, match=f"^{variable}="):
            _resolve({variable: text})

    def test_refuses_an_environment_without_meaning(self) -> None:
        with pytest.raises(OptionError, match="concurrency=0"):
            _resolve({"STREAMLOAD_CONCURRENCY": "0"})

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("order", "random"),
            ("verify", "perhaps"),
            ("concurrency", "0"),
            ("memory_bytes", "1"),
            ("read_bytes", "1"),
            ("deadline_s", "nan"),
            ("max_bytes_per_s", "0"),
            ("device", ""),
        ],
    )
    def test_a_value_without_meaning_names_its_variable(self, name: str, text: str) -> None:
        variable = f"STREAMLOAD_{name.upper()}"
        with pytest.raises(OptionError, match=rf"^{variable}='{text}': {name}=.* is not "):
            _resolve({variable: text})
        with pytest.raises(OptionError, match=r"^order='random' is not"):
            resolve({"order": "random"}, {"STREAMLOAD_ORDER": "file"})

    def test_refuses_unknown_names(self) -> None:
        with pytest.raises(OptionError, match=r"no option 'devise'; there are device, include"):
            _resolve(devise="cpu")

    @pytest.mark.parametrize("text", ["1", "true", "Yes", " on "])
    def test_true(self, text: str) -> None:
        assert _resolve({"STREAMLOAD_STRICT_MEMORY": text}).strict_memory is True

    @pytest.mark.parametrize("text", ["0", "false", "No", " off ", ""])
    def test_false(self, text: str) -> None:
        assert _resolve({"STREAMLOAD_STRICT_MEMORY": text}).strict_memory is False

    def test_what_is_shown(self) -> None:
        def watch(progress: Progress) -> None: ...

        found = resolve(
            {
                "memory_bytes": 256 * _MIB,
                "include": ["a", "b"],
                "progress": watch,
                "on_event": functools.partial(print),
            },
            {},
        )[1]
        shown = {option.name: option.value for option in found}
        assert list(shown) == [field.name for field in dataclasses.fields(LoadOptions)]
        assert shown["memory_bytes"] == "268435456 (256.0 MiB)"
        assert (shown["include"], shown["exclude"]) == ("a, b", "none")
        assert shown["progress"].endswith("watch")
        assert shown["on_event"] == "partial"
        assert shown["read_bytes"] == "the source's choice"
        assert shown["deadline_s"] == "None"


@pytest.mark.usefixtures("available")
class TestDefaultMemory:
    def test_a_quarter_of_what_is_left(self) -> None:
        assert _resolve().memory_bytes == 512 * _MIB
        assert "2.0 GiB that the cgroup v2 leaves" in _origins()["memory_bytes"]

    def test_none_is_no_value(self) -> None:
        assert _resolve(memory_bytes=None).memory_bytes == 512 * _MIB

    def test_the_ranks_of_a_node_share(self) -> None:
        assert _resolve({"LOCAL_WORLD_SIZE": "8"}).memory_bytes == 64 * _MIB
        assert "8 ranks" in _origins({"LOCAL_WORLD_SIZE": "8"})["memory_bytes"]

    def test_at_least_something(self) -> None:
        assert _resolve({"LOCAL_WORLD_SIZE": "1000000"}).memory_bytes == 1 * _MIB

    def test_no_more_than_is_of_use(self, available: pytest.MonkeyPatch) -> None:
        limits = HostLimits(available_bytes=1 << 50, bound_by="machine", open_files=1024, locked_bytes=None)
        available.setattr("streamload.options.host_limits", lambda: limits)
        assert _resolve().memory_bytes == 1 * _GIB

    @pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "²"])
    def test_ranks_that_are_no_number(self, text: str) -> None:
        with pytest.raises(OptionError, match="LOCAL_WORLD_SIZE="):
            _resolve({"LOCAL_WORLD_SIZE": text})

    def test_ranks_do_not_matter_where_the_limit_is_given(self) -> None:
        assert _resolve({"LOCAL_WORLD_SIZE": "two"}, memory_bytes=_MIB).memory_bytes == _MIB


class TestProxies:
    def test_none(self) -> None:
        assert proxies({"PATH": "/bin", "HTTP_PROXY": ""}) == {}

    def test_both_spellings(self) -> None:
        environment = {"HTTP_PROXY": "a", "http_proxy": "b", "https_proxy": "c", "NO_PROXY": "d"}
        assert proxies(environment) == {"HTTP_PROXY": "b", "HTTPS_PROXY": "c", "NO_PROXY": "d"}

    def test_the_process_environment_is_the_default_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("https_proxy", raising=False)
        monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
        assert proxies()["HTTPS_PROXY"] == "http://proxy:3128"
