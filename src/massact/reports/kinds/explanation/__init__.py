"""How an explanation is read: words, sections, figures."""
