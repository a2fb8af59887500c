"""Requests about one bucket: made with aiobotocore, mended where credentials or the clock are at fault, counted."""

from __future__ import annotations

import asyncio
import copy
import gc
import os
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any, Literal, Self, TypeVar
from urllib.parse import urlsplit

from aiobotocore.config import AioConfig
from aiobotocore.session import AioSession, get_session
from botocore import UNSIGNED
from botocore.exceptions import ClientError, ConnectionClosedError
from botocore.loaders import Loader, create_loader

from streamload.errors import CredentialsError, ObjectChangedError, SourceError
from streamload.loan import Loan
from streamload.sources.http_answers import parse_http_date
from streamload.sources.s3_answers import BoundedSession, StrictParsers
from streamload.sources.s3_errors import (
    EXPIRED,
    FOREIGN_ERRORS,
    SKEWED,
    error_code,
    error_headers,
    is_changed,
    other_tag,
    translate_s3_error,
)
from streamload.sources.s3_settings import S3Settings
from streamload.sources.s3_signing import ServerClock, Signer
from streamload.sources.s3_wire import S3Wire
from streamload.uris import scrub_uri
from streamload.wire import ONLY_TLS, Head, Lanes, speaks_tls

__all__ = ["Asked", "Connection", "S3Client"]

T = TypeVar("T")

# Looking for credentials may run a program, or ask STS or a container's agent, each with retries of its own.
_CREDENTIALS_TIMEOUT_S = 30.0

# From the request to the head of the answer. The connection's own timeouts do not cover looking up the host's name, or
# a server that sends its head byte by byte.
_ANSWER_TIMEOUT_S = 60.0

# An error that is known already does not wait longer for one detail of it.
_DETAIL_TIMEOUT_S = 5.0

# Statuses that S3 gives for several reasons: expired keys, unknown keys or no permission, no bucket or no object.
_UNEXPLAINED = {400, 401, 403, 404}

_REDIRECTS = {301, 302, 307}

