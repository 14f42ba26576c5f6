"""The nouns and their files.

Takes nothing from other rooms, gives every room its words. Knows the shape of a run directory.
Must not know torch, models or how anything is measured.
"""
