"""What a prune is about as plans of its memory and time see it: shapes, counts and choices, no values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class SiteShape:
    """An input whose statistics are kept, and the layers that are pruned by them.

    Attributes:
        name: Its first layer.
        columns: Entries of a row of it (n); of a convolution, of an unrolled field.
        rows: Outputs of each layer that is pruned by it, in one of the groups.
        groups: Of a convolution.
        biased: Whether biases take up the mean, so that a solve goes by centred inputs.
        masked: Whether single weights go.
        cut: Whether units go.
        kept: Share of the layers' weights that are stored afterwards: those of cut layers become smaller.
        producers: Entries that are left of weights that lose rows, where units go.
        together: The same for sites whose layers are cut in one go; "" where it is alone.
        tokens: Rows of it that a call with one prompt gives.
        ranked: Whether directions of it go, which are tried on other prompts then.
    """

    name: str
    columns: int
    rows: tuple[int, ...] = ()
    groups: int = 1
    biased: bool = True
    masked: bool = True
    cut: bool = False
    kept: float = 1.0
    producers: int = 0
    together: str = ""
    tokens: int = 0
    ranked: bool = False

    @property
    def weights(self) -> int:
        """Entries of all weights that are pruned by it."""
        return self.groups * self.columns * sum(self.rows)


@dataclass(frozen=True)
class Solving:
    """How sites are solved.

    Attributes:
        method: A name of :data:`obsdiff.criteria.METHODS`.
        refits: Whether least squares on the kept weights follows.
        gram: Whether whole Hessians are kept; else their diagonals, or nothing.
        measured: Whether anything of layer inputs is kept.
        centred: Whether the method itself selects on centred inputs where biases take up the mean.
        once: Whether a site's statistics are let go when it is solved (they serve this prune alone).
        stored: Whether they lie on disk, and memory holds one site's at a time once they are measured.
        reused: Whether they lie there already.
        passes: Whether gradients or gates are measured, by backward passes.
        device_type: Where Hessians are.
    """

    method: str
    refits: bool
    gram: bool
    measured: bool = True
    centred: bool = False
    once: bool = True
    stored: bool = False
    reused: bool = False
    passes: bool = False
    device_type: str = "cpu"


@dataclass(frozen=True)
class Scan:
    """A sensitivity scan.

    Attributes:
        triples: Recorded calls.
        levels: Shares at which every layer is solved.
        rows: Prompts' worth of rows in one of its calls.
        stages: Entries of the weights that are pruned in each stage.
        probe: Bytes of the recorded calls and of what is kept between stages.
        cut: Whether units go, not single weights.
        backward: Bytes of candidates that one backward pass serves; 0 where there is none.
        calls: What it runs, in calls of the denoiser with one prompt.
    """

    triples: int
    levels: int
    rows: int
    stages: tuple[int, ...]
    probe: int
    cut: bool = False
    backward: int = 0
    calls: float = 0.0


@dataclass(frozen=True)
class Shapes:
    """What a prune is about.

    Attributes:
        weights: Bytes by component of the pipeline, in its dtype.
        element: Bytes of one weight of the denoiser.
        sites: Whose statistics are measured, in the order of a forward pass; those that are measured for a store
            alone have no rows.
        call: Activations of a call of the denoiser, for each prompt in it.
        observed: The same while statistics are measured, with what adding to them takes.
        made: All that such a call makes, for each prompt: what a backward pass keeps, or somewhat more.
        text: The text encoders' activations, for each prompt.
        decode: The autoencoder's, for each image.
        prompt: Bytes of one encoded prompt.
        image: Bytes of one image, float32.
        imports: What the process holds before anything is loaded.
        at_hand: Of weights that rest on the host or on a disk, what the device holds at most while the "denoiser" runs,
            while "text" is encoded, and while latents "decode"; empty: it holds all.
        on_disk: Whether they rest there, and the device is the host.
    """

    weights: Mapping[str, int]
    element: int
    sites: tuple[SiteShape, ...]
    call: int
    observed: int
    made: int
    text: int
    decode: int
    prompt: int
    image: int
    imports: int = 0
    at_hand: Mapping[str, int] = field(default_factory=dict)
    on_disk: bool = False

    def weights_while(self, running: str) -> dict[str, int]:
        """Bytes of weights that the device holds meanwhile, as a part of a moment."""
        return {"weights": self.at_hand.get(running, sum(self.weights.values()))}


@dataclass(frozen=True)
class Batches:
    """What can be chosen without changing what is asked for (packages: but a little).

    Attributes:
        prompts: Per call of a calibration.
        images: Per call of an evaluation.
        packages: The sites of each calibration pass, or of each stage of a streamed one, by name.
        recorded: Bytes of the calls that a streamed calibration holds, with what a stage has answered, unless that
            waits on a disk; 0: it is none.
        on_disk: Bytes of what waits there, of all processes.
    """

    prompts: int
    images: int
    packages: tuple[tuple[str, ...], ...]
    recorded: int = 0
    on_disk: int = 0
