"Every row of the campaign: what is done, what is said, and what holds afterwards."
import pytest

import rows_arguments
import rows_data
import rows_hdf5
import rows_images
import rows_life
import rows_store
import rows_weights
import rows_wheel
from campaign import check_case

TABLES = {
    "damaged store": rows_store, "data sets": rows_data, "images": rows_images, "arguments": rows_arguments,
    "life cycle": rows_life, "weights": rows_weights, "official files": rows_hdf5, "wheel": rows_wheel,
}
ROWS = [pytest.param(case, id=f"{group}: {case.name}") for group, table in TABLES.items() for case in table.CASES]


@pytest.mark.parametrize("case", ROWS)
def test_row(case, world):
    check_case(case, world)


def test_the_campaign_is_large_enough():
    assert len(ROWS) >= 250
    assert len({row.id for row in ROWS}) == len(ROWS)
