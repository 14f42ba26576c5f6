"""Why massive activations are there, and what they do to attention.

Takes a model, a corpus and the scan of it; gives an `Explanation`. Knows how attention concentrates, what the tokens
with massive activations add to the others, who writes them, and which weights stand out. Must not know how attention
calls are caught, nor name a cause: it reports what is measured side by side (field.md 1.5).
"""

from massact.explanations.image_sinks import visual_sinks
from massact.explanations.job import explain
from massact.explanations.patch_attention import attention_shares

__all__ = ["attention_shares", "explain", "visual_sinks"]
