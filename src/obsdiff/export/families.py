"""What each family of denoisers supports, as a table and as the page docs/families.md: written from the rows alone."""

from __future__ import annotations

from collections.abc import Sequence

from obsdiff.models.families import FAMILIES, Family

KINDS = {"heads": "heads", "ffn": "FFN neurons", "channels": "ResNet channels"}
GUIDANCE = {
    "first": "rows of one call, negative ones first",
    "last": "rows of one call, negative ones last",
    "calls": "a call of its own for the negative prompt, or a scale that is embedded",
    "none": "none",
}
_HEAD = """# Families

What `obsdiff inspect --families` prints, with what a user of each should know. This page is written by
`obsdiff.export.families.document` from the rows in `src/obsdiff/models/families`; a test keeps it equal.

"""
_NOTES = """
*Other denoisers* of diffusers get unstructured and N:M patterns, low ranks, and ranks where they have modulations,
through tracing alone, and a note says so; structured patterns are refused. [adding-a-family.md](adding-a-family.md)
says how to add one: a file of ten lines.

## What holds for all

- **Layers.** Unstructured and N:M patterns go for every Linear and Conv2d of the repeated blocks, but not for
  modulations (layers that read one vector per image: in a whole calibration they see as many inputs as there are
  steps) and depthwise convolutions. Embedders and output layers outside the blocks are left alone. `--include` and
  `--exclude` narrow it.
- **Sites.** Layers that read the same memory share one Hessian; this is seen in one recorded call, not listed.
- **Structured patterns** cut whole heads (of grouped queries: a head of keys and values with all its queries; of
  joint attention: in both streams at once), FFN neurons in every layout (gated ones with their gates), and the inner
  channels of ResNet blocks by whole GroupNorm groups, the only way in which the smaller model is the masked one.
  Residual widths, down- and upsamplers stay.
- **Norms over all heads** (Wan, Sana 1.5 and Sprint, LTX attn2) depend on every head. They and their layers of
  queries and keys stay whole, and give only the kept heads' channels: exactly the masked model; values, outputs and
  the attention itself become smaller.
- **Ranks** (`rank:R`) are of the vector that modulations, or the projections of time in ResNet blocks, read; of those
  that are made in front of all blocks (Flux.2, PixArt, Sana, Wan, LTX), too. Embedders of times and guidance stay
  whole: what they read takes as many values as there are steps, and of other steps that says nothing. Chroma's
  modulations come from one such network, and Wan 2.2's of text and image to video are made for each token.
- **Low ranks** (`lowrank:R`) are of the tokens that queries, keys and values read: one basis for the layers that read
  the same ones (of all blocks where those are the text), beside heads of any share; of other classes, of whatever
  linear layers read in their blocks.
- **Spared blocks.** Structured patterns leave the first and last block alone unless `--spare_blocks` or a measured
  allocation says otherwise; UNets spare none.
- **Depth.** Whole blocks go where the class builds what is left from its config alone, which is tried without weights:
  all families but UNets and Chroma; the last block of SD3 and the refiners of Lumina 2 and Z-Image stay.
- **As published.** `--method obs-diff` is OBS-Diff to the letter: SD3 spares its first and last block, SDXL none,
  counts are rounded, widths keep no multiple, and `structured:RATIO` leaves ResNet blocks whole. On the true
  configurations that leaves 1.911, 1.834, 1.776 and 1.717 B parameters of SD3-medium at 10, 15, 20 and 25 %, 7.277
  to 6.541 B of SD3.5-large at 15 to 30 %, 2.35 to 1.91 B of SDXL at 10 to 30 %: the published tables, to the digit
  (`tests/families/test_counts.py`).
- **Padding.** Where the denoiser masks padded tokens they stay out of the statistics too, by its own mask; where it
  attends to them and the tokenizers say which they are, they are left out by these; otherwise they count like
  others.
- **Recovery.** Distillation works for all: what the denoiser is told is recorded from the pipeline's own calls and
  told again, so nothing of guidance, masks, packing or lists is rebuilt. Of two denoisers each learns from its own
  share of the steps. Fine-tuning on images goes through the pipeline's own autoencoder and normalisation (video models
  see videos of one frame; pixel models the pixels, with or without captions); a sampler whose noise training cannot
  follow, such as Sana Sprint's, is refused.
- **Samples** of a video show four of its frames side by side. Class-conditional pipelines take class numbers or names
  as prompts.
- **Budgets in FLOPs** are counted without weights. Lumina 2 does not run without (its lengths are values), so its
  structured budgets are in parameters.
- **Derived pipelines** (image to image, inpainting, ControlNet, PAG) share their denoiser with a plain pipeline;
  prune through that, `FluxPipeline.from_pipe(pipe, dtype=pipe.dtype)` say, and save either.
"""


