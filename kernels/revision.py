"""A digest of the kernels' own source, passed to every op as a literal argument.

AOTAutograd and Inductor key their caches by the graph, not by what a custom op does. A package upgrade that changes only
a registered backward would therefore be served the old gradient from a warm cache (pytorch#144344). With the digest in
the graph, other source is another key. `tests/test_cache.py` holds that to account.
"""

import hashlib
from importlib import resources


def source_digest(package: str) -> str:
    """The first 12 hex digits of the SHA-256 of a package's Python files, in the order of their names."""
    digest = hashlib.sha256()
    files = [file for file in resources.files(package).iterdir() if file.name.endswith(".py")]
    for file in sorted(files, key=lambda file: file.name):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


REVISION: str = source_digest(__package__)
