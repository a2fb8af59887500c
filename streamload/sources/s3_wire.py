"""Ranges of S3 objects, straight from the socket into lent memory; addressed and signed as aiobotocore would."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import SplitResult, urlsplit

from botocore.awsrequest import AWSPreparedRequest, AWSRequest
from botocore.exceptions import ClientError
from botocore.httpsession import get_cert_path
from botocore.utils import get_environ_proxies

from streamload.errors import SourceError
from streamload.loan import Loan
from streamload.sources.s3_answers import parse_refusal
from streamload.sources.s3_signing import SIGNATURES, Moment, Signer, Signing, signing_of
from streamload.wire import Head, Lanes, Response, Server

__all__ = ["S3Wire", "UnservedError"]

# Sent again as they are; all else that aiobotocore sets (retries made, trace ids) is for its own request.
_KEPT_HEADERS = ("x-amz-request-payer", "x-amz-security-token")

_SIGNATURES = SIGNATURES

# Answers that mean another place or another way of asking, which aiobotocore finds.
_ELSEWHERE = {
    "PermanentRedirect",
    "TemporaryRedirect",
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
}


class UnservedError(Exception):
    """This request cannot be made here; aiobotocore can. Its text says why."""


class _Captured(Exception):
    """Ends aiobotocore's request when it is ready to be sent."""

    def __init__(self, request: AWSPreparedRequest) -> None:
        super().__init__("captured")
        self.request = request


@dataclass(frozen=True, slots=True)
class _Target:
    """How one object is asked for.

    Attributes:
        url: Where.
        server: Whom that means.
        signing: How it is signed; None where it is not.
        headers: What goes with every request.
    """

    url: str
    server: Server
    signing: Signing | None
    headers: Mapping[str, str]


# Set while a request is made only to see what it would be; how it is signed is put into it.
_capturing: ContextVar[list[Signing] | None] = ContextVar("_capturing", default=None)


