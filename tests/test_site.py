"""The check of the built pages in a browser sees what it should; run by make site-check, beside that check itself."""

import importlib.util
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import bnbp

pytestmark = pytest.mark.site

DOCS = Path(__file__).parent.parent / "docs"


def module_of(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def browse() -> ModuleType:
    return module_of(DOCS / "browse.py")


# ---------------------------------------------------------------- single faults


@pytest.fixture(scope="module")
def faulty(browse: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    """A browser on an empty site."""
    site = tmp_path_factory.mktemp("faulty")
    with browse.opened(site) as browser:
        yield browser, site


PAGE = """<!doctype html><html lang="en"><head><title>A page</title><link rel="icon" href="data:,">
<meta name="viewport" content="width=device-width"><style>
body {{ color: #000; background: #fff }}
@media (prefers-color-scheme: dark) {{
body {{ color: #fff; background: #000 }} a {{ color: #8cf }} .dim {{ color: #333 }}
}}
@media (max-width: 400px) {{ .phone {{ width: 500px }} }}
</style></head><body><main><h1>A page</h1>{}</main></body></html>"""
MATH = "<p>So <math><mi>x</mi></math></p>"
CODE = '<div class="highlight"><pre tabindex="0"><span class="n">{}</span></pre>{}</div>'
BUTTON = '<button class="copybtn">Copy</button>'
FUNCTION = '<dl class="py function"><dt id="f">f()<a class="viewcode-link" href="#f">{}</a></dt><dd>Text</dd></dl>'
LABEL = '<svg width="100" height="20" role="img" aria-label="A plot"><text x="{}" y="15">seconds</text></svg>'


def problems_of(faulty: tuple[Any, Path], html: str) -> list[str]:
    browser, site = faulty
    name = f"{len(list(site.iterdir()))}.html"  # a new one, or the browser may take the page from its cache
    (site / name).write_text(PAGE.format(html), "utf-8")
    browser.problems.clear()
    browser.check(name)
    return [problem.removeprefix(f"{name}, ") for problem in browser.problems]


@pytest.mark.parametrize(
    "html",
    [
        MATH,
        CODE.format("x", BUTTON),
        CODE.format("x", BUTTON).replace("<pre", '<pre style="overflow-x: auto"').replace(">x<", ">" + "x" * 500 + "<"),
        '<div class="math" tabindex="0" style="overflow: auto"><p style="width: 600px">x</p></div>',
        FUNCTION.format("[source]"),
        LABEL.format(2),
        '<aside class="toc-drawer" style="position: fixed; left: 1290px; width: 90px">' + "x" * 90 + "</aside>",
        '<img alt="" src="data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw==">',
    ],
)
def test_good_page_has_no_problem(faulty: tuple[Any, Path], html: str) -> None:
    assert problems_of(faulty, html) == []


@pytest.mark.parametrize(
    ("html", "where", "problem"),
    [
        ('<div style="width: 1500px">a</div>', ["390", "1280"], "the page is 15"),
        ('<div class="phone">a</div>', ["390"], "the page is 5"),
        ('<div style="width: 99px; overflow: hidden">' + "x" * 90 + "</div>", ["390", "1280"], "is cut off"),
        (
            f'<table><tr><td style="max-width: 50px">{"x" * 30}</td></tr></table>',
            ["390", "1280"],
            "runs out of its box",
        ),
        ('<p><math style="display: block; width: 0"><mi>x</mi></math></p>', ["390", "1280"], "formula without a size"),
        (
            '<div class="math" style="overflow: auto"><p style="width: 1500px">x</p></div>',
            ["1280"],
            "must be scrolled",
        ),
        (LABEL.format(70), ["390", "1280"], 'label "seconds" of a picture is cut off'),
        ('<p class="dim">a</p>', ["1280 px, dark"], "axe, color-contrast"),
        ('<p style="color: #bbb; background: #fff">a</p>', ["390 px, light", "1280 px, dark"], "axe, color-contrast"),
        (
            CODE.format("x", BUTTON).replace('"n"', '"dim"') + CODE.format("y", BUTTON),
            ["1280 px, dark"],
            "color-contrast",
        ),
        (
            '<img src="data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw==">',
            ["390"],
            "image-alt",
        ),
    ],
)
def test_fault_is_found_where_it_shows(faulty: tuple[Any, Path], html: str, where: list[str], problem: str) -> None:
    found = [each for each in problems_of(faulty, html) if problem in each]
    assert found
    assert all(any(each.startswith(place) for place in where) for each in found), found
    assert all(any(each.startswith(place) for each in found) for place in where), found


@pytest.mark.parametrize(
    ("html", "problem"),
    [
        (CODE.format("x", ""), "no copy button: x"),
        (FUNCTION.format("").replace("viewcode-link", ""), "no link to the source: f"),
        ("<script>console.error('oh')</script>", "oh"),
        ("<script>throw new Error('oh')</script>", "a script fails: oh"),
        ('<img alt="" src="none.png">', "404"),
        ('<img alt="" src="none.png">', "none.png is no image"),
        ('<script src="http://outside.invalid/x.js"></script>', "asks for http://outside.invalid/x.js"),
    ],
)
def test_fault_is_found(faulty: tuple[Any, Path], html: str, problem: str) -> None:
    assert any(problem in each for each in problems_of(faulty, html))


# ---------------------------------------------------------------- a small site that Sphinx has built


@pytest.fixture(scope="module")
def built(browse: ModuleType, faulty: tuple[Any, Path]) -> Any:
    """A browser on two pages. What is copied has no prompts, and lacks the lines that go on."""
    browser, site = faulty
    folder = site / "built"
    folder.mkdir()
    (folder / "conf.py").write_text(
        'extensions = ["sphinx_copybutton"]\ncopybutton_prompt_text = ">>> "\n'
        'html_theme = "furo"\nhtml_favicon = "icon.svg"\n',
        "utf-8",
    )
    (folder / "icon.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>', "utf-8")
    example = "Title\n=====\n\nA word: running_mean.\n\n>>> 1 + 1\n2\n>>> 3\n3\n\n.. toctree::\n\n   other\n"
    (folder / "index.rst").write_text(example, "utf-8")
    (folder / "other.rst").write_text("Other\n=====\n\n>>> (1 +\n... 1)\n2\n", "utf-8")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "-b", "html", str(folder), str(folder / "html")]
    subprocess.run(command, check=True)
    return browse.Browser(browser.page, f"{browser.address}built/html/")


def test_search_and_copying_are_tried(built: Any) -> None:
    built.check_search("running_mean", "index.html")
    built.check_copy("index.html")
    assert built.problems == []
    built.check_search("running_mean", "other.html")
    built.check_search("momentum", "index.html")
    built.check_copy("other.html")
    found = [problem.partition(", ")[0] for problem in built.problems]
    assert found == ["search.html?q=running_mean", "search.html?q=momentum", "other.html"]
    assert built.problems[-1].endswith("['(1 +'] is copied, not ['(1 +', '1)']")


def test_help_names_the_pages_that_pictures_are_taken_of(
    browse: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        browse.main(["--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in browse.PICTURES)


# ---------------------------------------------------------------- what our extensions write


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One sentence.", "One sentence."),
        ("One. " + "Two " * 40 + "end.", "One."),
        ("word " * 40, "word " * 31 + "word …"),
    ],
)
def test_description_has_whole_sentences_or_words(text: str, expected: str) -> None:
    assert module_of(DOCS / "_ext" / "describe.py").shortened(text) == expected


def test_description_is_of_the_text_and_not_of_what_stands_beside_it() -> None:
    from docutils.core import publish_doctree

    page = "Title\n=====\n\n.. note:: Beside.\n\n+---+\n| a |\n+---+\n\nThe *text*\nhere.\n\nMore.\n"
    assert module_of(DOCS / "_ext" / "describe.py").description(publish_doctree(page)) == "The text here."


def test_what_scrolls_takes_the_focus_and_arguments_are_no_definitions() -> None:
    repaired = module_of(DOCS / "_ext" / "access.py").repaired
    assert (
        repaired('<pre>x</pre><div class="math">y</div>')
        == '<pre tabindex="0">x</pre><div tabindex="0" class="math">y</div>'
    )
    assert repaired('<div class="table-wrapper a">') == '<div tabindex="0" class="table-wrapper a">'
    signature = "<dt>f(\n\n<dl>\n<dd>a,</dd>\n<dd>b</dd>\n</dl>\n\n)</dt>"
    assert "<dl>" not in repaired(signature)
    assert repaired(signature).count('<span class="sig-argument">') == 2
    definitions = "<dl>\n<dt>a</dt><dd>b</dd>\n</dl><div class='mathematics'><present>"
    assert repaired(definitions) == definitions


def test_long_names_break_at_their_joints() -> None:
    repaired = module_of(DOCS / "_ext" / "access.py").repaired
    name = "batch_norm_training_BackpropGradient"
    heading = f'<h2>Of {{}} and a_bC<a href="#{name}">#</a></h2><p>{name}</p>'
    broken = "batch_<wbr>norm_<wbr>training_<wbr>Backprop<wbr>Gradient"
    assert repaired(heading.format(name)) == heading.format(broken)


def test_the_site_has_the_version() -> None:
    conf = runpy.run_path(str(DOCS / "conf.py"))
    assert conf["release"] == conf["version"] == bnbp.__version__


def test_captions_of_the_navigation_are_headings_of_a_level() -> None:
    navigation = module_of(DOCS / "_ext" / "access.py").navigation
    assert navigation('<p role="heading">Start</p>') == '<p role="heading" aria-level="2">Start</p>'
