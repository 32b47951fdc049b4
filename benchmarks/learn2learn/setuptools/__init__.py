"""Stands in for setuptools while pip builds learn2learn: see build_meta.py."""
