"""What is known of each denoiser class, as data: adding a family adds a row here and edits no driver.

All layer names are relative to a block. A row names everything a family *may* have; what a particular block lacks (the
text stream in SD3's last block, the second attention outside dual-attention blocks) is left out when the row is
resolved on a model (:mod:`obsdiff.models.wiring`).
"""

from __future__ import annotations

from dataclasses import dataclass

from obsdiff.errors import UserError


@dataclass(frozen=True)
class Site:
    """A distinct layer input: all ``layers`` read the same tensor. ``text``: its tokens are prompt tokens."""

    layers: tuple[str, ...]
    text: bool = False


@dataclass(frozen=True)
class Heads:
    """An attention module whose heads can go: rows of the producers, columns of the consumers."""

    attention: str
    producers: tuple[str, ...]
    consumers: tuple[str, ...]


@dataclass(frozen=True)
class Neurons:
    """A feed-forward module whose neurons can go: ``rows`` equal slabs of the producer (2 for GLU), one column of the
    consumer."""

    ffn: str
    producer: str
    consumer: str
    rows: int = 1


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
        component: Its name in the pipeline.
        blocks: Attribute that holds the list of blocks.
        sites: In the order of a forward pass.
        heads, neurons: What structured pruning can remove.
        embeds: What ``encode_prompt`` returns, by the pipeline's call argument.
        text: Segments of the prompt token sequence.
        inputs: The denoiser's tensor arguments; each dimension a config key, "text_length", or nothing but the batch.
        sample, time: Which of them are the noisy latents and the time.
        conditions: The others, with the entry of ``embeds`` each is given.
        chain: Whether each block reads of the earlier ones nothing but what the one before it returned.
    """

    denoiser: str
    component: str
    blocks: str
    sites: tuple[Site, ...]
    heads: tuple[Heads, ...]
    neurons: tuple[Neurons, ...]
    embeds: tuple[str, ...]
    text: tuple[TextSegment, ...]
    inputs: tuple[tuple[str, tuple[str, ...]], ...]
    sample: str
    time: str
    conditions: tuple[tuple[str, str], ...]
    chain: bool = True


SD3 = Family(
    denoiser="SD3Transformer2DModel",
    component="transformer",
    blocks="transformer_blocks",
    sites=(
        Site(("attn.to_q", "attn.to_k", "attn.to_v")),
        Site(("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), text=True),
        Site(("attn.to_out.0",)),
        Site(("attn.to_add_out",), text=True),
        Site(("attn2.to_q", "attn2.to_k", "attn2.to_v")),
        Site(("attn2.to_out.0",)),
        Site(("ff.net.0.proj",)),
        Site(("ff.net.2",)),
        Site(("ff_context.net.0.proj",), text=True),
        Site(("ff_context.net.2",), text=True),
    ),
    heads=(
        Heads(
            "attn",
            ("attn.to_q", "attn.to_k", "attn.to_v", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            ("attn.to_out.0", "attn.to_add_out"),
        ),
        Heads("attn2", ("attn2.to_q", "attn2.to_k", "attn2.to_v"), ("attn2.to_out.0",)),
    ),
    neurons=(
        Neurons("ff", "ff.net.0.proj", "ff.net.2"),
        Neurons("ff_context", "ff_context.net.0.proj", "ff_context.net.2"),
    ),
    embeds=(
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    ),
    text=(
        TextSegment(("tokenizer", "tokenizer_2")),
        TextSegment(("tokenizer_3",), length_argument="max_sequence_length", default_length=256),
    ),
    inputs=(
        ("hidden_states", ("in_channels", "sample_size", "sample_size")),
        ("encoder_hidden_states", ("text_length", "joint_attention_dim")),
        ("pooled_projections", ("pooled_projection_dim",)),
        ("timestep", ()),
    ),
    sample="hidden_states",
    time="timestep",
    conditions=(("encoder_hidden_states", "prompt_embeds"), ("pooled_projections", "pooled_prompt_embeds")),
)

FAMILIES: tuple[Family, ...] = (SD3,)


def find_family(denoiser: object) -> Family:
    """The row of a denoiser's class (or of a class it is derived from).

    Raises:
        UserError: No row matches.
    """
    names = {base.__name__ for base in type(denoiser).__mro__}
    for family in FAMILIES:
        if family.denoiser in names:
            return family
    supported = ", ".join(family.denoiser for family in FAMILIES)
    raise UserError(f"denoiser class {type(denoiser).__name__} is not supported; supported: {supported}")
