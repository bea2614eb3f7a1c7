"""What freeflow is measured by: `python -m benchmarks` runs the suite, the scripts beside it measure one thing each."""
