"""A grid of runs from one file, started, watched and resumed: python study.py studies/digits.toml [--jobs N]."""

from experiment import cli, study

if __name__ == "__main__":
    cli.guard(study.main)
