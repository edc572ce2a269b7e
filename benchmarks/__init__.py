"""The benchmarks behind docs/performance.md, all called as python -m benchmarks.NAME."""
