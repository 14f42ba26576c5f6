"""Renderers of the same sections: HTML, Markdown, LaTeX, a notebook, a terminal; and figures as files."""
