"""Backbones and the feature extractor; every width in a frozen config."""
