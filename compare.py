"""Runs side by side, each method's baseline beside its IGDM twin: python compare.py DIR... [--html FILE ...]."""

from experiment import cli, report

if __name__ == "__main__":
    cli.guard(report.compare_main)
