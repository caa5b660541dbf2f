"""Sizes in the unit that fits."""

import pytest

from largescale.host.sizes import size_text


@pytest.mark.parametrize(("count", "text"), [
    (0, "0 B"), (1, "1 B"), (999, "999 B"), (999.4, "999 B"), (999.6, "1 KB"), (1000, "1 KB"), (47_900, "47.9 KB"), (85_256, "85.3 KB"), (999_499, "999 KB"),
    (999_500, "1 MB"), (1_234_567, "1.23 MB"), (900 * 10**6, "900 MB"), (1.25e9, "1.25 GB"), (363e9, "363 GB"), (2e12, "2 TB"),
    (99.96e12, "100 TB"), (1234e12, "1,234 TB")])
def test_three_digits_and_a_unit(count: float, text: str) -> None:
    assert size_text(count) == text
