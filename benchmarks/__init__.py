"""The benchmarks behind docs/performance.md: python -m benchmarks.training_step, .evaluation, .gpu_check, .report."""
