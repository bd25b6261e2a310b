"""Every rule that the emulator knows, broken by a kernel; and what it lets pass."""

import ctypes
import re
from pathlib import Path

import numpy as np
import pytest

SAYS = {
    "global_read_outside": "DataCopy reads global memory outside the tensors of the launch",
    "global_write_outside": "DataCopy writes global memory outside the tensors of the launch",
    "global_write_of_an_input": "DataCopy writes global memory that is an input",
    "global_past_its_buffer": "goes past the buffer of a GlobalTensor",
    "global_offset_past_its_buffer": "GlobalTensor: offset past its buffer",
    "local_past_its_buffer": "Muls goes past its buffer in the unified buffer",
    "local_offset_past_its_buffer": "LocalTensor: offset past its buffer",
    "misaligned_address": "Muls: the address in the unified buffer is not 32-byte aligned",
    "misaligned_copy_length": "the length is not a positive multiple of 32 bytes",
    "misaligned_store_length": "the length is not a positive multiple of 32 bytes",
    "copy_of_too_many_blocks": r"blockCount in \[1, 4095\]",
    "misaligned_buffer_length": "InitBuffer: the length is not a multiple of 32 bytes",
    "unified_buffer_overflow": "unified buffer overflow: 262144 of 196608 bytes",
    "uninitialised": "Muls reads uninitialised unified buffer",
    "uninitialised_tail": "Muls reads uninitialised unified buffer",
    "uninitialised_after_free": "Muls reads uninitialised unified buffer",
    "partial_overlap": "source and destination overlap in part",
    "no_elements": "Muls: count must be positive",
    "rounding_of_what_is_widened": "Cast: to float with CAST_NONE, from float with CAST_RINT",
    "mask_too_long": r"Mul: mask not in \[1, 64\]",
    "no_repeats": r"Exp: repeats not in \[1, 255\]",
    "copy_cuts_an_element": "DataCopyPad: blockLen or the stride in global memory cuts an element",
    "padding_on_the_left": "emulator: leftPadding is not there",
    "place_of_a_maximum": "emulator: WholeReduceMax gives values only",
    "padding_too_long": "DataCopyPad: the padding goes past the 32 bytes",
    "dequeue_empty": "DeQue of an empty queue",
    "allocate_too_many": "AllocTensor: every buffer of the queue is in use",
    "enqueue_twice": "EnQue of a tensor that was not allocated",
    "queue_full": "EnQue: the queue is full",
    "free_twice": "FreeTensor of a tensor that is not in use",
    "tensor_of_another_queue": "EnQue of a tensor of another queue",
    "free_of_another_queue": "FreeTensor of a tensor of another queue",
    "more_queue_buffers_than_events": "more than 8 buffers of queues at one position",
    "more_buffers_than_a_pipe_has": "more than 64 buffers in a kernel",
    "never_freed": "ends with a tensor of a queue that was not freed",
    "wait_without_set": "WaitFlag of an event that nobody sets, .* MTE2_V 0",
    "set_twice": "SetFlag of an event that is set already: MTE2_V 0",
    "set_and_left": "an event is left set: MTE2_V 0",
    "no_such_event": r"event id 8 is not in \[0, 8\)",
    "no_event_MTE2_V": "Muls on pipe V touches unified buffer that pipe MTE2 wrote",
    "no_event_V_MTE3": "DataCopy on pipe MTE3 touches unified buffer that pipe V wrote",
    "no_barrier_V_V": r"Muls on pipe V touches unified buffer that pipe V wrote \(PipeBarrier\)",
    "load_over_a_running_read": "DataCopy on pipe MTE2 touches unified buffer that pipe V reads",
    "compute_over_a_running_store": "Muls on pipe V touches unified buffer that pipe MTE3 reads",
    "used_after_free": "Muls on pipe V touches unified buffer that pipe MTE2 wrote",
    "passed_on_without_computing": "DataCopy on pipe MTE3 touches unified buffer that pipe MTE2",
    "scalar_read_of_a_vector": "GetValue on pipe S touches unified buffer that pipe V wrote",
    "vector_read_of_a_scalar": "Muls on pipe V touches unified buffer that pipe S wrote",
    "load_of_a_running_store": "DataCopy on pipe MTE2 touches global memory that pipe MTE3 wrote",
    "scalar_read_of_written_memory": "reads global memory that the kernel has written",
    "two_cores_write": "touches global memory that another core touches without a SyncAll",
    "exchange_without_sync_all": "touches global memory that another core touches without",
    "overwrites_what_another_core_reads": "touches global memory that another core touches without",
    "sync_all_on_one_core": "a core ends while others wait in SyncAll",
    "sync_all_of_vector_cores_alone": "the kernel is not declared KERNEL_TYPE_MIX_AIV_1_0",
    "tiling_undeclared": "REGISTER_TILING_DEFAULT declares another struct, or none",
    "tiling_of_another_struct": "REGISTER_TILING_DEFAULT declares another struct, or none",
    "tiling_longer_than_the_hosts": "GET_TILING_DATA_WITH_STRUCT reads global memory outside",
}  # fmt: skip
EMULATOR = Path(__file__).resolve().parents[3] / "tests" / "emulators" / "ascend"
GOOD = ["good_queues", "good_events", "good_exchange"]


@pytest.fixture(scope="module")
def broken(ascend_build):
    library = ctypes.CDLL(str(ascend_build / "libclrt_broken_kernels.so"))
    library.run_kernel.restype = library.kernel_names.restype = ctypes.c_char_p
    return library


def run(broken, name):
    """The emulator's message, and the kernel's result."""
    x, out = np.arange(256, dtype=np.float32), np.zeros(256, np.float32)
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (x, out)]
    return broken.run_kernel(name.encode(), *pointers).decode(), out


@pytest.mark.parametrize("name", SAYS)
def test_a_broken_rule_is_told(broken, name):
    message, _ = run(broken, name)
    assert message, "the emulator accepts it"
    with pytest.raises(RuntimeError, match=SAYS[name]):
        raise RuntimeError(message)
    assert message.startswith(("core 0: ", "core 1: ", "a core ends"))


@pytest.mark.parametrize("name", GOOD)
def test_a_kernel_that_breaks_none_passes(broken, name):
    message, out = run(broken, name)
    assert message == ""
    if name != "good_exchange":
        np.testing.assert_array_equal(out, 2 * np.arange(256))


def test_every_kernel_is_tested(broken):
    assert sorted(broken.kernel_names().decode().split()) == sorted([*SAYS, *GOOD])


def test_every_message_of_the_emulator_is_provoked(broken):
    """A check without a kernel that trips it would be a claim only."""
    said = "\n".join(run(broken, name)[0] for name in SAYS)
    checks = [
        max(re.findall(r'"((?:[^"\\]|\\.)*)"', statement), key=len)
        for header in sorted(EMULATOR.glob("*.h"))
        for statement in re.findall(r"\bfail\((?=[^;]*\")([^;]*);", header.read_text())
    ]
    checks.append("a core ends while others wait in SyncAll, the device would hang")
    assert len(checks) >= 36, "the emulator's sources have changed their shape"
    assert [check for check in checks if check not in said] == []


def test_a_kernel_runs_again_after_one_that_failed(broken):
    """Nothing of a refused kernel is left in the next one's way."""
    for name in ["never_freed", "set_and_left", "exchange_without_sync_all"]:
        assert run(broken, name)[0]
        assert not run(broken, "good_queues")[0]
        assert not run(broken, "good_exchange")[0]
