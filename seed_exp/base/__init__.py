"""Leaves that import nothing of this package."""
