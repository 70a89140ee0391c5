"""Long generations: five hundred steps under each policy, and that the soak test sees what it is there to see."""

import pytest
import soak
import torch

from kvprune.policies import A2SF, StreamingLLM


@pytest.mark.parametrize("name", soak.POLICIES)
def test_five_hundred_steps(name):
    """Constant bytes, finite logits, and the kept positions of a reference."""
    result = soak.soak(name, 256, 500)
    assert result.faults == []
    if "|" not in name:
        assert result.nbytes[0] == result.nbytes[1] == result.nbytes_first_half[1]


def test_a_cache_that_grows_is_seen(monkeypatch):
    monkeypatch.setitem(soak.POLICIES, "grows", lambda budget: A2SF(budget, interval=None))
    faults = soak.soak("grows", 64, 40).faults
    assert any("rows after" in fault for fault in faults)
    assert any("the cache grew" in fault for fault in faults)


def test_other_positions_are_seen(monkeypatch):
    """A policy that is not StreamingLLM, under the name of one, keeps other tokens."""

    class Other(StreamingLLM):
        def scores(self, table, step):
            return -table.positions.float()

    monkeypatch.setitem(soak.POLICIES, "other", Other)
    assert any("not the sinks" in fault for fault in soak.soak("other", 64, 10).faults)


def test_numbers_that_are_none_are_seen():
    model = soak.tiny_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    assert "logits that are no numbers at step 0" in soak.soak("TOVA", 64, 10, model=model).faults


def test_slopes():
    assert soak.slope([100, 120, 140, 160], 10) == pytest.approx(2.0)
    assert soak.slope([7, 7, 7], 10) == pytest.approx(0.0)
