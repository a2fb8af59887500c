"""Azure Blob Storage, through Microsoft's own client."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from streamload.checksums import Checksum
from streamload.errors import CredentialsError, MissingDependencyError, StreamloadError
from streamload.sources.base import SourceObject
from streamload.sources.blobs import BlobStore, error_of_status

__all__ = ["AzureStore"]

_INSTALL = "pip install 'streamload[runai,az]'"

_CONNECT_TIMEOUT_S = 5
_READ_TIMEOUT_S = 20


class AzureStore(BlobStore):
    """One container; a version is a blob's ETag.

    Account and credentials are found as the engine's plugin finds them: the variables ``AZURE_STORAGE_…``, or what
    Azure's `DefaultAzureCredential` finds.

    Raises:
        MissingDependencyError: Microsoft's client or the plugin is not installed.
        CredentialsError: No account is named.
    """

    def __init__(self, container: str) -> None:
        try:
            blob: Any = import_module("azure.storage.blob")
            core: Any = import_module("azure.core")
            self._errors: Any = import_module("azure.core.exceptions")
            found = import_module("runai_model_streamer_azure.credentials.credentials")
        except ImportError as error:
            raise MissingDependencyError(f"az:// needs Microsoft's client ({error}): {_INSTALL}") from error
        try:
            who = found.get_credentials()
        except ValueError:
            raise CredentialsError("no account is named: set AZURE_STORAGE_ACCOUNT_NAME") from None
        limits = {
            "connection_timeout": _CONNECT_TIMEOUT_S,
            "read_timeout": _READ_TIMEOUT_S,
            "retry_total": 0,  # the pipeline retries
        }
        if who.connection_string:
            self._client = blob.BlobServiceClient.from_connection_string(who.connection_string, **limits)
        else:
            credential = who.sas_token.lstrip("?") if who.sas_token else who.account_key or who.credential
            url = f"https://{who.account_name}.{who.endpoint_suffix}"
            self._client = blob.BlobServiceClient(url, credential=credential, **limits)
        self._container = self._client.get_container_client(container)
        self._unless_modified = core.MatchConditions.IfNotModified

    def list(self, prefix: str) -> Sequence[SourceObject]:
        found = self._container.walk_blobs(name_starts_with=prefix, delimiter="/", include=["metadata"])
        # What has no size is a folder; so is, where names make a real tree, what says so.
        return [_object(blob) for blob in found if hasattr(blob, "size") and not _is_folder(blob)]

    def stat(self, name: str) -> SourceObject:
        return _object(self._container.get_blob_client(name).get_blob_properties())

    def read(self, object: SourceObject, start: int, end: int) -> bytes:
        download = self._container.get_blob_client(object.key).download_blob(
            offset=start, length=end - start, etag=f'"{object.version}"', match_condition=self._unless_modified
        )
        content: bytes = download.readall()
        return content

    def checksum(self, name: str) -> Checksum | None:
        """None: Azure keeps an MD5 at most, which cannot be put together from parts."""
        return None

    def translate(self, error: Exception) -> StreamloadError | None:
        if isinstance(error, self._errors.ClientAuthenticationError) and getattr(error, "status_code", None) is None:
            return CredentialsError("there are no credentials for Azure that can be used")
        if isinstance(error, self._errors.HttpResponseError) and error.status_code is not None:
            code = getattr(error, "error_code", None) or type(error).__name__
            return error_of_status(error.status_code, str(code))
        if isinstance(error, self._errors.AzureError):
            return error_of_status(None, type(error).__name__)
        return None

    def close(self) -> None:
        self._client.close()


def _object(blob: Any) -> SourceObject:
    # Listings show the tag without quotes, other answers with them.
    return SourceObject(blob.name, blob.size, blob.etag.strip('"'))


def _is_folder(blob: Any) -> bool:
    marks = {name.lower(): value for name, value in (blob.metadata or {}).items()}
    return blob.size == 0 and marks.get("hdi_isfolder") == "true"
