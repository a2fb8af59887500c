"""Remove botocore's descriptions of services that are never asked, from the environment that this runs in.

They are 400 services' and nine tenths of botocore; what S3 and its credentials need is 2 MB.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import botocore
import botocore.session

# S3; and whom credentials come from: roles and web identities, single sign-on, `aws login`.
_KEPT = ("s3", "sts", "sso", "sso-oidc", "signin")


def main() -> None:
    """Remove them.

    Raises:
        SystemExit: What is kept is not there, or botocore cannot make a client of it.
    """
    data = Path(botocore.__file__).parent / "data"
    missing = [name for name in _KEPT if not (data / name).is_dir()]
    if missing:
        sys.exit(f"botocore describes no {', '.join(missing)}")
    for folder in data.iterdir():
        if folder.is_dir() and folder.name not in _KEPT:
            shutil.rmtree(folder)
    session = botocore.session.get_session()
    for name in _KEPT:
        session.create_client(name, region_name="eu-central-1").close()


if __name__ == "__main__":
    main()
