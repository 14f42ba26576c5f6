"""How a scan of checkpoints is read: words, section, figure."""
