"""Methods beyond the six, each in one file. Run one from the project's folder: python -m examples.NAME."""
