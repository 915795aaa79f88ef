"""A digest of the kernels' own source, passed to every op as a literal argument.

AOTAutograd and Inductor key their caches by the graph, not by what a custom op does. A package upgrade that changes only
a registered backward would therefore be served the old gradient from a warm cache (pytorch#144344). With the digest in
the graph, other source is another key. `tests/integration/test_cache.py` holds that to account.
"""

import hashlib
from collections.abc import Iterator
from importlib import resources
from importlib.resources.abc import Traversable


def source_digest(package: str) -> str:
    """The first 12 hex digits of the SHA-256 of a package's Python files, in the order of their names."""
    digest = hashlib.sha256()
    for name, file in sorted(_python_files(resources.files(package))):
        digest.update(name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def _python_files(folder: Traversable, prefix: str = "") -> Iterator[tuple[str, Traversable]]:
    """Every Python file below a folder, with its path in it: a room's files decide results as much as those on top."""
    for file in folder.iterdir():
        if file.is_dir():
            yield from _python_files(file, f"{prefix}{file.name}/")
        elif file.name.endswith(".py"):
            yield prefix + file.name, file


REVISION: str = source_digest(__package__)
