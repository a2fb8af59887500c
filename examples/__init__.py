"""Programs that show streamload at work; each runs with ``python -m examples.NAME`` from the repository's root."""
