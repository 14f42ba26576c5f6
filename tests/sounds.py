"""Recordings made by formula, and tiny random models of sound with their feature extractors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile
import torch
import transformers
from torch import nn

from tests.families import FAMILIES

RATE = 16000
POSITIONS = 50  # of the tiny whisper: 1 s in steps of 0.02 s
CONTENT = (18, 50, 33)  # positions with sound of the three recordings of `folder`
WORDS = ("low", "high", "sweep", "rises", "falls")


def sweep(seconds: float, rate: int = RATE, low: float = 200.0, high: float = 3000.0) -> np.ndarray:
    """A sine from `low` to `high` Hz, (samples,) float32."""
    t = np.arange(round(seconds * rate)) / rate
    phase = 2 * np.pi * (low * t + (high - low) * t**2 / (2 * seconds))
    return (0.5 * np.sin(phase)).astype(np.float32)


def folder(path: Path, ending: str = "wav", texts: bool = False) -> Path:
    """Three sweeps of 0.36, 1 and 0.66 s."""
    path.mkdir(parents=True, exist_ok=True)
    for i, n in enumerate(CONTENT):
        samples = np.round(sweep(n * 0.02, low=200 + 100 * i) * 32767).astype(np.int16)
        soundfile.write(path / f"{i}.{ending}", samples, RATE)
        if texts:
            (path / f"{i}.txt").write_text(" ".join(WORDS[: i + 1]) + "\n", encoding="utf-8")
    return path


def whisper_extractor() -> transformers.WhisperFeatureExtractor:
    """Features of 8 bins and 1 s."""
    return transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1)


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Whole words; 0 pads, 1 starts, 2 ends, as the tiny whisper says."""
    import tokenizers

    vocabulary = {w: i for i, w in enumerate(("<pad>", "<s>", "</s>", "<unk>", *WORDS, *map(str, range(40))))}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def whisper() -> nn.Module:
    """The tiny whisper of `tests.families`, 3 and 2 layers, with more positions of sound."""
    torch.manual_seed(0)
    config = transformers.WhisperConfig(**FAMILIES["whisper"][1] | {"max_source_positions": POSITIONS})
    return transformers.WhisperForConditionalGeneration(config).eval()


def saved_whisper(path: Path, words: bool = True) -> Path:
    """A folder with the model, its feature extractor, and a tokenizer where words are wanted."""
    whisper().save_pretrained(path)
    whisper_extractor().save_pretrained(path)
    if words:
        tokenizer().save_pretrained(path)
    return path


def wav2vec2(masked: bool) -> tuple[nn.Module, transformers.Wav2Vec2FeatureExtractor]:
    """A tiny wav2vec2 with a CTC head that heeds a mask (layer norms), or has none (a group norm)."""
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        vocab_size=12, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=56,
        conv_dim=[8, 8, 8], conv_stride=[5, 8, 8], conv_kernel=[10, 8, 8], num_feat_extract_layers=3,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, feat_extract_norm="layer" if masked else "group",
        do_stable_layer_norm=masked,
    )  # fmt: skip
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=masked)
    return transformers.Wav2Vec2ForCTC(config).eval(), extractor
