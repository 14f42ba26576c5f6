"""How a result shows itself in Python: in words, as a figure, and in a notebook, by the parts of its report."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Display:
    """A result that can be read: `print(result)`, `result.summary()`, `result.plot()`, or as it is in a notebook."""

    def summary(self) -> str:
        """All that is said of it, a sentence a line, the answer first; then its notes."""
        from massact.reports import summary  # the one way up, see tests/test_structure.py

        return summary(self)

    def plot(self, name: str | None = None) -> Figure:
        """One of its figures, drawn by matplotlib: `result.plot().savefig("layers.png")`; a notebook shows it.

        Args:
            name: of a figure, as its file in `figures/` is called; None: the main one.

        Raises:
            UserError: it has no such figure (says which it has), or none at all.
        """
        from massact.reports import plot

        return plot(self, name)

    def __str__(self) -> str:
        """The answer in a few sentences: what `print` shows."""
        from massact.reports import answer

        return answer(self)

    def _repr_html_(self) -> str:
        """Its words, its main figure and the first rows of its main table: what a notebook shows."""
        from massact.reports import notebook_html

        return notebook_html(self)
