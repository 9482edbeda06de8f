"""Honest evaluation and its report."""
