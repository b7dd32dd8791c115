"""Deployable artefacts: ONNX, StableHLO, and back to timm."""
