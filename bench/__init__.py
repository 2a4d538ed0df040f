"""The benchmark harness: `python -m bench`. It measures the real program from outside, and proves what it counts."""
