"""What an error of botocore, aiohttp or the S3 server means for a request."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from urllib.parse import urlsplit

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
from streamload.sources.http_answers import ERRORS, THROTTLED, parse_http_date, retry_after_s
from streamload.wire import NO_TLS, ONLY_TLS, is_plain

__all__ = [
    "EXPIRED",
    "FOREIGN_ERRORS",
    "SKEWED",
    "error_code",
    "error_headers",
    "is_changed",
    "other_tag",
    "translate_s3_error",
]

#: What aiobotocore lets out; anything else is a mistake in this package and is not dressed up as an answer of S3's.
FOREIGN_ERRORS: tuple[type[Exception], ...] = (
    boto.BotoCoreError,
    boto.ClientError,
    ResponseParserError,
    aiohttp.ClientError,
    OSError,
)

#: Codes of credentials that were good once.
EXPIRED = frozenset({"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"})

#: The code of a signature whose time is too far from the server's.
SKEWED = "RequestTimeTooSkewed"

# S3's own operations, and what a policy must allow for them.
_PERMISSIONS = {
    "GetObject": "s3:GetObject",
    "GetObjectAttributes": "s3:GetObjectAttributes",
    "HeadObject": "s3:GetObject",
    "ListObjectsV2": "s3:ListBucket",
    "ListMultipartUploads": "s3:ListBucketMultipartUploads",
    "ListParts": "s3:ListMultipartUploadParts",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "DeleteObject": "s3:DeleteObject",
}

# In the text of a refusal: of an action or a key of KMS's, not of a bucket that is called so.
_ABOUT_KMS = re.compile(r"\bkms:|\bKMS\b")

_CODES: dict[str, type[SourceError]] = {
    "NoSuchBucket": NotFoundError,
    "NoSuchKey": NotFoundError,
    "NoSuchUpload": NotFoundError,
    "NoSuchVersion": NotFoundError,
    "AccessDenied": AccessError,
    "AllAccessDisabled": AccessError,
    "AccountProblem": AccessError,
    "InvalidAccessKeyId": CredentialsError,
    "SignatureDoesNotMatch": CredentialsError,
    **dict.fromkeys(EXPIRED, CredentialsError),
    "InvalidToken": CredentialsError,
    "InvalidClientTokenId": CredentialsError,
    "UnrecognizedClientException": CredentialsError,
    "PreconditionFailed": ObjectChangedError,
    "InvalidRange": SourceError,
    SKEWED: SourceError,  # the clock was corrected already, or cannot be
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
    "TooManyRequests": TransientError,
    "TooManyRequestsException": TransientError,
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
    "TooManyRequests",
    "TooManyRequestsException",
}

_ADVICE = {
    **dict.fromkeys(EXPIRED, "the credentials have expired, and no newer ones were found"),
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


def error_headers(error: boto.ClientError) -> Mapping[str, str]:
    """The headers of the answer, by lower-case name."""
    headers: Mapping[str, str] = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    return headers


def is_changed(error: boto.ClientError) -> bool:
    """Whether the object is no longer the version that the request pinned."""
    code, status = error_code(error)
    return _CODES.get(code, ERRORS.get(status) if not code else None) is ObjectChangedError


def other_tag(headers: Mapping[str, str], version: str) -> str | None:
    """The tag that an answer names, where it is another one than the request pinned."""
    tag = headers.get("etag")
    return None if tag is None or tag.strip('"') == version.strip('"') else tag


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
    reason = _reason(error)
    if isinstance(error, boto.ProxyConnectionError):
        return _through_proxy(error, reason, host)
    if isinstance(error, boto.SSLError | aiohttp.ClientSSLError):
        if is_plain(getattr(reason, "os_error", None)):
            return SourceError(f"no secure connection to {host}: {NO_TLS}")
        kind = SourceError if isinstance(reason, aiohttp.ClientConnectorCertificateError) else TransientError
        return kind(f"no secure connection to {host}: {_text(reason)}")
    if isinstance(error, aiohttp.ClientPayloadError | boto.IncompleteReadError):
        return TruncatedReadError(f"the connection to {host} ended inside the body")
    if isinstance(reason, aiohttp.ClientResponseError):
        return SourceError(f"no answer from {host}: {_no_http(reason)}")
    # Where aiohttp cannot make sense of the URL itself, another try has the same URL.
    if isinstance(error, _CONNECTION_ERRORS) and not isinstance(reason, ValueError):
        return TransientError(_connection_cause(error, host))
    return SourceError(f"{type(error).__name__}: {error}")


def _answered(error: boto.ClientError, bucket: str, version: str | None) -> SourceError:
    code, status = error_code(error)
    message = str(error.response.get("Error", {}).get("Message", ""))
    cause = " ".join(part for part in (f"the server answered {status}", code and f"{code}:", message) if part)
    if error.operation_name not in _PERMISSIONS:
        # Another service was asked, for credentials.
        return CredentialsError(f"{error.operation_name} failed: {cause}")
    # KMS's own codes come with 400 mostly, whatever they mean.
    by_kms = code.startswith("KMS.")
    throttling = code.removeprefix("KMS.").startswith("Throttl")
    if throttling or (by_kms and status >= 500):
        kind: type[SourceError] = TransientError
    elif by_kms:
        kind = AccessError
    elif status == 405 and error_headers(error).get("x-amz-delete-marker") == "true":
        kind = NotFoundError
    else:
        # Answers to HEAD, and those of proxies and load balancers, have no code.
        kind = _CODES.get(code) or ERRORS.get(status, SourceError)
    cause = _explanation(error, kind, cause, bucket, version)
    if kind is TransientError:
        asked_less = throttling or code in _THROTTLED or status == 429
        return TransientError(
            cause,
            throttled=asked_less or (not code and status in THROTTLED),
            retry_after_s=retry_after_s(error_headers(error)),
        )
    return kind(cause)


def _explanation(error: boto.ClientError, kind: type[SourceError], cause: str, bucket: str, version: str | None) -> str:
    """What an answer means for whoever asked; with the server's own words where they may say more."""
    code, status = error_code(error)
    details = error.response.get("Error", {})
    if code == "NoSuchBucket":
        return f"there is no bucket {bucket!r}"
    if code == "NoSuchVersion":
        return "the object has no such version"
    if kind is NotFoundError:
        return "this version marks that the object was deleted" if status == 405 else "there is no such object"
    if kind is ObjectChangedError:
        tag = other_tag(error_headers(error), version or "")
        if tag is None:
            return f"the object is no longer the version {version} that was seen first"
        return f"the object is now version {tag}; the one seen first was {version}"
    if code == "InvalidObjectState":
        where = f" in {details['StorageClass']}" if "StorageClass" in details else ""
        return f"the object is archived{where} and must be restored first ({cause})"
    if kind is AccessError and (code.startswith("KMS.") or _ABOUT_KMS.search(str(details.get("Message", "")))):
        return f"the object is encrypted with a key of KMS that may not be used, which needs kms:Decrypt ({cause})"
    if code == "AccessDenied":
        return f"access is refused; this needs {_PERMISSIONS[error.operation_name]} ({cause})"
    if code == SKEWED:
        return f"{_difference(error_headers(error).get('date'))} ({cause})"
    return f"{_ADVICE[code]} ({cause})" if code in _ADVICE else cause


