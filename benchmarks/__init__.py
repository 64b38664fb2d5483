"""Every performance figure that docs/costs.md quotes, as a command: `python -m benchmarks`."""
