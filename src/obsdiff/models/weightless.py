"""A pipeline without weights: its models on the meta device, everything else as it is.

Such a pipeline runs: what its models are told and answer are real tensors on the CPU, the answers zeros of the true
shapes, found by the models on the meta device. So calls are recorded as of any pipeline, and nothing is ever as large
as the weights.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from obsdiff.errors import UserError
from obsdiff.files import read_json
from obsdiff.models.denoisers import denoisers_of
from obsdiff.models.info import PipelineInfo, attach_info, read_info
from obsdiff.models.live import live_in
from obsdiff.models.loading import find_pipeline
from obsdiff.models.register import LIBRARY, register

META, CPU = torch.device("meta"), torch.device("cpu")
METHODS = ("forward", "encode", "decode")  # by which pipelines ask their models
PEAKS = "obsdiff_peaks"  # on the pipeline: the most that each of its models took within one call, bytes
_LONGEST = 512  # tokens of a text, where no file says how many a tokenizer gives
_CONFIGS = ("*.json", "*.txt", "*.model", "*.jinja")  # what is fetched of a hub repository
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")


def open_weightless(source: str, dtype: str = "float32", name: str | None = None) -> Any:
    """The pipeline of a folder, an embedded name or a hub id, from its config files alone.

    Args:
        source: Where it is; of a hub repository only small files are fetched.
        dtype: Of its weights.
        name: What to call it; the source by default.

    Raises:
        UserError: Its files are missing or do not describe a pipeline.
    """
    folder = Path(find_pipeline(source))
    folder = folder if folder.is_dir() else _fetched(source)
    index = read_json(folder / "model_index.json", "a pipeline's index")
    register()
    try:
        kind = _class_of("diffusers", index["_class_name"])
        parts = {key: _part(folder, index, key, getattr(torch, dtype)) for key in _accepted(kind)}
    except UserError:
        raise
    except Exception as error:  # diffusers and transformers raise whatever a config leads to
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the configs of {source} do not make a pipeline without weights ({type(error).__name__}: {reason})"
        ) from error
    missing = inspect.signature(kind.__init__).parameters
    given = {
        key: value for key, value in parts.items() if value is not None or missing[key].default is missing[key].empty
    }
    return _running(kind, given, PipelineInfo(name or source, **read_info(folder)))


def is_weightless(pipe: Any) -> bool:
    """Whether a pipeline was made here."""
    return PEAKS in vars(pipe)


def _accepted(kind: Any) -> list[str]:
    return [name for name in inspect.signature(kind.__init__).parameters if name not in ("self", "args", "kwargs")]


def _fetched(source: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=list(_CONFIGS)))
    except Exception as error:  # of the network, the hub or its client
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot fetch the configs of {source}: {type(error).__name__}: {reason}") from error


def _class_of(library: str, name: str) -> Any:
    import diffusers

    if library == LIBRARY:
        from obsdiff.models import obsdiff_shrunk

        return getattr(obsdiff_shrunk, name)
    own = getattr(diffusers.pipelines, library, None)  # classes that belong to one pipeline
    return getattr(own if own is not None else importlib.import_module(library), name)


def _part(folder: Path, index: Mapping[str, Any], key: str, dtype: torch.dtype) -> Any:
    """A component, or a setting of the pipeline."""
    value = index.get(key)
    if not isinstance(value, list) or len(value) != 2:
        return value
    if value[1] is None:
        return None
    kind = _class_of(*value)
    if isinstance(kind, type) and issubclass(kind, nn.Module):
        return _model(kind, folder / key, dtype)
    if "tokenizer" in key and not any((folder / key / file).is_file() for file in _VOCABULARIES):
        return PlainTokenizer(folder / key)
    return kind.from_pretrained(folder / key)


def _model(kind: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    """A model as its config describes it, without weights, in the dtype that loading would give it."""
    with META:
        if hasattr(kind, "load_config"):
            model = kind.from_config(kind.load_config(folder))
        else:
            model = kind(kind.config_class.from_pretrained(folder))
    kept = [*(getattr(kind, "_keep_in_fp32_modules_strict", None) or ())]
    if dtype == torch.float16 or hasattr(kind, "load_config"):  # transformers keeps these in fp16 alone
        kept += getattr(kind, "_keep_in_fp32_modules", None) or ()
    model = model.to(META)
    for name, module in model.named_modules():
        if not set(name.split(".")) & set(kept):
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if tensor.is_floating_point():
                    tensor.data = tensor.data.to(dtype)
    return model.eval().requires_grad_(False)


def _running(kind: Any, parts: Mapping[str, Any], info: PipelineInfo) -> Any:
    """The pipeline, whose models answer with zeros."""
    pipe = type(kind.__name__, (kind,), {"_execution_device": CPU})(**parts)
    denoisers, peaks = [*denoisers_of(pipe).values()], dict[str, int]()
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            for key, buffer in [*part.named_buffers()] if name == "vae" else ():
                owner, _, own = key.rpartition(".")  # the pipeline itself reads them, to undo a normalisation
                setattr(part.get_submodule(owner), own, torch.zeros(buffer.shape, dtype=buffer.dtype))
            for method in METHODS:
                if hasattr(part, method):
                    setattr(part, method, _answering(getattr(part, method), name, peaks, part in denoisers))
    vars(pipe)[PEAKS] = peaks
    attach_info(pipe, info)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _answering(method: Any, name: str, peaks: dict[str, int], traced: bool) -> Any:
    """A model's method that answers on the CPU; if it is ``traced``, only where it is given real tensors."""
    known: dict[str, tuple[int, Any]] = {}

    @functools.wraps(method)
    def answer(*args: Any, **kwargs: Any) -> Any:
        real: list[Tensor] = []
        tree_map_only(Tensor, lambda x: None if x.is_meta else real.append(x), (args, kwargs))
        if traced and not real:
            return method(*args, **kwargs)
        given, named = tree_map_only(Tensor, lambda x: x.to(META), (args, kwargs))
        if (key := repr((given, named))) not in known:
            held: list[Any] = []
            live = live_in(lambda: held.append(method(*given, **named)), unknown=0)
            known[key] = live.peak, held[0]
        peak, found = known[key]
        peaks[name] = max(peaks.get(name, 0), peak)
        return _zeros(found)

    return answer