# Where botocore finds the region: the option of a profile, variables, a default, a conversion. It knows the second
# variable only; all other AWS tools go by the first, before the second.
_VARIABLES = {"region": ("region", ["AWS_REGION", "AWS_DEFAULT_REGION"], None, None)}


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked, and how.

    Attributes:
        bucket: The bucket's name or alias, or the ARN of an access point.
        versions: The version ids of those keys that are not read at their newest version.
        requester_pays: Whether whoever asks agrees to pay for it.
        anonymous: Whether requests are signed by nobody.
        connections: How many connections there may be at once.
        connect_timeout_s: How long making one may take, in seconds.
        read_timeout_s: How long it may be silent, in seconds.
        settings: What counts more than what AWS tools would find.
    """

    bucket: str
    versions: dict[str, str]
    requester_pays: bool
    anonymous: bool
    connections: int
    connect_timeout_s: float
    read_timeout_s: float
    settings: S3Settings = field(default_factory=S3Settings)


@dataclass(frozen=True, slots=True)
class Connection:
    """Where S3 is, and what it is asked with at this moment.

    Attributes:
        endpoint: The URL of the service.
        region: Its region.
        virtual: Whether the bucket is named in the host's name; None where nothing was asked yet.
        access_key: The access key's id.
        secret_key: The secret that belongs to it.
        token: The session's token; None for keys that do not expire.
    """

    endpoint: str
    region: str
    virtual: bool | None
    access_key: str = field(repr=False)
    secret_key: str = field(repr=False)
    token: str | None = field(repr=False)


class S3Client:
    """Asks S3 about one bucket.

    Where the server says that the credentials have expired, they are found anew, as if the process had just begun, and
    the request is made again. What is under way with the older ones goes on; if it is refused, it goes on with the
    newer ones. Where the server says that the clock is wrong, requests are signed at the server's time from then on.
    Both are done once for each request, and never for credentials or a time with which nothing was answered yet.

    Attributes:
        host: Who is asked: host and port.
    """

    def __init__(self, asked: Asked, count: Callable[[], None]) -> None:
        self.host = "S3"
        self._asked = asked
        self._count = count
        self._style = "unknown"
        self._clock = ServerClock()
        self._lanes = Lanes(connect_timeout_s=asked.connect_timeout_s, stall_s=asked.read_timeout_s)
        self._sessions = AsyncExitStack()  # all of them, the older ones included
        self._session: _Session
        self._renewing = asyncio.Lock()
        self._failure: SourceError | None = None  # why credentials could not be had the last time

    @classmethod
    async def open(cls, asked: Asked, *, count: Callable[[], None]) -> Self:
        """Find the credentials and make the client; S3 itself is not asked yet.

        Args:
            asked: What is asked.
            count: Called whenever a request is sent.

        Raises:
            CredentialsError: There are none.
            SourceError: The configuration found in the environment makes no sense.
        """
        opened = cls(asked, count)
        await opened._begin()
        return opened

    async def call(self, operation: str, *, version: str | None = None, **arguments: Any) -> dict[str, Any]:
        """Make a request and wait for the head of its answer.

        Args:
            operation: The client's method: ``get_object``.
            version: The tag that the request pins, for the error.
            **arguments: The method's, all but the bucket, the version id and who pays.

        Returns:
            The answer. A body in it is the caller's to close.

        Raises:
            SourceError: Of the kind that fits; not located.
        """
        with self.translating(version=version):
            try:
                async with self._pinned(arguments.get("Key", ""), version):
                    return await self._request(operation, **arguments)
            except ConnectionClosedError:
                if await self._expects_tls():
                    raise SourceError(f"no answer from {self.host}: {ONLY_TLS}") from None
                raise

    async def _expects_tls(self) -> bool:
        """Whether a server that has never answered is spoken to in plain text and does not understand it."""
        endpoint = urlsplit(self._session.endpoint)
        if self._session.served or endpoint.scheme != "http" or endpoint.hostname is None:
            return False
        return await speaks_tls(endpoint.hostname, endpoint.port or 80, timeout_s=_DETAIL_TIMEOUT_S)

    async def head(self, key: str) -> dict[str, Any]:
        """HEAD an object.

        Raises:
            SourceError: Of the kind that fits; not located.
        """
        return await self.call("head_object", Key=key)

    async def get(self, key: str, start: int, end: int, tag: str, loan: Loan, accept: Callable[[Head], None]) -> None:
        """Ask for a range of an object at a version, without aiobotocore's body; see `S3Wire.get`.

        Raises:
            UnservedError: `call` must be asked instead.
            SourceError: Of the kind that fits; not located.
        """
        with self.translating(version=tag):
            async with self._pinned(key, tag):
                await self._mended(lambda session: session.wire.get(key, start, end, tag, loan, accept))

    @asynccontextmanager
    async def _pinned(self, key: str, version: str | None) -> AsyncIterator[None]:
        """Find out which version an object has now, where the one that was asked for is gone and nobody says."""
        try:
            yield
        except ClientError as error:
            if version is None or not is_changed(error) or other_tag(error_headers(error), version):
                raise
            now = await self._version_now(key, version)
            raise ObjectChangedError(f"the object is now {now}; the one seen first was {version}") from None

    async def _version_now(self, key: str, version: str) -> str:
        try:
            async with asyncio.timeout(_DETAIL_TIMEOUT_S):
                tag = (await self.head(key)).get("ETag")
        except SourceError as error:
            return f"another version, and which one cannot be told ({error.cause})"
        except TimeoutError:
            return f"another version, and which one is not told within {_DETAIL_TIMEOUT_S:g} s"
        if other_tag({} if tag is None else {"etag": tag}, version) is None:
            return f"said to be another version, then version {tag} again"
        return f"version {tag}"

    async def connection(self) -> Connection:
        """Where to ask, and with what.

        Raises:
            CredentialsError: They cannot be refreshed.
        """
        session = self._session
        with self.translating():
            credentials = await session.credentials.get_frozen_credentials()
        virtual = {"virtual host": True, "path": False}.get(self._style)
        return Connection(
            session.endpoint, session.region, virtual, credentials.access_key, credentials.secret_key, credentials.token
        )

    @contextmanager
    def translating(self, *, version: str | None = None) -> Iterator[None]:
        """Turn what aiobotocore raises inside into errors of ours."""
        try:
            yield
        except SourceError:
            raise
        except FOREIGN_ERRORS as error:
            # Not chained: their texts are not ours, and may show an endpoint with a password in it.
            raise translate_s3_error(error, host=self.host, bucket=self._asked.bucket, version=version) from None

    async def describe(self, prefix: str) -> dict[str, str]:
        """Endpoint, region, addressing style, kind of credentials, and the answer to one small listing."""
        session = self._session
        facts = {
            "endpoint": f"{urlsplit(session.endpoint).scheme}://{self.host}",
            "region": session.region,
            "credentials": session.kind_of_credentials,
        }
        answer: dict[str, Any] = {}
        asked = time.time()
        try:
            answer = await self._request("list_objects_v2", Prefix=prefix, MaxKeys=1)
            facts["answer"] = str(answer["ResponseMetadata"]["HTTPStatusCode"])
        except ClientError as error:
            answer = error.response
            code, status = error_code(error)
            facts["answer"] = f"{status} {code}".strip()
        except SourceError as error:
            facts["answer"] = f"none: {error.cause}"
        except FOREIGN_ERRORS as error:
            facts["answer"] = "none: " + translate_s3_error(error, host=self.host, bucket=self._asked.bucket).cause
        facts["addressing"] = self._style
        server_s = parse_http_date(answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date"))
        if server_s is not None:
            # The header counts whole seconds.
            facts["clock offset"] = f"{server_s - (asked + time.time()) / 2:+.0f} s"
        return facts

    async def aclose(self) -> None:
        """Close the connections."""
        try:
            await self._lanes.aclose()
        finally:
            await self._sessions.aclose()

    async def _request(self, operation: str, **arguments: Any) -> dict[str, Any]:
        return await self._mended(lambda session: session.request(operation, arguments))

    async def _mended(self, ask: Callable[[_Session], Awaitable[T]]) -> T:
        """Ask; and again, once, where the clock was wrong."""
        was_corrected = self._clock.corrected
        try:
            return await self._renewed(ask)
        except ClientError as error:
            if error_code(error)[0] != SKEWED or was_corrected:
                raise
            # Another request may have been told the same, and have corrected it.
            if not self._clock.corrected and not self._clock.correct(error_headers(error).get("date")):
                raise
        return await self._renewed(ask)

    async def _renewed(self, ask: Callable[[_Session], Awaitable[T]]) -> T:
        """Ask; and again, once, where the credentials had expired."""
        session = self._session
        try:
            answer = await ask(session)
        except ClientError as error:
            if error_code(error)[0] not in EXPIRED:
                raise
            await self._renew(session, error)
            session = self._session
            answer = await ask(session)
        session.served = True
        return answer

    async def _renew(self, expired: _Session, error: ClientError) -> None:
        """Have a session that is newer than this one."""
        failure = self._failure
        async with self._renewing:
            if self._session is not expired:
                return
            if not expired.served:
                # Found just now: there are no newer ones.
                raise error
            if self._failure is failure:
                try:
                    await self._begin()
                    return
                except SourceError as failed:
                    failed.cause = f"the credentials have expired, and newer ones cannot be had: {failed.cause}"
                    self._failure = failed
            # For whoever waited meanwhile, too; each locates an error of its own.
            assert self._failure is not None
            raise copy.copy(self._failure)

    async def _begin(self) -> None:
        session = await _Session.open(self._asked, self._clock, self._lanes, self._sent_to)
        self._sessions.push_async_callback(session.aclose)
        self._session = session
        self.host = _host_of(session.endpoint)

    def _sent_to(self, url: str) -> None:
        self._count()
        self.host = _host_of(url)
        bucket = self._asked.bucket
        if bucket.startswith("arn:"):
            self._style = "access point"
        else:
            self._style = "virtual host" if self.host.startswith(f"{bucket}.") else "path"


class _Session:
    """A client of aiobotocore's, with the credentials that were found when it was made.

    Attributes:
        endpoint: The URL of the service.
        region: Its region.
        credentials: botocore's.
        kind_of_credentials: Where they were found.
        wire: Reads ranges without aiobotocore's body.
        served: Whether anything was answered.
    """

    wire: S3Wire

    def __init__(self, client: Any, credentials: Any, stack: AsyncExitStack, asked: Asked) -> None:
        self._client = client
        self._stack = stack
        self._asked = asked
        self.endpoint = str(client.meta.endpoint_url)
        self.region = str(client.meta.region_name)
        self.credentials = credentials
        self.kind_of_credentials = "none, as asked for" if credentials is None else str(credentials.method)
        self.served = False

    @classmethod
    async def open(cls, asked: Asked, clock: ServerClock, lanes: Lanes, sent: Callable[[str], None]) -> Self:
        """Find credentials; nothing that an older session has read is used again."""
        settings = asked.settings
        config = AioConfig(
            # The pipeline retries, and knows from which byte on.
            retries={"total_max_attempts": 1, "mode": "standard"},
            connect_timeout=asked.connect_timeout_s,
            read_timeout=asked.read_timeout_s,
            max_pool_connections=asked.connections,
            # The checksum of a whole object says nothing about a range of it.
            response_checksum_validation="when_required",
            user_agent_extra="streamload",
            http_session_cls=BoundedSession,
            **({"signature_version": UNSIGNED} if asked.anonymous else {}),
            **({"s3": {"addressing_style": "virtual"}} if settings.virtual else {}),
        )
        try:
            session = get_session(_VARIABLES)
            session.register_component("data_loader", _models(session.get_config_variable("data_path")))
            session.register_component("response_parser_factory", StrictParsers())
            for name, value in (("region", settings.region), ("ca_bundle", settings.ca_bundle)):
                if value is not None:
                    session.set_config_variable(name, value)
            if settings.access_key_id is not None and settings.secret_access_key is not None:
                session.set_credentials(settings.access_key_id, settings.secret_access_key)
            credentials = None if asked.anonymous else await _find_credentials(session)
            # What aiobotocore and we go by: False, a file, or None for the usual certificates.
            verify: str | Literal[False] | None = False
            if settings.verify_tls:
                verify = session.get_config_variable("ca_bundle") or None
            creating = session.create_client("s3", config=config, endpoint_url=settings.endpoint_url, verify=verify)
            async with AsyncExitStack() as opening:
                try:
                    async with asyncio.TaskGroup() as group:
                        if verify:
                            # On a thread: it takes 50 ms, and not the interpreter's lock.
                            group.create_task(asyncio.to_thread(_check_ca_bundle, verify))
                        with _no_garbage_collected():
                            client = await opening.enter_async_context(creating)
                except ExceptionGroup as errors:
                    raise errors.exceptions[0] from None
                stack = opening.pop_all()
        except FOREIGN_ERRORS as error:
            if isinstance(error, SourceError):
                raise
            raise translate_s3_error(error, host="S3", bucket=asked.bucket) from None
        except ValueError as error:  # an endpoint that is no URL
            raise SourceError(str(error)) from None
        opened = cls(client, credentials, stack, asked)
        opened.wire = S3Wire(
            client,
            None if credentials is None else Signer(client, credentials, clock),
            asked.bucket,
            lanes,
            verify=verify,
            count=sent,
        )
        client.meta.events.register("before-parameter-build.s3", opened._complete)
        client.meta.events.register_first("needs-retry.s3.HeadBucket", _end_circles)
        client.meta.events.register_last("before-send.s3", lambda request, **_: sent(request.url))
        return opened

    async def request(self, operation: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Make a request and wait for the head of its answer.

        The answer to a HEAD has no body, so a refusal is asked for again in a way that names its reason.
        """
        try:
            return await self._ask(operation, arguments)
        except ClientError as error:
            code, status = error_code(error)
            if operation != "head_object" or code or status not in _UNEXPLAINED:
                raise
        which = {name: value for name, value in arguments.items() if name in {"Key", "IfMatch"}}
        answer = await self._ask("get_object", {**which, "Range": "bytes=0-0"})
        answer["Body"].close()
        # The reason is gone: the object has come, or the clock was corrected meanwhile.
        return await self._ask(operation, arguments)

    async def aclose(self) -> None:
        """Close aiobotocore's connections."""
        await self._stack.aclose()

    async def _ask(self, operation: str, arguments: dict[str, Any]) -> dict[str, Any]:
        async with asyncio.timeout(_ANSWER_TIMEOUT_S):
            answer: dict[str, Any] = await getattr(self._client, operation)(Bucket=self._asked.bucket, **arguments)
        return answer

    def _complete(self, params: dict[str, Any], model: Any, **_: Any) -> None:
        """Add what every request about an object or the bucket has, whoever makes it."""
        accepted = model.input_shape.members
        if self._asked.requester_pays and "RequestPayer" in accepted:
            params["RequestPayer"] = "requester"
        version = self._asked.versions.get(params.get("Key", ""))
        if version is not None and "VersionId" in accepted:
            params["VersionId"] = version


