"""Why massive activations are there, and what they do to attention.

Takes a model, a corpus and the scan of it; gives an `Explanation`. Knows how attention concentrates, what the tokens
with massive activations add to the others, who writes them, and which weights stand out. Must not know how attention
calls are caught, nor name a cause: it reports what is measured side by side (field.md 1.5).
"""

from massact.explanations.job import ExplainConfig, explain
from massact.explanations.saved_run import explain_run
from massact.explanations.shares import share_probes, shares_table

__all__ = ["ExplainConfig", "explain", "explain_run", "share_probes", "shares_table"]
