"""The page about what carries over from here to FineWeb."""

import sys

import numpy as np
import pytest

from conftest import ROOT

sys.path.insert(0, str(ROOT / "records"))
import transfer

pytestmark = pytest.mark.contract


def test_the_page_is_that_of_the_logs():
    columns = transfer.read_columns()
    page = (ROOT / "records" / "transfer.md").read_text()
    for line in transfer.technique_rows(columns) + transfer.correlation_rows(columns):
        assert line in page


def test_what_is_taken_away_counts_the_other_way_around(monkeypatch):
    """Without U-Net skips the loss is higher, so they help. Without a control, there is no figure."""
    result = {"mean": 0.02, "error": 0.001, "p": 0.01}
    monkeypatch.setattr(transfer, "difference", lambda group, control: result)
    groups = {
        "plain": {"control": None},
        "no_unet": {"control": "plain", "logs": [1, 2, 3]},
        "ema": {"control": "plain", "logs": [1, 2, 3]},
        "iha": {"control": "missing", "logs": [1, 2, 3]},
    }
    effects = {}
    for technique in transfer.TECHNIQUES:
        effects[technique.run] = transfer.effect(technique, groups, "", {})
    assert effects.pop("no_unet") == (-0.02, 0.001, 0.01, 3)
    assert effects.pop("ema") == (0.02, 0.001, 0.01, 3)
    assert set(effects.values()) == {None}


@pytest.mark.parametrize("order, sign", [([1, 2, 3, 4, 5, 6, 7, 8], 1), ([8, 7, 6, 5, 4, 3, 2, 1], -1)])
def test_rank_correlation(order, sign):
    """Exact columns keep their order, however they are stretched; noise makes the interval reach zero."""
    values = np.array(order, dtype=float)
    a = np.exp(np.arange(8)), np.full(8, 1e-9)
    rho, (low, high) = transfer.rank_correlation(a, (values, np.full(8, 1e-9)))
    assert rho == pytest.approx(sign) and sign * (low + high) > 1
    rho, (low, high) = transfer.rank_correlation(a, (values, np.full(8, 100.0)))
    assert rho == pytest.approx(sign) and low < 0 < high
