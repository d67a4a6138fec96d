"""The boundary to the compiled code; not public."""

from collections.abc import Callable, Sequence
from typing import Any

kernels: object

def run(
    name: str,
    inputs: tuple[Any, ...],
    epsilon: float,
    channel_axis: int,
    output_mask: Sequence[bool] | None,
    out: Sequence[Any] | None,
    num_threads: int | None,
    count: int = 0,
) -> list[Any]: ...
def integer_of(name: str, value: object, least: int | None = None, expected: str = ...) -> int: ...
def text_of(value: object, how: Callable[[Any], str] = ...) -> str: ...
def config() -> dict[str, Any]: ...
def set_l2_size(size: int) -> int: ...
