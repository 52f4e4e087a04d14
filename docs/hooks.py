"""Hooks of the site (mkdocs.yml): pages from files outside of docs/, tables from CSV files, and formulas.

Every file that a page links becomes part of the site: Markdown as it is, notebooks and code as pages, folders as lists,
pictures and data as downloads.  README.md is the home page.  Links stay those that GitHub shows.
"""

import ast
import csv
import json
import posixpath
import re
from html import unescape
from pathlib import Path

from math_core import LatexError, LatexToMathML
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)|(?:(?<=src=\")|(?<=srcset=\")|(?<=href=\"))(?![a-z]+:|#)([^\"#]+)")
CODE = re.compile(r"(^ *```.*?^ *```|`[^`\n]+`)", re.DOTALL | re.MULTILINE)
TABLE = re.compile(r"^\[Table: ([^]]+)\]\(([^)]+\.csv)\)$", re.MULTILINE)
BADGE = re.compile(r"!\[[^]]*\]\(https://img\.shields\.io/[^)]*\) ?")
COLAB = "![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)"
NUMBER = re.compile(r"[−+*×<>~-]*\d|$")
ROLE = re.compile(r":(?:func|class|mod|meth|attr|data|exc):<code>~?([\w.]+)</code>")
FLAG = re.compile(r"<code>(--?[^<]{1,27})</code>")
PAGE = re.compile(r"(?<![\w/])docs/([\w/-]+\.md)")
LANGUAGES = {".py": "python", ".toml": "toml", ".cpp": "cpp", ".cu": "cpp", ".h": "cpp", ".sh": "bash", ".yml": "yaml"}
NAMES = {"README.md": "index.md"}
MATHML = LatexToMathML(fancy_error=False)
OUTPUTS = {
    "image/png": '<img alt="Output of the cell" src="data:image/png;base64,{}">',
    "text/html": "{}",
    "text/plain": "```text\n{}\n```",
}
log = get_plugin_logger("fedkern")


def page_path(source: str) -> str:
    """Return the path in the site of a file of the repository."""
    if source.startswith("docs/"):
        return source.removeprefix("docs/")
    if (ROOT / source).is_dir():
        return f"{source}.md" if (ROOT / "docs" / f"{source}.md").exists() else f"{source}/index.md"
    return NAMES.get(source, f"{source}.md" if Path(source).suffix in {*LANGUAGES, ".ipynb"} else source)


def resolve(source: str, link: str) -> str:
    """Return the file of the repository that a link of a page leads to."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    return f"{path}/README.md" if (ROOT / path / "README.md").exists() else path


def find_links(source: str, text: str) -> set[str]:
    """Return the files of the repository that a page links."""
    links = (next(filter(None, match)) for match in LINK.findall(CODE.sub("", text)))
    paths = {resolve(source, link) for link in links}
    return {path for path in paths if not path.startswith("..") and (ROOT / path).exists()}


def first_sentence(path: Path) -> str:
    """Return the first line of a script's docstring after a colon, or an empty text."""
    text = (ast.get_docstring(ast.parse(path.read_text())) or "") if path.suffix == ".py" else ""
    return f": {text.splitlines()[0]}" if text else ""


def as_page(path: Path) -> str | None:
    """Return a file or folder as Markdown, None for a file that is a download."""
    name = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("_"))
        return f"# {name}\n\n" + "\n".join(f"- [{file.name}]({file.name}){first_sentence(file)}" for file in files)
    if path.suffix == ".ipynb":
        return "\n\n".join(as_text(cell) for cell in json.loads(path.read_text())["cells"])
    if path.suffix in LANGUAGES:
        return f"# {path.name}\n\n``` {{.{LANGUAGES[path.suffix]} title={name}}}\n{path.read_text()}```\n"
    return path.read_text() if path.suffix == ".md" else None


