"""Generator inputs of noise, and ONNX files run on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from export import spec
from export.onnx.int8 import Feeds


def feeds(lr_size: spec.Size, batch: int = 1) -> Feeds:
    """Noise, and motion that also leaves the frame."""
    rng = np.random.default_rng(3)
    return {
        "lr_window": rng.integers(0, 256, spec.LR_WINDOW.shape(batch, lr_size), np.uint8),
        "flow": rng.normal(0, 4, spec.FLOW.shape(batch, lr_size)).astype(np.float32),
        "aligned": rng.integers(0, 256, spec.ALIGNED.shape(batch, lr_size), np.uint8),
    }


def session(model: onnx.ModelProto | Path, optimized: Path | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if optimized:
        options.optimized_model_filepath = str(optimized)
    source = model if isinstance(model, Path) else model.SerializeToString()
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run(model: onnx.ModelProto | Path, inputs: Feeds) -> np.ndarray:
    return session(model).run(None, inputs)[0]
