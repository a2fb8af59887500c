"""Checks that are more than a test run; each runs from the repository's root."""
