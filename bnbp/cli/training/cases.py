"""What is measured, and what comes of it: networks and their batches, candidates, rows. Nothing here needs PyTorch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..benchmark.measure import Seconds

__all__ = [
    "BOTH",
    "CANDIDATES",
    "CHANNELS_LAST",
    "COMPILE",
    "CONTIGUOUS",
    "CONVERTED",
    "EAGER",
    "FORMATS",
    "OTHER_THREADS",
    "SETS",
    "TITLES",
    "Case",
    "Result",
    "Row",
    "Settings",
    "Way",
]

# PyTorch as it is and compiled; converted, and compiled after that.
CANDIDATES = EAGER, COMPILE, CONVERTED, BOTH = "eager", "compile", "converted", "converted+compile"
OTHER_THREADS = "eager, other threads"  # of losses alone
FORMATS = CONTIGUOUS, CHANNELS_LAST = "contiguous", "channels_last"


@dataclass(frozen=True)
class Case:
    """A network, with a batch."""

    network: str  #: a function of ``networks.py``
    shape: tuple[int, ...]  #: of the batch
    sizes: dict[str, Any] = field(default_factory=dict)  #: what the function is given

    @property
    def formats(self) -> Sequence[str]:
        """The memory formats to choose from."""
        return FORMATS if len(self.shape) == 4 else FORMATS[:1]


@dataclass(frozen=True)
class Way:
    """A candidate in a memory format."""

    candidate: str
    format: str = CONTIGUOUS

    def __str__(self) -> str:
        return f"{self.candidate}, {self.format}"

    @property
    def converted(self) -> bool:
        """Whether bnbp takes part."""
        return self.candidate in (CONVERTED, BOTH)

    @property
    def compiled(self) -> bool:
        """Whether ``torch.compile`` takes part."""
        return self.candidate in (COMPILE, BOTH)


IMAGES = (8, 3, 224, 224)
TINY = (4, 3, 32, 32)

_CASES = {
    "full": [
        Case("mobilenet_v1", IMAGES),
        Case("mobilenet_v2", IMAGES),
        Case("resnet50", IMAGES),
        Case("densenet121", IMAGES),
        Case("efficientnet", IMAGES),
        Case("unet", IMAGES, {"width": 16}),
        Case("gan", (64, 3, 64, 64)),
        Case("mlp", (256, 1024)),
        Case("small_convnet", (64, 3, 32, 32)),
    ],
    "tiny": [
        Case("mobilenet_v1", TINY, {"blocks": ((2, 1), (4, 2)), "width": 8, "classes": 10}),
        Case("mobilenet_v2", TINY, {"stages": ((1, 8, 1, 1), (6, 8, 2, 1)), "width": 8, "last": 32, "classes": 10}),
        Case("resnet50", TINY, {"blocks": (2, 1), "width": 8, "classes": 10}),
        Case("densenet121", TINY, {"blocks": (2, 2), "growth": 4, "classes": 10}),
        Case(
            "efficientnet", TINY, {"stages": ((1, 8, 1, 1, 3), (6, 8, 2, 1, 5)), "width": 8, "last": 32, "classes": 10}
        ),
        Case("unet", TINY, {"width": 4, "depth": 2}),
        Case("gan", (4, 3, 64, 64), {"latent": 8, "width": 4}),
        Case("mlp", (32, 16), {"width": 16, "layers": 2}),
        Case("small_convnet", TINY, {"width": 4}),
    ],
}

TITLES = {
    "mobilenet_v1": "MobileNet v1",
    "mobilenet_v2": "MobileNet v2",
    "resnet50": "ResNet-50",
    "densenet121": "DenseNet-121",
    "efficientnet": "EfficientNet-B0",
    "unet": "U-Net",
    "gan": "DCGAN",
    "mlp": "MLP",
    "small_convnet": "small convolutional",
}

#: The networks by set and name. Those of the set tiny are for trying out, and for tests.
SETS = {name: {case.network: case for case in cases} for name, cases in _CASES.items()}


@dataclass(frozen=True)
class Settings:
    """What to measure. The defaults are those of the command line."""

    set: str = "full"
    networks: Sequence[str] = tuple(SETS["full"])
    candidates: Sequence[str] = CANDIDATES[:3]
    threads: Sequence[int] = (1,)
    rounds: int = 10
    steps: int = 20  #: whose losses are compared
    memory: bool = True


@dataclass
class Result:
    """What was measured of a candidate in a memory format."""

    candidate: str
    format: str
    seconds: Seconds | None = None  #: of a step
    memory: int | None = None  #: bytes that a step takes at most
    deviation: float | None = None  #: of losses and gradients from those in float64
    note: str | None = None  #: why there is no time, or no memory

    @property
    def way(self) -> Way:
        """The candidate and the format."""
        return Way(self.candidate, self.format)


@dataclass
class Row:
    """What was measured of a network with a number of threads."""

    network: str
    shape: tuple[int, ...]
    parameters: int
    threads: int
    results: list[Result] = field(default_factory=list)
    #: Of steps in a row: of PyTorch, of PyTorch with another number of threads, and of the converted network.
    losses: dict[str, list[float]] = field(default_factory=dict)

    def best(self, *candidates: str) -> Result | None:
        """The fastest of some candidates in the faster memory format; None if none has a time."""
        timed = [
            (result.seconds.minimum, k)
            for k, result in enumerate(self.results)
            if result.candidate in candidates and result.seconds
        ]
        return self.results[min(timed)[1]] if timed else None
