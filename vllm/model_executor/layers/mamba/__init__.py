"""Layers that keep a state per request: the base class; each kind has a module of its own."""
