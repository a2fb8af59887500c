"""A fast S3 server on this machine: what the network scenarios read from, where the user names no other endpoint.

nginx sends the files by sendfile, so that the server takes next to nothing from the client it shares the machine with;
``origin.js`` checks signatures and lists the bucket. It needs nginx with its njs module: on Debian, ``nginx-light`` and
``libnginx-mod-http-js``.

As root it has a network namespace of its own. There loopback uses CUBIC: BBR, the default of some machines, paces what
needs no pacing and more than halves loopback's throughput. The link can be capped there, too, and nothing else on the
machine is touched. The namespace has no name: it is held by the server's process and goes with it.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Literal, TypeAlias

__all__ = ["BUCKET", "Origin", "OriginUnavailableError", "Variant", "serve"]

Variant: TypeAlias = Literal["http", "tls", "capped", "latency", "stalls", "link"]

BUCKET = "bench"
"""The only bucket, and the name of the folder that holds its objects."""

REGION = "us-east-1"

# One connection to S3 brings 85 to 90 MB/s as AWS's guidelines put it, and seen from EC2 somewhat more. nginx waits a
# whole number of milliseconds after each piece but the last: here 4, which the timer makes 4.2. A range of 8 MiB takes
# 80 ms then, as at 100 MiB/s, and one of 16 MiB 160 ms.
CAPPED = "sendfile_max_chunk 410k; limit_rate 100m;"

# The least that a request to S3 from the same region takes is 10 to 30 ms; more would measure nothing else.
FIRST_BYTE_MS = 30

# One answer in a hundred: a server that is down for a moment, a packet lost at the wrong time.
STALL_MS = 3000

# A link that any client here can fill, so that what is measured is who wastes it.
LINK = "rate 4gbit burst 1mb latency 20ms"

# Where OpenSSL, Go, s2n and others of Debian look for certificates; some clients can be given no other place.
SYSTEM_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")

_START_S = 30.0
_STOP_S = 10.0
_LOOK_AGAIN_S = 0.02
_BLOCK_BYTES = 16 << 20

_SCRIPT = Path(__file__).with_suffix(".js")

# Runs as long as the server does. Its only way out is the trap, so that the folder goes whatever ended it: the parent's
# exit from the context, or the parent's death, of which the kernel tells it with SIGTERM.
_SUPERVISE = """
nginx=
finish() {
  trap '' TERM INT HUP
  [ -z "$nginx" ] || { kill "$nginx" 2>/dev/null; wait "$nginx"; }
  rm -rf -- "$state"
}
trap finish EXIT
trap 'exit 0' TERM INT HUP
set -e
eval "$setup"
"$binary" -e "$state/error.log" -p "$state" -c "$state/nginx.conf" &
nginx=$!
wait "$nginx"
"""


class OriginUnavailableError(RuntimeError):
    """The server cannot run here; the text says why."""


@dataclass(frozen=True, slots=True)
class Origin:
    """A running server.

    Attributes:
        variant: How it behaves.
        endpoint_url: Where it listens, seen from a command with the prefix.
        bucket: The bucket that holds all objects.
        environ: The variables that point everything that speaks S3 at it.
        command_prefix: What to put before a command that is to reach it; empty where there is no namespace.
        congestion_control: What its connections use; None where it is whatever this machine has.
    """

    variant: Variant
    endpoint_url: str
    bucket: str
    environ: dict[str, str] = field(repr=False)
    command_prefix: list[str]
    congestion_control: str | None


@contextlib.contextmanager
def serve(folder: Path, *, variant: Variant) -> Iterator[Origin]:
    """Serve the files under ``folder/bench`` as the objects of one bucket, as they are at the start.

    HEAD with ``x-amz-checksum-mode: ENABLED`` answers with CRC-64/NVME checksums; they are computed at the first start
    and kept in the folder. Any number of servers may run at once. Everything ends with the context, and with this
    process, whatever ends it; the thread that enters must outlive the context.

    Args:
        folder: What holds the folder ``bench``; the checksums are written here.
        variant: ``http`` and ``tls``, as fast as it can; ``capped``, http with about 100 MiB/s for each connection
            (requests of 8 MiB and more: smaller ones are through before the cap acts); ``latency``, http that waits
            30 ms before each first byte; ``stalls``, http of whose answers one in a hundred, and the last of a load, is
            3 s late; ``link``, http with 4 Gbit/s for all connections together.

    Yields:
        The server, listening.

    Raises:
        OriginUnavailableError: nginx or its njs module is missing, the link cannot be capped here, or nginx failed.
        FileNotFoundError: There is no folder ``bench``.
    """
    binary, modules = _find_nginx()
    namespace = _can_have_namespace()
    if variant == "link" and not namespace:
        raise OriginUnavailableError("capping a link needs root and a network namespace")
    objects = _describe_objects(folder)
    state = Path(tempfile.mkdtemp(prefix="streamload-origin-"))
    port = _free_port()
    access_key, secret_key = "AKID" + secrets.token_hex(8).upper(), secrets.token_hex(20)
    environ = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": access_key,
        "AWS_SECRET_ACCESS_KEY": secret_key,
        "AWS_REGION": REGION,
        "AWS_DEFAULT_REGION": REGION,
        # Nothing of the user's own, and no metadata service, for which some clients wait for seconds.
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    with contextlib.ExitStack() as stack:
        # Until the supervisor runs, the folder is ours to remove; removing it twice does no harm.
        stack.callback(shutil.rmtree, state, ignore_errors=True)
        (state / "objects.json").write_text(json.dumps([entry.listed for entry in objects]))
        (state / "nginx.conf").write_text(
            _configuration(variant, folder, state, port, modules, objects, access_key, secret_key)
        )
        if variant == "tls":
            authority = _make_certificate(state)
            environ |= {
                "AWS_ENDPOINT_URL": f"https://127.0.0.1:{port}",
                "AWS_CA_BUNDLE": str(authority),
                "SSL_CERT_FILE": str(authority),
            }
        process = stack.enter_context(_running(binary, state, variant, namespace=namespace))
        prefix = _command_prefix(process.pid, environ.get("AWS_CA_BUNDLE")) if namespace else []
        congestion_control = "cubic" if namespace else None
        yield Origin(variant, environ["AWS_ENDPOINT_URL"], BUCKET, environ, prefix, congestion_control)


# What is there to serve with


def _find_nginx() -> tuple[str, Path]:
    """The program, and its njs module."""
    binary = shutil.which("nginx", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"]))
    if binary is None:
        raise OriginUnavailableError("nginx is not installed (Debian: nginx-light, libnginx-mod-http-js)")
    built = subprocess.run([binary, "-V"], capture_output=True, text=True, check=True).stderr
    found = re.search(r"--modules-path=(\S+)", built)
    module = Path(found.group(1) if found else "/usr/lib/nginx/modules") / "ngx_http_js_module.so"
    if not module.exists():
        raise OriginUnavailableError(f"nginx has no njs module at {module} (Debian: libnginx-mod-http-js)")
    return binary, module


def _can_have_namespace() -> bool:
    """Whether this process may make a network namespace and join it; being root is not enough in every container."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("unshare", "nsenter", "ip", "tc"))):
        return False
    return subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode == 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


