"""Triton twins of the ops."""
