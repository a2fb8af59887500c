"""How a checkpoint is named: URIs, taken apart and shown without credentials."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, urlencode, urlsplit

__all__ = ["scheme_of", "scrub", "scrub_uri"]

# Query fields that say which bytes are meant and are safe to show; everything else may be a signature or a token.
_SHOWN_QUERY_FIELDS = frozenset({"requestPayer", "versionId"})
_HIDDEN = "***"

_SECRETS = re.compile(
    r"(?P<key>\b(?:AKIA|ASIA|AROA)[A-Z0-9]{12,124}\b)"
    r"|(?P<field>(?:X-Amz-(?:Signature|Credential|Security-Token)|Signature|AWSAccessKeyId"
    r"|secret_?access_?key|session_?token)[\"']?\s*[=:]\s*[\"']?)[^\s&\"',;]+"
    r"|(?P<bearer>\bAuthorization:\s*(?:Bearer\s+|Basic\s+)?|\bBearer\s+)\S+"
    # The last @ counts: a password that nobody has escaped can hold others, and slashes.
    r"|(?P<scheme>\b[a-z][a-z0-9+.-]*://)(?:(?!arn:)[^/\s:@]*:(?!\d+(?:[/\s]|$))\S*@|[^/\s]+@)",
    re.IGNORECASE,
)


def scheme_of(uri: str) -> str:
    """The URI's scheme in lower case; ``file`` for a plain path."""
    scheme, separator, _ = uri.partition("://")
    return scheme.lower() if separator else "file"


def scrub_uri(uri: str) -> str:
    """The URI without user name, password and any query field that could be a credential."""
    if "://" not in uri:
        return uri
    uri = scrub(uri)
    try:
        parts = urlsplit(uri)
        query = parse_qsl(parts.query, keep_blank_values=True)
    except ValueError:
        return uri
    host = parts.netloc.rpartition("@")[2]
    shown = urlencode([(k, v if k in _SHOWN_QUERY_FIELDS else _HIDDEN) for k, v in query], safe="*")
    # Not urlunsplit, which leaves the slashes out where there is no host.
    return f"{parts.scheme}://{host}{parts.path}" + (f"?{shown}" if shown else "")


def scrub(text: str) -> str:
    """Free text with everything that looks like a credential replaced: what a library's own message may carry."""

    def hide(match: re.Match[str]) -> str:
        kept = match["field"] or match["bearer"] or match["scheme"] or ""
        return kept + _HIDDEN + ("@" if match["scheme"] else "")

    return _SECRETS.sub(hide, text)
