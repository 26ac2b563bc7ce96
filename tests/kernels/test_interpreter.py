import pytest

from tests.triton_interpreter import needs_triton, run_interpreted


@needs_triton
@pytest.mark.parametrize(
    "file", ["test_numbers.py", "test_decode_numbers.py", "test_prefill_numbers.py", "test_offload.py"]
)
def test_kernels_interpreted(file):
    run_interpreted(f"tests/kernels/{file}")