@contextmanager
def peaks_of_models(pipe: Any) -> Iterator[dict[str, int]]:
    """The most that each model of a pipeline takes within one call while it runs, in bytes by component."""
    peaks: dict[str, int] = vars(pipe).get(PEAKS, {})
    if peaks or is_weightless(pipe):
        peaks.clear()
        yield peaks
        return
    changed = []
    for name, part in pipe.components.items():
        for key in METHODS if isinstance(part, nn.Module) else ():
            if hasattr(part, key) and key not in vars(part):
                setattr(part, key, _counted(getattr(part, key), name, peaks))
                changed.append((part, key))
    try:
        yield peaks
    finally:
        for part, key in changed:
            delattr(part, key)


def _counted(method: Any, name: str, peaks: dict[str, int]) -> Any:
    @functools.wraps(method)
    def answer(*args: Any, **kwargs: Any) -> Any:
        held: list[Any] = []
        peaks[name] = max(peaks.get(name, 0), live_in(lambda: held.append(method(*args, **kwargs))).peak)
        return held[0]

    return answer


def _zeros(value: Any) -> Any:
    """An answer with zeros on the CPU in place of its tensors."""
    if isinstance(value, Tensor):
        return torch.zeros(value.shape, dtype=value.dtype)
    if isinstance(value, Mapping):  # outputs of diffusers and transformers are, and classes made of keywords
        return type(value)(**{key: _zeros(inner) for key, inner in value.items()})
    if isinstance(value, tuple | list):
        return type(value)(map(_zeros, value))
    return value


class PlainTokenizer:
    """Stands for a tokenizer whose files are not there: every text is as long as it may be."""

    pad_token_id = eos_token_id = bos_token_id = 0
    padding_side = "right"

    def __init__(self, folder: Path) -> None:
        file = folder / "tokenizer_config.json"
        said = read_json(file, "a tokenizer's config") if file.is_file() else {}
        longest = said.get("model_max_length")
        self.model_max_length = longest if isinstance(longest, int) and 0 < longest < 2**16 else _LONGEST

    def __call__(self, text: Any = None, *_: Any, max_length: int | None = None, **__: Any) -> Any:
        from transformers import BatchEncoding

        count = 1 if isinstance(text, str) or text is None else len(text)
        ids = torch.zeros(count, max_length or self.model_max_length, dtype=torch.int64)
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def apply_chat_template(self, messages: Any, *_: Any, tokenize: bool = True, **kwargs: Any) -> Any:
        """The same for conversations, one or a list of them."""
        several = bool(messages) and isinstance(messages[0], list)
        texts = [""] * len(messages) if several else ""
        return self(texts, **kwargs) if tokenize else texts

    def batch_decode(self, ids: Any, **_: Any) -> list[str]:
        """Texts of which nothing was cut off."""
        return [""] * len(ids)
