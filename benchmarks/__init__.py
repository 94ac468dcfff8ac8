"""Side-by-side measurements, each runnable with one command: `python -m benchmarks.X --help`."""
