"""What the documentation site needs beside mkdocs.yml (`make docs`).

Pages are written to be read in the repository: they link to source files, and README.md is the
first of them. Here each linked file outside docs/ becomes a page of the site as well. A public
name that the API pages leave out, or that has no description, is a warning, and so an error.
"""

import itertools
import json
import logging
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
RENAMED = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "notebooks/own_images.ipynb": "own_images_notebook.md",
}
LINK = re.compile(r"(?<=\]\()([^()\s#]+)(#[^()\s]*)?(?=\))")
API_ENTRY = re.compile(r"^::: (\S+)", re.MULTILINE)

log = logging.getLogger("mkdocs.hooks.docs")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are not below docs/."""
    for path, uri in RENAMED.items():
        text = (ROOT / path).read_text()
        content = _cells(text) if path.endswith(".ipynb") else text
        files.append(File.generated(config, uri, content=content))
    linked = {
        target
        for file in files.documentation_pages()
        for target, _ in _links(file.content_string, _repository_path(file.src_uri))
    }
    for path in sorted(linked):
        uri = _site_uri(path)
        if files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, content=_source_page(ROOT / path, path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Points the links of a page to where their targets are on the site."""
    uri = page.file.src_uri
    if uri.startswith("source/"):
        return markdown
    for target, link in _links(markdown, _repository_path(uri)):
        new = posixpath.relpath(_site_uri(target), posixpath.dirname(uri))
        markdown = re.sub(rf"(?<=\]\(){re.escape(link)}(?=[#)])", new, markdown)
    return markdown


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links the decisions that docstrings and comments cite."""
    up = "../" * page.file.src_uri.count("/")
    link = rf'<a href="{up}decisions.html#\1">decisions.md \1</a>'
    return re.sub(r"\bdecisions\.md (\d+[a-c]?)\b", link, html)


def on_pre_build(config: MkDocsConfig) -> None:
    """Warns of each public name without description, or without a place on the API pages."""
    package = griffe.load(
        "csc_jax", search_paths=[ROOT], extensions=griffe.load_extensions(CommentsOfFields())
    )
    for page in sorted((ROOT / "docs" / "api").glob("*.md")):
        shown = API_ENTRY.findall(page.read_text())
        for path in shown:
            documented = package[path.removeprefix("csc_jax.")]
            names = documented.exports if documented.is_module else None
            for name in names or []:
                if not any(each.endswith(f".{name}") for each in shown):
                    log.warning("%s leaves out %s.%s", page.name, path, name)
            for nameless in _undescribed(documented, follow=not names):
                log.warning("%s has no description", nameless.path)


class CommentsOfFields(griffe.Extension):
    """Takes the comment beside or above a field for its description."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: object) -> None:
        """Adds that comment as the docstring."""
        if attr.docstring or not attr.lineno or not attr.endlineno:
            return
        lines = attr.lines_collection[attr.filepath]
        comment = re.findall(r"  # (.*)", lines[attr.endlineno - 1])
        if not comment:
            above = itertools.takewhile(
                lambda line: line.lstrip().startswith("# "), reversed(lines[: attr.lineno - 1])
            )
            comment = [line.strip(" #") for line in above][::-1]
        if comment:
            attr.docstring = griffe.Docstring(" ".join(comment), parent=attr)


def _undescribed(documented: griffe.Object, follow: bool = True) -> Iterator[griffe.Object]:
    """Yields a public object and its public members as far as they have no docstring."""
    owner = documented.parent
    listed = (  # among the attributes of its class
        owner and owner.docstring and f"\n  {documented.name}: " in owner.docstring.value
    )
    if not documented.has_docstring and not listed:
        yield documented
    for member in documented.members.values() if follow else ():
        if member.is_public and not (
            member.is_alias or member.is_module or member.name.startswith("__")
        ):
            yield from _undescribed(member)


def _cells(notebook: str) -> str:
    """Returns a notebook as Markdown."""
    parts = []
    for cell in json.loads(notebook)["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    return "\n\n".join(parts) + "\n"


def _links(markdown: str, path: str) -> set[tuple[str, str]]:
    """Returns (path in the repository, as written) of the links that lead out of docs/.

    Those of a page outside docs/ that lead into it are among them, as the site knows no docs/.
    """
    found = set()
    for link, _ in LINK.findall(markdown):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
        stays = path.startswith("docs/") and target.startswith("docs/")
        if not stays and (ROOT / target).is_file():
            found.add((target, link))
    return found


def _repository_path(uri: str) -> str:
    """Returns where a page of the site stands in the repository."""
    return next((path for path, new in RENAMED.items() if new == uri), f"docs/{uri}")


def _site_uri(path: str) -> str:
    """Returns where a file of the repository stands on the site."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return RENAMED.get(path, f"source/{path}.md")


def _source_page(file: Path, path: str) -> str:
    """Returns a file as a page, which the search leaves out."""
    language = {".py": "python", ".toml": "toml", ".cff": "yaml"}.get(file.suffix, "text")
    return (
        f"---\nsearch:\n  exclude: true\n---\n# {path}\n\n"
        f"~~~~{language}\n{file.read_text()}\n~~~~\n"
    )
