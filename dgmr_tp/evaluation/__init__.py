"""Evaluate encoders: clip_benchmark's metrics, k-NN, a linear classifier, and compatibility with an embedding index."""