def table(families: Sequence[Family] = FAMILIES) -> str:
    """A table in Markdown, one row a family, its columns aligned for terminals."""
    head = ("models", "unstructured, N:M", *KINDS.values(), "rank", "guidance", "padding", "recovery")
    rows = [head, tuple("---" for _ in head)]
    for family in families:
        cells = [family.title, "yes", *(_cell(family, kind) for kind in KINDS), "yes" if family.ranks else "-"]
        rows.append((*cells, _guidance(family), _padding(family), _recovery(family)))
    rows.append(("any other", "yes", *("-" for _ in KINDS), "as traced", "as it is called", "counts", "-"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = []
    for row in rows:
        filled = ["-" * width if cell == "---" else cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("| " + " | ".join(filled) + " |")
    return "\n".join(lines)


def document() -> str:
    """The page docs/families.md."""
    return _HEAD + table() + "\n" + _NOTES + "".join(_section(family) for family in FAMILIES)


def _cell(family: Family, kind: str) -> str:
    """Whether a family has units of a kind to cut; with what is excepted."""
    if kind not in family.cuts:
        return "-"
    excepted = [rule.strip("*.") for rule in family.refused] if kind == "heads" else []
    return f"yes, but {', '.join(excepted)}" if excepted else "yes"


def _guidance(family: Family) -> str:
    return {"first": "one call", "last": "one call", "calls": "own call", "none": "-"}[family.guidance]


def _padding(family: Family) -> str:
    if family.input != "prompt":
        return "-"
    return "masked" if family.mask else "by tokenizer" if family.text else "counts"


def _recovery(family: Family) -> str:
    excepted = "".join(f" (not {name})" for name in family.distilled)
    return f"distillation, images{excepted}"


def _time(family: Family) -> str:
    """What a denoiser is told of the scheduler's time t, which goes from 1000 to 0."""
    scale = {1.0: "t", 1 / 1000: "t / 1000", -1 / 1000: "- t / 1000"}[family.time_scale]
    told = f"{family.time_offset:g} {scale}" if family.time_offset else scale
    return f"`{family.time}` = {told}"


def _section(family: Family) -> str:
    facts = [
        f"`{family.denoiser}` through {', '.join(f'`{name}`' for name in family.pipelines)}; structured: "
        + ", ".join(KINDS[kind] for kind in family.cuts)
        + ("; rank of modulations." if family.ranks else ".")
    ]
    facts += [f"Not cut: `{rule}`, {reason}." for rule, reason in family.refused.items()]
    negated = ", and its answer is negated" if family.sign < 0 else ""
    listed = " (a list of tensors)" if family.listed else ""
    variance = "; half of its answer is a variance, which is not used" if family.learned_sigma else ""
    facts.append(f"Told `{family.sample}`{listed} and {_time(family)}{negated}{variance}.")
    facts.append(f"Guidance: {GUIDANCE[family.guidance]}.")
    if family.input == "prompt":
        facts.append(f"Padded tokens: {_padded(family)}.")
    else:
        facts.append({"class_labels": "Prompts are class labels.", "nothing": "There are no prompts."}[family.input])
    if not family.latents:
        facts.append("The pipeline gives images alone, no latents.")
    if len(family.components) > 1:
        facts.append(f"Where a pipeline has both `{'` and `'.join(family.components)}`, both are pruned.")
    if family.notes:
        facts.append(family.notes)
    return f"\n## {family.title}\n\n" + "\n".join(f"- {fact}" for fact in facts) + "\n"


def _padded(family: Family) -> str:
    if family.mask:
        return f"masked by the denoiser, `{family.mask}` says which they are"
    if family.text:
        names = ", ".join(f"`{name}`" for segment in family.text for name in segment.tokenizers)
        return f"attended to; {names} say which they are, and they stay out of the statistics of the text's layers"
    return "attended to, and in the statistics"
