"""Releasing: the folder that stock transformers loads, its card and its report."""
