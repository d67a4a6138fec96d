"""Two pictures: what the operator computes, and how a call goes through the code."""

from collections.abc import Callable

from drawing import SMALL, WIDTH, Drawing

TITLES = {
    "operator": "BatchNormTrainingBackprop in two passes",
    "code": "The way of a call through the code",
}
DESCRIPTIONS = {
    "operator": (
        "Tensors of shape (N, C, H, W) are drawn as N images of C planes. A channel is one plane of every image. The "
        "first pass reads input and normalized_delta, uses the channel's mean and variance, and sums up: beta_delta is "
        "the sum of normalized_delta, gamma_delta the sum of normalized_delta times the normalised input. The second "
        "pass reads both tensors again and computes input_delta, a tensor of the same shape, with these two sums."
    ),
    "code": (
        "Five steps from top to bottom. The Python function in bnbp/ops.py takes arrays. The boundary in "
        "engine/boundary.pyx makes views of them and, with memory of engine/pool.pyx, results. The call in "
        "detail/call.hpp checks types, shapes and overlap. The plan in plan.pxi, schedule.pxi and tiles.pxi gives "
        "units of channels to threads. The kernels reduce (reduce_runs.pxi and reduce_rows.pxi), finish (finish.pxi) "
        "and apply (apply_runs.pxi and apply_rows.pxi) compute; sweep.pxi reduces and applies at once. The results go "
        "back."
    ),
}


def operator(identity: str, description: str = DESCRIPTIONS["operator"]) -> str:
    """The operator: tensors, the two passes, results."""
    drawing = Drawing()
    text, box, line = drawing.text, drawing.box, drawing.line
    text(WIDTH / 2, 13, "tensors (N, C, H, W): N images of C planes", "quiet", 12.5, "middle")
    text(WIDTH / 2, 30, "one channel, in blue: m = N · H · W elements", "quiet", 12.5, "middle")
    tensor(drawing, 22, 62, "input")
    tensor(drawing, 206, 62, "normalized_delta")
    line((20, 99), (8, 99), (8, 358), (24, 358), head=True)  # both tensors are read a second time
    line((340, 99), (352, 99), (352, 358), (336, 358), head=True)
    text(14, 324, "again", "quiet", 12)
    text(346, 324, "again", "quiet", 12, "end")

    line((88, 142), (88, 168), head=True)
    line((272, 142), (272, 168), head=True)
    box(24, 168, 312, 84)
    text(34, 187, "First pass: sums over the channel", "strong")
    text(34, 208, "beta_delta  = Σ normalized_delta", "code", 12)
    text(34, 226, "gamma_delta = Σ normalized_delta · x̂", "code", 12)
    text(34, 244, "x̂ = (input - mean) / √(variance + ε)", "code", 12)

    for middle, width, name in ((120, 98, "beta_delta"), (240, 108, "gamma_delta")):
        line((middle, 252), (middle, 272), head=True)
        box(middle - width / 2, 272, width, 26, "slice", 13)
        text(middle, 289, name, "code", 12, "middle")
        line((middle, 298), (middle, 326), head=True)

    box(24, 326, 312, 84)
    text(34, 345, "Second pass: every element", "strong")
    text(34, 366, "input_delta = gamma / √(variance + ε)", "code", 12)
    text(34, 384, "· (normalized_delta - beta_delta / m", "code", 12)
    text(WIDTH - 34, 402, "- x̂ · gamma_delta / m)", "code", 12, "end")
    line((180, 410), (180, 432), head=True)
    tensor(drawing, 114, 460, "input_delta")
    return drawing.svg(identity, TITLES["operator"], description)


def tensor(drawing: Drawing, x: float, y: float, name: str) -> None:
    """A tensor as N images of C planes, a channel of which is marked."""
    drawing.text(x + 66, y - 10, name, "code strong", 12.5, "middle")
    for image in range(3):
        for plane in (2, 1, 0):
            left, top = x + 46 * image, y + 27 * plane
            corners = [(left + 12, top), (left + 44, top), (left + 32, top + 20), (left, top + 20)]
            drawing.shape(corners, "slice" if plane == 1 else "plane")


STEPS = (
    ("Python function", ("bnbp/ops.py",), ("arrays of NumPy or of others, and options",)),
    (
        "Boundary",
        ("bnbp/engine/boundary.pyx", "bnbp/engine/pool.pyx"),
        ("objects become views; results are made", "or taken from out="),
    ),
    (
        "Checks",
        ("bnbp/include/bnbp/detail/call.hpp",),
        ("types, shapes, overlap: all rules stand here,", "for Python and for C++"),
    ),
    (
        "Plan and tiles",
        ("bnbp/engine/kernels/", "plan.pxi, schedule.pxi, tiles.pxi"),
        ("units of channels for each thread; other", "layouts are gathered tile by tile"),
    ),
)
KERNELS = (
    ("reduce", ("reduce_runs", "reduce_rows"), "sums"),
    ("finish", ("finish",), "coefficients"),
    ("apply", ("apply_runs", "apply_rows"), "results"),
)


def code(identity: str, description: str = DESCRIPTIONS["code"]) -> str:
    """The way of a call: a box for each step, with its files."""
    drawing = Drawing()
    text, box, line = drawing.text, drawing.box, drawing.line
    y, middle = 1.0, WIDTH / 2
    for k, (title, files, words) in enumerate(STEPS):
        height = 30 + 17 * (len(files) + len(words))
        box(1, y, WIDTH - 2, height)
        text(12, y + 20, f"{k + 1}. {title}", "strong", 13.5)
        for row, name in enumerate(files):
            text(12, y + 38 + 17 * row, name, "code", 12)
        for row, sentence in enumerate(words, len(files)):
            text(12, y + 38 + 17 * row, sentence, "quiet", 12.5)
        line((middle, y + height), (middle, y + height + 18), head=True)
        y += height + 18
    box(1, y, WIDTH - 2, 164, "group")
    text(12, y + 20, "5. Kernels", "strong", 13.5)
    text(12, y + 38, "bnbp/engine/kernels/*.pxi", "code", 12)
    width, gap = 104.0, 14
    for k, (name, files, result) in enumerate(KERNELS):
        x = 10 + k * (width + gap)
        box(x, y + 50, width, 74)
        text(x + 8, y + 69, name, "strong", 13)
        for row, file in enumerate(files):
            text(x + 8, y + 86 + 15 * row, file, "code", SMALL)
        text(x + 8, y + 118, f"→ {result}", "quiet", 12)
        if k:
            line((x - gap, y + 64), (x, y + 64), head=True)
    text(12, y + 145, "sweep", "code", 12)
    text(54, y + 145, "applies to one unit and reduces the next", "quiet", 12.5)
    line((middle, y + 164), (middle, y + 182), head=True)
    box(1, y + 182, WIDTH - 2, 46, "slice")
    text(12, y + 202, "Results", "strong", 13.5)
    text(12, y + 219, "BatchNormTrainingBackpropResult, a named tuple", "", 12.5)
    return drawing.svg(identity, TITLES["code"], description)


PICTURES: dict[str, Callable[..., str]] = {"operator": operator, "code": code}
