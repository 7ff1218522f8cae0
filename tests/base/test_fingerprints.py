"""What two fingerprints have to have in common to be of the same images."""

from __future__ import annotations

import pytest

from seed_exp.base.fingerprints import content_of, is_sampled, same_images, unsampled

NAMES, SAMPLE, OTHER = "0123456789abcdef", "fedcba9876543210", "fedcba9876543211"


@pytest.mark.parametrize("part", ["", "[7:00000000000000ff]"])
@pytest.mark.parametrize("name", ["train", "a:b [x]", "", "2024:01", "ä\nb"])
def test_moved_images_are_the_same_and_changed_ones_are_not(name: str, part: str) -> None:
    given = f"image_folder:{name}:20:{NAMES}+{SAMPLE}{part}"
    assert same_images(given, given)
    assert same_images(f"image_folder:elsewhere:20:{NAMES}+{SAMPLE}{part}", given)
    assert not same_images(f"image_folder:{name}:20:{NAMES}+{OTHER}{part}", given)
    assert not same_images(f"image_folder:{name}:21:{NAMES}+{SAMPLE}{part}", given)
    assert not same_images(f"image_folder:{name}:20:{OTHER}+{SAMPLE}{part}", given)
    assert not same_images(f"tsv:{name}:20:{NAMES}+{SAMPLE}{part}", given)
    assert not same_images(given + "[3:00000000000000ff]", given)


def test_a_record_of_an_older_version_fits_by_its_names_only() -> None:
    given = f"tsv:train.tsv:20:{NAMES}+{SAMPLE}[7:00000000000000ff]"
    old = f"tsv:train.tsv:20:{NAMES}[7:00000000000000ff]"
    assert unsampled(given) == old
    assert (is_sampled(given), is_sampled(old)) == (True, False)
    assert same_images(old, given)
    assert not same_images(old.replace("train", "val"), given)
    assert not same_images(given, old)  # the images of the record are known better


@pytest.mark.parametrize("other", ["digits:train:1437:0123456789abcdef", "files:['a']", "a" * 64])
def test_what_has_no_sample_stays_as_it_is(other: str) -> None:
    assert content_of(other) == unsampled(other) == other
    assert not is_sampled(other)
