"""Measuring: metrics, the evaluation table, and size and speed by one protocol."""