def _end_circles(response: tuple[Any, dict[str, Any]] | None, **_: Any) -> None:
    """Refuse a redirect that does not say where to.

    aiobotocore finds a bucket's region by a HEAD of the bucket; where that is redirected too, it asks in the same way
    again, until Python's stack is full.
    """
    if response is None or response[0].status_code not in _REDIRECTS:
        return
    if "x-amz-bucket-region" not in response[1]["ResponseMetadata"]["HTTPHeaders"]:
        raise SourceError(f"{_host_of(response[0].url)} redirects without end")


# Whether Python does not look for garbage because a client is being made.
_paused = False


@contextmanager
def _no_garbage_collected() -> Iterator[None]:
    """Have Python not look for garbage meanwhile.

    botocore makes so many objects for a client, which stay, that Python looks through all that the process has: with
    torch imported it takes 130 ms, in which no other thread runs. Of loads that begin at once, the first to begin is
    the one that has it look again. So it does after these 100 ms even if the program has turned it off within them.
    """
    global _paused
    if not gc.isenabled():
        yield
        return
    gc.disable()
    _paused = True
    try:
        yield
    finally:
        _paused = False
        gc.enable()


def _collect_again() -> None:
    """In a child that was forked meanwhile: it has not got the thread that would do so."""
    global _paused
    if _paused:
        _paused = False
        gc.enable()