# The objects


@dataclass(frozen=True, slots=True)
class _Object:
    key: str
    size: int
    mtime_ns: int
    crc64: str

    @property
    def listed(self) -> list[object]:
        """As origin.js wants it. nginx makes the same ETag from a file's date and size."""
        date = datetime.fromtimestamp(self.mtime_ns // 10**9, UTC)
        return [
            self.key,
            self.size,
            f"{self.mtime_ns // 10**9:x}-{self.size:x}",
            date.strftime("%Y-%m-%dT%H:%M:%S.000Z"),
        ]


def _describe_objects(folder: Path) -> list[_Object]:
    """Everything under ``folder/bench``, by key, with checksums: computed once for each version of a file."""
    bucket = folder / BUCKET
    if not bucket.is_dir():
        raise FileNotFoundError(f"there is no folder {bucket}")
    kept = folder / ".crc64nvme.json"
    try:
        known: dict[str, list[object]] = json.loads(kept.read_text())
    except (OSError, ValueError):
        known = {}
    objects = []
    for path in sorted(bucket.rglob("*")):
        if path.is_file():
            stat, key = path.stat(), path.relative_to(bucket).as_posix()
            entry = known.get(key, [])
            if entry[:2] != [stat.st_size, stat.st_mtime_ns]:
                entry = known[key] = [stat.st_size, stat.st_mtime_ns, _crc64nvme(path)]
            objects.append(_Object(key, stat.st_size, stat.st_mtime_ns, str(entry[2])))
    # Another server may start over the same folder: it reads the old file or the new one, never half of one.
    with tempfile.NamedTemporaryFile("w", dir=folder, prefix=kept.name, delete=False) as file:
        json.dump(known, file)
    os.replace(file.name, kept)
    # A listing is in the order of UTF-8's bytes, a path's order is by its parts.
    return sorted(objects, key=lambda each: each.key.encode())


def _crc64nvme(path: Path) -> str:
    """The file's checksum as S3 writes it."""
    from awscrt import checksums

    crc = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            crc = checksums.crc64nvme(block, crc)
    return base64.b64encode(crc.to_bytes(8, "big")).decode()


# The server


def _configuration(
    variant: Variant,
    folder: Path,
    state: Path,
    port: int,
    module: Path,
    objects: list[_Object],
    access_key: str,
    secret_key: str,
) -> str:
    """What nginx is told to do."""
    listen = f"listen 127.0.0.1:{port} backlog=1024;"
    if variant == "tls":
        # The kernel encrypts where it can, from the page cache; where it cannot, the option has no effect.
        listen = (
            f"listen 127.0.0.1:{port} ssl backlog=1024; ssl_certificate {state}/certificate.pem; "
            f"ssl_certificate_key {state}/key.pem; ssl_session_cache shared:tls:1m; "
            # As S3's endpoints do: the server chooses, and prefers the cheaper cipher. Else each client brings its own
            # preference, and ciphers are compared rather than loaders.
            "ssl_prefer_server_ciphers on; "
            "ssl_conf_command Ciphersuites TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256;"
        )
    # Regardless of the case, as nginx compares these; no checkpoint has keys that differ only in that.
    checksums = "\n".join(
        f"    {_quoted(f'HEAD ENABLED /{BUCKET}/{each.key}')} {_quoted(each.crc64)};" for each in objects
    )
    errors = {403: "SignatureDoesNotMatch", 404: "NoSuchKey", 412: "PreconditionFailed", 416: "InvalidRange"}
    pages = "\n".join(
        f"    error_page {status} @{status};\n"
        f"    location @{status} {{ internal; default_type application/xml; "
        f"return {status} '<?xml version=\"1.0\"?><Error><Code>{code}</Code></Error>'; }}"
        for status, code in errors.items()
    )
    weights = [each for each in objects if each.key.endswith(".safetensors")] or objects
    last_uri, last_byte = (f"/{BUCKET}/{weights[-1].key}", weights[-1].size - 1) if weights else ("", 0)
    temporary = " ".join(
        f"{kind}_temp_path {state}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    return f"""
load_module {module};
{"user root;" if os.geteuid() == 0 else ""}
daemon off;
pid {state}/nginx.pid;
# One can send ten gigabytes a second, and encrypt two or three. Of several, each new connection gets one by chance, and
# a client with two connections would be twice as fast where these are not the same.
worker_processes 1;
worker_rlimit_nofile 8192;
events {{ worker_connections 4096; }}
http {{
  js_import origin from {_SCRIPT};
  access_log off;
  {temporary}
  default_type application/octet-stream;
  sendfile on; tcp_nopush on; tcp_nodelay on;
  # What is read for TLS; the default of 32 KiB is a system call for every two records.
  output_buffers 2 256k;
  keepalive_requests 1000000; keepalive_timeout 300s;
  open_file_cache max=4096 inactive=300s; open_file_cache_valid 60s;
  map_hash_max_size 65536; map_hash_bucket_size 2048;
  map "$request_method $http_x_amz_checksum_mode $uri" $crc64 {{
    default "";
{checksums}
  }}
  map $crc64 $crc64_type {{ default FULL_OBJECT; "" ""; }}
  server {{
    {listen}
    {CAPPED if variant == "capped" else ""}
    root {_quoted(str(folder.resolve()))};
    set $s3_bucket {BUCKET};
    set $s3_objects {state}/objects.json;
    set $s3_access_key {access_key};
    set $s3_secret_key {secret_key};
    set $s3_first_byte_ms {FIRST_BYTE_MS if variant == "latency" else 0};
    set $s3_stall_ms {STALL_MS if variant == "stalls" else 0};
    set $s3_last_object {_quoted(last_uri)};
    set $s3_last_byte -{last_byte};
    set $s3_last_mark {state}/last;
{pages}
    location = /_authorize {{ internal; js_content origin.authorize; }}
    location = /{BUCKET} {{ auth_request /_authorize; js_content origin.list; }}
    location = /{BUCKET}/ {{ auth_request /_authorize; js_content origin.list; }}
    location /{BUCKET}/ {{
      auth_request /_authorize;
      try_files $uri =404;
      add_header x-amz-checksum-crc64nvme $crc64;
      add_header x-amz-checksum-type $crc64_type;
    }}
    location / {{ auth_request /_authorize; try_files /no/such/bucket =404; }}
  }}
}}
"""


def _quoted(text: str) -> str:
    """A string of nginx's configuration, taken literally."""
    if "$" in text:
        # There is no way to write one in a place where variables are allowed.
        raise ValueError(f"the server cannot serve a path with a dollar sign: {text}")
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _make_certificate(state: Path) -> Path:
    """Make the server's certificate and the authority that signed it: some clients take no certificate that is both."""
    authority = state / "authority.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "30", "-batch"]
    commands = [
        [*make, "-subj", "/CN=authority", "-keyout", f"{state}/authority-key.pem", "-out", str(authority)],
        [
            *(*make, "-subj", "/CN=localhost", "-keyout", f"{state}/key.pem", "-out", f"{state}/certificate.pem"),
            *("-CA", str(authority), "-CAkey", f"{state}/authority-key.pem"),
            *("-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost", "-addext", "basicConstraints=critical,CA:FALSE"),
        ],
    ]
    for command in commands:
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError:
            raise OriginUnavailableError("openssl is not installed, and TLS needs a certificate") from None
        except subprocess.CalledProcessError as error:
            raise OriginUnavailableError(f"openssl 3 is needed to make a certificate: {error.stderr[-500:]}") from None
    return authority


@contextlib.contextmanager
def _running(binary: str, state: Path, variant: Variant, *, namespace: bool) -> Iterator[subprocess.Popen[bytes]]:
    setup = []
    if namespace:
        setup.append("ip link set lo up")
        setup += [
            f"ip route replace local {net} dev lo table local proto kernel scope host src 127.0.0.1 congctl cubic"
            for net in ("127.0.0.0/8", "127.0.0.1")
        ]
        if variant == "link":
            setup.append(f"tc qdisc add dev lo root tbf {LINK}")
    variables = {"state": str(state), "binary": binary, "setup": "\n".join(setup)}
    script = "".join(f"{name}={shlex.quote(value)}\n" for name, value in variables.items()) + _SUPERVISE
    # Each of them becomes the next: the supervisor has the process's id, and hears of this process's end.
    command = ["setpriv", "--pdeathsig", "TERM", *(["unshare", "--net"] if namespace else []), "sh", "-c", script]
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # A Ctrl-C at the terminal is for the parent; it ends the server when it is done with it.
            start_new_session=True,
        )
        try:
            _wait_until_it_listens(process, state, output)
            yield process
        finally:
            _stop(process)


def _wait_until_it_listens(process: subprocess.Popen[bytes], state: Path, output: IO[bytes]) -> None:
    """Wait for the file with nginx's process id, which it writes when its sockets are open."""
    deadline = time.monotonic() + _START_S
    while not (state / "nginx.pid").exists():
        # Waiting for its end is waiting, too, and notices when it cannot start.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_LOOK_AGAIN_S)
            raise OriginUnavailableError(f"nginx ended with exit code {process.returncode}: {_text(output)}")
        if time.monotonic() > deadline:
            raise OriginUnavailableError(f"nginx does not listen after {_START_S:g} s: {_text(output)}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        # The whole session: killed, the supervisor could not end nginx any more.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _text(output: IO[bytes]) -> str:
    output.seek(0)
    return output.read().decode(errors="replace").strip()[-2000:]


def _command_prefix(pid: int, authority: str | None) -> list[str]:
    """What makes a command see the server's network, and its authority as the system's."""
    # Not the mount namespace, too: joining one would change the command's working directory.
    prefix = ["nsenter", f"--net=/proc/{pid}/ns/net", "--"]
    if authority is not None and SYSTEM_CERTIFICATES.exists():
        # The command alone sees it: its mounts are its own.
        bind = f'mount --bind "$0" {SYSTEM_CERTIFICATES} && exec "$@"'
        prefix += ["unshare", "--mount", "--propagation", "private", "sh", "-c", bind, authority]
    return prefix
