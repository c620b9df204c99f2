"""A ring in the memory of a GPU that a Triton server on the same machine uses as well.

Tested against a stand-in; not yet run on a GPU.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
from tritonclient.grpc import InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from ...frames.windows import Image
from .ring import TELL_TIMEOUT_S, Ring

MODULE = "tritonclient.utils.cuda_shared_memory"
REGISTER_TIMEOUT_S = 10.0  # the first may have to wait until the server has set up its side of CUDA
DEVICE = 0  # of those visible to this process; the server must count its own alike


class CudaRing(Ring):
    """A ring in CUDA memory: every slot is a region for the window and another for the answer.

    The library writes and reads a region from its beginning only, so slots cannot share one.

    Raises:
        OSError: There is no CUDA here, no device, or too little memory on it.
        InferenceServerException: The server cannot open the memory, or will not.
    """

    def _open(self) -> None:
        self._handles: dict[str, Any] = {}
        try:
            self._cuda = import_module(MODULE)
        except (ImportError, RuntimeError) as err:  # tritonclient turns the one into the other
            raise OSError(None, "cuda-python is not installed") from err
        self._release_others()
        for slot in range(self._slots):
            self._share(self._lr_name(slot), self._lr_bytes)
            self._share(self._hr_name(slot), self._hr_bytes)

    def _lr_name(self, slot: int) -> str:
        return f"{self._name}.{slot}.lr"

    def _hr_name(self, slot: int) -> str:
        return f"{self._name}.{slot}.hr"

    def _share(self, name: str, size_bytes: int) -> None:
        try:
            handle = self._cuda.create_shared_memory_region(name, size_bytes, DEVICE)
            self._handles[name] = handle
            raw_handle = self._cuda.get_raw_handle(handle)
        except (self._cuda.CudaSharedMemoryException, AttributeError) as err:  # releases that do not fit
            raise OSError(None, _reason(err)) from err
        self._registered.append(name)
        self.client.register_cuda_shared_memory(
            name, raw_handle, DEVICE, size_bytes, client_timeout=REGISTER_TIMEOUT_S
        )

    def _write(self, slot: int, lr_window: Image) -> None:
        try:
            self._cuda.set_shared_memory_region(self._handles[self._lr_name(slot)], [lr_window])
        except self._cuda.CudaSharedMemoryException as err:
            raise InferenceServerException(f"cannot copy to the GPU: {_reason(err)}") from err

    def attach(self, slot: int, lr_input: InferInput, hr_output: InferRequestedOutput) -> None:
        """Let a request use a slot."""
        lr_input.set_shared_memory(self._lr_name(slot), self._lr_bytes)
        hr_output.set_shared_memory(self._hr_name(slot), self._hr_bytes)

    def take(self, slot: int) -> Image:
        """Copy the answer out of a slot."""
        handle = self._handles[self._hr_name(slot)]
        try:
            hr: Image = self._cuda.get_contents_as_numpy(handle, np.uint8, self.hr_shape)
        except self._cuda.CudaSharedMemoryException as err:
            raise InferenceServerException(f"cannot copy from the GPU: {_reason(err)}") from err
        return hr

    def _unregister(self, name: str) -> None:
        self.client.unregister_cuda_shared_memory(name, client_timeout=TELL_TIMEOUT_S)

    def _regions_of_server(self) -> Any:
        return self.client.get_cuda_shared_memory_status(client_timeout=TELL_TIMEOUT_S).regions

    def _destroy(self) -> None:
        # CUDA leaves undefined what becomes of memory that is freed while another process has it open.
        for name in [name for name in self._handles if name not in self._registered]:
            self._cuda.destroy_shared_memory_region(self._handles.pop(name))


def _reason(err: Exception) -> str:
    """What CUDA itself said, which the library hides behind a line of its own."""
    said = err.__cause__.args[0] if err.__cause__ and err.__cause__.args else str(err)
    return said.decode() if isinstance(said, bytes) else str(said)
