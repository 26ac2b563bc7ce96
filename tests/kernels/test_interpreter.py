from tests.triton_interpreter import needs_triton, run_interpreted


@needs_triton
def test_kernels_interpreted():
    run_interpreted("tests/kernels/test_numbers.py")
