"""Check the files of the built pages; docs/browse.py looks at them in a browser.

Every formula is rendered, nothing is loaded from an outside address, every link within the site arrives, and each page
has an icon and a description of its own.

Usage: python docs/check.py docs/_build/html
"""

import posixpath
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Pages that have formulas. Without this list, a build that drops them all would pass.
PAGES_WITH_FORMULAS = (
    "api/batch_norm_training.html",
    "api/batch_norm_training_backprop.html",
    "ops/index.html",
    "ops/batch_norm_inference.html",
    "ops/batch_norm_training.html",
    "ops/batch_norm_training_backprop.html",
    "ops/in_parts.html",
)

RAW_TEX = re.compile(r"\\(?:[A-Za-z]+|[()\[\]])|\$\$")
NOT_TEXT = ("annotation", "code", "pre", "script", "style")  # here a backslash is not a formula gone wrong

OUTSIDE = re.compile(r"\s*(?:[a-z][a-z0-9+.-]*:)?//", re.IGNORECASE)
LOADING = ("src", "srcset", "href", "xlink:href", "data", "poster", "background")
LINKS = ("a", "area")  # the reader follows these; the browser does not

CSS_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
CSS_ADDRESS = re.compile(r"""(?:url\(\s*["']?|@import\s+["'])([^"')]*)""", re.IGNORECASE)


def outside_in_css(css: str) -> Iterator[str]:
    for address in CSS_ADDRESS.findall(CSS_COMMENT.sub(" ", css)):
        if OUTSIDE.match(address):
            yield f"a style loads {address}"


class Page(HTMLParser):
    """Reads one page, and gathers its ``problems`` and what the checks of the whole site need of it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.problems: list[str] = []
        self.formulas = 0
        self.description = ""
        self.has_icon = False
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.open: list[str] = []  # the elements of NOT_TEXT that we are inside of
        self.unrendered = ""  # the last element of Sphinx's class "math", until a <math> comes
        self.feed(html)
        self.close()
        self.formula_is_due()

    def formula_is_due(self) -> None:
        if self.unrendered:
            self.problems.append(f"a formula is not rendered: <{self.unrendered} class=math> without <math>")
            self.unrendered = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        if tag == "math":
            self.formulas += 1
            self.unrendered = ""
        elif "math" in values.get("class", "").split():
            self.formula_is_due()
            self.unrendered = tag
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag in LINKS and "href" in values:
            self.links.append(values["href"])
        if tag == "link" and "icon" in values.get("rel", "").split():
            self.has_icon = True
        if tag == "meta" and values.get("name") == "description":
            self.description = values.get("content", "")
        if tag == "merror":
            self.problems.append("a formula shows an error")
        if tag in NOT_TEXT:
            self.open.append(tag)
        if tag not in LINKS:
            for name in LOADING:
                addresses = values.get(name, "").split(",") if name == "srcset" else [values.get(name, "")]
                self.problems += [f"<{tag} {name}> loads {address}" for address in addresses if OUTSIDE.match(address)]
        if tag == "meta" and re.search(r"url=", values.get("content", ""), re.IGNORECASE):
            self.problems.append(f"<meta> sends the reader to {values['content']}")
        self.problems += outside_in_css(values.get("style", ""))

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, text: str) -> None:
        if "style" in self.open:
            self.problems += outside_in_css(text)
        if not self.open:
            self.problems += [f"raw TeX in the text: {tex}" for tex in RAW_TEX.findall(text)]


def links_that_do_not_arrive(pages: dict[str, Page], site: Path) -> Iterator[str]:
    for name, page in pages.items():
        for link in page.links:
            scheme, host, path, _, anchor = urlsplit(link)
            if scheme or host:
                continue
            target = posixpath.normpath(posixpath.join(posixpath.dirname(name), unquote(path))) if path else name
            if target not in pages and not (site / target).is_file():
                yield f"{name}: a link leads to {target}, which is not there"
            elif anchor and target in pages and unquote(anchor) not in pages[target].anchors:
                yield f"{name}: a link leads to {target}#{unquote(anchor)}, which has no such place"


def descriptions(pages: dict[str, Page]) -> Iterator[str]:
    first: dict[str, str] = {}
    for name, page in pages.items():
        if not page.has_icon:
            yield f"{name}: has no icon"
        if not page.description:
            yield f"{name}: has no description"
        elif page.description in first:
            yield f"{name}: has the description of {first[page.description]}"
        first.setdefault(page.description, name)


def check(site: Path) -> tuple[list[str], dict[str, Page]]:
    """The problems of a built site, and its pages."""
    pages = {path.relative_to(site).as_posix(): Page(path.read_text("utf-8")) for path in sorted(site.rglob("*.html"))}
    problems = [f"{name}: {problem}" for name, page in pages.items() for problem in page.problems]
    for path in sorted(site.rglob("*.css")):
        name = path.relative_to(site).as_posix()
        problems += [f"{name}: {problem}" for problem in outside_in_css(path.read_text("utf-8"))]
    for name in PAGES_WITH_FORMULAS:
        if name not in pages:
            problems.append(f"{name}: there is no such page")
        elif not pages[name].formulas:
            problems.append(f"{name}: has no formulas")
    return [*problems, *descriptions(pages), *links_that_do_not_arrive(pages, site)], pages


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python docs/check.py docs/_build/html", file=sys.stderr)
        return 2
    problems, pages = check(Path(arguments[0]))
    for problem in problems:
        print(f"docs/check.py: {problem}", file=sys.stderr)
    if problems:
        return 1
    formulas, links = sum(page.formulas for page in pages.values()), sum(len(page.links) for page in pages.values())
    print(f"docs/check.py: {len(pages)} pages; {formulas} formulas, all rendered; {links} links, none leads nowhere")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
