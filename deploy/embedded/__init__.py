"""The embedded server: Triton from a PyPI wheel, ONNX models through a Python backend."""
