"""Plots and pictures of the pages: they show what was measured, fit a narrow window, and have the page's colours.

Nothing here needs Sphinx. What the figures show is read from the files of measurements, by other ways than theirs.
"""

import dataclasses
import itertools
import json
import math
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

from bnbp.cli.benchmark import plot, points, report
from bnbp.cli.training import report as training_report

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
MEASURED = DOCS / "measured"
CSS = (DOCS / "_static" / "figures.css").read_text("utf-8")
SVG = "{http://www.w3.org/2000/svg}"

GRADIENTS = {"operator": "training_backprop"}


@pytest.fixture(scope="module")
def ext() -> Iterator[SimpleNamespace]:
    """The modules that make the figures, which are found as Sphinx finds them."""
    sys.path.insert(0, str(DOCS / "_ext"))
    try:
        import drawing
        import headline
        import machines
        import panels
        import pictures

        yield SimpleNamespace(**{module.__name__: module for module in (drawing, headline, machines, panels, pictures)})
    finally:
        sys.path.pop(0)


def measured(name: str) -> Any:
    return json.loads((MEASURED / name).read_text("utf-8"))


def rows_of(name: str, threads: int) -> Any:
    return [row for row in report.load(measured(name)) if row.point.threads == threads]


@pytest.fixture(scope="module")
def figures(ext: SimpleNamespace) -> dict[str, str]:
    """One SVG of each kind, as it stands in a page."""
    result = {f"picture {name}": draw(f"p-{name}") for name, draw in ext.pictures.PICTURES.items()}
    content = ext.machines.load(ext.headline.newest())
    inline = ext.headline.inline(content, "h")
    for k, svg in enumerate(re.findall(r"<svg xmlns.*?</svg>", inline, re.DOTALL)):
        result[f"headline {k}"] = svg
    for name in ("network.json", "cache.json", "relu.json"):
        drawn, _ = ext.panels.of_rows(rows_of(name, 2), name.partition(".")[0], "What there is to see.")
        result |= {f"{name} {k}": svg for k, svg in enumerate(drawn)}
    steps = training_report.load({"rows": [row for row in measured("training.json")["rows"] if row["threads"] == 2]})
    [result["training"]], _ = ext.panels.of_training(steps, "t", "Steps.")
    return result


def test_there_are_figures_of_every_kind(figures: dict[str, str]) -> None:
    kinds = [name.partition(" ")[0] for name in figures]
    wanted = {"picture": 2, "headline": 2, "network.json": 2, "cache.json": 3, "relu.json": 2, "training": 1}
    assert {kind: kinds.count(kind) for kind in kinds} == wanted


# ---------------------------------------------------------------- in the page


def test_figures_say_what_they_are_to_those_who_do_not_see_them(figures: dict[str, str]) -> None:
    for name, svg in figures.items():
        root = ElementTree.fromstring(svg)
        assert root.get("role") == "img", name
        assert [child.tag for child in root[:2]] == [f"{SVG}title", f"{SVG}desc"], name
        assert root.get("aria-labelledby") == " ".join(child.get("id", "") for child in root[:2]), name
        assert all((child.text or "").strip() for child in root[:2]), name


def test_ids_of_a_page_with_all_figures_are_unique_and_references_find_them(figures: dict[str, str]) -> None:
    every = [name for svg in figures.values() for name in re.findall(r' id="([^"]*)"', svg)]
    assert len(every) == len(set(every)) > 2 * len(figures)
    for svg in figures.values():
        own = set(re.findall(r' id="([^"]*)"', svg))
        references = set(re.findall(r'(?:url\(#|href="#)([^)"]*)', svg))
        assert references <= own
        assert "xlink" not in svg
    assert "url(#" in figures["network.json 0"]


