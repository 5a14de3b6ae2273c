"""Tiny text encoders with random weights, and tokenizers built in code: whole words of the prompts, else letters.

Each function gives (encoder, tokenizer); ``pair`` names them as a pipeline does.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from typing import Any

from tests.families.making import PROMPTS, TEXT_LENGTH, TEXT_WIDTH

# Newlines are a token, and so is the blank before a digit: thus the templates of Qwen-Image and HunyuanVideo have as
# many tokens (34 and 95) as in the public tokenizers, and the pipelines crop that many.
PIECES = r"\w+|[^\w\s]|\n+| (?=\d)"
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
MISTRAL_CHAT = (
    "<s>{% for message in messages %}"
    "{% if message['role'] == 'system' %}[SYSTEM_PROMPT]{{ message['content'][0]['text'] }}[/SYSTEM_PROMPT]"
    "{% else %}[INST]{{ message['content'][0]['text'] }}[/INST]{% endif %}{% endfor %}"
)


def pair(encoders: bool, make: Callable[[], tuple[Any, Any]], suffix: str = "") -> dict[str, Any]:
    """The pipeline's ``text_encoder`` and ``tokenizer``, both None without encoders."""
    encoder, tokenizer = make() if encoders else (None, None)
    return {"text_encoder" + suffix: encoder, "tokenizer" + suffix: tokenizer}


def tokenizer_of(
    specials: Sequence[str], before: str = "", after: str = "", pad: str = "<pad>", template: str = "", **named: Any
) -> Any:
    """A fast tokenizer.

    Args:
        specials: Special tokens, at the head of the vocabulary in this order.
        before, after: Special tokens that every text gets, "" for none.
        pad: The token that fills up on the right.
        template: Further text whose words are tokens too.
        named: Further arguments of the tokenizer, as ``eos_token``.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = dict.fromkeys(re.findall(PIECES, " ".join([*PROMPTS, template]).lower()))
    letters = [prefix + letter for prefix in ("", "##") for letter in string.ascii_lowercase + string.digits]
    tokens = dict.fromkeys([*specials, pad, "<unk>", "\n", "\n\n", " ", *letters, *string.punctuation, *words])
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True)
    tokenizer.add_special_tokens([*specials, pad, "<unk>"])
    ends = [token for token in (before, after) if token]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(part for part in (before, "$A", after) if part),
        special_tokens=[(token, vocabulary[token]) for token in dict.fromkeys(ends)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, unk_token="<unk>", padding_side="right", **named
    )


def clip(width: int = TEXT_WIDTH, projected: bool = False, length: int = TEXT_LENGTH) -> tuple[Any, Any]:
    """CLIP of ``length`` tokens; ``projected`` where the pooled embedding goes through the projection (SD3, SDXL)."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = tokenizer_of(
        ["<|startoftext|>", "<|endoftext|>"],
        before="<|startoftext|>",
        after="<|endoftext|>",
        pad="<|endoftext|>",
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        model_max_length=length,
    )
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config), tokenizer


def t5(width: int = TEXT_WIDTH, multilingual: bool = False) -> tuple[Any, Any]:
    """T5, or UMT5 as Wan has it."""
    from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    tokenizer = tokenizer_of(
        ["<pad>", "</s>"], after="</s>", pad="<pad>", eos_token="</s>", model_max_length=10 * TEXT_LENGTH
    )
    sizes = {
        "vocab_size": len(tokenizer),
        "d_model": width,
        "d_kv": width // 4,
        "num_heads": 4,
        "d_ff": 2 * width,
        "num_layers": 2,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "decoder_start_token_id": tokenizer.pad_token_id,
    }
    if multilingual:
        return UMT5EncoderModel(UMT5Config(**sizes)), tokenizer
    return T5EncoderModel(T5Config(**sizes)), tokenizer


def _decoder_sizes(tokenizer: Any, layers: int = 4) -> dict[str, Any]:
    """Of a small causal language model with grouped keys and values."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 2 * TEXT_WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 1024,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def gemma2(template: str = "") -> tuple[Any, Any]:
    from transformers import Gemma2Config, Gemma2Model

    tokenizer = tokenizer_of(
        ["<pad>", "<eos>", "<bos>"],
        before="<bos>",
        template=template,
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=1024,
    )
    return Gemma2Model(Gemma2Config(**_decoder_sizes(tokenizer), query_pre_attn_scalar=8)), tokenizer


def _chat_tokenizer(template: str = "") -> Any:
    return tokenizer_of(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|image_pad|>", "<|video_pad|>"],
        pad="<|endoftext|>",
        template="system user assistant " + template,
        eos_token="<|im_end|>",
        chat_template=CHAT,
        model_max_length=1024,
    )


def qwen3(with_head: bool = False) -> tuple[Any, Any]:
    """The bare model as Z-Image has it, or the language model of Flux.2 Klein (layers 9, 18 and 27 are read)."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

    tokenizer = _chat_tokenizer()
    sizes = _decoder_sizes(tokenizer, 28 if with_head else 4)
    return (Qwen3ForCausalLM if with_head else Qwen3Model)(Qwen3Config(**sizes)), tokenizer


def qwen25_vl(template: str) -> tuple[Any, Any]:
    """The words of ``template`` are tokens, so that it has as many as in the public tokenizer."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = _chat_tokenizer(template)
    sizes = _decoder_sizes(tokenizer)
    sizes["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    config = Qwen2_5_VLConfig(
        text_config=sizes,
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": TEXT_WIDTH,
            "patch_size": 4,
            "fullatt_block_indexes": [0],
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
    )
    return Qwen2_5_VLForConditionalGeneration(config), tokenizer


def llama(template: str) -> tuple[Any, Any]:
    from transformers import LlamaConfig, LlamaModel

    tokenizer = tokenizer_of(
        ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
        before="<|begin_of_text|>",
        template=template,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        model_max_length=1024,
    )
    return LlamaModel(LlamaConfig(**_decoder_sizes(tokenizer))), tokenizer


def mistral3(template: str) -> tuple[Any, Any]:
    """With an image side, which text alone never runs, and a processor in the place of a tokenizer; layers 10, 20 and
    30 are read."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration, PixtralImageProcessor, PixtralProcessor

    marks = ["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    tokenizer = tokenizer_of(
        ["<s>", "</s>", *marks],
        template=template,
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=1024,
    )
    config = Mistral3Config(
        text_config={"model_type": "mistral", **_decoder_sizes(tokenizer, 31)},
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "head_dim": 8,
            "image_size": 32,
            "patch_size": 4,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
    )
    processor = PixtralProcessor(
        image_processor=PixtralImageProcessor(size={"longest_edge": 32}, patch_size=4),
        tokenizer=tokenizer,
        patch_size=4,
        spatial_merge_size=2,
        chat_template=MISTRAL_CHAT,
    )
    return Mistral3ForConditionalGeneration(config), processor
