"""What the row `gpu` measures. All but CUDA's own calls runs on a CPU too, on tiny models and for tests only."""
