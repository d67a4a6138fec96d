from collections.abc import Sequence

def capsules() -> dict[str, object]: ...
def check(
    operator: str,
    operands: tuple[tuple[str, Sequence[int]] | None, ...],
    epsilon: float,
    channel_axis: int,
    activation: int,
    addend: bool,
    /,
) -> tuple[str, ...]: ...
def inputs(operator: str, /) -> tuple[str, ...]: ...
