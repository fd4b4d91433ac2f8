"""Golden locore_global: the official LOCORE model, every aggregation, hidden states, loss and variants."""
import pytest
from locore_goldens import check_names_the_tensor_of_another_shape, check_outputs, check_sizes_are_read_off_the_tensors
from rerank_goldens import Golden


@pytest.mark.parametrize("check", [check_outputs, check_sizes_are_read_off_the_tensors, check_names_the_tensor_of_another_shape])
def test_golden_locore_global(check):
    check(Golden("locore_global"))
