"""SVG that stands in the page itself, in the colours of the page: drawn by hand, or made of matplotlib's.

Colours are classes of ``_static/figures.css``: ``ink`` for text and lines, ``paper`` for the background, ``faint`` for
grids, and one for each thing that is shown, such as ``bnbp``. A drawing is as wide as a narrow window, 360 units, and
its text has at least 12 of them, so that it can be read there.
"""

import re
from collections.abc import Mapping, Sequence
from html import escape
from xml.etree import ElementTree

WIDTH = 360  # of a drawing, in units that are no smaller than 0.95 pixels on a telephone
SMALL = 12  # the least size of text
NAMESPACE = "http://www.w3.org/2000/svg"


class Drawing:
    """Shapes from the back to the front, and how far down they reach."""

    def __init__(self, width: int = WIDTH) -> None:
        self.width = width
        self.height = 0.0
        self.parts: list[str] = []

    def add(self, tag: str, text: str = "", bottom: float = 0, **attributes: float | str) -> None:
        """Add an element. Underscores of attributes are hyphens; ``class_`` is the class."""
        self.height = max(self.height, bottom)
        values = {
            name.rstrip("_").replace("_", "-"): f"{value:g}" if isinstance(value, int | float) else value
            for name, value in attributes.items()
        }
        inside = "".join(f' {name}="{escape(value)}"' for name, value in values.items() if value)
        self.parts.append(f"<{tag}{inside}>{escape(text, quote=False)}</{tag}>" if text else f"<{tag}{inside}/>")

    def text(self, x: float, y: float, text: str, kind: str = "", size: float = 13, anchor: str = "") -> None:
        """Text whose baseline is at ``y``; kinds are classes, such as ``code`` and ``strong``."""
        self.add("text", text, y + 4, x=x, y=y, class_=kind, font_size=size, text_anchor=anchor)

    def box(self, x: float, y: float, width: float, height: float, kind: str = "box", round_: float = 4) -> None:
        """A rectangle."""
        self.add("rect", "", y + height, x=x, y=y, width=width, height=height, rx=round_, class_=kind)

    def line(self, *points: tuple[float, float], kind: str = "line", head: bool = False) -> None:
        """A line through points, and a head of an arrow at the last."""
        path = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
        self.add("path", "", max(y for _, y in points) + 1, d=path, class_=kind)
        if head:
            (x0, y0), (x, y) = points[-2:]
            dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
            left, right = (x - 7 * dx - 4 * dy, y - 7 * dy - 4 * dx), (x - 7 * dx + 4 * dy, y - 7 * dy + 4 * dx)
            corners = " ".join(f"{a:g},{b:g}" for a, b in ((x, y), left, right))
            self.add("polygon", "", y, points=corners, class_="head")

    def shape(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        """A polygon."""
        corners = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.add("polygon", "", max(y for _, y in points) + 1, points=corners, class_=kind)

    def svg(self, identity: str, title: str, description: str) -> str:
        """The element, whose IDs begin with ``identity``."""
        head = opening(identity, f"0 0 {self.width} {round(self.height) + 2}", title, description)
        return head + "\n".join(self.parts) + "\n</svg>"


def opening(identity: str, view: str, title: str, description: str) -> str:
    """The tag that opens an SVG, with what is read out in its place."""
    return (
        f'<svg xmlns="{NAMESPACE}" class="figure" viewBox="{view}" role="img" '
        f'aria-labelledby="{identity}-title {identity}-description">\n'
        f'<title id="{identity}-title">{escape(title, quote=False)}</title>\n'
        f'<desc id="{identity}-description">{escape(description, quote=False)}</desc>\n'
    )


def themed(svg: str, identity: str, title: str, description: str, colours: Mapping[str, str]) -> str:
    """What matplotlib has made, to stand in a page.

    Parameters
    ----------
    svg : str
        Of matplotlib's SVG backend, with ``svg.fonttype`` "none".
    identity : str
        What all IDs begin with, so that they are the only ones of a page that has several such figures.
    title, description : str
        What is read out in the figure's place.
    colours : mapping of str to str
        Classes of the style sheet, by the colours as matplotlib writes them, such as "#1f77b4". Black, white and the
        grey of grids need not be there.

    Returns
    -------
    str
        The element.

    Raises
    ------
    ValueError
        If there is a colour of no class: it would be wrong in the dark.
    """
    names = {"#000000": "ink", "#ffffff": "paper", "#b0b0b0": "faint", **colours}

    def with_variables(style: str) -> str:
        def variable(match: re.Match[str]) -> str:
            if match[0].lower() not in names:
                raise ValueError(f"the colour {match[0]} has no class")
            return f"var(--figure-{names[match[0].lower()]})"

        return re.sub(r"#[0-9a-fA-F]{6}\b", variable, style)

    root = ElementTree.fromstring(svg)
    used = set(re.findall(r'(?:url\(#|href="#)([\w.-]+)', svg))
    link = "{http://www.w3.org/1999/xlink}href"
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):  # a style here would hold for the whole page
                parent.remove(child)
        attributes = parent.attrib
        name = attributes.pop("id", "")
        if name in used:
            attributes["id"] = f"{identity}-{name}"
        if link in attributes:
            attributes["href"] = f"#{identity}-{attributes.pop(link).removeprefix('#')}"
        if "clip-path" in attributes:
            attributes["clip-path"] = attributes["clip-path"].replace("url(#", f"url(#{identity}-")
        if "style" in attributes:
            style = with_variables(attributes["style"])
            attributes["style"] = re.sub(r"font-family: [^;]*; ?", "", style)
        if attributes.get("transform", "").startswith("rotate(-0 "):
            del attributes["transform"]
    ElementTree.register_namespace("", NAMESPACE)
    body = "".join(ElementTree.tostring(child, "unicode") for child in root)
    body = body.replace(f' xmlns="{NAMESPACE}"', "")
    return opening(identity, root.attrib["viewBox"], title, description) + re.sub(r"\s*\n\s*", " ", body) + "\n</svg>"


