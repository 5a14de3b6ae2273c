"""``obsdiff sample``."""

from __future__ import annotations

from collections.abc import Sequence

from obsdiff.cli.options import SampleOptions
from obsdiff.cli.parse import clear_errors, parse_options
from obsdiff.errors import UserError


def main(args: Sequence[str] | None = None) -> None:
    """Parse, draw, print the files."""
    options = parse_options(SampleOptions, "obsdiff sample", args, positional=True)
    with clear_errors("obsdiff sample"):
        from obsdiff.evaluation.sampling import check_request, image_files, sample, save_images
        from obsdiff.pruning.folder import load_pipeline

        prompts = [options.prompt] if isinstance(options.prompt, str) else options.prompt
        files = image_files(options.output, len(prompts), options.overwrite)
        if blank := [prompt for prompt in prompts if not prompt.strip()]:
            raise UserError(f"--prompt holds an empty prompt {blank[0]!r}; say what to draw")
        seeds = list(range(options.seed, options.seed + len(files)))
        call = {"num_inference_steps": options.steps, "guidance_scale": options.guidance_scale}
        check_request(prompts, seeds, call=call)
        pipe = load_pipeline(options.pipeline, dtype=options.dtype, device=options.device)
        save_images(sample(pipe, prompts, seeds, call=call), files)
        print("\n".join(str(file) for file in files))
