"""Look at the built pages in a browser, or take pictures of them.

Usage: python docs/browse.py docs/_build/html
       python docs/browse.py docs/_build/html --pictures FOLDER [PAGE ...]

Every page is opened in Chromium, in two widths and in light and dark colours. Nothing may be wider than the window or
cut off, every formula and image has a size, code can be copied, functions lead to their source, axe finds nothing
serious, the console stays empty and no request leaves the machine. The search must find what newcomers look for.
docs/check.py reads the files of the pages, and follows their links, without a browser.
"""

import argparse
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTHS = (390, 1280)  # a phone, a laptop
COLOURS = ("light", "dark")

# The words that newcomers search for, and the page that must be among the first results.
SEARCHES = {
    "running_mean": "coming_from.html",
    "momentum": "coming_from.html",
    "weight": "coming_from.html",
    "autograd": "coming_from.html",
    "onnx": "coming_from.html",
    "SyncBatchNorm": "coming_from.html",
    "backpropagation": "coming_from.html",
}
FIRST_RESULTS = 5

PICTURES = ("index", "ops/batch_norm_training_backprop", "pytorch", "performance")

SERIOUS = ("serious", "critical")

# What is wider than the window, cut off, or has no size. A box that scrolls may hold what is wider than itself.
LAYOUT = r"""
async () => {
  await new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn)));
  const problems = [];
  const name = (element) => {
    const text = element.textContent.trim().replace(/\s+/g, " ").slice(0, 40);
    const kind = element.classList.length ? "." + [...element.classList].join(".") : "";
    return `<${element.localName}${kind}> "${text}"`;
  };
  const width = document.documentElement.scrollWidth;
  if (width > innerWidth) problems.push(`the page is ${width} px wide`);

  const look = (element, scrolls) => {
    const box = element.getBoundingClientRect();
    const style = getComputedStyle(element);
    if (style.display === "none" || style.visibility === "hidden") return;
    if (element.matches(".sidebar-drawer, .toc-drawer") && (box.right <= 0 || box.left >= innerWidth)) return;
    if (element.localName === "math" && !(box.width > 0 && box.height > 0)) {
      problems.push(`${name(element)} is a formula without a size`);
    }
    if (element.localName === "img" && !element.naturalWidth) problems.push(`${element.src} is no image`);
    if (box.width > 1 && box.height > 1) {
      const outside = box.right > innerWidth + 1 || box.left < -1;
      if (outside && !scrolls) problems.push(`${name(element)} leaves the window`);
      const wider = element.scrollWidth > element.clientWidth + 1 && element.clientWidth > 1;
      if (wider && innerWidth > 1000 && element.matches("div.math")) problems.push(`${name(element)} must be scrolled`);
      if (wider && ["hidden", "clip"].includes(style.overflowX)) problems.push(`${name(element)} is cut off`);
      if (wider && element.matches("td, th, .sidebar-drawer a, .toc-drawer a")) {
        problems.push(`${name(element)} runs out of its box`);
      }
    }
    if (element.localName === "svg") {
      for (const text of element.querySelectorAll("text")) {
        const label = text.getBoundingClientRect();
        if (label.width && (label.left < box.left - 1 || label.right > box.right + 1 ||
            label.top < box.top - 1 || label.bottom > box.bottom + 1)) {
          problems.push(`the label "${text.textContent}" of a picture is cut off`);
        }
      }
    }
    if (["svg", "math"].includes(element.localName)) return;
    const inside = scrolls || ["auto", "scroll"].includes(style.overflowX);
    for (const child of element.children) look(child, inside);
  };
  for (const element of document.body.children) look(element, false);
  return problems;
}
"""

# What scripts and extensions have to add to a page.
ADDED = r"""
() => {
  const problems = [];
  for (const code of document.querySelectorAll("div.highlight pre")) {
    const start = code.textContent.slice(0, 40);
    if (!code.parentElement.querySelector(".copybtn")) problems.push(`no copy button: ${start}`);
  }
  for (const signature of document.querySelectorAll("dl.py.function > dt, dl.py.class > dt")) {
    if (signature.id.startsWith("bnbp.kernels.")) continue; // what Cython code sees, which is no Python
    if (!signature.querySelector(".viewcode-link")) problems.push(`no link to the source: ${signature.id}`);
  }
  return problems;
}
"""


