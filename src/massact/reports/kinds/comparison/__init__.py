"""How a comparison of runs is made and read: its tables, words, sections, figures."""
