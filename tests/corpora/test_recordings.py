"""Recordings as a corpus: where they are, how they become numbers, what is refused."""

from __future__ import annotations

import builtins
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

import massact as ma
from massact.corpora import AudioSource, Corpus, Prompt, Source, corpus
from massact.records.errors import UserError
from tests.facts import each, tells
from tests.sounds import CONTENT, RATE, WORDS, folder, sweep, tokenizer, wav2vec2, whisper_extractor

PROMPT = Prompt((1, 2), "a test", 24)


def encoded(spec: Any, extractor: Any = None, **options: Any) -> Corpus:
    source = corpus(spec)
    assert isinstance(source, AudioSource)
    name = "input_features" if extractor is None else "input_values"
    return source.encode(extractor or whisper_extractor(), input_name=name, **options)


def test_wav_and_flac_are_one_corpus_and_their_features_those_of_the_extractor(tmp_path: Path) -> None:
    wav, flac = encoded(folder(tmp_path / "w")), encoded(folder(tmp_path / "f", "flac"))
    assert wav.sha256 == flac.sha256
    assert wav.recordings is not None and wav.recordings.names == ("0.wav", "1.wav", "2.wav")
    assert wav.recordings.seconds == tuple(n * 0.02 for n in CONTENT)
    read = [np.round(sweep(n * 0.02, low=200 + 100 * i) * 32767) / 32768 for i, n in enumerate(CONTENT)]
    read = [x.astype(np.float32) for x in read]
    exact = whisper_extractor()(read, sampling_rate=RATE, return_tensors="pt")["input_features"]
    assert torch.equal(wav.inputs["input_features"], exact)
    one = encoded(tmp_path / "w" / "1.wav")
    assert torch.equal(one.inputs["input_features"][0], exact[1]) and one.name == "1.wav"
    assert torch.equal(encoded([(x, RATE) for x in read]).inputs["input_features"], exact)
    assert torch.equal(encoded([tmp_path / "w" / "1.wav", str(tmp_path / "w" / "0.wav")]).inputs["input_features"],
                       exact[[1, 0]])  # fmt: skip


def test_more_recordings_than_are_prepared_at_once() -> None:
    many = [(sweep(0.1 + i / 100), RATE) for i in range(11)]
    together = encoded(many).inputs["input_features"]
    assert torch.equal(together[10], encoded(many[10:]).inputs["input_features"][0]) and len(together) == 11
    assert encoded(many, n_sequences=2).n_sequences == 2
    with pytest.raises(UserError, match="12 recordings"):
        encoded(many, n_sequences=12)


def test_channels_and_rates_are_joined_and_recorded() -> None:
    t = {rate: np.arange(rate) / rate for rate in (8000, 16000, 44100)}
    tone = {rate: (0.5 * np.sin(2 * np.pi * 440 * x)).astype(np.float32) for rate, x in t.items()}
    _, extractor = wav2vec2(masked=False)
    extractor.do_normalize = False
    stereo = np.stack([tone[44100] + 0.25, tone[44100] - 0.25], 1)
    made = encoded([(tone[16000], 16000), (tone[8000], 8000), (stereo, 44100)], extractor)
    values = made.inputs["input_values"].numpy()
    assert values.shape == (3, 16000)
    np.testing.assert_array_equal(values[0], tone[16000])
    inner = slice(800, -800)  # filters know nothing of what lies outside
    for row in (1, 2):
        assert np.abs(values[row, inner] - tone[16000][inner]).max() < 2e-3
    prepared = made.origin.source["preprocess"]
    assert prepared["recorded_at"] == {"8000": 1, "16000": 1, "44100": 1} and prepared["channels"] == {"1": 2, "2": 1}
    assert prepared["resampled_by"] == "scipy.signal.resample_poly" and prepared["channels_joined_by"] == "mean"
    plain = encoded([(tone[16000], 16000)], extractor).origin.source["preprocess"]
    assert plain["resampled_by"] is None and plain["channels_joined_by"] is None
    assert plain["extractor"] == "Wav2Vec2FeatureExtractor" and plain["sampling_rate"] == 16000


def test_recordings_longer_than_the_model_takes_are_told() -> None:
    made = encoded([(sweep(0.5), RATE), (sweep(1.25), RATE)])
    assert made.recordings is not None and made.recordings.seconds == (0.5, 1.0)
    (note,) = made.origin.source["notes"]
    assert "1 recording(s) are longer" in note and "first 1 s" in note and "recording 1" in note
    assert made.origin.source["seconds"] == [0.5, 1.25]


