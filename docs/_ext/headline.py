"""The front page's plot: bnbp beside the frameworks, on the batch norms of ResNet-50.

``python docs/_ext/headline.py`` writes ``docs/_static/headline.svg`` for README.md, which has no style sheet: that file
has colours and a background of its own, light and dark.
"""

from pathlib import Path
from typing import Any

from drawing import NAMESPACE, WIDTH, Drawing, figure
from machines import FOLDER, build_of, cpu_of, load, machine_of, number, threads_of

FILE = Path(__file__).parents[1] / "_static" / "headline.svg"

# A bar that is longer than this many of bnbp's is cut. TensorFlow's channels first can be 24 times as long.
LONGEST = 6
BARS = {"bnbp": "bnbp", "torch": "PyTorch", "tensorflow": "TensorFlow", "jax": "JAX"}
LAYOUTS = {"nchw": "Channels first, (N, C, H, W)", "nhwc": "Channels last, (N, H, W, C)"}
WHAT = "Gradient of ResNet-50's 53 batch norms"
STYLE = """
svg { --ink: #1c1c1c; --paper: #ffffff; --bnbp: #0b5cc4; --torch: #c92a2a; --tensorflow: #b95800; --jax: #7443b8;
  font-family: -apple-system, "Segoe UI", Helvetica, Arial, sans-serif }
@media (prefers-color-scheme: dark) {
  svg { --ink: #e0e0e0; --paper: #131416; --bnbp: #6cabff; --torch: #ff7f76; --tensorflow: #ffab4a; --jax: #c3a2ff }
}
text { fill: var(--ink) } .strong { font-weight: 600 } .page { fill: var(--paper) }
.dashed { fill: none; stroke: var(--ink); stroke-dasharray: 4 3 } .cut { stroke: var(--paper); stroke-width: 3 }
.bnbp { fill: var(--bnbp) } .torch { fill: var(--torch) }
.tensorflow { fill: var(--tensorflow) } .jax { fill: var(--jax) }
"""


def fits(content: dict[str, Any]) -> bool:
    """Whether a file has the gradient of the network in float32, in both layouts, with all that is shown."""
    wanted = {"sets": ["network"], "dtype": "float32"}
    settings = content["settings"]
    if any(settings.get(key) != value for key, value in wanted.items()) or settings.get("activation"):
        return False
    return all(
        any(total["layout"] == layout and BARS.keys() <= total["seconds"].keys() for total in gradients(content))
        for layout in LAYOUTS
    )


def gradients(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The totals of the gradient, with the largest number of threads that was measured."""
    totals = [total for total in content["totals"] if total["operator"] == "training_backprop"]
    return [total for total in totals if total["threads"] == max(each["threads"] for each in totals)]


def newest() -> str:
    """The file of the newest release that fits; of several, the last in the order of their names."""
    found = []
    for path in FOLDER.glob("*.json"):
        content = load(path.name)
        if "totals" in content and fits(content):
            release = tuple(map(int, content["environment"]["bnbp"]["version"].split(".")[:3]))
            found.append((release, not content["early"], path.name))
    if not found:
        raise FileNotFoundError(f"{FOLDER}: no file has the gradient of the network with {', '.join(BARS)}")
    return max(found)[-1]


def draw(drawing: Drawing, content: dict[str, Any], layout: str, top: float) -> float:
    """Draw the bars of a layout; return where they end. All layouts have one scale, and the same longest bar."""
    totals = {total["layout"]: total["seconds"] for total in gradients(content)}
    longest = max(each[name]["median"] for each in totals.values() for name in BARS)
    longest = min(longest, LONGEST * max(each["bnbp"]["median"] for each in totals.values()))
    seconds = totals[layout]
    left, scale = 92.0, (WIDTH - 92 - 104) / longest
    drawing.text(0, top + 14, LAYOUTS[layout], "strong", 14)
    y = top + 26
    for name, label in BARS.items():
        time = seconds[name]["median"]
        drawing.text(left - 8, y + 15, label, "strong" if name == "bnbp" else "", 13.5, "end")
        end = left + min(time, longest) * scale
        drawing.box(left, y, end - left, 20, name, 2)
        if time > longest:
            for x in (end - 24, end - 17):
                drawing.line((x - 3, y + 22), (x + 3, y - 2), kind="cut")
        ratio = "" if name == "bnbp" else f" ({number(time / seconds['bnbp']['median'])}\N{MULTIPLICATION SIGN})"
        drawing.text(end + 6, y + 15, f"{time * 1e3:.0f} ms{ratio}", size=13.5)
        y += 27
    floor = left + seconds["bound"]["median"] * scale
    drawing.line((floor, top + 22), (floor, y + 4), kind="dashed")
    drawing.text(floor + 5, y + 10, f"the memory alone: {seconds['bound']['median'] * 1e3:.0f} ms", size=12.5)
    return y + 20


def described(content: dict[str, Any], layout: str) -> str:
    """The bars in words."""
    [total] = [each for each in gradients(content) if each["layout"] == layout]
    seconds = total["seconds"]
    bars = [f"{label} {seconds[name]['median'] * 1e3:.0f} ms" for name, label in BARS.items()]
    bound = f"reading and writing the memory alone takes {seconds['bound']['median'] * 1e3:.0f} ms"
    return f"Bars, shorter is better: {', '.join(bars)}; {bound}."


def caption(content: dict[str, Any]) -> str:
    """What was measured, and where."""
    threads = gradients(content)[0]["threads"]
    return (
        f"{WHAT}, batch of 32, float32: total time, shorter is better. "
        f"Median of {content['settings']['rounds']} rounds, {threads_of(threads)}. {machine_of(content)}."
    )


def inline(content: dict[str, Any], identity: str) -> str:
    """The plot to stand in a page."""
    panels = []
    for layout, title in LAYOUTS.items():
        drawing = Drawing()
        draw(drawing, content, layout, 0)
        panels.append(drawing.svg(f"{identity}-{layout}", f"{WHAT}. {title}", described(content, layout)))
    return figure(panels, caption(content))


def standalone(content: dict[str, Any]) -> str:
    """The plot as a file, one layout below the other."""
    drawing = Drawing()
    drawing.text(0, 16, WHAT, "strong", 15)
    threads = gradients(content)[0]["threads"]
    drawing.text(0, 35, f"float32, batch of 32, {threads_of(threads)}: shorter is better", size=13)
    bottom = 44.0
    for layout in LAYOUTS:
        bottom = draw(drawing, content, layout, bottom) + 8
    drawing.text(0, bottom + 10, f"{cpu_of(content)}, {build_of(content)}", size=12.5)
    edge, height = 14, round(bottom + 18)
    size = f'width="{WIDTH + 2 * edge}" height="{height + 2 * edge}"'
    page = f'<rect class="page" x="{-edge}" y="{-edge}" {size} rx="8"/>'
    view = f"{-edge} {-edge} {WIDTH + 2 * edge} {height + 2 * edge}"
    words = " ".join(f"{title}: {described(content, layout)}" for layout, title in LAYOUTS.items())
    return (
        f'<svg xmlns="{NAMESPACE}" {size} viewBox="{view}" role="img" aria-label="{WHAT}. {words}">\n'
        f"<style>{STYLE}</style>\n{page}\n" + "\n".join(drawing.parts) + "\n</svg>\n"
    )


if __name__ == "__main__":
    FILE.write_text(standalone(load(newest())), "utf-8")