# axe takes seconds for a page of much code and many formulas. The insides of formulas and pictures are nothing to it.
# Of the words of code that have one class, and so one colour, one is enough; of the plain rows of a table and of the
# lines of the navigation, three.
THIN = r"""
() => {
  for (const formula of document.querySelectorAll("math")) formula.replaceChildren();
  for (const shape of document.querySelectorAll("svg > :not(title, desc)")) shape.remove();
  for (const row of document.querySelectorAll("tr:nth-child(n + 4)")) {
    if (!row.querySelector(":not(td, p)")) row.remove();
  }
  for (const line of document.querySelectorAll(".sidebar-tree li:nth-child(n + 4)")) line.remove();
  const seen = new Set();
  for (const word of [...document.querySelectorAll("pre span, .sig span")].reverse()) {
    if (word.querySelector("span, a") || word.closest("a")) continue;
    const kind = word.className + (word.closest("pre") ? " in code" : "");
    if (seen.has(kind)) word.replaceWith(word.textContent);
    seen.add(kind);
  }
}
"""

# Of all pieces of text that have the same colours, size and weight, one shows whether the contrast is enough. axe gives
# its ratio for a single character too, but leaves open whether that is text; in code it is.
AXE = r"""
async ([colours_only, serious]) => {
  const opaque = (element) => {
    const colours = [];
    for (; element; element = element.parentElement) {
      const { backgroundColor, opacity } = getComputedStyle(element);
      colours.push(backgroundColor, opacity);
      if (backgroundColor.startsWith("rgb(")) break;
    }
    return colours.filter((colour) => colour !== "rgba(0, 0, 0, 0)" && colour !== "1");
  };
  const samples = new Map();
  for (const element of document.body.querySelectorAll(":not(math, math *, svg, svg *, script, style, noscript)")) {
    const has_text = [...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim());
    if (!has_text || !element.checkVisibility({ visibilityProperty: true })) continue;
    const { color, fontSize, fontWeight } = getComputedStyle(element);
    const key = [color, fontSize, fontWeight, ...opaque(element)].join();
    if (!samples.has(key)) samples.set(key, element);
  }
  const options = { resultTypes: ["violations", "incomplete"] };
  const runs = [[{ include: [...samples.values()] }, { ...options, runOnly: ["color-contrast"] }]];
  if (!colours_only) runs.push([document, { ...options, rules: { "color-contrast": { enabled: false } } }]);
  const problems = [];
  const report = (rule, node) => {
    const why = node.any.concat(node.all, node.none).map((check) => check.message).join("; ");
    problems.push(`axe, ${rule.id}: ${node.html.slice(0, 120)} (${why.slice(0, 200)})`);
  };
  for (const [context, settings] of runs) {
    const { violations, incomplete } = await axe.run(context, settings);
    for (const rule of violations) {
      if (serious.includes(rule.impact)) rule.nodes.forEach((node) => report(rule, node));
    }
    for (const rule of incomplete.filter((rule) => rule.id === "color-contrast")) {
      for (const node of rule.nodes) {
        const { messageKey, bgColor, contrastRatio, expectedContrastRatio } = node.any[0].data;
        const is_short = messageKey === "shortTextContent" && bgColor; // without one, it has been scrolled away
        if (is_short && contrastRatio < parseFloat(expectedContrastRatio)) report(rule, node);
      }
    }
  }
  return problems;
}
"""


