"""What S3 can be told that counts more than what AWS's own tools would find."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["S3Settings"]


@dataclass(frozen=True, kw_only=True, slots=True)
class S3Settings:
    """Where S3 is, and what it is asked with. What is None is found as by all AWS tools.

    Attributes:
        endpoint_url: The service's URL.
        region: Its region.
        access_key_id: The access key's id; counts with `secret_access_key` only.
        secret_access_key: The secret that belongs to it.
        ca_bundle: A file with the certificates that are trusted.
        verify_tls: Whether the server has to show a certificate that is good.
        anonymous: Whether requests are signed by nobody.
        virtual: Whether buckets are always named in the host's name; else where botocore would do so.
    """

    endpoint_url: str | None = None
    region: str | None = None
    access_key_id: str | None = field(default=None, repr=False)
    secret_access_key: str | None = field(default=None, repr=False)
    ca_bundle: str | None = None
    verify_tls: bool = True
    anonymous: bool = False
    virtual: bool = False
