"""What the pictures of diagnostics draw, against the numbers they are made from."""

import numpy as np
import pytest
from conftest import LinearGaussian
from scipy.optimize import brentq
from scipy.stats import binom
from test_evidence import exact
from test_predictive_checks import drawn
from test_report_labels import numbers

from pyro_lrblora import metrics, plots
from pyro_lrblora.diagnostics import decompose, draws_sweep, intervals
from pyro_lrblora.diagnostics.structure import structure


def test_every_row_is_at_its_entropies_and_wrong_ones_are_apart():
    prediction = drawn(rows=60)
    found = decompose(prediction)
    right, wrong = plots.entropy_parts(found).axes[0].lines
    hits = (prediction.predicted == prediction.labels).numpy()
    for line, rows in ((right, hits), (wrong, ~hits)):
        np.testing.assert_allclose(line.get_xdata(), found.expected_entropy[rows])
        np.testing.assert_allclose(line.get_ydata(), found.mutual_information[rows])
    assert (right.get_label(), wrong.get_label()) == ("right", "wrong")


def test_the_nll_is_drawn_at_every_number_of_draws_with_its_error():
    sweep = draws_sweep(drawn(rows=60), sizes=[2, 8])
    axis = plots.draws_needed(sweep).axes[0]
    line, _, (bars,) = axis.containers[0]
    np.testing.assert_allclose(line.get_xydata(), sweep.table["NLL"].reset_index())
    lengths = [float(np.ptp(segment[:, 1])) / 2 for segment in bars.get_segments()]
    np.testing.assert_allclose(lengths, sweep.table["NLL SE"], atol=1e-12)


def test_bars_of_the_pit_count_all_rows_and_right_ones_stay_in_the_band():
    found = intervals(numbers())
    axis = plots.pit_histogram(found, bins=5).axes[0]
    band, *bars = axis.patches[::-1]
    heights = [bar.get_height() for bar in bars[::-1]]
    np.testing.assert_allclose(heights, [((found.pit >= k / 5) & (found.pit < (k + 1) / 5)).sum() for k in range(5)])
    low, high = binom.interval(0.95, 400, 0.2)
    assert (band.get_y(), band.get_y() + band.get_height()) == pytest.approx((low, high))
    assert sum(low <= height <= high for height in heights) >= 4


def test_the_reliability_diagram_has_wilsons_intervals():
    prediction = drawn(rows=200)
    upper, lower = plots.reliability_diagram({"one": prediction}, bins=4).axes
    curve = metrics.reliability(prediction.probs, prediction.labels, 4)
    line, _, (bars,) = upper.containers[0]
    np.testing.assert_allclose(line.get_xdata(), curve["confidence"])
    np.testing.assert_allclose(line.get_ydata(), curve["accuracy"])
    for segment, share, rows in zip(bars.get_segments(), curve["accuracy"], curve["rows"], strict=True):
        # The two shares that a score test at 95% just does not reject.
        off = lambda p, share=share, rows=rows: abs(share - p) - 1.96 * np.sqrt(p * (1 - p) / rows)
        assert segment[0, 1] == pytest.approx(brentq(off, 1e-9, share), abs=1e-6)
        assert segment[1, 1] == pytest.approx(brentq(off, share, 1 - 1e-9), abs=1e-6)
    np.testing.assert_allclose([bar.get_height() for bar in lower.patches], curve["rows"])
    assert f"ECE {metrics.ece(prediction.probs, prediction.labels, 4):.3f}" in upper.get_title()


def test_modules_are_bars_of_contraction_and_a_map_of_correlation():
    found = structure(exact(LinearGaussian(rank=2, modules=3)))
    axis = plots.modules(found).axes[0]
    np.testing.assert_allclose([bar.get_width() for bar in axis.patches], found.modules["contraction"])
    (image,) = plots.correlation(found).axes[0].images
    shown, expected = np.ma.filled(image.get_array(), np.nan), found.correlation.to_numpy()
    apart = ~np.eye(3, dtype=bool)
    np.testing.assert_allclose(shown[apart], expected[apart])
    assert np.isnan(np.diag(shown)).all()