class S3Wire:
    """Makes GetObject's requests for one bucket, without aiobotocore's connections.

    aiobotocore prepares the first request for each object; it knows endpoints, regions and addressing styles. Its URL
    and region serve for the object's other ranges, signed with the credentials of that moment, at the server's time.

    Args:
        client: aiobotocore's client.
        signer: Signs requests; None where none is signed.
        bucket: The bucket.
        lanes: Whose connections are used.
        verify: The CA bundle's path, None for the usual one, or False where any certificate will do.
        count: Called with the URL whenever a request is sent.
    """

    def __init__(
        self,
        client: Any,
        signer: Signer | None,
        bucket: str,
        lanes: Lanes,
        *,
        verify: str | Literal[False] | None,
        count: Callable[[str], None],
    ) -> None:
        self._client = client
        self._signer = signer
        self._bucket = bucket
        self._lanes = lanes
        self._verify = verify
        self._context: ssl.SSLContext | None = None
        self._count = count
        self._targets: dict[str, _Target] = {}
        self._unserved: dict[str, str] = {}
        self._heads: dict[str, tuple[Moment | None, str]] = {}
        client.meta.events.register_first("before-sign.s3.GetObject", _note_signing)
        # Before the handler that counts what is sent: this one ends the request, and nothing is.
        client.meta.events.register_first("before-send.s3.GetObject", _capture)

    async def get(self, key: str, start: int, end: int, tag: str, loan: Loan, accept: Callable[[Head], None]) -> None:
        """Ask for a range of an object at a version.

        Args:
            key: The object's key in the bucket.
            start: First byte.
            end: One past the last.
            tag: The ETag, sent as If-Match.
            loan: Where the bytes go.
            accept: Looks at the head of an answer that is no error; raises where it is not the one that was asked for.

        Raises:
            UnservedError: aiobotocore must be asked instead.
            ClientError: The server answered with an error.
            SourceError: The connection broke, or the answer is not one.
        """
        if key in self._unserved:
            raise UnservedError(self._unserved[key])
        target = self._targets.get(key) or await self._find_target(key)
        head = await self._signed_head(target)
        request = f"{head}Range: bytes={start}-{end - 1}\r\nIf-Match: {tag}\r\n\r\n".encode("latin-1")
        self._count(target.url)

        def place(head: Head) -> Sequence[memoryview] | None:
            if head.status >= 300:
                return None
            accept(head)
            if head.body_bytes is None:
                self._unserved[key] = "its answers do not say how long they are"
                raise UnservedError(self._unserved[key])
            return loan.views

        response = await self._lanes.ask(target.server, request, place, loan.landed)
        if response.head.status >= 300:
            error = _error(response)
            if response.head.status < 400 or error.response["Error"].get("Code") in _ELSEWHERE:
                self._targets.pop(key, None)
                # The URL may stay the same, and the region that is signed for not.
                self._heads.pop(target.url, None)
                raise UnservedError(f"redirected ({error.response['Error'].get('Code') or response.head.status})")
            raise error

    async def _find_target(self, key: str) -> _Target:
        signings: list[Signing] = []
        token = _capturing.set(signings)
        try:
            await self._client.get_object(Bucket=self._bucket, Key=key)
        except _Captured as captured:
            request = captured.request
        else:  # a handler that somebody registered answered in the server's place
            raise UnservedError("a handler of botocore's answers its requests")
        finally:
            _capturing.reset(token)
        if get_environ_proxies(request.url):
            raise UnservedError("a proxy is configured")
        signing = signings[-1] if signings and self._signer is not None else None
        if self._signer is not None and (signing is None or signing.version not in _SIGNATURES):
            way = "not at all" if signing is None else signing.version
            raise UnservedError(f"requests are signed in another way ({way})")
        headers = {name: _text(request.headers[name]) for name in _KEPT_HEADERS if name in request.headers}
        headers.pop("x-amz-security-token", None)  # of those credentials, not of this moment's
        target = self._targets[key] = _Target(request.url, self._server(urlsplit(request.url)), signing, headers)
        return target

    async def _signed_head(self, target: _Target) -> str:
        """What all requests for an object have in common within a second: everything but range and version.

        Those two are left out of the signature, as headers may be whose names do not begin with ``x-amz-`` (Amazon S3
        API reference, "Authenticating Requests: Using the Authorization Header"): to sign each range for itself took an
        eighth of a load's time. That an answer is the range and version that were asked for is checked on the answer.
        """
        moment = None if self._signer is None else await self._signer.moment()
        signed = self._heads.get(target.url)
        if signed is not None and signed[0] == moment:
            return signed[1]
        request = AWSRequest(method="GET", url=target.url, headers=dict(target.headers))
        request.context["payload_signing_enabled"] = False
        if self._signer is not None and target.signing is not None and moment is not None:
            self._signer.sign(request, target.signing.region, target.signing.service, moment)
        parts = urlsplit(target.url)
        where = parts.path + (f"?{parts.query}" if parts.query else "")
        host = parts.netloc.rpartition("@")[2]
        lines = [f"GET {where} HTTP/1.1", f"Host: {host}", "Accept-Encoding: identity"]
        lines += [f"{name}: {value}" for name, value in request.headers.items()]
        head = "\r\n".join([*lines, ""])
        self._heads[target.url] = (moment, head)
        return head

    def _server(self, parts: SplitResult) -> Server:
        assert parts.hostname is not None
        secure = parts.scheme == "https"
        return Server(parts.hostname, parts.port or (443 if secure else 80), self._tls() if secure else None)

    def _tls(self) -> ssl.SSLContext:
        if self._context is None:
            try:
                self._context = ssl.create_default_context(cafile=self._verify or get_cert_path(True))
                if self._verify is False:
                    self._context.check_hostname = False
                    self._context.verify_mode = ssl.CERT_NONE
            except OSError as error:
                raise SourceError(f"the CA bundle {self._verify!r} cannot be read: {error}") from None
        return self._context


def _note_signing(request: AWSRequest, region_name: str, signing_name: str, signature_version: Any, **_: Any) -> None:
    signings = _capturing.get()
    if signings is not None:
        signings.append(signing_of(request, region_name, signing_name, signature_version))


def _capture(request: AWSPreparedRequest, **_: Any) -> None:
    if _capturing.get() is not None:
        raise _Captured(request)


def _text(value: Any) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def _error(response: Response) -> ClientError:
    """What botocore would have raised."""
    return ClientError(parse_refusal(response.head.status, response.head.headers, response.explanation), "GetObject")
