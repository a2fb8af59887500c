"""What the Hub's refusals mean, and what to do about them."""

from __future__ import annotations

from dataclasses import dataclass

from streamload.errors import (
    AccessError,
    CredentialsError,
    NotFoundError,
    OptionError,
    SourceError,
    StreamloadError,
    TransientError,
)
from streamload.sources.http_errors import refusal
from streamload.wire import Head

__all__ = ["Asked", "hub_refusal", "translate_hub_error"]

_LOG_IN = "set HF_TOKEN or run `hf auth login`"


@dataclass(frozen=True, slots=True)
class Asked:
    """What the Hub was asked for.

    Attributes:
        endpoint: The Hub's URL.
        repository: ``org/model``.
        revision: As it was given; None for the default one.
        with_token: Whether a token was sent.
    """

    endpoint: str
    repository: str
    revision: str | None
    with_token: bool


def hub_refusal(head: Head, host: str, asked: Asked) -> SourceError:
    """The error that an answer of the Hub's means; the caller locates it.

    The Hub says in headers of its own what it refuses: it answers 401 to whoever asks for what does not exist.

    Args:
        head: The answer's, with a status of 400 or more.
        host: Who answered.
        asked: What was asked for.
    """
    code, message = head.headers.get("x-error-code", ""), head.headers.get("x-error-message", "")
    said = f"{host} answered {head.status}{f' {code}' if code else ''}"
    page = f"{asked.endpoint}/{asked.repository}"
    if code == "GatedRepo":
        if asked.with_token:
            return AccessError(f"the repository is gated: ask for access at {page} with this token's account ({said})")
        return CredentialsError(f"the repository is gated: ask for access at {page}, then {_LOG_IN} ({said})")
    if code == "RevisionNotFound":
        return NotFoundError(f"the repository has no revision {asked.revision or 'main'!r} ({said})")
    if code == "EntryNotFound":
        return NotFoundError(f"the repository has no such file at this revision ({said})")
    if message == "Access to this resource is disabled.":
        return AccessError(f"the repository is disabled: see {page} ({said})")
    if message.startswith("Invalid credentials") or (head.status == 401 and asked.with_token and not code):
        return CredentialsError(
            f"the token is not accepted: it may have expired; make a new one and {_LOG_IN} ({said})"
        )
    if code == "RepoNotFound" or head.status in {401, 404}:
        reach = "the token does not reach it" if asked.with_token else f"it is private: {_LOG_IN}"
        return NotFoundError(f"there is no repository {asked.repository!r}, or {reach} ({said})")
    if head.status == 403:
        return AccessError(f"access is refused: the token may lack the right to read this repository ({said})")
    return refusal(head, host)


def translate_hub_error(error: Exception, asked: Asked) -> StreamloadError | None:
    """The error of ours that says the same as one of huggingface_hub's; None where it is none of those."""
    from huggingface_hub import errors as hub

    response = getattr(error, "response", None)
    if isinstance(error, hub.HfHubHTTPError) and response is not None:
        headers = {name.lower(): value for name, value in response.headers.items()}
        return hub_refusal(Head(response.status_code, headers, keep_alive=False), _host(asked), asked)
    if isinstance(error, hub.HFValidationError):
        return OptionError(f"{asked.repository!r} is no repository's name: a Hub URI is hf://org/model[@revision]")
    if isinstance(error, hub.LocalEntryNotFoundError | hub.OfflineModeIsEnabled):
        return NotFoundError(
            f"HF_HUB_OFFLINE is set, and revision {asked.revision or 'main'!r} of {asked.repository!r} is not in the "
            f"cache, or not all of it: unset it, or download that first"
        )
    # What the HTTP library raises that huggingface_hub is built on, httpx or a successor of it.
    if isinstance(error, hub.HfHubHTTPError.__bases__[0]):
        return TransientError(f"{_host(asked)} cannot be reached: {type(error).__name__}: {error}")
    return SourceError(f"{type(error).__name__}: {error}") if isinstance(error, OSError) else None


def _host(asked: Asked) -> str:
    return asked.endpoint.partition("://")[2].rpartition("@")[2]
