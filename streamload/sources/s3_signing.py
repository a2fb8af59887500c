"""Signatures made at the server's time: a machine whose clock is wrong can read all the same."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

from botocore.auth import SIGV4_TIMESTAMP, S3SigV4Auth
from botocore.awsrequest import AWSRequest

from streamload.sources.http_answers import parse_http_date

__all__ = ["SIGNATURES", "Moment", "ServerClock", "Signer", "Signing", "signing_of"]

#: The versions of signatures that `Signer` makes, as botocore calls them.
SIGNATURES = frozenset({"v4", "s3v4"})

# Under which `Signer` finds how a request was signed; a request's context is for handlers to leave things in.
_NOTE = "streamload-signing"


class ServerClock:
    """What time it is for the server: this machine's time, until the server refuses it.

    From then on it is the time that the server named, carried on by the monotonic clock: this machine's own may be set
    right meanwhile, which must not spoil it again.

    Attributes:
        corrected: Whether the server's time is used.
    """

    def __init__(self) -> None:
        self._origin_s: float | None = None
        self._stamp = (0, "")  # the second that was asked for last, and its text

    @property
    def corrected(self) -> bool:
        return self._origin_s is not None

    def correct(self, date: str | None) -> bool:
        """Take over the time in the ``Date`` header of an answer; whether there is one."""
        server_s = parse_http_date(date)
        if server_s is None:
            return False
        # In whole seconds, and somewhat old when it comes here; S3 allows a quarter of an hour.
        self._origin_s = server_s - time.monotonic()
        return True

    def timestamp(self) -> str:
        """The time to sign with, as signatures have it."""
        seconds = time.time() if self._origin_s is None else self._origin_s + time.monotonic()
        if self._stamp[0] != int(seconds):
            self._stamp = (int(seconds), datetime.fromtimestamp(seconds, UTC).strftime(SIGV4_TIMESTAMP))
        return self._stamp[1]


@dataclass(frozen=True, slots=True)
class Signing:
    """How a request is signed.

    Attributes:
        region: Whose signature is expected.
        service: What the service calls itself: access points of other services than S3 have names of their own.
        version: Of the signature.
    """

    region: str
    service: str
    version: str


def signing_of(request: AWSRequest, region_name: str, signing_name: str, signature_version: Any) -> Signing:
    """What a ``before-sign`` event says of a request; its own context counts more than the client's settings."""
    context = request.context.get("signing", {})
    return Signing(
        str(context.get("region") or region_name),
        str(context.get("signing_name") or signing_name),
        str(signature_version),
    )


class Moment(NamedTuple):
    """What a signature depends on beside the request: within one moment the same request is signed alike.

    Attributes:
        credentials: botocore's frozen ones.
        timestamp: The server's time, in whole seconds, as signatures have it.
    """

    credentials: Any
    timestamp: str


class Signer:
    """Signs requests to S3 with the credentials of the moment, at the server's time.

    Args:
        client: aiobotocore's client. Once the clock is corrected, its requests are signed here again.
        credentials: Its credentials, which refresh themselves.
        clock: The server's.
    """

    def __init__(self, client: Any, credentials: Any, clock: ServerClock) -> None:
        self._credentials = credentials
        self._clock = clock
        client.meta.events.register("before-sign.s3", _note)
        # botocore's signers read the machine's clock, and take no other one; the one that awscrt brings does not even
        # pass the time through Python. So what they have signed is signed again. Last: after botocore's own handler.
        client.meta.events.register_last("request-created.s3", self._sign_again)

    async def moment(self) -> Moment:
        """The credentials and the time of now; credentials that are about to expire are refreshed first."""
        credentials = await self._credentials.get_frozen_credentials()
        return Moment(credentials, self._clock.timestamp())

    def sign(self, request: AWSRequest, region: str, service: str, moment: Moment) -> None:
        """Put date, token and signature into a request's headers, in place of those it has."""
        _TimedAuth(moment, service, region).add_auth(request)

    async def _sign_again(self, request: AWSRequest, **_: Any) -> None:
        signing = request.context.get(_NOTE)
        if self._clock.corrected and signing is not None and signing.version in SIGNATURES:
            self.sign(request, signing.region, signing.service, await self.moment())


class _TimedAuth(S3SigV4Auth):  # type: ignore[misc]
    def __init__(self, moment: Moment, service: str, region: str) -> None:
        super().__init__(moment.credentials, service, region)
        self._timestamp = moment.timestamp

    def _modify_request_before_signing(self, request: AWSRequest) -> None:
        # The first thing that `add_auth` calls; what it signs is the time that it has noted here.
        request.context["timestamp"] = self._timestamp
        super()._modify_request_before_signing(request)


def _note(request: AWSRequest, region_name: str, signing_name: str, signature_version: Any, **_: Any) -> None:
    request.context[_NOTE] = signing_of(request, region_name, signing_name, signature_version)
