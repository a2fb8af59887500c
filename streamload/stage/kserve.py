"""What KServe tells its storage initializer of S3, beside AWS's own variables.

Source: KServe's ``python/storage/kserve_storage/kserve_storage.py`` and ``pkg/credentials/s3``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from streamload.options import variables
from streamload.sources.s3_settings import S3Settings

__all__ = ["s3_settings"]

_logger = logging.getLogger("streamload.stage")

# A secret's content, and what a service says beside it, which counts more.
_CONFIGS = ("STORAGE_CONFIG", "STORAGE_OVERRIDE_CONFIG")

# What a secret's content calls it, the variable that says the same, and what it is here.
_KEYS = (
    ("endpoint_url", None, "endpoint_url"),
    ("region", None, "region"),
    ("access_key_id", None, "access_key_id"),
    ("secret_access_key", None, "secret_access_key"),
    ("ca_bundle", None, "ca_bundle"),
    ("verify_ssl", "S3_VERIFY_SSL", "verify_tls"),
    ("anonymous", "awsAnonymousCredential", "anonymous"),
    (None, "S3_USER_VIRTUAL_BUCKET", "virtual"),
)
_FLAGS = ("verify_tls", "anonymous", "virtual")

# A bundle for the whole cluster, which is mounted into every initializer.
_BUNDLE_MAP, _BUNDLE_FOLDER, _BUNDLE_FILE = "CA_BUNDLE_CONFIGMAP_NAME", "CA_BUNDLE_VOLUME_MOUNT_POINT", "cabundle.crt"


def s3_settings(environment: Mapping[str, str] | None = None) -> S3Settings:
    """What there is in the environment; nothing is, elsewhere than under KServe.

    Args:
        environment: In place of the process's environment.
    """
    names = [variable for _, variable, _ in _KEYS if variable is not None]
    told = variables([*_CONFIGS, *names, _BUNDLE_MAP, _BUNDLE_FOLDER, "AWS_CA_BUNDLE"], environment)
    config: dict[str, Any] = {}
    for name in _CONFIGS:
        config |= _object(name, told.get(name, "{}"))
    if config.get("type") != "s3":
        config = {}
    found: dict[str, Any] = {}
    for key, variable, name in _KEYS:
        value = config.get(key or "", told.get(variable or ""))
        if value not in (None, ""):
            # KServe writes words; a flag of JSON's is as clear.
            text = str(value)
            found[name] = _flag(name, text) if name in _FLAGS else text
    if "ca_bundle" not in found and "AWS_CA_BUNDLE" not in told and _BUNDLE_MAP in told and _BUNDLE_FOLDER in told:
        found["ca_bundle"] = f"{told[_BUNDLE_FOLDER].rstrip('/')}/{_BUNDLE_FILE}"
    settings = S3Settings(**found)
    if not settings.verify_tls:
        _logger.warning("S3's certificate is not verified, as KServe's configuration asks: anybody could answer for it")
    return settings


def _flag(name: str, text: str) -> bool:
    """As the initializer understands it: what it does not know leaves things safe."""
    return text.lower() not in ("0", "false") if name == "verify_tls" else text.lower() in ("1", "true")


def _object(name: str, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        # Its text may hold a secret; and its name may be somebody else's.
        _logger.warning("%s is no JSON object as KServe's is, and is ignored", name)
        return {}
    return found
