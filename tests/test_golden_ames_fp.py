"""Golden ames_fp: scores, tokens, training mode and gradients of the official AMES."""
import pytest
from ames_goldens import check_names_the_tensor_of_another_shape, check_outputs, check_sizes_are_read_off_the_tensors
from rerank_goldens import Golden


@pytest.mark.parametrize("check", [check_outputs, check_sizes_are_read_off_the_tensors, check_names_the_tensor_of_another_shape])
def test_golden_ames_fp(check):
    check(Golden("ames_fp"))
