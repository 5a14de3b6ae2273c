"""``obsdiff sample``."""

from __future__ import annotations

import time
from collections.abc import Sequence

from obsdiff.cli.options import SampleOptions
from obsdiff.cli.parse import clear_errors, parse_options


def main(args: Sequence[str] | None = None) -> None:
    """Parse, draw, print the files."""
    options = parse_options(SampleOptions, "obsdiff sample", args, positional=True)
    with clear_errors("obsdiff sample"):
        started = time.perf_counter()
        from obsdiff.evaluation.sampling import image_files, sample, save_images
        from obsdiff.export.summary import images_summary, seeds_text
        from obsdiff.pruning.folder import load_pipeline

        prompts = [options.prompt] if isinstance(options.prompt, str) else options.prompt
        files = image_files(options.output, len(prompts), options.overwrite)
        pipe = load_pipeline(options.pipeline, dtype=options.dtype, device=options.device)
        seeds = list(range(options.seed, options.seed + len(files)))
        call = {"num_inference_steps": options.steps, "guidance_scale": options.guidance_scale}
        save_images(sample(pipe, prompts, seeds, call=call), files)
        print(images_summary(f"{seeds_text(seeds)} by {options.pipeline}", files, time.perf_counter() - started))