# ---------------------------------------------------------------------------------------------------- transcripts
def test_transcripts_beside_files_and_in_a_csv(tmp_path: Path) -> None:
    files = folder(tmp_path / "s", texts=True)
    words = tokenizer()
    made = encoded(files, tokenizer=words, prompt=PROMPT)
    rows = [[1, 2, *(words.convert_tokens_to_ids(w) for w in WORDS[: i + 1])] for i in range(3)]
    ids = made.inputs["decoder_input_ids"]
    (counts,) = made.counts
    assert [ids[i][counts[i]].tolist() for i in range(3)] == rows and ids.shape == (3, 5)
    assert made.origin.source["decoder"] == {"prompt_ids": [1, 2], "prompt_from": "a test", "then": "transcript"}
    head = made.head(2)
    assert head.recordings is not None and head.recordings.texts == ("low", "low high") and len(head.counts[0]) == 2
    lines = ["Path,Text", *(f"s/{i}.wav,{' '.join(WORDS[: i + 1])}" for i in range(3))]
    (tmp_path / "all.csv").write_text("\n".join(lines), encoding="utf-8")
    table = encoded(tmp_path / "all.csv", tokenizer=words, prompt=PROMPT)
    assert table.sha256 == made.sha256 and table.origin.source["form"] == "csv"
    bare = encoded(folder(tmp_path / "bare"), prompt=PROMPT)
    assert bare.inputs["decoder_input_ids"].tolist() == [[1, 2]] * 3 and bare.counts == ()
    with pytest.raises(UserError, match="without a tokenizer"):
        encoded(files, prompt=PROMPT)
    with pytest.raises(UserError, match="5 tokens long.*prompt included"):
        encoded(files, tokenizer=words, prompt=Prompt((1, 2), "a test", 4))
    assert tells(encoded(files).origin.source["notes"][:1], "transcripts", "not")
    (files / "1.txt").unlink()
    with pytest.raises(UserError, match=each("'1.wav'", "no transcript")):
        corpus(files)
    (files / "1.txt").write_text(" \n")
    with pytest.raises(UserError, match="'1.txt' is empty"):
        corpus(files)


# ----------------------------------------------------------------------------------------------------- bad inputs
def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    good = sweep(0.1)
    cases: dict[str, Any] = {
        "broken.wav": b"RIFF....nothing", "empty.wav": b"", "noise.flac": os.urandom(400),
    }  # fmt: skip
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=f"'{name}' cannot be read"):
            encoded(tmp_path / name)
    soundfile.write(tmp_path / "none.wav", good[:0], RATE)
    with pytest.raises(UserError, match="'none.wav' is empty"):
        encoded(tmp_path / "none.wav")
    bad = good.copy()
    bad[[3, 7]] = np.nan, np.inf
    soundfile.write(tmp_path / "nan.wav", bad, RATE, subtype="FLOAT")
    with pytest.raises(UserError, match=each("'nan.wav'", "NaN or Inf", 2)):
        encoded(tmp_path / "nan.wav")
    for spec, says in (
        ((good, 0), "sampling rate .* is 0"), ((good, 16000.5), "sampling rate"),
        (((good * 32767).astype(np.int16), RATE), "int16"), ((good.reshape(2, 2, -1), RATE), "of shape"),
        ([(good, RATE), "a prompt"], "Entry 1 of the list is no recording"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=says):
            encoded(spec)
    with pytest.raises(UserError, match=each("no recording", "nowhere.wav")):
        corpus([str(tmp_path / "nan.wav"), str(tmp_path / "nowhere.wav")])
    with pytest.raises(UserError, match="nowhere.flac"):
        corpus(str(tmp_path / "nowhere.flac"))
    for options in ({"seq_len": 8}, {"bos": "never"}, {"split": "test"}, {"preprocess": {"crop": 3}}):
        with pytest.raises(UserError, match="means (nothing|something)"):
            corpus((good, RATE), **options)
    with pytest.raises(UserError, match="no preprocessor_config.json"):
        corpus((good, RATE)).encode(None, input_name="input_values")  # type: ignore[union-attr]
    assert isinstance(corpus(["say hello.wav", "and this"]), Source)


def test_a_folder_of_two_kinds_is_refused(tmp_path: Path) -> None:
    both = folder(tmp_path / "s", texts=True)
    (both / "notes.md").write_text("words")
    with pytest.raises(UserError, match=each("(3)", "(1)")):
        corpus(both)
    (both / "notes.md").unlink()
    Image.new("RGB", (4, 4)).save(both / "a.png")
    with pytest.raises(UserError, match="'a.png'"):
        corpus(both)
    (both / "a.png").rename(both / ".a.png")
    assert isinstance(corpus(both), AudioSource)


def test_without_the_extra_it_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "soundfile":
            raise ImportError(name)
        return real(name, *rest, **more)

    soundfile.write(tmp_path / "a.wav", sweep(0.1, 8000), 8000)
    source = corpus(tmp_path / "a.wav")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=each("soundfile", "installed")) as error:
        source.encode(whisper_extractor(), input_name="input_features")  # type: ignore[union-attr]
    assert "massact[audio]" in str(error.value.do)


def test_models_of_other_kinds_refuse_recordings() -> None:
    with pytest.raises(UserError, match="takes input_ids, not sound"):
        ma.scan(ma.load(), corpus((sweep(0.1), RATE)))