def test_figures_have_the_colours_of_the_style_sheet_alone(figures: dict[str, str]) -> None:
    known = set(re.findall(r"(--figure-[\w-]+):", CSS))
    classes = set(re.findall(r"svg(?:\.figure)? ?(?:text)?\.([\w-]+)", CSS)) | {"figure"}
    for name, svg in figures.items():
        assert not re.search(r"#[0-9a-fA-F]{3,8}\b(?!-)", re.sub(r"""(url\(|href=")#[^)"]*""", "", svg)), name
        assert "<style" not in svg, name  # it would hold for the whole page
        assert set(re.findall(r"var\((--[\w-]+)\)", svg)) <= known, name
        used = {each for value in re.findall(r' class="([^"]*)"', svg) for each in value.split()}
        assert used <= classes, name
    assert "--figure-torch" in figures["network.json 0"]


def test_a_colour_without_a_class_is_an_error(ext: SimpleNamespace) -> None:
    svg = f'<svg xmlns="{SVG[1:-1]}" viewBox="0 0 1 1"><path style="fill: #1f77b5"/></svg>'
    with pytest.raises(ValueError, match="#1f77b5"):
        ext.drawing.themed(svg, "x", "t", "d", {"#1f77b4": "bnbp"})
    assert "var(--figure-bnbp)" in ext.drawing.themed(svg, "x", "t", "d", {"#1f77b5": "bnbp"})


def test_text_is_text_and_can_be_read_in_a_window_of_390_pixels(figures: dict[str, str]) -> None:
    for name, svg in figures.items():
        root = ElementTree.fromstring(svg)
        width = float(root.get("viewBox", "").split()[2])
        sizes = []
        for text in root.iter(f"{SVG}text"):
            style = re.search(r"font(?:-size)?: ([\d.]+)px", text.get("style", ""))
            size = float(style[1] if style else text.get("font-size", "nan"))
            sizes.append(size * (390 - 32) / width)  # what furo leaves of the window
            assert "".join(text.itertext()).strip()
        assert len(sizes) >= 6, name
        assert min(sizes) >= 11, name
    words = " ".join(ElementTree.fromstring(figures["network.json 0"]).itertext())
    assert "32x2048x7x7" in words


