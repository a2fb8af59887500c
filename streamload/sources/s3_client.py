"""An aiobotocore client for one bucket: opened with care, its requests counted, its errors ours."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from email.utils import parsedate_to_datetime
from functools import cache
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from aiobotocore.config import AioConfig
from aiobotocore.session import AioSession, get_session
from botocore.exceptions import ClientError
from botocore.loaders import Loader, create_loader

from streamload.errors import CredentialsError, SourceError
from streamload.sources.s3_errors import FOREIGN_ERRORS, error_code, translate_s3_error
from streamload.sources.s3_wire import S3Wire

__all__ = ["S3Client"]

# Looking for credentials may run a program, or ask STS or a container's agent, each with retries of its own.
_CREDENTIALS_TIMEOUT_S = 30.0

# From the request to the head of the answer. The connection's own timeouts do not cover looking up the host's name, or
# a server that sends its head byte by byte.
_ANSWER_TIMEOUT_S = 60.0

# Statuses that S3 gives for several reasons: expired keys, unknown keys or no permission, no bucket or no object.
_UNEXPLAINED = {400, 401, 403, 404}


class S3Client:
    """Asks S3 about one bucket.

    Attributes:
        host: Who is asked: host and port.
        wire: Reads ranges without aiobotocore's body.
    """

    wire: S3Wire

    def __init__(self, client: Any, credentials: Any, stack: AsyncExitStack, bucket: str) -> None:
        self._client = client
        self._credentials = credentials
        self._stack = stack
        self._bucket = bucket
        self._style = "unknown"
        self.host = urlsplit(client.meta.endpoint_url).netloc.rpartition("@")[2]

    @classmethod
    async def open(
        cls,
        bucket: str,
        *,
        connections: int,
        connect_timeout_s: float,
        read_timeout_s: float,
        count: Callable[[], None],
    ) -> Self:
        """Find the credentials and make the client; S3 itself is not asked yet.

        Args:
            bucket: The bucket.
            connections: How many connections there may be at once.
            connect_timeout_s: How long making one may take.
            read_timeout_s: How long it may be silent.
            count: Called whenever a request is sent.

        Raises:
            CredentialsError: There are none.
            SourceError: The configuration found in the environment makes no sense.
        """
        config = AioConfig(
            # The pipeline retries, and knows from which byte on.
            retries={"total_max_attempts": 1, "mode": "standard"},
            connect_timeout=connect_timeout_s,
            read_timeout=read_timeout_s,
            max_pool_connections=connections,
            # The checksum of a whole object says nothing about a range of it.
            response_checksum_validation="when_required",
            user_agent_extra="streamload",
        )
        stack = AsyncExitStack()
        try:
            session = get_session()
            session.register_component("data_loader", _models(session.get_config_variable("data_path")))
            credentials = await _find_credentials(session)
            _check_ca_bundle(session)
            client = await stack.enter_async_context(session.create_client("s3", config=config))
        except FOREIGN_ERRORS as error:
            if isinstance(error, SourceError):
                raise
            raise translate_s3_error(error, host="S3", bucket=bucket) from None
        except ValueError as error:  # an endpoint that is no URL
            raise SourceError(str(error)) from None
        opened = cls(client, credentials, stack, bucket)

        def sent(url: str) -> None:
            count()
            opened._sent_to(url)

        opened.wire = S3Wire(
            client,
            credentials,
            bucket,
            verify=session.get_config_variable("ca_bundle"),
            connect_timeout_s=connect_timeout_s,
            stall_s=read_timeout_s,
            count=sent,
        )

        def before_send(request: Any, **_: Any) -> None:
            sent(request.url)

        client.meta.events.register_last("before-send.s3", before_send)
        return opened

    async def call(self, operation: str, *, version: str | None = None, **arguments: Any) -> dict[str, Any]:
        """Make a request and wait for the head of its answer.

        Args:
            operation: The client's method: ``get_object``.
            version: The tag that the request pins, for the error.
            **arguments: The method's, all but the bucket.

        Returns:
            The answer. A body in it is the caller's to close.

        Raises:
            SourceError: Of the kind that fits; not located.
        """
        with self.translating(version=version):
            return await self._request(operation, **arguments)

    @contextmanager
    def translating(self, *, version: str | None = None) -> Iterator[None]:
        """Turn what aiobotocore raises inside into errors of ours."""
        try:
            yield
        except SourceError:
            raise
        except RecursionError:
            # To find the bucket's region aiobotocore asks the same server, which redirects that too.
            raise SourceError(f"{self.host} redirects without end") from None
        except FOREIGN_ERRORS as error:
            # Not chained: their texts are not ours, and may show an endpoint with a password in it.
            raise translate_s3_error(error, host=self.host, bucket=self._bucket, version=version) from None

    async def head(self, key: str) -> dict[str, Any]:
        """HEAD an object. Its answers have no bodies, so a refusal is asked for again in a way that names its reason.

        Raises:
            SourceError: Of the kind that fits; not located.
        """
        with self.translating():
            try:
                return await self._request("head_object", Key=key)
            except ClientError as error:
                code, status = error_code(error)
                if not code and status in _UNEXPLAINED:
                    answer = await self._request("get_object", Key=key, Range="bytes=0-0")
                    answer["Body"].close()
                raise

    async def describe(self, prefix: str) -> dict[str, str]:
        """Endpoint, region, addressing style, kind of credentials, and the answer to one small listing."""
        facts = {
            "endpoint": f"{urlsplit(self._client.meta.endpoint_url).scheme}://{self.host}",
            "region": str(self._client.meta.region_name),
            "credentials": str(self._credentials.method),
        }
        asked = time.time()
        try:
            answer = await self._request("list_objects_v2", Prefix=prefix, MaxKeys=1)
            facts["answer"] = str(answer["ResponseMetadata"]["HTTPStatusCode"])
        except ClientError as error:
            answer = error.response
            code, status = error_code(error)
            facts["answer"] = f"{status} {code}".strip()
        except FOREIGN_ERRORS as error:
            answer = {}
            facts["answer"] = "none: " + translate_s3_error(error, host=self.host, bucket=self._bucket).cause
        facts["addressing"] = self._style
        date = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
        if date is not None:
            offset_s = parsedate_to_datetime(date).timestamp() - (asked + time.time()) / 2
            # The header counts whole seconds.
            facts["clock offset"] = f"{offset_s:+.0f} s"
        return facts

    async def aclose(self) -> None:
        """Close the connections."""
        try:
            await self.wire.aclose()
        finally:
            await self._stack.aclose()

    async def _request(self, operation: str, **arguments: Any) -> dict[str, Any]:
        async with asyncio.timeout(_ANSWER_TIMEOUT_S):
            answer: dict[str, Any] = await getattr(self._client, operation)(Bucket=self._bucket, **arguments)
        return answer

    def _sent_to(self, url: str) -> None:
        self.host = urlsplit(url).netloc.rpartition("@")[2]
        self._style = "virtual host" if self.host.startswith(f"{self._bucket}.") else "path"


@cache
def _models(data_path: str | None) -> Loader:
    """What reads botocore's descriptions of the services; parsing S3's takes a tenth of a second, once."""
    return create_loader(data_path)


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
    if credentials is None:
        raise CredentialsError(
            "no AWS credentials were found: not in the environment, nor in a profile, a container or an instance's role"
        )
    return credentials


def _check_ca_bundle(session: AioSession) -> None:
    """A bundle that is not there would show as a connection that breaks, again and again."""
    bundle = session.get_config_variable("ca_bundle")
    if bundle and not Path(bundle).exists():
        raise SourceError(f"the CA bundle {bundle!r} that the AWS configuration names is not there")
