"""The benchmarks' S3 server: what it answers, how it behaves, and that nothing of it is left."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from awscrt import checksums

from bench import origin
from bench.origin import Origin, OriginUnavailableError, Variant, serve

# Runs in the server's namespace; prints what the client was told.
CLIENT = """
import json, socket, sys, time
from botocore.config import Config
from botocore.exceptions import ClientError
from botocore.session import Session

client = Session().create_client("s3", config=Config(retries={"total_max_attempts": 1}))
found = []
for operation, arguments in json.loads(sys.argv[1]):
    began = time.perf_counter()
    try:
        answer = getattr(client, operation)(Bucket="bench", **arguments)
        if "Body" in answer:
            answer["Body"] = answer["Body"].read().hex()
    except ClientError as error:
        answer = error.response
    answer["seconds"] = time.perf_counter() - began
    found.append(answer)
print(json.dumps(found, default=str))
"""


def ask(server: Origin, *calls: tuple[str, dict[str, Any]], **environ: str) -> list[dict[str, Any]]:
    """Make calls of botocore's client and return the answers."""
    command = [*server.command_prefix, sys.executable, "-c", CLIENT, json.dumps(calls)]
    done = subprocess.run(command, env=os.environ | server.environ | environ, check=True, stdout=subprocess.PIPE)
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.fixture
def folder(tmp_path: Path, clean_aws_env: pytest.MonkeyPatch) -> Path:
    """Objects at the top and in folders, with names that need escaping."""
    names = ["a.bin", "llama/model-1.bin", "llama/model-2.bin", "llama/old/x.bin", 'odd/ü & "<+ %.bin']
    for number, name in enumerate(names):
        path = tmp_path / "bench" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(range(number, 200)))
    return tmp_path


@pytest.mark.root
@pytest.mark.parametrize("variant", ["http", "tls", "capped", "latency", "stalls", "link"])
def test_every_variant_speaks_s3(folder: Path, variant: Variant) -> None:
    content = (folder / "bench" / "a.bin").read_bytes()
    with serve(folder, variant=variant) as server:
        head, part, same, other, missing, past, bucket = ask(
            server,
            ("head_object", {"Key": "a.bin", "ChecksumMode": "ENABLED"}),
            ("get_object", {"Key": "a.bin", "Range": "bytes=10-19"}),
            ("get_object", {"Key": "a.bin", "IfMatch": '"' + etag(folder / "bench" / "a.bin") + '"'}),
            ("get_object", {"Key": "a.bin", "IfMatch": '"1-2"'}),
            ("get_object", {"Key": "b.bin"}),
            ("get_object", {"Key": "a.bin", "Range": "bytes=500-600"}),
            ("head_bucket", {}),
        )

    assert head["ContentLength"] == len(content)
    assert base64.b64decode(head["ChecksumCRC64NVME"]) == checksums.crc64nvme(content).to_bytes(8, "big")
    assert head["ChecksumType"] == "FULL_OBJECT"
    assert bytes.fromhex(part["Body"]) == content[10:20]
    assert part["ResponseMetadata"]["HTTPStatusCode"] == 206
    assert part["ETag"] == '"' + etag(folder / "bench" / "a.bin") + '"'
    assert bytes.fromhex(same["Body"]) == content
    assert other["Error"]["Code"] == "PreconditionFailed"
    assert missing["Error"]["Code"] == "NoSuchKey"
    assert past["Error"]["Code"] == "InvalidRange"
    assert bucket["ResponseMetadata"]["HTTPStatusCode"] == 200


def etag(path: Path) -> str:
    return f"{int(path.stat().st_mtime):x}-{path.stat().st_size:x}"


@pytest.mark.root
def test_a_listing_has_prefixes_folders_and_pages(folder: Path) -> None:
    with serve(folder, variant="http") as server:
        everything, level, first, odd = ask(
            server,
            ("list_objects_v2", {}),
            ("list_objects_v2", {"Prefix": "llama/", "Delimiter": "/"}),
            ("list_objects_v2", {"MaxKeys": 2}),
            ("get_object", {"Key": 'odd/ü & "<+ %.bin'}),
        )
        (second,) = ask(
            server, ("list_objects_v2", {"MaxKeys": 2, "ContinuationToken": first["NextContinuationToken"]})
        )

    keys = sorted(path.relative_to(folder / "bench").as_posix() for path in folder.glob("bench/**/*.bin"))
    assert [each["Key"] for each in everything["Contents"]] == keys
    assert everything["IsTruncated"] is False
    assert everything["Contents"][0]["ETag"] == '"' + etag(folder / "bench" / "a.bin") + '"'
    assert [each["Key"] for each in level["Contents"]] == ["llama/model-1.bin", "llama/model-2.bin"]
    assert [each["Prefix"] for each in level["CommonPrefixes"]] == ["llama/old/"]
    assert [each["Key"] for each in first["Contents"] + second["Contents"]] == keys[:4]
    assert second["IsTruncated"] is True
    assert bytes.fromhex(odd["Body"]) == (folder / "bench" / 'odd/ü & "<+ %.bin').read_bytes()


@pytest.mark.root
def test_a_wrong_secret_is_refused(folder: Path) -> None:
    with serve(folder, variant="http") as server:
        found, listed = ask(
            server, ("get_object", {"Key": "a.bin"}), ("list_objects_v2", {}), AWS_SECRET_ACCESS_KEY="wrong"
        )

    assert found["Error"]["Code"] == listed["Error"]["Code"] == "SignatureDoesNotMatch"


