"""mkdocs calls this: README.md is the site's first page, and links out of docs/ lead to the repository.

Without `repo_url` in mkdocs.yml they become text, as nothing could be opened there.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HOME = "index.md"
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:)([^)#\s]+)((?:#[^)\s]*)?)\)")
"""A link or an image with a relative target: mark, text, path, anchor."""


def on_files(files: Any, config: Any) -> Any:
    """Make README.md the first page."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, HOME, content=(ROOT / "README.md").read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite a page's links."""
    here = posixpath.dirname(f"docs/{page.file.src_uri}")
    base = "" if page.file.src_uri == HOME else here

    def lead(link: re.Match[str]) -> str:
        image, text, target, anchor = link.groups()
        path = posixpath.normpath(posixpath.join(base, target))  # from the repository's root
        if path.startswith("docs/") and not (ROOT / path).is_dir():
            return f"{image}[{text}]({posixpath.relpath(path, here)}{anchor})"
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/HEAD/{path}{anchor})" if config.repo_url else text

    return LINK.sub(lead, markdown)
