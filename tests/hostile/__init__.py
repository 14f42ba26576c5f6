"""Damaged and hostile input of every kind: whatever it is, it is taken, or refused with one message."""
