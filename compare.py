"""Compare runs: each method with and without IGDM, side by side: python compare.py DIR... [--html FILE ...]."""

from experiment import cli, compare

if __name__ == "__main__":
    cli.guard(compare.main)