MARKS = {  # matplotlib's markers, in a square of 12
    "D": "M6 1 L11 6 L6 11 L1 6 Z",
    "d": "M6 1 L9 6 L6 11 L3 6 Z",
    "P": "M4.5 1.5 h3 v3 h3 v3 h-3 v3 h-3 v-3 h-3 v-3 h3 Z",
    "o": "M2 6 a4 4 0 1 0 8 0 a4 4 0 1 0 -8 0 Z",
    ".": "M4 6 a2 2 0 1 0 4 0 a2 2 0 1 0 -4 0 Z",
    "p": "M6 1.5 L10.5 5 L8.8 10.3 L3.2 10.3 L1.5 5 Z",
    "s": "M2.2 2.2 h7.6 v7.6 h-7.6 Z",
    "^": "M6 1.8 L10.5 10 L1.5 10 Z",
    "v": "M6 10.2 L10.5 2 L1.5 2 Z",
}


def figure(panels: Sequence[str], caption: str = "", legend: Sequence[tuple[str, str, str]] = ()) -> str:
    """Panels side by side where there is room, below each other where there is not; then a legend and a caption.

    A line of the legend is a class, a marker of matplotlib's, and text.
    """
    lines = [
        f'<li><svg class="mark {kind}" viewBox="0 0 12 12" aria-hidden="true"><path d="{MARKS[mark]}"/></svg>'
        f" {escape(text, quote=False)}</li>"
        for kind, mark, text in legend
    ]
    parts = ['<figure class="figure">', '<div class="panels">', *panels, "</div>"]
    if lines:
        parts += ['<ul class="legend">', *lines, "</ul>"]
    if caption:
        parts.append(f"<figcaption>{escape(caption, quote=False)}</figcaption>")
    return "\n".join([*parts, "</figure>"])