def _difference(date: str | None) -> str:
    """By how much this machine's clock differs from the server's, which has answered with this date."""
    server_s = parse_http_date(date)
    if server_s is None:
        return "this machine's clock and the server's differ too much"
    ahead_s = time.time() - server_s
    return f"this machine's clock is {abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} the server's"


def _through_proxy(error: Exception, reason: Exception, host: str) -> SourceError:
    proxy = str(getattr(error, "kwargs", {}).get("proxy_url", ""))
    # User name and password are masked, and say nothing.
    cause = f"cannot reach {host} through the proxy {proxy.rpartition('@')[2].rpartition('://')[2]}"
    if not isinstance(reason, aiohttp.ClientHttpProxyError):
        return TransientError(f"{cause}: {_text(reason)}")
    # Its own refusal (of its user, of the host) stays; that it cannot reach the host may pass.
    kind = TransientError if reason.status >= 500 else SourceError
    return kind(f"{cause}: it answered {reason.status} {reason.message}".rstrip())


def _no_http(reason: aiohttp.ClientResponseError) -> str:
    if isinstance(reason, aiohttp.TooManyRedirects):
        return "it redirects without end"
    # aiohttp keeps the bytes only as it shows them.
    return ONLY_TLS if r"b'\x15\x03" in reason.message else f"it is not HTTP: {reason.message}"


def _text(reason: Exception) -> str:
    """What went wrong, without the objects that aiohttp shows as well."""
    if isinstance(reason, aiohttp.ClientConnectorError):
        reason = reason.os_error
        return (isinstance(reason, OSError) and reason.strerror) or str(reason) or type(reason).__name__
    return str(reason) or type(reason).__name__


def _connection_cause(error: Exception, host: str) -> str:
    if isinstance(error, boto.ConnectTimeoutError):
        return f"no connection to {host} in time"
    if isinstance(error, boto.ReadTimeoutError | TimeoutError):
        return f"{host} sent nothing for too long"
    reason = _reason(error)
    if isinstance(error, boto.EndpointConnectionError):
        # Where the proxy's name cannot be looked up, nothing but that name tells it from the host's.
        if isinstance(reason, aiohttp.ClientConnectorError) and reason.host != urlsplit(f"//{host}").hostname:
            host += f" through the proxy {reason.host}"
        return f"cannot reach {host}: {_text(reason)}"
    return f"the connection to {host} broke: {_text(reason)}"


def _reason(error: Exception) -> Exception:
    """The error that botocore's stands for."""
    reason = getattr(error, "kwargs", {}).get("error")
    return reason if isinstance(reason, Exception) else error
