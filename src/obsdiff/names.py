"""Names that options may take, without the code behind them, so that a wrong one is refused before torch is imported.

A rule test compares them with the tables of the code.
"""

METHODS = (
    "obs", "obs-diff", "admm", "sparsegpt", "wanda", "dsnot", "taylor", "diff-pruning", "ecodiff", "magnitude", "l1",
    "random",
)  # fmt: skip
STRUCTURED_METHODS = ("obs", "obs-diff", "taylor", "diff-pruning", "ecodiff", "magnitude", "l1", "random")
SWEEPING_METHODS = ("obs", "obs-diff", "sparsegpt")  # which compare scores over stretches of columns
SUB_BLOCK = 32  # columns; stretches are multiples of it
UNIT_METHODS = ("ecodiff",)  # which remove nothing but whole units
FUSIONS = ("reciprocal_rank", "relative_error")
DEAD = ("report", "remove", "ignore")
ALLOCATIONS = ("uniform", "measured", "owl")
DTYPES = ("float32", "bfloat16", "float16")
PRECISIONS = ("float32", "tf32", "bfloat16", "int8")  # of a calibration's products
EMBEDDED = ("digits-sd3", "digits-ddpm", "emoji-sd3")
EMBEDDED_PROMPTS = ("digits-train", "digits-heldout", "emoji-train", "emoji-heldout")
ALIGNMENTS = ("digits", "emoji")
PRESETS = ("sd3-tiny-cpu", "sd3-medium", "sd35-large", "sdxl", "flux", "qwen-image", "wan-14b")
MEASURES = ("mse", "ssim", "lpips", "distance", "alignment", "clip_score", "frechet", "kid", "precision", "cmmd")
AGAINST_REAL = ("frechet", "kid", "precision", "cmmd")
BY_NETWORK = ("distance", "clip_score", *AGAINST_REAL)  # which may be named with a network
EXTRACTORS = ("inception", "inception-legacy", "clip", "dinov2", "efficientnet")
