"""``bnbp demo``: train a small network with and without batch norm, and compare."""

import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich import box
from rich.table import Table

from . import network
from .files import check_output, plot_format, write_file
from .terminal import Failure, console, print_line, progress_bar

__all__ = ["demo"]

WITHOUT, WITH = "without batch norm", "with batch norm"


def demo(
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of weights, split and batches.")] = 0,
    epochs: Annotated[int, typer.Option(min=1, metavar="N", help="How often each network sees every image.")] = 8,
    plot: Annotated[Path, typer.Option(metavar="PATH", help="Where to save the plot: .png, .pdf or .svg.")] = Path(
        "bnbp-demo.png"
    ),
    num_threads: Annotated[int, typer.Option(min=1, metavar="N", help="Upper limit for the number of threads.")] = 1,
) -> None:
    """Train a small network on images of handwritten digits, with and without batch norm, and compare.

    It needs scikit-learn for the images and matplotlib for the plot.
    """
    file_format = plot_format(plot)
    target = check_output(plot, force=True)
    try:
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401
    except ModuleNotFoundError as error:
        raise Failure("the demo needs scikit-learn and matplotlib; run: pip install 'bnbp[demo]'") from error

    digits = network.load_digits(seed)
    operators = network.TimedOperators(num_threads)
    curves, seconds = _train({WITHOUT: None, WITH: operators}, digits, epochs, seed)
    share = operators.seconds / seconds[WITH]
    deviations = {
        dtype.__name__: network.gradient_deviation(operators, digits, seed, dtype) for dtype in (np.float32, np.float64)
    }
    write_file(plot, target, True, lambda stream: network.draw_learning_curves(stream, file_format, curves))

    console.print(
        f"Both train with learning rate {network.LEARNING_RATE}, momentum {network.MOMENTUM} and batches of "
        f"{network.BATCH}. The rate is high, but the network still learns without batch norm.",
        highlight=False,
    )
    console.print(_demo_table(curves, seconds, share, deviations))
    console.print(
        "The gradient deviation is over all parameters, from the same network with bnbp.reference in float64. It is "
        "the largest difference in a layer divided by the layer's largest gradient, for the worst layer.",
        highlight=False,
    )
    print_line(f"plot saved in {plot}")


def _train(
    variants: dict[str, network.TimedOperators | None], digits: network.Digits, epochs: int, seed: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Train each variant, with a progress bar; return the test accuracies after each epoch, and the seconds."""
    curves: dict[str, list[float]] = {}
    seconds: dict[str, float] = {}
    with progress_bar() as progress:
        for name, operators in variants.items():
            start = time.perf_counter()
            training = network.train(network.build_network(operators, seed), digits, epochs, seed)
            curves[name] = list(progress.track(training, total=epochs, description=f"{name:<{len(WITHOUT)}}"))
            seconds[name] = time.perf_counter() - start
    return curves, seconds


def _demo_table(
    curves: dict[str, list[float]], seconds: dict[str, float], share: float, deviations: dict[str, float]
) -> Table:
    table = Table("", *curves, box=box.SIMPLE_HEAD)
    for epoch in sorted({1, len(curves[WITH])}):
        accuracies = (f"{curve[epoch - 1]:.1%}" for curve in curves.values())
        table.add_row(f"test accuracy after {epoch} epoch{'s' * (epoch > 1)}", *accuracies)
    table.add_row("training time", *(f"{taken:.1f} s" for taken in seconds.values()))
    table.add_row("of that in bnbp", "", f"{share:.1%}")
    for dtype, deviation in deviations.items():
        table.add_row(f"gradient deviation in {dtype}", "", f"{deviation:.1e}")
    return table