os.register_at_fork(after_in_child=_collect_again)


@lru_cache(maxsize=1024)  # asked for each request, of which there are many for one object
def _host_of(url: str) -> str:
    # Scrubbed first: a password that nobody has escaped may hold what ends a host's name.
    return urlsplit(scrub_uri(url)).netloc.rpartition("@")[2]


class _AllServices(list[str]):
    """As good as a list of all services, to those who only ask whether one is in it."""

    def __contains__(self, name: object) -> bool:
        return True


class _Models(Loader):  # type: ignore[misc]
    """What reads botocore's descriptions of the services."""

    def list_available_services(self, type_name: str) -> list[str]:
        """Not looked for in four hundred folders, twice, which takes 20 ms: S3 is there, or is missed when read."""
        return _AllServices()


@cache
def _models(data_path: str | None) -> Loader:
    """One for the process: to parse what it reads takes some 40 ms, once."""
    return _Models(create_loader(data_path).search_paths, include_default_search_paths=False)


async def _find_credentials(session: AioSession) -> Any:
    try:
        async with asyncio.timeout(_CREDENTIALS_TIMEOUT_S) as limit:
            credentials = await session.get_credentials()
            if credentials is not None:
                # A role is assumed, and a token fetched, only when the keys are asked for.
                await credentials.get_frozen_credentials()
    except TimeoutError:
        if limit.expired():
            raise CredentialsError(f"looking for credentials took more than {_CREDENTIALS_TIMEOUT_S:g} s") from None
        raise
    except (FileNotFoundError, PermissionError, ValueError) as error:
        # A token's file that is not there, a program that cannot be run, an answer of it that makes no sense.
        raise CredentialsError(f"looking for AWS credentials failed: {error}") from None
    except KeyError as error:
        # Of an agent's answer; botocore does not look whether it is whole.
        raise CredentialsError(f"looking for AWS credentials failed: an answer lacks {error}") from None
    if credentials is None:
        raise CredentialsError(
            "no AWS credentials were found: not in the environment, nor in a profile, a container or an instance's role"
            " (a public bucket is read with s3_anonymous=True, --s3-anonymous or STREAMLOAD_S3_ANONYMOUS=1)"
        )
    return credentials


def _check_ca_bundle(path: str) -> None:
    """A bundle that is not there, or is none, would show as a connection that breaks, again and again."""
    try:
        ssl.create_default_context(cafile=path)
    except OSError as error:  # ssl.SSLError is one, too
        cause = error.strerror or error
        raise SourceError(f"the CA bundle {path!r} that the AWS configuration names is none: {cause}") from None
