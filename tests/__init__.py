"""Tests mirror the package; what several of them share lies in conftest.py and helpers.py."""
