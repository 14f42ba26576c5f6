"""How each kind of result is read: its words, its sections, its figures; one file or one package each."""
