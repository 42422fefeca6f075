"""A shim for tools that still want it; everything is in setup.cfg."""

from setuptools import setup

setup()
