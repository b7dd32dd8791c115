"""Programs: the main job, sweeps, comparisons, benchmarks."""
