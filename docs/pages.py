"""What mkdocs.yml adds to mkdocs: pages that lie outside of docs/, sources that pages link to, doctests in colour.

In the repository, pages link to each other and to sources by relative paths, so that they can be read where they lie.
The site has the same pages; a link to a source leads to a page that shows it.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

ROOT = Path(__file__).parent.parent
ELSEWHERE = {  # where in the site a page lies that is not in docs/
    "README.md": "start.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "benchmarks/results/gpu.md": "gpu.md",
}
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")  # the path of a relative link
DOCTEST = re.compile(r"^>>> .*\n(?:.+\n)*", re.MULTILINE)
CODE_IN_TABLE = re.compile(r"(?<=[| ])`[^`\n]*\\\|[^`\n]*`")  # where GitHub wants a backslash, and Python-Markdown none
TOGETHER = re.compile(r"^( +)((?:\w+, )+\w+): (.*)\n", re.MULTILINE)  # an argument line that speaks of several
SHIM = "https://unpkg.com/iframe-worker/shim"  # what the theme loads
LANGUAGES = {".py": "python", ".toml": "toml", ".json": "json", ".yml": "yaml"}


def in_repository(page: str) -> str:
    """Where a page of the site lies in the repository."""
    return next((path for path, here in ELSEWHERE.items() if here == page), f"docs/{page}")


def in_site(path: str) -> str:
    """Where the site shows a file of the repository."""
    if path in ELSEWHERE:
        return ELSEWHERE[path]
    if path.startswith("docs/") and not path.endswith(".py"):
        return path.removeprefix("docs/")
    if (ROOT / path).is_dir():
        path = f"{path}/__init__.py"
    return f"source/{path}.md"


def target(page: str, link: str) -> str:
    """The file of the repository that a link on a page means."""
    return normpath(PurePosixPath(in_repository(page)).parent / link)


def source(path: str) -> str:
    """A page that shows a source file."""
    language = LANGUAGES.get(Path(path).suffix, "text")
    text = (ROOT / path).read_text(encoding="utf-8").rstrip("\n")
    return f'---\nsearch:\n  exclude: true\nhide: [toc]\n---\n\n# {path}\n\n````{language} linenums="1"\n{text}\n````\n'


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/, and the sources that any page links to."""
    for path, here in ELSEWHERE.items():
        if (ROOT / path).exists():
            files.append(File.generated(config, here, content=(ROOT / path).read_text(encoding="utf-8")))
    linked = set()
    for file in files.documentation_pages():
        for link in LINK.findall(file.content_string):
            shown = in_site(target(file.src_uri, link))
            path = shown.removeprefix("source/").removesuffix(".md")
            if shown.startswith("source/") and (ROOT / path).is_file():
                linked.add(path)
    for path in linked:
        files.append(File.generated(config, f"source/{path}.md", content=source(path)))
    index = "\n".join(f"- [`{path}`]({path}.md)" for path in sorted(linked))
    index = f"# Sources\n\nThe files that the pages speak of.\n\n{index}\n"
    files.append(File.generated(config, "source/index.md", content=index))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at where the site has their targets; colour doctests as such."""
    here = page.file.src_uri
    if here.startswith("source/"):
        return markdown

    def moved(match: re.Match[str]) -> str:
        return relpath(in_site(target(here, match[1])), str(PurePosixPath(here).parent))

    markdown = LINK.sub(moved, markdown).replace("```python\n>>> ", "```pycon\n>>> ")
    markdown = markdown.replace("<details>", '<details markdown="1">')
    return CODE_IN_TABLE.sub(lambda match: match[0].replace("\\|", "|"), markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Take what lets the search run from a disk from the site, not from the network."""
    return output.replace(SHIM, get_relative_url("worker.js", page.url))


def on_post_template(output: str, template_name: str, config: MkDocsConfig) -> str:
    """The same in the page that says that there is no such page."""
    return output.replace(SHIM, "/worker.js")


class Docstrings(griffe.Extension):
    """Docstrings as mkdocstrings wants them: doctests as blocks of code, a line for each argument."""

    def on_object(self, *, obj: griffe.Object, **options: Any) -> None:
        if obj.docstring:
            text = DOCTEST.sub(r"```pycon\n\g<0>```\n", obj.docstring.value + "\n")
            obj.docstring.value = TOGETHER.sub(_apart, text)


def _apart(line: re.Match[str]) -> str:
    """A line for each of the arguments that are described together."""
    indent, names, text = line.groups()
    return "".join(f"{indent}{name}: {text}\n" for name in names.split(", "))
