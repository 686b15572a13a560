"""mkdocs hooks: README.md is the first page, and links to files of the repository lead to copies of them in the site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
FRONT = "index.md"
_TO_REPOSITORY = re.compile(r"\]\(\.\./(?!images/)([^)#\s]+)(#[^)\s]*)?\)")
_TO_GUIDE = re.compile(r"\]\(docs/")
_FENCE = re.compile(r"^```(\w+) title=[\w-]+$", re.MULTILINE)  # the titles tell tests/test_docs.py where a block can run
_FROM_README = re.compile(r"\]\((?!docs/|https?:|#)([^)#\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the first page, and every file that a page links to outside of docs/."""
    files.append(File.generated(config, FRONT, content=_front_page()))
    for page in [page for page in files.documentation_pages() if page.src_uri != FRONT]:
        for name, _ in _TO_REPOSITORY.findall(page.content_string):
            _add_source(files, config, name)
    for name in _FROM_README.findall((ROOT / "README.md").read_text(encoding="utf-8")):
        _add_source(files, config, name)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links that leave docs/ to the copies in the site, and take away the titles of code blocks."""
    up = "../" * page.file.src_uri.count("/")
    readme = _FENCE.sub(r"```\1", markdown).replace("](../README.md", f"]({up}{FRONT}")
    return _TO_REPOSITORY.sub(lambda link: f"]({up}{_place(link[1])})", readme)


def _front_page() -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return _FROM_README.sub(lambda link: f"]({_place(link[1])})", _TO_GUIDE.sub("](", text))


def _place(name: str) -> str:
    """Where a file of the repository stands in the site. Text, so that a browser shows it in place of saving it."""
    path = ROOT / name
    return f"source/{name}.txt" if path.is_file() and path.suffix not in (".svg", ".png", ".json") else f"source/{name}"


def _add_source(files: Files, config: Any, name: str) -> None:
    path, place = ROOT / name, _place(name)
    if path.is_dir():
        files_in_it = sorted(str(p.relative_to(ROOT)) for p in path.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
        place, content = f"{place.rstrip('/')}/files.txt", "\n".join(files_in_it).encode()
    else:
        content = path.read_bytes()
    if files.get_file_from_path(place) is None:
        files.append(File.generated(config, place, content=content))
