"""How a scan is read: words, sections, figures."""
