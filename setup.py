"""Builds ``vllm/_C`` from ``csrc/`` when a C++ compiler is there; see pyproject.toml for the rest."""

from setuptools import setup

setup()
