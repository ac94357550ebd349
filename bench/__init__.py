"""Benchmarks of normfused against PyTorch: ``python -m bench ops`` and ``python -m bench demo``."""
