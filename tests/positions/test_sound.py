"""Models of sound: hidden states as transformers gives them, positions in time, padding told apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import massact as ma
from massact.interventions.effects import evaluate
from massact.models import first_ids
from massact.positions import ready_corpus, tokens_of
from massact.positions.frames import frames_of
from massact.records.errors import UserError
from massact.reports.kinds.scan.words import answer_in_words
from massact.verbs.scan import ScanConfig
from tests.facts import tells
from tests.families import build
from tests.sounds import CONTENT, POSITIONS, RATE, folder, sweep, tokenizer, wav2vec2, whisper, whisper_extractor

LOW = {"magnitude": 0.0, "ratio": 1.4}
DECODER = "decoder_input_ids"


def loaded(module: Any = None, extractor: Any = None, words: bool = True) -> ma.Model:
    given = {} if extractor is not None or not words else {"tokenizer": tokenizer()}
    return ma.load(module or whisper(), processor=extractor or whisper_extractor(), **given)


def naive_layers(states: list[list[np.ndarray]]) -> dict[str, np.ndarray]:
    """Of hidden states (T, D) of each sequence and layer: top 1 and median of |h|, mean over sequences."""
    top1 = [[np.abs(h).max() for h in layers] for layers in states]
    median = [[np.sort(np.abs(h), None)[(h.size - 1) // 2] for h in layers] for layers in states]
    return {"top1": np.mean(top1, 0), "median": np.mean(median, 0)}


def test_encoder_and_decoder_are_measured_as_transformers_gives_them(tmp_path: Path) -> None:
    model = loaded()
    result = ma.scan(model, folder(tmp_path / "s", texts=True), thresholds=LOW, null=False, batch_size=2)
    corpus = ready_corpus(model, ma.corpus(tmp_path / "s"), ScanConfig())
    encoder, decoder = [], []
    for i, row in enumerate(corpus.counts[0]):
        inputs = {"input_features": corpus.inputs["input_features"][i : i + 1],
                  DECODER: corpus.inputs[DECODER][i : i + 1][:, row]}  # fmt: skip
        with torch.no_grad():
            out = model.module(**inputs, output_hidden_states=True)
        encoder.append([h[0].numpy() for h in out.encoder_hidden_states[:-1]])  # the last one is behind the last norm
        decoder.append([h[0].numpy() for h in out.decoder_hidden_states[:-1]])
    for stack, states in (("encoder", encoder), ("decoder", decoder)):
        layers = result.layers[(result.layers["stack"] == stack) & (result.layers.site == "resid_post")]
        known = naive_layers(states)
        for name, values in known.items():
            np.testing.assert_allclose(layers[name].to_numpy()[: len(values)], values, rtol=1e-5)
    text = result.findings[result.findings["stack"] == "decoder"]
    assert set(text.token) <= {"<s>", "low", "high", "sweep"} and set(text.position_class) <= {"start", "other"}
    assert text.groupby("sequence").pos.max().le([1, 2, 3]).all() and result.info.corpus["source"]["decoder"]["then"]
    assert result.info.answer["bos"] == {"unavailable": "recordings have none"}


@pytest.mark.parametrize("pos", [5, 17, 18, 32, 33, 49])
def test_a_planted_frame_is_padding_where_the_recording_has_ended(pos: int, tmp_path: Path) -> None:
    """The same position is sound in long recordings and padding in short ones."""
    module = whisper()
    module.model.encoder.embed_positions.weight.data[pos, 7] = 5000.0
    result = ma.scan(loaded(module), folder(tmp_path / "s"), null=False)
    found = result.findings[result.findings["stack"] == "encoder"]
    assert set(found.pos) == {pos} and set(found.dim) == {7} and set(found.layer) == {0, 1, 2, 3}
    for sequence, n in enumerate(CONTENT):
        mine = found[found.sequence == sequence]
        padding = pos >= n
        name = "padding" if padding else f"frame {pos * 0.02:.2f}-{pos * 0.02 + 0.02:.2f} s"
        assert set(mine.token) == {name} and set(mine.position_class) == {"padding" if padding else "other"}
        np.testing.assert_allclose(mine.value[mine.layer == 0], 5000, atol=5)
    words, n_padding = " ".join(answer_in_words(result)), sum(pos >= n for n in CONTENT)
    share = f"encoder: {4 * n_padding} findings ({n_padding / 3:.1%}".split(".")[0]
    assert (share in words and "are in padding" in words) == (n_padding > 0)


def click(at: float, seconds: float = 1.0) -> np.ndarray:
    """Faint noise with a short burst that begins at a time."""
    wave = (1e-3 * np.random.default_rng(0).standard_normal(round(seconds * RATE))).astype(np.float32)
    start = round(at * RATE)
    wave[start : start + 160] += 0.5 * np.sin(np.arange(160) * 0.6).astype(np.float32)
    return wave


@pytest.mark.parametrize("kind", ["whisper", "group", "layer"])
def test_names_tell_the_time(kind: str) -> None:
    """Of two bursts, each moves the position whose name holds its time, or one beside it, more than its half."""
    model = loaded() if kind == "whisper" else loaded(*wav2vec2(masked=kind == "layer"))
    stack = "encoder" if kind == "whisper" else ""
    for at in (0.21, 0.5, 0.83):
        other = 0.95 if at < 0.6 else 0.1
        pair = ready_corpus(model, ma.corpus([(click(other), RATE), (click(at), RATE)]), ScanConfig())
        text = tokens_of(model, pair, stack, 49 if kind == "whisper" else 48)
        inputs = pair.inputs[str(model.sound_input)]
        with torch.no_grad():
            more = {DECODER: pair.inputs[DECODER]} if DECODER in pair.inputs else {}
            out = model.module(**{str(model.sound_input): inputs}, **more, output_hidden_states=True)
        h = (out.encoder_hidden_states if kind == "whisper" else out.hidden_states)[0]
        moved_T = (h[1] - h[0]).abs().sum(-1)
        spans = [text.token(1, t).removeprefix("frame ").removesuffix(" s").split("-") for t in range(len(moved_T))]
        mine = [t for t, (low, _) in enumerate(spans) if abs(float(low) - at) < abs(float(low) - other)]
        low, high = map(float, spans[max(mine, key=lambda t: float(moved_T[t]))])
        assert low - 0.03 <= at + 0.005 <= high + 0.03, (at, low, high)


def test_padding_that_a_model_masks_does_not_count(tmp_path: Path) -> None:
    model = loaded(*wav2vec2(masked=True))
    files = folder(tmp_path / "s")
    corpus = ready_corpus(model, ma.corpus(files), ScanConfig())
    (counts,) = corpus.counts
    result = ma.scan(model, files, thresholds=LOW, null=False, batch_size=3)
    inputs = {"input_values": corpus.inputs["input_values"], "attention_mask": corpus.mask.long()}
    with torch.no_grad():
        states = model.module(**inputs, output_hidden_states=True).hidden_states[:-1]
    window = 10 + 5 * 7 + 40 * 7
    lengths = [(n * 320 - window) // 320 + 1 for n in CONTENT]  # windows that lie in the recording
    assert counts.sum(1).tolist() == lengths
    known = naive_layers([[h[i, :n].numpy() for h in states] for i, n in enumerate(lengths)])
    layers = result.layers[result.layers.site == "resid_post"]
    for name, values in known.items():
        np.testing.assert_allclose(layers[name].to_numpy()[: len(values)], values, rtol=1e-4)
    assert "padding" not in set(result.findings.position_class) and not result.info.corpus["source"]["notes"]
    plain = ma.scan(loaded(*wav2vec2(masked=False)), files, thresholds=LOW, null=False)
    assert "padding" in set(plain.findings.position_class)  # nothing masks it there: it counts


def test_a_mask_that_the_model_does_not_heed_is_left_out(tmp_path: Path) -> None:
    """Whisper takes a mask and attends to everything."""
    extractor = whisper_extractor()
    extractor.return_attention_mask = True
    corpus = ready_corpus(loaded(extractor=extractor), ma.corpus(folder(tmp_path / "s")), ScanConfig())
    assert corpus.mask is None and corpus.counts == () and not corpus.origin.source["preprocess"]["masked"]


def test_positions_that_are_no_frames_are_not_named() -> None:
    """A spectrogram transformer has patches and two tokens in front: no position is given a time."""
    config = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40, max_length=64,
                  num_mel_bins=16, patch_size=8, frequency_stride=8, time_stride=8)  # fmt: skip
    torch.manual_seed(0)
    module = transformers.ASTModel(transformers.ASTConfig(**config)).eval()
    extractor = transformers.ASTFeatureExtractor(num_mel_bins=16, max_length=64)
    result = ma.scan(loaded(module, extractor), (sweep(0.4), RATE), thresholds=LOW, null=False)
    assert all(t.startswith("token ") for t in result.findings.token) and len(result.findings)
    assert tells(result.info.notes, "time", "padding", "not")


def test_a_short_recording_and_one_that_fills_the_model() -> None:
    model = loaded()
    corpus = ready_corpus(model, ma.corpus([(sweep(0.001), RATE), (sweep(1.0), RATE)]), ScanConfig())
    text = tokens_of(model, corpus, "encoder", POSITIONS - 1)
    assert text.ends == (1, POSITIONS)
    assert text.position_class(0, 0) == "start" and text.token(0, 0) == "frame 0.00-0.02 s"
    assert text.position_class(0, 1) == "padding" and text.position_class(1, POSITIONS - 1) == "other"
    assert tokens_of(model, corpus.part(1), "encoder", POSITIONS - 1).ends == (POSITIONS,)
    assert frames_of(model, corpus, "decoder") is None


def test_an_extractor_of_another_model_is_refused() -> None:
    with pytest.raises(UserError, match="WhisperFeatureExtractor"):
        ma.scan(loaded(build("whisper")), (sweep(0.2), RATE), null=False)


def test_features_alone_get_the_start_tokens() -> None:
    model = loaded()
    features = torch.randn(2, 8, 2 * POSITIONS, generator=torch.Generator().manual_seed(0))
    result = ma.scan(model, {"input_features": features}, thresholds=LOW, null=False)
    both = ma.scan(model, {"input_features": features, DECODER: torch.tensor([[1], [1]])}, thresholds=LOW, null=False)
    assert result.findings.equals(both.findings) and set(result.layers["stack"]) == {"encoder", "decoder"}
    assert result.info.corpus["source"]["decoder"]["prompt_ids"] == [1]


def test_start_tokens_come_from_the_tokenizer_or_the_configuration() -> None:
    module = whisper()
    assert first_ids(module) == ((1,), "decoder_start_token_id")
    module.generation_config.forced_decoder_ids = [[1, 7], [2, 9], [4, 5]]
    assert first_ids(module)[0] == (1, 7, 9)  # nothing is forced at 3
    module.generation_config.forced_decoder_ids = [[1, None], [2, 9]]
    assert first_ids(module)[0] == (1,)

    class Words:
        prefix_tokens = [1, 4, 6]

    assert first_ids(module, Words()) == ((1, 4, 6), "Words.prefix_tokens")
    Words.prefix_tokens = [3, 4]  # of another model
    assert first_ids(module, Words())[0] == (1,)


# -------------------------------------------------------------------------------------------------------- effects
def test_loss_is_that_of_the_transcript_behind_the_start_tokens(tmp_path: Path) -> None:
    module = whisper()
    module.generation_config.forced_decoder_ids = [[1, 30], [2, 31]]
    model = loaded(module)
    corpus = ready_corpus(model, ma.corpus(folder(tmp_path / "s", texts=True)), ScanConfig())
    paired = evaluate(model, corpus, [], batch_size=2)
    assert paired.n_targets.tolist() == [1, 2, 3]
    for i, row in enumerate(corpus.counts[0]):
        ids = corpus.inputs[DECODER][i : i + 1][:, row]
        with torch.no_grad():
            logits = module(input_features=corpus.inputs["input_features"][i : i + 1], decoder_input_ids=ids).logits[0]
        naive = torch.nn.functional.cross_entropy(logits[2:-1], ids[0, 3:])
        assert paired.baseline["nll"][i] == pytest.approx(float(naive), rel=1e-5)


@pytest.mark.parametrize("kind", ["whisper", "wav2vec2"])
def test_without_a_transcript_there_is_no_loss_but_a_divergence(kind: str, tmp_path: Path) -> None:
    from massact.interventions import zero_dims

    model = loaded(words=False) if kind == "whisper" else loaded(*wav2vec2(masked=True))
    site = "encoder/2.resid_post" if kind == "whisper" else "2.resid_post"
    corpus = ready_corpus(model, ma.corpus(folder(tmp_path / "s")), ScanConfig())
    edit = replace(zero_dims([3, 4, 5], site), name="zero")
    paired = evaluate(model, corpus, [edit], batch_size=3)
    assert "nll" not in paired.baseline and (paired.edited["zero"]["kl"] > 1e-5).all()
    inputs: dict[str, Any] = dict(corpus.inputs)
    if corpus.mask is not None:
        inputs["attention_mask"] = corpus.mask.long()
    with torch.no_grad():
        before = model.module(**inputs).logits.log_softmax(-1)
        with ma.edited(model, edit):
            after = model.module(**inputs).logits.log_softmax(-1)
    kl = (before.exp() * (before - after)).sum(-1)
    rows = corpus.counts[0] if corpus.counts else torch.ones(kl.shape, dtype=torch.bool)
    naive = [float(kl[i][rows[i]].mean()) for i in range(3)]
    np.testing.assert_allclose(paired.edited["zero"]["kl"], naive, rtol=1e-3, atol=3e-7)