def as_text(cell: dict) -> str:
    """Return a cell of a notebook as Markdown with its outputs."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return source
    blocks = [f"```python\n{source}\n```"]
    for output in cell["outputs"]:
        data = {"text/plain": output.get("text", ""), **output.get("data", {})}
        kind = next(kind for kind in ("image/png", "text/html", "text/plain") if kind in data)
        blocks.append(OUTPUTS[kind].format("".join(data[kind]).strip()))
    return "\n\n".join(blocks)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add README.md and all files outside of docs/ that pages link."""
    queue = ["README.md", *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    seen = set(queue)
    while queue:
        source = queue.pop()
        text, uri = as_page(ROOT / source), page_path(source)
        source += "/index.md" * (ROOT / source).is_dir()
        if files.get_file_from_path(uri) is None:
            where = {"abs_src_path": str(ROOT / source)} if text is None else {"content": text}
            file = File.generated(config, uri, **where, inclusion=InclusionLevel.NOT_IN_NAV)
            file.repository_path = source
            files.append(file)
        new = find_links(source, text or "") - seen
        seen |= new
        queue += sorted(new)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Show tables in place of their links, and point links to where the site has their files."""
    source = getattr(page.file, "repository_path", f"docs/{page.file.src_uri}")

    def site_link(match: re.Match) -> str:
        file = files.get_file_from_path(page_path(resolve(source, match[0])))
        if file is None:
            log.warning("%s links %s, which does not exist", source, match[0])
            return match[0]
        if match[1]:  # mkdocs makes an address of it
            return posixpath.relpath(file.src_uri, posixpath.dirname(page.file.src_uri) or ".")
        return file.url_relative_to(page.file)

    markdown = BADGE.sub("", markdown).replace(COLAB, COLAB[2:15])  # no pictures of other hosts
    parts = CODE.split(TABLE.sub(lambda match: as_table(source, match), markdown))
    return "".join(part if i % 2 else LINK.sub(site_link, part) for i, part in enumerate(parts))


def as_table(source: str, match: re.Match) -> str:
    """Return the CSV file of a link as a Markdown table: the first column left, columns of numbers right."""
    title, link = match.groups()
    path = (ROOT / source).parent / link
    if not path.exists():
        return match[0]
    with path.open(newline="") as file:
        head, *rows = csv.reader(file)
    if {len(row) for row in rows} != {len(head)}:
        log.warning("%s has rows of several lengths", link)
    columns = zip(*rows, strict=False)
    shares = [sum(bool(NUMBER.match(cell)) for cell in column) / len(rows) for column in columns]
    sides = [":--", *("--:" if share > 0.5 else ":--" for share in shares[1:])]
    caption = f"**{title[0].upper()}{title[1:]}** ([CSV]({link}))"
    return "\n".join(
        [caption, "", *(f"| {' | '.join(cell or ' ' for cell in line)} |" for line in (head, sides, *rows))]
    )


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn formulas into MathML, which browsers show without a script, and Sphinx roles in docstrings into links."""

    def formula(match: re.Match) -> str:
        try:
            return MATHML.convert_with_local_state(unescape(match[2]), displaystyle=match[1] == "div")
        except LatexError as error:
            log.warning("%s: %s: %s", page.file.src_uri, match[2], error)
            return match[2]

    html = re.sub(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', formula, html, flags=re.DOTALL)
    html = FLAG.sub(r'<code style="white-space: nowrap">\1</code>', html)
    if page.file.src_uri.startswith("api/"):
        html = ROLE.sub(r'<autoref optional identifier="\1"><code>\1</code></autoref>', html)
        html = PAGE.sub(lambda match: as_anchor(match, page, files), html.replace("::</p>", ":</p>"))
    return html


def as_anchor(match: re.Match, page: Page, files: Files) -> str:
    """Return a link in place of the path of a page."""
    file = files.get_file_from_path(match[1])
    return f'<a href="{file.url_relative_to(page.file)}">{match[0]}</a>' if file else match[0]