@contextmanager
def served(site: Path) -> Iterator[str]:
    """The address of the site, while a server of this process serves it."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(site))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()


def path_of_browser() -> str:
    for name in BROWSERS:
        if path := shutil.which(name):
            return path
    raise FileNotFoundError("docs/browse.py needs Chromium (Debian: apt-get install chromium)")


@contextmanager
def opened(site: Path) -> Iterator["Browser"]:
    with served(site) as address, sync_playwright() as playwright:
        # The site is our own, so the sandbox, which needs rights that containers lack, may be off. No name resolves.
        options = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
        chromium = playwright.chromium.launch(executable_path=path_of_browser(), args=options)
        context = chromium.new_context(permissions=["clipboard-read", "clipboard-write"])
        try:
            yield Browser(context.new_page(), address)
        finally:
            chromium.close()


class Browser:
    """One window of the browser, and the ``problems`` that it came upon."""

    def __init__(self, page: Page, address: str) -> None:
        self.page = page
        self.address = address
        self.axe = Axe().axe_script
        self.name = self.at = ""  # what is looked at, for the problems' sake
        self.problems: list[str] = []
        page.on("console", lambda message: self.logged(message.type, f"{message.text} ({message.location['url']})"))
        page.on("pageerror", lambda error: self.found(f"a script fails: {error}"))
        page.on("request", lambda request: self.requested(request.url))

    def found(self, problem: str) -> None:
        if (text := f"{self.at}: {problem}") not in self.problems:
            self.problems.append(text)

    def logged(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.found(text)

    def requested(self, url: str) -> None:
        if not url.startswith((self.address, "data:", "blob:")):
            self.found(f"asks for {url}")

    def show(self, name: str, width: int = WIDTHS[-1], colours: str = COLOURS[0]) -> None:
        self.name = name
        self.look_as(width, colours)
        self.page.goto(self.address + name, wait_until="load")

    def look_as(self, width: int, colours: Any) -> None:
        self.at = f"{self.name}, {width} px, {colours}"
        self.page.set_viewport_size({"width": width, "height": 900})
        self.page.emulate_media(color_scheme=colours, reduced_motion="reduce")

    def check(self, name: str) -> None:
        """One page, in every width and in light and dark."""
        self.show(name)
        for problem in self.page.evaluate(ADDED):
            self.found(problem)
        for colours in COLOURS:
            for width in WIDTHS:
                self.look_as(width, colours)
                for problem in self.page.evaluate(LAYOUT):
                    self.found(problem)
        self.page.evaluate(THIN)
        self.page.evaluate(self.axe)
        for width, colours in zip(WIDTHS, COLOURS, strict=True):
            self.look_as(width, colours)
            for problem in self.page.evaluate(AXE, [colours != COLOURS[0], SERIOUS]):
                self.found(problem)

    def check_search(self, word: str, expected: str) -> None:
        self.show(f"search.html?q={word}")
        self.page.wait_for_function("typeof Search === 'object' && Search.title?.innerText === 'Search Results'")
        links = self.page.locator("ul.search > li > a:first-of-type")
        results = [link.get_attribute("href") or "" for link in links.all()[:FIRST_RESULTS]]
        if not any(result.partition("#")[0].partition("?")[0] == expected for result in results):
            self.found(f"{expected} is not among the first results, which are {results}")

    def check_copy(self, name: str) -> None:
        """The first example of a page is copied without its prompts and its results."""
        self.show(name)
        code = self.page.locator("div.highlight:has(.gp)").first  # "generic prompt", in the words of Pygments
        lines = code.locator("pre").inner_text().splitlines()
        code.hover()
        code.locator(".copybtn").click()
        copied = self.page.evaluate("navigator.clipboard.readText()").splitlines()
        expected = [line[4:] for line in lines if line.startswith((">>> ", "... "))]
        if copied != expected:
            self.found(f"{copied} is copied, not {expected}")


def check(site: Path) -> tuple[list[str], int]:
    """The problems of a site, and how many pages it has."""
    pages = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))
    with opened(site) as browser:
        for name in pages:
            browser.check(name)
        browser.check_copy("index.html")
        for word, expected in SEARCHES.items():
            browser.check_search(word, expected)
        return browser.problems, len(pages)


def take_pictures(site: Path, folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with opened(site) as browser:
        for name in names:
            for width in WIDTHS:
                for colours in COLOURS:
                    browser.show(f"{name}.html", width, colours)
                    path = folder / f"{name.replace('/', '-')}-{width}-{colours}.png"
                    browser.page.screenshot(path=path, full_page=True)
                    print(path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Look at the built pages in a browser, or take pictures of them.")
    parser.add_argument("site", type=Path, help="docs/_build/html")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="take pictures and check nothing")
    parser.add_argument("pages", nargs="*", default=PICTURES, help=f"of which pages; left out: {' '.join(PICTURES)}")
    options = parser.parse_intermixed_args(arguments)
    if options.pictures:
        take_pictures(options.site, options.pictures, [name.removesuffix(".html") for name in options.pages])
        return 0
    problems, pages = check(options.site)
    for problem in problems:
        print(f"docs/browse.py: {problem}", file=sys.stderr)
    if problems:
        return 1
    print(
        f"docs/browse.py: {pages} pages at {WIDTHS} px, {' and '.join(COLOURS)}; {len(SEARCHES)} searches; no problem"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
