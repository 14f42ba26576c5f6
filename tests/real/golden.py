"""Golden values of SmolLM2-135M-Instruct on the validation text of WikiText-2, computed without massact.

Plain PyTorch and transformers (hooks on the blocks, eager attention, own perplexity), float32, CPU, on the first 8
sequences of 256 tokens. Layer, top 1 (mean over sequences), max, median, ratio, and of the block that writes the layer
attention on position 0 (mean over heads and over queries 1 to 255) and value norm ratio, as they were printed.
"""

from __future__ import annotations

COLUMNS = ("top1", "max", "median", "ratio", "mass_first", "value_norm_ratio")
_PRINTED = """
0 0.888 0.95 0.0699 12.69 - -
1 33.214 37.66 0.6865 48.43 0.0148 1.1193
2 204.530 295.73 0.8556 238.87 0.0155 1.0346
3 803.788 935.64 0.983 818.82 0.1137 0.6833
4 801.233 932.53 1.1264 712.32 0.2556 0.1868
5 797.708 928.46 1.269 629.58 0.2271 0.1612
6 791.297 921.73 1.3307 595.45 0.2268 0.2133
7 785.701 915.30 1.4255 551.75 0.2185 0.2241
8 776.017 903.32 1.4852 523.08 0.2399 0.1951
9 685.018 787.34 1.603 427.69 0.2206 0.248
10 343.726 395.33 1.698 202.37 0.2039 0.2582
11 102.959 111.37 1.709 60.26 0.0693 0.7241
12 23368.384 25750.24 1.6625 14063.43 0.0064 1.5617
13 23359.502 25741.38 1.7318 13498.16 0.3636 0.3265
14 23346.258 25728.18 1.8711 12490.45 0.3959 0.2761
15 23332.975 25714.91 1.9725 11841.51 0.5341 0.2329
16 23316.413 25698.32 2.1405 10906.06 0.4792 0.3274
17 23301.271 25683.10 2.5146 9274.47 0.2997 0.3364
18 23285.892 25667.67 2.8044 8306.66 0.5471 0.2461
19 23277.067 25658.75 2.9483 7902.44 0.6136 0.19
20 23269.623 25651.07 3.4608 6729.89 0.426 0.2515
21 23269.231 25650.39 3.9033 5968.19 0.6132 0.1107
22 23278.296 25659.36 4.515 5162.60 0.4573 0.2188
23 23272.033 25653.05 5.3139 4385.51 0.4642 0.1743
24 23274.579 25655.17 6.5806 3540.52 0.6341 0.0981
25 23237.821 25618.40 7.2524 3207.93 0.6053 0.1665
26 23240.125 25620.68 8.0869 2878.92 0.6448 0.1532
27 23233.222 25613.82 9.0701 2566.97 0.6447 0.1315
28 22981.999 25361.16 10.671 2157.32 0.4723 0.1887
29 8735.062 11051.16 11.7947 741.94 0.4615 0.1863
30 3392.523 5160.03 15.1879 224.28 0.3544 0.3921
"""


def printed() -> dict[int, dict[str, str]]:
    """Layer -> column -> number as it was printed, "-" where there is none."""
    rows = [line.split() for line in _PRINTED.strip().splitlines()]
    return {int(layer): dict(zip(COLUMNS, values, strict=True)) for layer, *values in rows}


def last_digit(text: str) -> float:
    """One unit of the last digit of a printed number: 0.01 for "3.25"."""
    return 10.0 ** -len(text.partition(".")[2])
