"""The project's benchmarks. The installed package lacks them: run them from a clone (docs/benchmarks.md)."""