@pytest.mark.root
def test_a_file_that_changed_has_a_new_checksum(folder: Path) -> None:
    for content in (b"first", b"second"):
        (folder / "bench" / "a.bin").write_bytes(content)
        with serve(folder, variant="http") as server:
            (head,) = ask(server, ("head_object", {"Key": "a.bin", "ChecksumMode": "ENABLED"}))
        assert base64.b64decode(head["ChecksumCRC64NVME"]) == checksums.crc64nvme(content).to_bytes(8, "big")


@pytest.mark.root
def test_latency_comes_before_each_first_byte(folder: Path) -> None:
    with serve(folder, variant="latency") as server:
        answers = ask(server, *[("get_object", {"Key": "a.bin"})] * 3)

    assert all(answer["seconds"] >= origin.FIRST_BYTE_MS / 1000 for answer in answers)


@pytest.mark.root
def test_the_last_range_stalls_and_is_served_at_once_when_asked_for_again(folder: Path) -> None:
    (folder / "bench" / "a.safetensors").write_bytes(bytes(100))
    last = ("get_object", {"Key": "a.safetensors", "Range": "bytes=10-99"})
    with serve(folder, variant="stalls") as server, ThreadPoolExecutor() as threads:
        answers = [threads.submit(ask, server, last) for _ in range(2)]
        seconds = sorted(future.result()[0]["seconds"] for future in answers)

    assert seconds[0] < origin.STALL_MS / 1000 <= seconds[1]


@pytest.mark.root
def test_a_capped_connection_is_no_faster_than_its_cap(folder: Path) -> None:
    (folder / "bench" / "large.bin").write_bytes(bytes(32 << 20))
    with serve(folder, variant="capped") as server:
        (answer,) = ask(server, ("get_object", {"Key": "large.bin"}))

    assert answer["seconds"] > 32 / 120


@pytest.mark.root
def test_the_link_is_capped_and_congestion_control_is_not_what_the_machine_has(folder: Path) -> None:
    with serve(folder, variant="link") as server:
        shown = subprocess.run(
            [
                *server.command_prefix,
                "sh",
                "-c",
                "tc qdisc show dev lo; ip route get 127.0.0.1; ip route show table local",
            ],
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    assert "tbf" in shown
    assert "rate 4Gbit" in shown
    assert f"congctl {server.congestion_control}" in shown


@pytest.mark.root
def test_two_servers_run_at_once(folder: Path) -> None:
    with serve(folder, variant="http") as one, serve(folder, variant="tls") as other:
        answers = [*ask(one, ("get_object", {"Key": "a.bin"})), *ask(other, ("get_object", {"Key": "a.bin"}))]

    assert answers[0]["Body"] == answers[1]["Body"]


@pytest.mark.root
def test_nothing_is_left_after_an_interrupt(folder: Path) -> None:
    seen: list[tuple[Path, list[int]]] = []

    def interrupted() -> None:
        with serve(folder, variant="tls") as server:
            state = Path(server.environ["AWS_CA_BUNDLE"]).parent
            seen.append((state, processes_of(state)))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()

    (state, running), *_ = seen
    assert len(running) >= 3
    assert not state.exists()
    assert processes_of(state) == []


@pytest.mark.root
@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_when_the_process_is_killed(folder: Path, signal_number: int) -> None:
    program = (
        "import sys; from pathlib import Path; from bench.origin import serve\n"
        "with serve(Path(sys.argv[1]), variant='tls') as server:\n"
        "    print(server.environ['AWS_CA_BUNDLE'], flush=True); sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        state = Path(process.stdout.readline().strip()).parent
        ends = [os.pidfd_open(pid) for pid in processes_of(state)]
        process.send_signal(signal_number)

    assert len(ends) >= 3  # the supervisor, nginx, its workers
    for end in ends:
        assert select.select([end], [], [], 60)[0], "a process of the server is still there"
        os.close(end)
    assert not state.exists()


def processes_of(state: Path) -> list[int]:
    """The supervisor and nginx's processes: the session whose first process was told of the folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(state).encode() in words:
                found.append(os.getsid(int(entry.name)))
    sessions = set(found) - {os.getsid(0)}
    return [int(each.name) for each in Path("/proc").iterdir() if each.name.isdigit() and session(each) in sessions]


def session(entry: Path) -> int | None:
    try:
        return os.getsid(int(entry.name))
    except ProcessLookupError:
        return None


def test_without_nginx_there_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bench").mkdir()
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)

    with pytest.raises(OriginUnavailableError, match="nginx is not installed"), serve(tmp_path, variant="http"):
        pass


@pytest.mark.root
def test_without_a_namespace_all_but_the_capped_link_works(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(origin, "_can_have_namespace", lambda: False)
    with serve(folder, variant="tls") as server:
        (answer,) = ask(server, ("get_object", {"Key": "a.bin"}))

    assert server.command_prefix == []
    assert server.congestion_control is None
    assert bytes.fromhex(answer["Body"]) == (folder / "bench" / "a.bin").read_bytes()
    with pytest.raises(OriginUnavailableError, match="namespace"), serve(folder, variant="link"):
        pass
