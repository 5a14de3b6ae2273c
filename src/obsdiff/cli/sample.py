"""``obsdiff sample``."""

from __future__ import annotations

import time
from collections.abc import Sequence

from obsdiff.cli.early import checked_sample
from obsdiff.cli.options import SampleOptions
from obsdiff.cli.parse import clear_errors, parse_options

PROGRAM = "obsdiff sample"
EXAMPLE = """example: obsdiff sample outputs/digits --prompt "a digit seven" --output seven.png
required: the pipeline (a name, folder or hub id) and --prompt, or --num_images for a pipeline that takes no prompt"""


def main(args: Sequence[str] | None = None) -> None:
    """Parse, draw, print the files."""
    with clear_errors(PROGRAM):
        started = time.perf_counter()
        options = checked_sample(parse_options(SampleOptions, PROGRAM, args, positional=True, example=EXAMPLE))

        from obsdiff.devices import choose_device

        device = choose_device(options.device, float64=False)

        from obsdiff.evaluation.sampling import check_request, image_files, sample, save_images
        from obsdiff.export.summary import images_summary, seeds_text
        from obsdiff.pruning.folder import load_pipeline

        prompts = list(options.prompt or ())
        files = image_files(options.output, len(prompts), options.overwrite)
        seeds = list(range(options.seed, options.seed + len(files)))
        call = {"num_inference_steps": options.steps, "guidance_scale": options.guidance_scale}
        check_request(prompts, seeds, call=call)
        pipe = load_pipeline(
            options.pipeline, dtype=options.dtype, device=device, variant=options.variant, denoiser=options.denoiser
        )
        save_images(sample(pipe, prompts, seeds, call=call), files)
        print(images_summary(f"{seeds_text(seeds)} by {options.pipeline}", files, time.perf_counter() - started))
