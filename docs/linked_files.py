"""A hook of MkDocs: what the pages link to outside docs/ becomes part of the site.

    ](../benchmarks/results/layer.png)   ->   ](benchmarks/results/layer.png), and a copy of the file is there

So one relative link serves the repository and the site.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

OUTSIDE = re.compile(r"\]\(\.\./([^)#]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files, once each."""
    root = Path(str(config.config_file_path)).parent
    for page in list(files.documentation_pages()):
        for path in OUTSIDE.findall(page.content_string):
            if path not in files.src_uris:
                files.append(File.generated(config, path, abs_src_path=str(root / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead the links there."""
    return OUTSIDE.sub(r"](\1", markdown)
