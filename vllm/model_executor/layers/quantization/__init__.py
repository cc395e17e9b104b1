"""Formats that checkpoints store weights in; each is expanded while it is loaded."""
