"""What an error of botocore, aiohttp or the S3 server means for a request."""

from __future__ import annotations

import aiohttp
from botocore import exceptions as boto
from botocore.parsers import ResponseParserError

from streamload.errors import (
    AccessError,
    CredentialsError,
    NotFoundError,
    ObjectChangedError,
    SourceError,
    TransientError,
    TruncatedReadError,
)

__all__ = ["FOREIGN_ERRORS", "error_code", "translate_s3_error"]

#: What aiobotocore lets out; anything else is a mistake in this package and is not dressed up as an answer of S3's.
FOREIGN_ERRORS: tuple[type[Exception], ...] = (
    boto.BotoCoreError,
    boto.ClientError,
    ResponseParserError,
    aiohttp.ClientError,
    OSError,
)

_OPERATIONS = {"GetObject", "HeadObject", "ListObjectsV2"}

_CODES: dict[str, type[SourceError]] = {
    "NoSuchBucket": NotFoundError,
    "NoSuchKey": NotFoundError,
    "NoSuchVersion": NotFoundError,
    "AccessDenied": AccessError,
    "AllAccessDisabled": AccessError,
    "AccountProblem": AccessError,
    "InvalidAccessKeyId": CredentialsError,
    "SignatureDoesNotMatch": CredentialsError,
    "ExpiredToken": CredentialsError,
    "InvalidToken": CredentialsError,
    "TokenRefreshRequired": CredentialsError,
    "InvalidClientTokenId": CredentialsError,
    "UnrecognizedClientException": CredentialsError,
    "PreconditionFailed": ObjectChangedError,
    "InvalidRange": SourceError,
    "InvalidObjectState": SourceError,
    "InternalError": TransientError,
    "ServiceUnavailable": TransientError,
    "SlowDown": TransientError,
    "SlowDownRead": TransientError,  # MinIO's
    "Busy": TransientError,
    "BandwidthLimitExceeded": TransientError,
    "OperationAborted": TransientError,
    "RequestLimitExceeded": TransientError,
    "RequestThrottled": TransientError,
    "RequestTimeout": TransientError,
    "RequestTimeTooSkewed": TransientError,  # a clock that is being set; a wrong one fails soon enough
    "Throttling": TransientError,
    "ThrottlingException": TransientError,
    "TooManyRequests": TransientError,
}

# With these the server asks for fewer requests.
_THROTTLED = {
    "SlowDown",
    "SlowDownRead",
    "ServiceUnavailable",
    "Busy",
    "BandwidthLimitExceeded",
    "RequestLimitExceeded",
    "RequestThrottled",
    "RequestTimeout",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
}
_THROTTLED_STATUSES = {408, 429, 503}

# For answers without a code: those to HEAD, and those of proxies and load balancers.
_STATUSES: dict[int, type[SourceError]] = {
    401: CredentialsError,
    403: AccessError,
    404: NotFoundError,
    408: TransientError,
    412: ObjectChangedError,
    429: TransientError,
    500: TransientError,
    502: TransientError,
    503: TransientError,
    504: TransientError,
}

_ADVICE = {
    "InvalidObjectState": "the object is archived and must be restored first",
    "RequestTimeTooSkewed": "this machine's clock and the server's differ too much",
    "PermanentRedirect": "the bucket is in another region than the one that was asked",
    "AuthorizationHeaderMalformed": "the bucket is in another region than the one that was asked",
}

_CREDENTIALS_ERRORS = (
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.CredentialRetrievalError,
    boto.MetadataRetrievalError,
    boto.NoAuthTokenError,
    boto.TokenRetrievalError,
    boto.UnknownCredentialError,
    boto.RefreshWithMFAUnsupportedError,
    boto.SSOError,
    boto.ProfileNotFound,
    boto.ConfigNotFound,
    boto.ConfigParseError,
    boto.InvalidConfigError,
)

_CONNECTION_ERRORS = (
    boto.HTTPClientError,
    boto.ConnectionError,
    aiohttp.ClientError,
    OSError,
)


def error_code(error: boto.ClientError) -> tuple[str, int]:
    """The server's code, empty where it sent none, and the HTTP status (0 where that is unknown)."""
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    # Without a body botocore makes the status the code.
    return ("" if code.isdigit() else code), status


def translate_s3_error(error: Exception, *, host: str, bucket: str, version: str | None = None) -> SourceError:
    """The error of ours that says the same; the caller locates it.

    Args:
        error: One of `FOREIGN_ERRORS`.
        host: Who was asked, for the text.
        bucket: The bucket, for the text.
        version: The tag that the request pinned.
    """
    if isinstance(error, boto.ClientError):
        return _answered(error, bucket, version)
    if isinstance(error, _CREDENTIALS_ERRORS):
        return CredentialsError(str(error))
    if isinstance(error, boto.SSLError | aiohttp.ClientSSLError):
        reason = _reason(error)
        kind = SourceError if isinstance(reason, aiohttp.ClientConnectorCertificateError) else TransientError
        return kind(f"no secure connection to {host}: {reason}")
    if isinstance(error, aiohttp.ClientPayloadError | boto.IncompleteReadError):
        return TruncatedReadError(f"the connection to {host} ended inside the body")
    # Where aiohttp cannot make sense of the URL itself, another try has the same URL.
    if isinstance(error, _CONNECTION_ERRORS) and not isinstance(_reason(error), ValueError):
        return TransientError(_connection_cause(error, host))
    return SourceError(f"{type(error).__name__}: {error}")


def _answered(error: boto.ClientError, bucket: str, version: str | None) -> SourceError:
    code, status = error_code(error)
    message = str(error.response.get("Error", {}).get("Message", ""))
    cause = " ".join(part for part in (f"the server answered {status}", code and f"{code}:", message) if part)
    if error.operation_name not in _OPERATIONS:
        # Another service was asked, for credentials.
        return CredentialsError(f"{error.operation_name} failed: {cause}")
    kind = _CODES.get(code) or _STATUSES.get(status, SourceError)
    if code == "NoSuchBucket":
        cause = f"there is no bucket {bucket!r}"
    elif kind is NotFoundError:
        cause = "there is no such object"
    elif kind is ObjectChangedError:
        cause = f"the object is no longer the version {version} that was seen first"
    elif code in _ADVICE:
        cause = f"{_ADVICE[code]} ({cause})"
    if kind is TransientError:
        return TransientError(cause, throttled=code in _THROTTLED or (not code and status in _THROTTLED_STATUSES))
    return kind(cause)


def _connection_cause(error: Exception, host: str) -> str:
    if isinstance(error, boto.ConnectTimeoutError):
        return f"no connection to {host} in time"
    if isinstance(error, boto.ReadTimeoutError | TimeoutError):
        return f"{host} sent nothing for too long"
    reason = _reason(error)
    text = str(reason) or type(reason).__name__
    if isinstance(error, boto.EndpointConnectionError | boto.ProxyConnectionError):
        return f"cannot reach {host}: {text}"
    return f"the connection to {host} broke: {text}"


def _reason(error: Exception) -> Exception:
    """The error that botocore's stands for."""
    reason = getattr(error, "kwargs", {}).get("error")
    return reason if isinstance(reason, Exception) else error
