"""utils/graphs.py without a GPU: a recording is a call whose results are written in place."""

import pytest
import torch

from utils import graphs


@pytest.fixture
def recorded(monkeypatch):
    """The numbers of recordings and replays."""
    seen = {"record": 0, "replay": 0}

    def record(work):
        seen["record"] += 1
        out = work()

        def replay():
            seen["replay"] += 1
            for mine, new in zip(out, work(), strict=True):
                mine.copy_(new)
        return replay, out
    monkeypatch.setattr(graphs, "record", record)
    return seen


def gradient(x, delta, y):
    labels = sum(part.sum() for part in y if part is not None)
    return (x * delta).sum() + labels, x.sum(0, keepdim=True) * delta + 1


def batch(seed, n=3):
    g = torch.Generator().manual_seed(seed)
    return (torch.rand((n, 2, 4, 4), generator=g), torch.rand((1, 2, 4, 4), generator=g),
            [torch.randint(5, (n,), generator=g), None])


def test_every_batch_of_the_first_shape_is_replayed_and_results_are_kept(recorded):
    graphed, kept = graphs.Graphed(gradient), []
    for seed in range(3):
        kept.append(graphed(*batch(seed)))
    for seed, found in enumerate(kept):  # a later replay has not changed the earlier results
        assert all(map(torch.equal, found, gradient(*batch(seed))))
    assert recorded == {"record": 1, "replay": 3}


def test_the_arguments_are_not_written_to_and_need_not_be_kept(recorded):
    graphed, given = graphs.Graphed(gradient), batch(0)
    before = given[0].clone()
    graphed(*given), graphed(*batch(1))
    assert torch.equal(given[0], before)
    found = graphed(given[0].clone(), *given[1:])
    assert all(map(torch.equal, found, gradient(*given)))


@pytest.mark.parametrize("other", [
    batch(4, n=2), (batch(4)[0].double(), *batch(4)[1:]),
    (batch(4)[0].contiguous(memory_format=torch.channels_last), *batch(4)[1:])],
    ids=["fewer images", "another type", "another memory layout"])
def test_another_shape_is_computed_without_the_graph(other, recorded):
    graphed = graphs.Graphed(gradient)
    graphed(*batch(0))
    found = graphed(*other)
    assert all(map(torch.equal, found, gradient(*other)))
    assert recorded == {"record": 1, "replay": 1}


def test_work_that_cannot_be_recorded_is_computed_without_a_graph(monkeypatch):
    tried = []

    def record(work):
        tried.append(1)
        raise RuntimeError("operation not permitted when stream is capturing")
    monkeypatch.setattr(graphs, "record", record)
    graphed = graphs.Graphed(gradient)
    for seed in range(2):
        assert all(map(torch.equal, graphed(*batch(seed)), gradient(*batch(seed))))
    assert tried == [1]
