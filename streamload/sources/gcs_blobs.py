"""Google Cloud Storage, through Google's own client."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from streamload.checksums import Checksum
from streamload.errors import CredentialsError, MissingDependencyError, StreamloadError
from streamload.sources.base import SourceObject
from streamload.sources.blobs import BlobStore, error_of_status

__all__ = ["GcsStore"]

_INSTALL = "pip install 'streamload[runai,gs]'"

# To connect, and for each piece of an answer.
_TIMEOUT_S = (5.0, 20.0)


class GcsStore(BlobStore):
    """One bucket; a version is an object's generation.

    Credentials are found as the engine's plugin finds them.

    Raises:
        MissingDependencyError: Google's client or the plugin is not installed.
        CredentialsError: There are no credentials.
    """

    def __init__(self, bucket: str) -> None:
        try:
            storage = import_module("google.cloud.storage")
            found = import_module("runai_model_streamer_gcs.credentials.credentials")
            self._errors: Any = import_module("google.api_core.exceptions")
            self._auth_errors: Any = import_module("google.auth.exceptions")
            self._wire_errors: Any = import_module("requests.exceptions")
        except ImportError as error:
            raise MissingDependencyError(f"gs:// needs Google's client ({error}): {_INSTALL}") from error
        try:
            credentials = found.get_credentials().gcp_credentials()
        except (self._auth_errors.GoogleAuthError, OSError) as error:
            raise CredentialsError(f"there are no credentials for Google Cloud: {type(error).__name__}") from None
        # Reading belongs to no project.
        self._client = storage.Client(project="-", credentials=credentials)
        self._bucket = self._client.bucket(bucket)

    def list(self, prefix: str) -> Sequence[SourceObject]:
        blobs = self._client.list_blobs(self._bucket, prefix=prefix, delimiter="/", timeout=_TIMEOUT_S, retry=None)
        return [_object(blob) for blob in blobs]

    def stat(self, name: str) -> SourceObject:
        return _object(self._reloaded(name))

    def read(self, object: SourceObject, start: int, end: int) -> bytes:
        blob = self._bucket.blob(object.key)
        content: bytes = blob.download_as_bytes(
            start=start,
            end=end - 1,
            raw_download=True,
            if_generation_match=int(object.version),
            checksum=None,  # that of the whole object says nothing about a range
            timeout=_TIMEOUT_S,
            retry=None,
        )
        return content

    def checksum(self, name: str) -> Checksum | None:
        text = self._reloaded(name).crc32c
        return None if text is None else Checksum.from_base64("CRC32C", text)

    def translate(self, error: Exception) -> StreamloadError | None:
        if isinstance(error, self._errors.GoogleAPICallError):
            return error_of_status(error.code, type(error).__name__)
        if isinstance(error, self._auth_errors.GoogleAuthError):
            return CredentialsError(f"the credentials for Google Cloud cannot be used: {type(error).__name__}")
        if isinstance(error, self._wire_errors.RequestException):
            return error_of_status(None, type(error).__name__)
        return None

    def close(self) -> None:
        self._client.close()

    def _reloaded(self, name: str) -> Any:
        blob = self._bucket.blob(name)
        blob.reload(timeout=_TIMEOUT_S, retry=None)
        return blob


def _object(blob: Any) -> SourceObject:
    return SourceObject(blob.name, blob.size, str(blob.generation))
