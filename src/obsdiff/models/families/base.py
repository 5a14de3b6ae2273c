"""What neither tracing nor parts can know of a denoiser class, as data: adding a family adds a small file here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

TEXT, IMAGE = "text", "image"


@dataclass(frozen=True)
class TextSegment:
    """A stretch of the prompt token sequence: its tokenizers (side by side along the channels) and its length.

    The length is the first tokenizer's ``model_max_length``, or the pipeline's call argument ``length_argument`` with
    its default.
    """

    tokenizers: tuple[str, ...]
    length_argument: str | None = None
    default_length: int = 77


@dataclass(frozen=True)
class Family:
    """One denoiser class.

    Attributes:
        denoiser: Class name in diffusers.
        components: Its names in the pipeline; two where a pipeline splits its steps over two denoisers.
        title: The models that use it, for people.
        pipelines: Pipeline classes that make images of prompts alone with it: those that can be measured.
        cuts: Kinds of units that its blocks have: "heads", "ffn", "channels".
        modulated: Whether layers in its blocks read one vector per sample, whose rank can be reduced.
        in_front: Modulations of all blocks that are made in front of them, by shell-style name pattern: theirs, too.
        notes: What else a user should know, for people.
        sample, time: Its arguments that hold the noisy latents (a tensor, or a list of one per row) and the time.
        time_scale, time_offset: The time it is told is ``offset + scale · t`` for the scheduler's t in 0 to 1000.
        sign: -1 where the pipeline negates its output.
        learned_sigma: Whether the second half of the output channels is a variance.
        listed: Whether latents come as a list with one tensor per row.
        guidance: How a pipeline asks for the negative prompt: "first" (rows of one call, negative ones first), "last",
            "calls" (a call of its own) or "none".
        guidance_offset: What a pipeline adds to its guidance scale g in ``n + g (p - n)``.
        input: What a user gives for each image: "prompt", "class_labels", or "nothing".
        encoded: What ``encode_prompt`` returns, in order, by the pipeline's call argument; empty: prompts go to the
            pipeline as they are.
        conditions: Which of these the denoiser is given, by its own argument: every call is checked against them.
        text: Segments of the prompt token sequence, where padding is known from the tokenizers.
        embeds: The denoiser's argument that holds the prompt's tokens.
        mask: The denoiser's argument that says which prompt tokens are real; it is believed before the tokenizers.
        tokens: What lies along the sequences that layers read or modulate, by shell-style name pattern; the first match
            counts.
        distilled: Models of the title that are recovered by distillation alone, not on images as well.
        refused: Groups that cannot be cut, by shell-style name pattern, with the reason.
        apart: What looks like blocks and is none, by shell-style name pattern: left alone.
        shared: Parts of a block that something outside the block asks too, by shell-style name pattern.
        video: Whether its autoencoder is one of videos (n, c, frames, h, w).
        packed: Gives an autoencoder's normalised latents the layout that the denoiser is given, if it is another one;
            called with the pipeline and the latents.
        latents: Whether the pipeline can return latents (``output_type="latent"``).
        spare: Stages that structured pruning spares by default, negative ones from the end.
        numbered: Entries of its config that list blocks by their number, and follow when blocks are removed.
        known: Whether parts of it may be cut out: False for classes that are only traced.
    """

    denoiser: str
    components: tuple[str, ...] = ("transformer",)
    title: str = ""
    pipelines: tuple[str, ...] = ()
    cuts: tuple[str, ...] = ("heads", "ffn")
    modulated: bool = False
    in_front: tuple[str, ...] = ()
    notes: str = ""
    sample: str = "hidden_states"
    time: str = "timestep"
    time_scale: float = 1.0
    time_offset: float = 0.0
    sign: int = 1
    learned_sigma: bool = False
    listed: bool = False
    guidance: str = "first"
    guidance_offset: float = 0.0
    input: str = "prompt"
    encoded: tuple[str, ...] = ()
    conditions: tuple[tuple[str, str], ...] = ()
    text: tuple[TextSegment, ...] = ()
    embeds: str = "encoder_hidden_states"
    mask: str | None = None
    tokens: tuple[tuple[str, tuple[str, ...]], ...] = ()
    distilled: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    apart: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    video: bool = False
    packed: Callable[[Any, Any], Any] | None = None
    latents: bool = True
    spare: tuple[int, ...] = (0, -1)
    numbered: tuple[str, ...] = ()
    known: bool = True

    @property
    def ranks(self) -> bool:
        """Whether there is a rank of modulations to reduce."""
        return self.modulated or bool(self.in_front)

    @property
    def example(self) -> str:
        """What any pipeline of the family can be told, where only shapes count."""
        return "0" if self.input == "class_labels" else ""
