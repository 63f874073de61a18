"""MkDocs hooks: the site is made of the same files that a repository browser shows, and every link works in both.

README.md becomes the first page and CHANGELOG.md a page of its own. A file outside docs/ that a page links to (source
code, benchmarks/README.md) becomes a page under source/. Rejected: copies of these files in docs/, which drift apart;
links to a repository's address, which show another version than the one that was built. Equations become MathML here;
MathJax would be loaded from another server.
"""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent
NAMED = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}
# [label](target) where the target is a path, perhaps with an anchor; one level of brackets in the label
LINK = re.compile(r"(\[(?:[^\[\]]|\[[^\]]*\])*\])\((?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?\)")
EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made of files outside docs/: the named ones, and all that any page links to."""
    waiting = [name for name in NAMED if (ROOT / name).is_file()]
    waiting += [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    seen = set(waiting)
    while waiting:
        name = waiting.pop(0)
        text = (ROOT / name).read_text(encoding="utf-8")
        if not name.startswith("docs/"):
            files.append(File.generated(config, _site_path(name), content=_content(name, text)))
        if name.endswith(".md"):
            linked = {_repository_path(name, match[2]) for match in LINK.finditer(text)}
            new = sorted(one for one in linked - seen if (ROOT / one).is_file() and not one.startswith("docs/"))
            seen.update(new)
            waiting += new
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    name = _file_of(page.file.src_uri)
    if not name.endswith(".md"):
        return markdown
    here = posixpath.dirname(page.file.src_uri)

    def replace(match: re.Match[str]) -> str:
        label, target, anchor = match[1], match[2], match[3] or ""
        path = _repository_path(name, target)
        if (ROOT / path).is_dir():  # a folder has no page: its name stays
            return label[1:-1]
        return f"{label}({posixpath.relpath(_site_path(path), here or '.')}{anchor})"

    return LINK.sub(replace, markdown)


def on_page_content(text: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the equations that pymdownx.arithmatex marks into MathML."""

    def replace(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        return convert(html.unescape(match[2]), display=display)

    return EQUATION.sub(replace, text)


def _repository_path(page: str, target: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), target))


def _site_path(name: str) -> str:
    """Where the site has a file of the repository, relative to docs/."""
    if name in NAMED:
        return NAMED[name]
    if name.startswith("docs/"):
        return name.removeprefix("docs/")
    return f"source/{name}" if name.endswith(".md") else f"source/{name}.md"


def _file_of(site_path: str) -> str:
    """The inverse of `_site_path`."""
    for name, path in NAMED.items():
        if path == site_path:
            return name
    if not site_path.startswith("source/"):
        return f"docs/{site_path}"
    name = site_path.removeprefix("source/")
    return name if (ROOT / name).is_file() else name.removesuffix(".md")


def _content(name: str, text: str) -> str:
    if name.endswith(".md"):
        return text
    language = {".py": "python", ".sh": "bash", ".yaml": "yaml"}.get(Path(name).suffix, "text")
    return f"---\nsearch: {{exclude: true}}\n---\n# {name}\n\n`````{language}\n{text}\n`````\n"
