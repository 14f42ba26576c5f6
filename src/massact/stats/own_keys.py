"""What each query gives to its own key: the diagonal of attention.

Shapes: H heads, K key-value heads, T queries and keys, E width of q and k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from massact.stats.attention_call import Attended


def diagonal(a: Attended) -> Tensor | None:
    """Probability p[t, t] of every query on its own key, (H, T), in O(T); None where the keys are another sequence."""
    H, T, S = a.shape
    if T != S:
        return None
    if a.scores_HTS is not None:
        s_HT = a.scores_HTS.diagonal(dim1=1, dim2=2).float()
    else:
        assert a.q_HTE is not None and a.k_KSE is not None
        K = len(a.k_KSE)
        q_KGTE = a.q_HTE.reshape(K, H // K, T, -1).float()  # heads of one key-value head lie side by side
        s_HT = (q_KGTE * a.k_KSE.float()[:, None]).sum(-1).reshape(H, T) * a.scale
        if a.cap is not None:
            s_HT = a.cap * torch.tanh(s_HT / a.cap)
        if a.mask_HTS is not None:
            s_HT = s_HT + a.mask_HTS.expand(-1, T, -1).diagonal(dim1=1, dim2=2)
    return (s_HT - a.norm_HT).exp()
