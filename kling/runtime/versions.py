"""The versions of packages, for checkpoints, records and benchmarks."""

from __future__ import annotations

from importlib import metadata

import kling


def versions(*packages: str) -> dict[str, str]:
    """The version of each; "absent" for one that is not installed. Sources on a path, without an installation, are this package too."""
    return {name: kling.__version__ if name == "kling" else _version(name) for name in packages}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"
