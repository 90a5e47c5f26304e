"""Normalisation layers, one file a layer."""
