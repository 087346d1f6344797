"""Hooks into other codebases."""
