"""The day that `./scripts/bench day` plays is the day it says."""

from __future__ import annotations

from collections import Counter

from benchmarks.day_traffic import HOURS, PEAK, SIZES, draw_day

IMAGES, WORKSPACES = 200_000, 2_000


def test_a_day_has_its_images_its_peak_and_everybody_in_it() -> None:
    day = draw_day(IMAGES, WORKSPACES)
    assert day == draw_day(IMAGES, WORKSPACES), "the same every time"
    assert sum(upload.images for upload in day) == IMAGES
    assert [upload.at for upload in day] == sorted(upload.at for upload in day)
    assert {upload.workspace for upload in day} == set(range(WORKSPACES))
    uploads = Counter(int(upload.at // 3600) for upload in day)
    assert set(uploads) <= set(range(24))
    assert uploads.most_common(1)[0][0] == PEAK
    assert abs(uploads[PEAK] / len(day) - HOURS[PEAK] / sum(HOURS)) < 0.02
    small = sum(upload.images <= 5 for upload in day) / len(day)
    assert abs(small - sum(share for size, share in SIZES.items() if size <= 5) / 100) < 0.02
