"""The published values (see `judgement`): tables of the paper, its code, and independent replications."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from massact.reproductions.judgement import ANY, CODE, OWEN, Published
from massact.reproductions.register_values import REGISTER_MEANS, SIZES

L7, L13, MIX = "LLaMA2-7B", "LLaMA2-13B", "Mixtral-8x7B"
RANKS = ("top 1", "top 2", "top 3", "top 4", "top 5", "top 10", "top 100", "top 1%", "top 10%", "median")
TABLE_1 = {
    L7: (2622.0, 1547.0, 802.0, 477.3, 156.9, 45.7, 10.6, 1.1, 0.6, 0.2),
    L13: (1264.0, 781.0, 51.0, 50.5, 47.1, 43.5, 16.6, 1.9, 1.1, 0.4),
    MIX: (7100.0, 5296.0, 1014.5, 467.8, 302.8, 182.8, 90.8, 3.0, 1.0, 0.3),
}
TABLE_2 = {  # mean, std
    L7: {"top 1": (2556.8, 141.0), "top 2": (-1507.0, 81.0), "top 1%": (-0.14, 0.6), "top 10%": (0.0, 0.5),
         "median": (0.2, 0.3)},
    L13: {"top 1": (-1277.5, 14.6), "top 2": (-787.8, 8.0), "top 1%": (0.9, 0.7), "top 10%": (-0.3, 0.8),
          "median": (0.1, 0.6)},
}  # fmt: skip
CONSTANTS = {  # hard-coded for set-to-mean
    L7: {"start, dim 2533": 767.6, "start, dim 1415": -458.55,
         "delimiter, dim 2533": 2546.8, "delimiter, dim 1415": -1502.0},
    L13: {"start, dim 4743": -1223.5, "start, dim 2100": -717.95},
}  # fmt: skip
GROUP_A, GROUP_B, GROUP_C = "start", "start and first delimiter", "start, delimiters and others"
# model: (first layer, dims, dims that may be there, group of positions or "", tag, source)
PLACES: dict[str, tuple[int, str, str, str, str, str]] = {
    L7: (2, "1415, 2533", "1512", GROUP_B, "confirmed", f"{CODE}; 2.1, 2.2"),
    f"{L7}-chat": (2, "1415, 2533", "1512", GROUP_B, "replicated", "massive-weights dictionary"),
    L13: (4, "2100, 4743", "", GROUP_A, "confirmed", f"{CODE}; 2.1, 2.2"),
    f"{L13}-chat": (4, "2100, 4743", "", GROUP_A, "replicated", "massive-weights dictionary"),
    MIX: (2, "2070, 3398", "", GROUP_C, "confirmed", "2.2, Fig. 3; layer: massive-weights dictionary"),
    "Mistral-7B": (2, "2070", "3398", GROUP_C, "replicated", "massive-weights dictionary; group from memory"),
    "Mistral-7B-v0.3": (2, "2070", "3398", "", "replicated", OWEN),
    "LLaMA3-8B": (2, "788, 1384, 4062", "", GROUP_A, "replicated", "massive-weights dictionary"),
    "Llama-3.2-1B": (2, "400, 698, 1159, 2029", "", GROUP_A, "replicated", OWEN),
    "Phi-2": (2, "743", "", "", "replicated", OWEN),
    "OPT-6.7B": (1, "2394", "", GROUP_A, "replicated", OWEN),
    "Falcon-7B": (4, "350, 2002, 3080, 3775", "2242", GROUP_A, "replicated", OWEN),
    "GPT-2": (3, "447", "138, 378", GROUP_A, "replicated", OWEN),
}
# Owen 2025, no BOS, 10 sequences, bf16: last layer with findings, mean top 1 at the first and at the last of them
OWEN_CURVES = {
    L7: (30, 2496.0, 2464.0), "Mistral-7B-v0.3": (30, 324.0, 322.0), "Llama-3.2-1B": (15, 384.0, 382.0),
    "Falcon-7B": (31, 1216.0, 1552.0), "GPT-2": (10, 2480.0, 3024.0), "Phi-2": (25, 264.0, 1160.0),
    "OPT-6.7B": (16, 148.0, 334.0),
}  # fmt: skip
TEXTS = {"wikitext-2": "--evaluate-on wikitext-2", "c4": "--evaluate-on c4", "pg19": "--evaluate-on pg19"}
INF = 1000.0  # "inf" of Table 3 depends on precision: an explosion counts
# model: text -> original, set to zero, set to mean; those of the second are from memory where marked
TABLE_3: dict[str, dict[str, tuple[float, float, float]]] = {
    L7: {"wikitext-2": (5.47, INF, 5.47), "c4": (7.85, INF, 7.86), "pg19": (8.57, INF, 8.59)},
    L13: {"wikitext-2": (4.88, INF, 4.88), "c4": (7.22, INF, 7.22), "pg19": (7.16, INF, 7.16)},
}
FROM_MEMORY = {(L13, "c4"), (L13, "pg19")}
# The same by Owen 2025 at 4,096 tokens (GPT-2 1,024; Phi-2, OPT 2,048), for models without a value in the paper.
OWEN_PERPLEXITY: dict[str, tuple[int, dict[str, tuple[float, float, float]]]] = {
    "Mistral-7B-v0.3": (4096, {"wikitext-2": (5.001, INF, 4.981), "c4": (8.449, INF, 8.474),
                               "pg19": (8.433, INF, 8.459)}),
    "Llama-3.2-1B": (4096, {"wikitext-2": (9.071, INF, 9.089), "c4": (14.56, INF, 14.78), "pg19": (14.88, INF, 15.02)}),
    "GPT-2": (1024, {"wikitext-2": (30.22, 30.21, 30.22), "c4": (37.33, 37.31, 37.33), "pg19": (53.28, 53.29, 53.28)}),
}  # fmt: skip
TASKS = {L7: (68.95, 36.75, 68.94), L13: (71.94, 37.50, 71.92)}
TABLE_5 = {"S": (81.9, 81.7), "B": (84.8, 85.0), "L": (86.3, 86.2), "G": (87.0, 87.0)}


def values() -> Iterator[Published]:
    """All of them."""
    yield from _places()
    yield from _curves()
    yield from _effects()
    yield from _trainings()
    yield from _images()


def _places() -> Iterator[Published]:
    for model, cells in TABLE_1.items():
        for rank, value in zip(RANKS, cells, strict=True):
            known = (model, rank) in ((L7, "top 1"), (L7, "median"), (MIX, "top 1"))
            low = RANKS.index(rank) >= (2 if model == L13 else 4)
            yield Published(model, "E2", rank, value, tolerance=0.5 if low else 0.1, source="Table 1",
                            tag="confirmed" if known else "memory")  # fmt: skip
    for prompt in ("warm-cold", "warm-cold-newline", "why"):
        peaks = {"start, dim 2533": 800.0, "start, dim 1415": 470.0}
        if prompt != "why":
            peaks |= {"delimiter, dim 2533": 2600.0, "delimiter, dim 1415": 1500.0}
        for place, value in peaks.items():
            yield Published(L7, "E1", f"peak, {prompt}", value, place=place, tag="confirmed", source="Fig. 1, read off")
    for model, count in ((L7, 4), (L13, 2)):
        yield Published(
            model, "E3", "of one prompt", count, place="warm-cold", tolerance=0, tag="confirmed", source="Table 1"
        )
        yield Published(model, "E10", "values set in a sequence", count, place="zero", tolerance=0.05, tag="confirmed",
                        source=CODE)  # fmt: skip
    for model, n in ((L7, 10), (L13, 25)):
        of: dict[str, Any] = {"place": "linear inputs", "tag": "confirmed", "source": "2.3; the site is from memory"}
        yield Published(model, "E7", "outlier features", n, tolerance=0.2, **of)
        yield Published(model, "E7", "of them massive dims", 0, tolerance=0, **of)
    for model, ranks in TABLE_2.items():
        for rank, (mean, std) in ranks.items():
            top, tag = rank in ("top 1", "top 2"), "confirmed" if (model, rank) == (L7, "top 1") else "memory"
            yield Published(
                model, "E8", f"{rank}, mean", mean, tolerance=0.1 if top else 1.0, tag=tag, source="Table 2"
            )
            yield Published(model, "E8", f"{rank}, std", std, tolerance=1.0, tag=tag, source="Table 2")
    for model, constants in CONSTANTS.items():
        for place, value in constants.items():
            yield Published(model, "E9", "mean", value, place=place, tag="confirmed", source=CODE)


def _curves() -> Iterator[Published]:
    for model, (first, dims, maybe, group, tag, source) in PLACES.items():
        yield Published(model, "E5", "first layer", first, tolerance=0, tag=tag, source=source)
        for experiment in ("E3", "E6"):
            yield Published(model, experiment, "dims", text=(dims,), maybe=maybe, tag=tag, source=source)
        if group:
            known = "memory" if group == GROUP_C else tag
            yield Published(model, "E6", "positions", text=(group,), tag=known, source=source)
        if model in OWEN_CURVES:
            last, early, late = OWEN_CURVES[model]
            yield Published(model, "E5", "last layer", last, tolerance=0.04, tag="replicated", source=OWEN)
            yield Published(model, "E4", "top 1", early, layer=first, tag="replicated", source=OWEN)
            yield Published(model, "E4", "top 1", late, layer=last, tag="replicated", source=OWEN)
    for place in ("with BOS", "without BOS"):
        yield Published(
            L7, "E24", "dims", text=("1415, 2533",), maybe="1512", place=place, tag="replicated", source=OWEN
        )


def _effects() -> Iterator[Published]:
    whole = {m: (2048, t, "Table 3; 2,048 tokens derived") for m, t in TABLE_3.items()}
    whole |= {m: (n, t, OWEN) for m, (n, t) in OWEN_PERPLEXITY.items()}
    for model, (seq_len, texts, source) in whole.items():
        for text, cells in texts.items():
            tag = "replicated" if source == OWEN else "memory" if (model, text) in FROM_MEMORY else "confirmed"
            for quantity, value in zip(("original", "set to zero", "set to mean"), cells, strict=True):
                exploded = quantity == "set to zero" and value == INF
                yield Published(model, "E11", quantity, value, place=text, least=exploded, tolerance=0.02,
                                seq_len=seq_len,
                                tag="confirmed" if exploded and tag == "memory" else tag, source=source,
                                needs=f"{TEXTS[text]} --seq-len {seq_len}")  # fmt: skip
    for model, cells in TASKS.items():
        for quantity, value in zip(("original", "set to zero", "set to mean"), cells, strict=True):
            yield Published(model, "E12", quantity, value, place="mean of five", tolerance=0.03, source="Table 3",
                            tag="memory" if value == 71.92 else "confirmed",
                            needs="--tasks boolq,piqa,winogrande,arc_easy,arc_challenge")  # fmt: skip


def _trainings() -> Iterator[Published]:
    place = "gpt2-124m, 50,000 steps"
    needs = "massact train --config gpt2-124m --attention NAME --steps 50000, for softmax, sink-token and kv-bias"
    of: dict[str, Any] = {"place": place, "tag": "confirmed", "source": "4.3; code of Sun 2024", "needs": needs}
    for label, massive in (("default", "yes"), ("sink token", "yes"), ("KV bias", "no")):
        yield Published(ANY, "E18", f"{label}: validation loss", 3.04, tolerance=0.02, **of)
        yield Published(ANY, "E18", f"{label}: massive", text=(massive,), **of)


def _images() -> Iterator[Published]:
    clip = "CLIP ViT-L"
    yield Published(clip, "E19", "first layer", 13, tolerance=0, source="5.1")
    for quantity, value in zip(("original", "set to zero", "set to mean"), (75.5, 59.8, 75.5), strict=True):
        yield Published(clip, "E20", quantity, value, place="top-1", tolerance=0.05, source="Table 4")
    for p in REGISTER_MEANS:
        quantity = "largest mean of a register" if p.largest else f"mean at reg{p.register}, dim {p.dims[0]}"
        text = tuple(f"reg{p.register}, dim {d}" for d in p.dims) if p.largest else ()
        yield Published(f"DINOv2-reg ViT-{p.size}", "E21", quantity, p.value, text=text, layer=p.key, tag="confirmed",
                        source="means shipped with the code")  # fmt: skip
    for size in SIZES:
        name, (original, fixed) = f"DINOv2-reg ViT-{size}", TABLE_5[size]
        of: dict[str, Any] = {"tolerance": 0.02, "tag": "confirmed", "source": "Table 5 (ImageNet, 518 pixels)"}
        yield Published(name, "E22", "original", original, **of)
        yield Published(name, "E22", "Fix-Reg-Mean", fixed, **of)
    giant = "DINOv2-reg ViT-G"
    yield Published(giant, "E19", "dims", text=("179, 999",), tag="confirmed", source="code of Sun 2024, Fig. 13")


PUBLISHED: tuple[Published, ...] = tuple(values())
