"""The states of sequences, as ``sequence_batching.state`` of a configuration describes them.

NVIDIA's backends hand states to Triton, which keeps them (implicit state). A Python backend cannot: Triton
2.51 gives it the input states, but takes none back. So each instance keeps them itself, by correlation id;
Triton sends all requests of a sequence to one instance.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

Array = np.ndarray[Any, Any]
Correlation = int | str

START, END = 1, 2  # TRITONSERVER_REQUEST_FLAG_SEQUENCE_*
NUMPY_TYPES = {"TYPE_UINT8": np.uint8, "TYPE_FP16": np.float16, "TYPE_FP32": np.float32}


class Sequences:
    """The states of one model instance. Freed with END, or when a sequence has been idle for too long."""

    def __init__(self, config: Mapping[str, Any], instance: str) -> None:
        """Read ``sequence_batching``; without it, there are no states.

        Raises:
            TritonModelException: a state without zeros to begin with, which this backend does not know.
        """
        batching = config.get("sequence_batching") or {}
        self._instance = instance
        self._idle_s = float(batching.get("max_sequence_idle_microseconds", 0)) / 1e6
        self._first: dict[str, Array] = {}
        self.inputs, self.outputs = [], []
        for state in batching.get("state", []):
            initial = (state.get("initial_state") or [{}])[0]
            if not initial.get("zero_data") or state["data_type"] not in NUMPY_TYPES:
                raise pb_utils.TritonModelException(
                    f"{config['name']}: expected an initial_state with zero_data for {state['input_name']}, "
                    f"of {list(NUMPY_TYPES)}, found {initial} of {state['data_type']}"
                )
            dims = [int(side) for side in initial["dims"]]
            shape = [1, *dims] if config["max_batch_size"] > 0 else dims
            self._first[state["input_name"]] = np.zeros(shape, NUMPY_TYPES[state["data_type"]])
            self.inputs.append(state["input_name"])
            self.outputs.append(state["output_name"])
        self._states: dict[Correlation, dict[str, Array]] = {}
        self._used_s: dict[Correlation, float] = {}
        self._lock = threading.Lock()
        if self._first:
            self._family, self._gauge = _gauge(config["name"], instance)  # a metric ends with its family
            threading.Thread(target=self._free_idle, daemon=True).start()

    def states(self, request: Any) -> dict[str, Array] | None:
        """Input states of a request: zeros at a START, else those after the request before it.

        Returns:
            By name; nothing for a model without states, ``None`` where they are gone.
        """
        if not self._first or request.flags() & START:
            return dict(self._first)
        with self._lock:
            known = self._states.get(request.correlation_id())
            return None if known is None else dict(known)

    def keep(self, request: Any, states: Mapping[str, Array] | None) -> bool:
        """Keep the states after a request, by the names of inputs; none where it failed.

        Returns:
            Whether they have the size of those before; a sequence whose frames change it is ended.
        """
        if not self._first:
            return True
        key = request.correlation_id()
        with self._lock:
            before = self._states.get(key)
            fits = not states or request.flags() & START or not before or _shapes(before) == _shapes(states)
            if states is None or request.flags() & END or not fits:
                self._states.pop(key, None)
                self._used_s.pop(key, None)
            else:
                self._states[key] = dict(states)
                self._used_s[key] = time.monotonic()
            self._report()
        return bool(fits)

    def _free_idle(self) -> None:
        while True:
            time.sleep(max(0.1, self._idle_s / 4))
            with self._lock:
                until_s = time.monotonic() - self._idle_s
                idle = [key for key, used_s in self._used_s.items() if used_s < until_s]
                for key in idle:
                    del self._states[key], self._used_s[key]
                    pb_utils.Logger.log_info(
                        f"{self._instance}: freed sequence {key}, idle for {self._idle_s:g} s"
                    )
                self._report()

    def _report(self) -> None:
        if self._gauge is not None:
            self._gauge.set(float(len(self._states)))


def _gauge(model: str, instance: str) -> tuple[Any, Any]:
    """Metric ``mst_gan_sequences``, its family first; none where the server has no metrics."""
    try:
        family = pb_utils.MetricFamily(
            name="mst_gan_sequences",
            description="Sequences whose state an instance holds",
            kind=pb_utils.MetricFamily.GAUGE,
        )
        return family, family.Metric(labels={"model": model, "instance": instance})
    except pb_utils.TritonModelException as err:
        pb_utils.Logger.log_warn(f"{instance}: sequences are not counted: {err}")
        return None, None


def _shapes(states: Mapping[str, Array]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in states.items()}
