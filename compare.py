"""Finished runs side by side, each method's baseline beside its IGDM twin: python compare.py RUN_DIR... [--out DIR]."""

from experiment import cli, report

if __name__ == "__main__":
    cli.guard(report.main)
