"""What the tiny pipelines of every family share: the row, seeded weights, seeded conditioning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

TEXT_WIDTH = 32  # channels of a text embedding, where the family has one text encoder
TEXT_LENGTH = 12  # tokens of a text segment
PROMPTS = (
    "a red circle on a white table",
    "two small blue birds",
    "the old green house by the sea",
    "a yellow cat",
    "snow over a dark forest at night",
)


@dataclass(frozen=True)
class TinyPipeline:
    """A small random pipeline of one family, of its true classes.

    What the fields after ``call`` say is checked against a recorded run by ``test_pipelines.py``.

    Attributes:
        make: Gives the pipeline with whatever weights; True asks for text encoders and tokenizers. Use ``build``.
        conditioning: Pipeline-call arguments for n rows, precomputed: embeddings, masks, negatives, class labels, or
            ``batch_size``. Row i is the same whatever n.
        call: The other pipeline-call arguments of a quick run, two steps.
        pipeline: Name of the pipeline's class.
        denoisers: Component name -> class name, in the order in which they first run.
        output_type: The ``output_type`` that costs least: latents where they are offered.
        output_types: All that the pipeline accepts beside "pil".
        result: Attribute of the pipeline's output that holds what it made.
        sample: Denoiser argument of the latents (or pixels).
        sample_form: Their layout, in letters: batch, channels, frames, height, width, tokens.
        time: Denoiser argument of the time.
        time_form: What it is of the scheduler's time t, and its shape: "()" one number, "(B,)" one each row.
        result_form: The layout of the result in the same letters; "" where it is ``sample_form``.
        guidance: How the negative comes: "none", "negative first" or "positive first" (rows of one call), or
            "two calls" (the positive first); "embedded" where the scale is an argument of the denoiser.
        unguided: Pipeline-call arguments that switch guidance off, as far as it is not embedded.
        text: Denoiser argument of the conditioning that tells positive from negative; "" where there is none.
        mask: Denoiser argument of the text's padding mask; "" where padding is attended like the rest.
        output: What the scheduler is given of the denoiser's output: "as it is", "negated", "first half of the
            channels" (the rest is a learned variance), or "trigonometric" (Sprint: mixed with the latents first).
        dead: Layers of the (first) denoiser that cannot change what is made: the end of the text path.
        shared: Conditioning arguments that all rows of a call share.
        prompts: Whether ``prompt=[...]`` works, with real text encoders and tokenizers; the others take no text.
        negatives: Whether the pipeline takes ``negative_prompt`` too.
        row_error: Largest difference, as a share of the largest number made, that a row may show when sampled alone.
        notes: What a reader should know.
    """

    make: Callable[[bool], Any]
    conditioning: Callable[[int], dict[str, Any]]
    call: dict[str, Any]
    pipeline: str
    denoisers: dict[str, str]
    output_type: str = "latent"
    output_types: tuple[str, ...] = ("latent", "pt", "np")
    result: str = "images"
    sample: str = "hidden_states"
    sample_form: str = "BCHW"
    time: str = "timestep"
    time_form: str = "t (B,)"
    result_form: str = ""
    guidance: str = "none"
    unguided: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": 1.0})
    text: str = "encoder_hidden_states"
    mask: str = ""
    output: str = "as it is"
    dead: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    prompts: bool = True
    negatives: bool = True
    row_error: float = 1e-4
    notes: str = ""

    def build(self, seed: int = 0, encoders: bool = True) -> Any:
        """The pipeline, float32 on the CPU, in eval mode: equal weights for an equal seed, none of them zero.

        Args:
            seed: Of the weights; torch's global generator is left as it was.
            encoders: Whether to make text encoders and tokenizers, where the row has them (``prompts``).
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pipe = self.make(encoders)
        for number, (_, component) in enumerate(sorted(pipe.components.items())):
            if isinstance(component, nn.Module):
                fill(component, 1000 * seed + number)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def prompting(self, rows: int) -> dict[str, Any]:
        """Pipeline-call arguments as ``conditioning``, but in words, ``PROMPTS`` in turn; needs ``prompts``."""
        given: dict[str, Any] = {"prompt": [PROMPTS[row % len(PROMPTS)] for row in range(rows)]}
        if self.negatives:
            given["negative_prompt"] = ["snow and a table"] * rows
        return {**{name: self.conditioning(rows)[name] for name in self.shared}, **given}

    def sample_rows(self, pipe: Any, conditioning: dict[str, Any], seeds: Sequence[int], **changes: Any) -> Tensor:
        """What the pipeline makes of ``conditioning`` or ``prompting``, (rows, ...), from one seed each row."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        call = {**self.call, "output_type": self.output_type, **conditioning, **changes}
        return torch.as_tensor(getattr(pipe(**call, generator=generators), self.result))

    def take(self, conditioning: dict[str, Any], rows: Sequence[int]) -> dict[str, Any]:
        """The given rows of what ``conditioning`` gave."""
        return {name: value if name in self.shared else _take(value, rows) for name, value in conditioning.items()}


def _take(value: Any, rows: Sequence[int]) -> Any:
    if isinstance(value, Tensor):
        return value[list(rows)]
    if isinstance(value, list):
        return [value[row] for row in rows]
    return len(rows) if isinstance(value, int) else value


def fill(module: nn.Module, seed: int) -> None:
    """Random numbers into every parameter: matrices by their fan-in, scales of norms about 1, biases about 0.

    Diffusers starts gates and output layers at zero, which would hide errors.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise / max(parameter[0].numel(), 1) ** 0.5)
            elif "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(0.1 * noise)
    module.requires_grad_(True).eval()


def embeddings(rows: int, *shape: int, salt: int = 0) -> Tensor:
    """Standard normal (rows, *shape); row i depends on ``salt`` and i alone."""
    return torch.stack(
        [torch.randn(shape, generator=torch.Generator().manual_seed(97 * salt + i)) for i in range(rows)]
    )


def masks(rows: int, longest: int = TEXT_LENGTH) -> Tensor:
    """Integer masks (rows, longest) of padding on the right, 1 = real token: the first full, others shorter."""
    real = [longest - 3 * (row % 3) for row in range(rows)]
    return torch.tensor([[1] * length + [0] * (longest - length) for length in real])
