"""Benchmarks: one module each, found by its name; a new one is a new file.

A benchmark is a module with a docstring (its first line is the title) and `run(settings) -> list[Measured]`. It checks
that the fast way gives the right result before it measures, and measures what it compares in turn.

A trial that has options and rows of its own is a module with a docstring and `main(argv)`.
"""
