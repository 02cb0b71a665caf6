"""What molora gives on real data and a real backbone, one page a result: see benchmarks/README.md."""