@pytest.mark.parametrize("name", ["picture operator", "picture code", "headline 0", "headline 1"])
def test_text_of_a_drawing_stays_inside_it_and_its_box(figures: dict[str, str], name: str) -> None:
    """In DejaVu, which is wider than the fonts that pages use."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    root = ElementTree.fromstring(figures[name])
    _, _, right, bottom = map(float, root.get("viewBox", "").split())
    boxes = [
        tuple(float(each.get(key, "nan")) for key in ("x", "y", "width", "height"))
        for each in root.iter(f"{SVG}rect")
        if "box" in each.get("class", "") or "slice" in each.get("class", "")
    ]
    for text in root.iter(f"{SVG}text"):
        kind = text.get("class", "").split()
        font = FontProperties(family="DejaVu Sans Mono" if "code" in kind else "DejaVu Sans Condensed")
        x, y, size = (float(text.get(key, "nan")) for key in ("x", "y", "font-size"))
        length = TextPath((0, 0), " ".join((text.text or "").split()), size=size, prop=font).get_extents().x1
        start = x - {"end": length, "middle": length / 2}.get(text.get("text-anchor", ""), 0)
        assert start >= -0.5, text.text
        assert start + length <= right + 0.5, text.text
        assert size * 0.7 < y < bottom, text.text
        for left, top, width, height in boxes:
            if left < x < left + width and top < y < top + height:
                assert start + length <= left + width, text.text
                assert y <= top + height - 3, text.text


# ---------------------------------------------------------------- colours


def palette(selector: str) -> dict[str, str]:
    block = CSS.partition(selector + " {")[2].partition("}")[0]
    return dict(re.findall(r"(--figure-[\w-]+): (#\w{6});", block))


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_colours_are_seen_on_the_background_in_light_and_dark() -> None:
    light, dark = palette("body"), palette('body[data-theme="dark"]')
    assert light.keys() == dark.keys()
    assert len(light) >= 9
    for colours, paper in ((light, "#ffffff"), (dark, "#131416")):  # furo's
        for name, colour in colours.items():
            assert name == "--figure-wash" or contrast(colour, paper) >= 3, (name, colour)
    assert contrast(light["--figure-wash"], "#000000") >= 7  # text stands on it
    assert contrast(dark["--figure-wash"], "#cfd0d0") >= 7


def test_the_dark_of_the_system_is_the_dark_of_the_page() -> None:
    assert palette('body[data-theme="dark"]') == palette('    body:not([data-theme="light"])')


def test_every_candidate_has_a_colour_and_a_marker_of_its_own(ext: SimpleNamespace) -> None:
    assert len(set(plot.MARKERS.values())) == len(plot.MARKERS)
    assert plot.MARKERS.keys() == plot.COLOURS_OF_LINES.keys() == ext.panels.CLASSES.keys()
    assert len(set(ext.panels.CLASSES.values())) == len(ext.panels.CLASSES)
    assert set(plot.MARKERS.values()) <= ext.drawing.MARKS.keys()


# ---------------------------------------------------------------- the front page's plot


def bars_of(svg: str) -> dict[str, float]:
    root = ElementTree.fromstring(svg)
    return {each.get("class", ""): float(each.get("width", "nan")) for each in root.iter(f"{SVG}rect")}


def test_bars_are_as_long_as_the_times_and_all_on_one_scale(ext: SimpleNamespace, figures: dict[str, str]) -> None:
    content = measured(ext.headline.newest())
    assert content["settings"]["dtype"] == "float32"
    scales, cut = [], []
    for k, layout in enumerate(("nchw", "nhwc")):
        svg = figures[f"headline {k}"]
        bars = bars_of(svg)
        assert list(bars) == ["bnbp", "torch", "tensorflow", "jax"]
        for name, width in bars.items():
            rows = [row for row in content["rows"] if row["point"]["layout"] == layout]
            time = sum(row["seconds"][name]["median"] * row["point"]["times"] for row in rows)
            assert f"{time * 1e3:.0f} ms" in svg
            (cut if 'class="cut"' in svg and width == max(bars.values()) else scales).append(width / time)
    assert scales == pytest.approx([scales[0]] * len(scales), rel=1e-4)
    assert len(cut) <= 1  # TensorFlow's channels first, which would leave no room for the others
    assert all(shorter < scales[0] for shorter in cut)


def test_the_plot_of_the_readme_is_what_the_script_makes(ext: SimpleNamespace, tmp_path: Path) -> None:
    made = ext.headline.standalone(ext.machines.load(ext.headline.newest()))
    assert ext.headline.FILE.read_text("utf-8") == made, "run: python docs/_ext/headline.py"
    script = f"import runpy, pathlib; pathlib.Path.write_text = lambda self, text, *_: print(self.name, len(text)); \
runpy.run_path({str(DOCS / '_ext' / 'headline.py')!r}, run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(DOCS / '_ext')!r}); {script}"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert done.stdout == f"headline.svg {len(made)}\n"


def test_the_plot_of_the_readme_stands_alone_in_light_and_dark(ext: SimpleNamespace) -> None:
    svg = ext.headline.FILE.read_text("utf-8")
    light, dark = re.findall(r"svg \{ (--ink.*?)[;}]?\s*(?:font-family.*?)?\}", svg, re.DOTALL)
    themes = [dict(re.findall(r"--(\w+): (#\w{6})", part)) for part in (light, dark)]
    assert themes[0].keys() == themes[1].keys() == set(re.findall(r"var\(--(\w+)\)", svg))
    for colours in themes:
        assert contrast(colours["ink"], colours["paper"]) >= 7
        assert min(contrast(colour, colours["paper"]) for name, colour in colours.items() if name != "paper") >= 3
    root = ElementTree.fromstring(svg)
    page = next(root.iter(f"{SVG}rect"))
    view = root.get("viewBox", "").split()
    assert (page.get("class"), page.get("x"), page.get("width"), page.get("height")) == ("page", view[0], *view[2:])
    assert "http" not in svg.replace(SVG[1:-1], "")
    assert all(name in root.get("aria-label", "") for name in ("PyTorch", "JAX", "Channels last"))


def test_the_newest_file_that_has_everything_is_shown(ext: SimpleNamespace, monkeypatch: Any, tmp_path: Path) -> None:
    content = measured("network.json")
    assert ext.headline.newest() == "network-zen3.json"
    (tmp_path / "early_builds.txt").write_text("z.json\n", "utf-8")
    for module in (ext.headline, ext.machines):
        monkeypatch.setattr(module, "FOLDER", tmp_path)
    monkeypatch.setattr(ext.machines, "EARLY", tmp_path / "early_builds.txt")

    def put(name: str, version: str = "0.1.0", **settings: Any) -> None:
        content["environment"]["bnbp"]["version"] = version
        changed = {**content, "settings": {**content["settings"], **settings}}
        (tmp_path / name).write_text(json.dumps(changed), "utf-8")

    put("relu.json", "0.9.0", activation="relu")
    put("wide.json", "0.9.0", dtype="float64")
    with pytest.raises(FileNotFoundError, match="bnbp, torch, tensorflow, jax"):
        ext.headline.newest()
    put("z.json")
    assert ext.headline.newest() == "z.json"
    put("a.json")
    assert ext.headline.newest() == "a.json"  # z.json is of an early build
    put("k.json", "0.10.0")
    put("l.json", "0.9.0")
    assert ext.headline.newest() == "k.json"
    del content["totals"][0]["seconds"]["jax"]
    put("m.json", "1.0.0")
    assert ext.headline.newest() == "k.json"


# ---------------------------------------------------------------- the panels


def test_panels_of_a_plot_have_one_scale() -> None:
    from matplotlib.figure import Figure

    for name in ("network.json", "cache.json"):
        rows = rows_of(name, 2)
        limits = []
        for members in plot.panels_of(rows).values():
            axes = Figure().subplots()
            plot.draw_panel(plot.kind_of(rows), axes, members, rows)
            limits.append((axes.get_xlim(), axes.get_ylim()))
        assert len(limits) >= 2
        assert len(set(limits)) == 1


def test_panels_are_the_layouts_and_for_the_caches_also_the_flat_shapes() -> None:
    assert [key[1] for key in plot.panels_of(rows_of("network.json", 2))] == ["channels first", "channels last"]
    panels = plot.panels_of(rows_of("cache.json", 1))
    assert [key[1] for key in panels] == ["channels first", "channels last", "(N, C)"]
    assert {len(row.point.shape) for row in panels["training_backprop", "(N, C)"]} == {2}
    assert sum(map(len, panels.values())) == len(rows_of("cache.json", 1))
    two = rows_of("odd.json", 2)
    both = [*two, *(dataclasses.replace(row, point=dataclasses.replace(row.point, operator="training")) for row in two)]
    assert len(plot.panels_of(both)) == 4


# ---------------------------------------------------------------- the pictures


def test_files_that_the_picture_of_the_code_names_are_there(ext: SimpleNamespace, figures: dict[str, str]) -> None:
    texts = [text.text or "" for text in ElementTree.fromstring(figures["picture code"]).iter(f"{SVG}text")]
    kernels = ROOT / "bnbp" / "engine" / "kernels"
    paths = [text for text in texts if text.startswith("bnbp/")]
    assert len(paths) == 6
    assert all(list(ROOT.glob(path.rstrip("/"))) for path in paths)
    named = re.findall(r"\b\w+\.pxi", " ".join(texts))
    named += [f"{name}.pxi" for _, files, _ in ext.pictures.KERNELS for name in files]
    named.append("sweep.pxi")
    assert len(named) == 3 + 5 + 1
    assert all((kernels / name).is_file() for name in named)
    description = ext.pictures.DESCRIPTIONS["code"]
    assert set(re.findall(r"\w+\.pxi", description)) == set(named)
    assert all(list(ROOT.glob(f"bnbp/**/{path}")) for path in ("detail/call.hpp", "engine/boundary.pyx"))


def test_a_page_may_describe_a_picture_in_its_own_words(ext: SimpleNamespace) -> None:
    root = ElementTree.fromstring(ext.pictures.operator("x", "Sums & results"))
    assert root.findtext(f"{SVG}desc") == "Sums & results"


def test_the_picture_of_the_operator_has_its_inputs_and_outputs(figures: dict[str, str]) -> None:
    from bnbp import BatchNormTrainingBackpropResult

    root = ElementTree.fromstring(figures["picture operator"])
    words = " ".join(text.text or "" for text in root.iter(f"{SVG}text"))
    names = {"input", "normalized_delta", "mean", "variance", "gamma", *BatchNormTrainingBackpropResult._fields}
    assert names <= set(re.findall(r"\w+", words))


def test_the_formulas_of_the_picture_are_those_of_the_reference(figures: dict[str, str]) -> None:
    """Its three lines of code, run as Python on one channel."""
    import numpy as np

    from bnbp import reference

    root = ElementTree.fromstring(figures["picture operator"])
    lines = [text.text or "" for text in root.iter(f"{SVG}text") if text.get("class") == "code"]
    code = "\n".join(line for line in lines if re.search(r"[=(]|x̂", line))
    code = (
        code.replace("\n·", " ·").replace("\n- x̂", " - x̂").replace("x̂", "x").replace("·", "*").replace("ε", "epsilon")
    )
    code = re.sub(r"√(\([^)]*\))", r"np.sqrt\1", code)
    code = re.sub(r"Σ (.*)", r"np.sum(\1)", code)
    definitions = dict(line.split(" = ", 1) for line in re.sub(" +=", " =", code).splitlines())
    assert list(definitions) == ["beta_delta", "gamma_delta", "x", "input_delta"]
    rng = np.random.default_rng(5)
    x, delta = rng.normal(2, 3, (7, 1)), rng.normal(1, 1, (7, 1))
    mean, variance = x.mean(0), x.var(0)
    names = {"np": np, "input": x, "normalized_delta": delta, "mean": mean, "variance": variance, "m": 7}
    names |= {"gamma": np.array([1.7]), "epsilon": 0.3}
    for name in ("x", "beta_delta", "gamma_delta", "input_delta"):
        names[name] = eval(definitions[name], {}, names)
    result = reference.batch_norm_training_backprop(x, names["gamma"], None, mean, variance, delta, epsilon=0.3)
    for name, value in result._asdict().items():
        np.testing.assert_allclose(np.squeeze(names[name]), np.squeeze(value), rtol=1e-12, err_msg=name)


# ---------------------------------------------------------------- figures in the text


@pytest.mark.parametrize(("layout", "threads"), list(itertools.product(points.LAYOUTS, (1, 2))))
def test_ratios_are_those_of_the_rows(ext: SimpleNamespace, layout: str, threads: int) -> None:
    where = {**GRADIENTS, "layout": layout, "threads": threads}
    network, cache = "network-epyc.json", "cache.json"

    def seconds(name: str) -> list[Any]:
        rows = [row for row in measured(name)["rows"] if row["point"]["layout"] == layout]
        return [row for row in rows if row["point"]["threads"] == threads]

    rows = seconds(network)

    def total(name: str) -> float:
        return sum(row["seconds"][name]["median"] * row["point"]["times"] for row in rows)

    def bound(row: Any) -> float:
        read = row["seconds"]["read"]["median"] if row["second_read"] else 0
        return (row["seconds"]["floor"]["median"] + read) * row["point"]["times"]

    content = ext.machines.load(network)
    assert ext.machines.ratio(content, "torch", "bnbp", **where) == pytest.approx(total("torch") / total("bnbp"))
    found = ext.machines.ratio(content, "bnbp", "bound", **where)
    assert found == pytest.approx(total("bnbp") / sum(map(bound, rows)))
    assert ext.machines.ratio(content, "jax", "bnbp", **where) is None

    rows = seconds(cache)
    content = ext.machines.load(cache)
    pairs = [(row["seconds"]["bnbp"]["minimum"], row["seconds"]["torch"]["minimum"]) for row in rows]
    mean = math.exp(statistics.fmean(math.log(own / other) for own, other in pairs))
    assert ext.machines.ratio(content, "bnbp", "torch", **where) == pytest.approx(mean)
    assert ext.machines.ratio(content, "torch", "bnbp", **where) == pytest.approx(1 / mean)
    assert ext.machines.slower(content, "torch", **where) == (sum(a > b for a, b in pairs), len(pairs))


def test_a_ratio_of_nothing_or_of_several_totals_is_an_error(ext: SimpleNamespace) -> None:
    content = ext.machines.load("network-epyc.json")
    for where in ({"layout": "nchw"}, {"layout": "nchw", "threads": 3}):
        with pytest.raises(ValueError, match="totals fit"):
            ext.machines.ratio(content, "torch", "bnbp", **where)
    with pytest.raises(ValueError, match="jax"):
        ext.machines.slower(content, "jax", layout="nchw", threads=2)


def test_numbers_have_the_digits_that_mean_something(ext: SimpleNamespace) -> None:
    assert [ext.machines.number(each) for each in (0.6071, 1.314, 6.755, 22.38)] == ["0.61", "1.31", "6.8", "22"]


def test_what_the_summary_says_of_shapes_is_true_of_the_files() -> None:
    ahead = [
        row.point.shape
        for row in rows_of("cache.json", 2)
        if row.point.layout == "nchw" and row.seconds["torch"].minimum < row.seconds["bnbp"].minimum
    ]
    assert sum(len(shape) == 2 for shape in ahead) > len(ahead) / 2  # "most of which are of shape (N, C)"
    for row in rows_of("network-zen3.json", 2):  # "the nearest to the floor in every layer"
        others = (row.seconds[name].median for name in ("torch", "tensorflow", "jax", "numpy"))
        assert row.seconds["bnbp"].median < min(others)
    sizes = [row.point.size for row in rows_of("cache.json", 1)]
    assert (round(min(sizes), -3), round(max(sizes), -5)) == (8_000, 800_000)


def test_captions_name_the_machine_the_build_and_the_releases(ext: SimpleNamespace) -> None:
    text = ext.machines.machine_of(ext.machines.load("network.json"))
    assert text == (
        "2 CPUs of Intel Xeon (2 MiB of L2 each), x86-64-v4, an early build of bnbp 0.1.0, PyTorch 2.13.0, "
        "TensorFlow 2.21.0, JAX 0.10.2, NumPy 2.4.6"
    )
    assert ext.machines.machine_of(ext.machines.load("training.json")) == (
        "2 CPUs of AMD EPYC (0.5 MiB of L2 each), x86-64-v3, bnbp 0.1.0, PyTorch 2.13.0"
    )


def test_files_of_early_builds_are_there() -> None:
    lines = (MEASURED / "early_builds.txt").read_text("utf-8").splitlines()
    names = [line for line in lines if not line.startswith("#")]
    assert len(names) == len(set(names))
    assert all((MEASURED / name).is_file() for name in names)


def test_every_file_of_measurements_is_on_a_page() -> None:
    text = "".join(path.read_text("utf-8") for path in DOCS.glob("*.rst"))
    for path in MEASURED.glob("*.json"):
        assert f":: {path.name}" in text, path.name
