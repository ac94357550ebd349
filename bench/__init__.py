"""Benchmarks of normfused: ``python -m bench`` in a checkout, ``normfused-bench`` where the package is installed."""

PROGRAM = "python -m bench" if __name__ == "bench" else "normfused-bench"
