"""From PyTorch to ONNX files, and from these to those of each target."""
