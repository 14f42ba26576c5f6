"""Named text, token ids, images and sound as ready batches, made the same way every time.

Takes: a name, a path, prompts, ids or tensors; a tokenizer.
Gives: `Corpus`, read as `Batch`es, with BOS policy, packing, seed and content hash recorded; or a `Source`,
which is text that still waits for a tokenizer, an `ImageSource` or `PairSource`, images (with text) that wait for a
processor, or an `AudioSource`, recordings that wait for a feature extractor.
Knows: files, data sets and their protocols, tokenizers, preprocessing of images, reading of sound. Must not know:
models, layers, or what is measured.
"""

from massact.corpora.audio_source import AudioSource
from massact.corpora.batch import GENERATED, PADDING, PROMPT, Batch, Corpus, Origin
from massact.corpora.image_files import Pictures, read_csv
from massact.corpora.image_source import ImageSource
from massact.corpora.modalities import Modalities
from massact.corpora.pairs import PairSource
from massact.corpora.readiness import check_preprocess, ready
from massact.corpora.recordings import Prompt
from massact.corpora.sources import AnySource, Source, corpus, corpus_again
from massact.records.presets import PRESETS, Preset

__all__ = [
    "GENERATED", "PADDING", "PRESETS", "PROMPT", "AnySource", "AudioSource", "Batch", "Corpus", "ImageSource",
    "Modalities", "Origin", "PairSource", "Pictures", "Preset", "Prompt", "Source", "check_preprocess", "corpus",
    "corpus_again", "read_csv", "ready",
]  # fmt: skip
