"""Tiny random models of images and text, their inputs and a processor, from configurations. Nothing is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

IMAGE, VIDEO, START, END = 95, 96, 97, 98  # token ids
_TEXT = dict(vocab_size=99, hidden_size=48, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2)  # fmt: skip


def llava(vision: str = "clip", text: str = "llama", features: int = -2) -> nn.Module:
    """16 patches of 6 x 6 pixels; CLIP's class token is left out of the text, SigLIP has none."""
    v: Any = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4, image_size=24,
                  patch_size=6)  # fmt: skip
    clip = vision == "clip"
    tower = transformers.CLIPVisionConfig(**v, projection_dim=32) if clip else transformers.SiglipVisionConfig(**v)
    words = transformers.LlamaConfig(**_TEXT) if text == "llama" else transformers.Qwen2Config(**_TEXT)
    config = transformers.LlavaConfig(
        vision_config=tower, text_config=words, image_token_index=IMAGE, vision_feature_layer=features,
        vision_feature_select_strategy="default" if clip else "full", image_seq_length=16,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config).eval()


def qwen(version: str = "2") -> nn.Module:
    """Patches of 4 x 4 pixels in one row for all images, merged 2 x 2; multimodal rotary positions."""
    words = _TEXT | dict(hidden_size=64, rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3]})
    v: Any = dict(depth=3, num_heads=4, patch_size=4, spatial_merge_size=2, temporal_patch_size=2)
    if version == "2":
        v |= dict(embed_dim=32, hidden_size=64, mlp_ratio=2)
        config: Any = transformers.Qwen2VLConfig
        cls: Any = transformers.Qwen2VLForConditionalGeneration
    else:
        v |= dict(hidden_size=32, out_hidden_size=64, intermediate_size=40, fullatt_block_indexes=[1], window_size=16)
        config, cls = transformers.Qwen2_5_VLConfig, transformers.Qwen2_5_VLForConditionalGeneration
    torch.manual_seed(0)
    ids = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)
    return cls(config(text_config=words, vision_config=v, bos_token_id=1, eos_token_id=2, **ids)).eval()


def llava_inputs(n: int = 3) -> dict[str, Tensor]:
    """BOS, a word, 16 image tokens, 7 words."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 95, (n, 25), generator=g)
    ids[:, 0], ids[:, 2:18] = 1, IMAGE
    return {"input_ids": ids, "pixel_values": torch.randn(n, 3, 24, 24, generator=g)}


def qwen_inputs(grids: tuple[tuple[int, int], ...] = ((4, 6), (4, 6), (4, 4))) -> dict[str, Tensor]:
    """BOS, a word, one image of rows x columns patches between its marks, words up to 20 tokens."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 95, (len(grids), 20), generator=g)
    ids[:, 0], ids[:, 2] = 1, START
    for row, (rows, columns) in zip(ids, grids, strict=True):
        n = rows * columns // 4
        row[3 : 3 + n], row[3 + n] = IMAGE, END
    return {
        "input_ids": ids,
        "pixel_values": torch.randn(sum(r * c for r, c in grids), 96, generator=g),
        "image_grid_thw": torch.tensor([(1, *grid) for grid in grids]),
    }


def save_llava(folder: Path) -> nn.Module:
    """The model with a processor: words of a tiny vocabulary, the images' processor written for Pillow."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    known = ["<unk>", "<s>", "</s>", "<pad>", *(f"w{i}" for i in range(4, 95)), "<image>", "<v>", "<vs>", "<ve>"]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(known)}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    images = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    processor = transformers.LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=6, vision_feature_select_strategy="default",
        image_token="<image>", num_additional_image_tokens=1,
    )  # fmt: skip
    model = llava()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model
