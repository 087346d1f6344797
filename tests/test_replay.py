"""When steps are recorded, without a GPU: a graph that only notes what is done to it takes the place of CUDA's."""

import contextlib

import pytest
import torch

from glm4v_ext import Replayed


class Graph:
    """Replays what was called while it was recorded."""

    recording = None

    def replay(self):
        self.done()


@pytest.fixture
def graphs(monkeypatch):
    made = []

    def new():
        made.append(Graph())
        return made[-1]

    @contextlib.contextmanager
    def record(graph, capture_error_mode):
        Graph.recording = graph
        yield
        Graph.recording = None

    monkeypatch.setattr(torch.cuda, "CUDAGraph", new)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(Replayed, "_records", staticmethod(lambda tensors: not torch.is_grad_enabled()))
    return made


def doubled(calls):
    def function(x):
        calls.append(x)
        out = x * 2
        if Graph.recording:
            Graph.recording.done = lambda: out.copy_(x * 2)
        return out

    return function


@torch.no_grad()
def test_recorded_after_some_calls(graphs):
    calls = []
    step = Replayed(doubled(calls), after=2)
    outs = [step(torch.full((3,), float(i))) for i in range(5)]
    assert [out[0].item() for out in outs] == [0, 2, 4, 6, 8]  # none was overwritten by the next
    assert len(graphs) == 1 and len(calls) == 3  # two plain calls, one that was recorded


@torch.no_grad()
def test_recorded_anew_for_other_shapes(graphs):
    step = Replayed(doubled([]), after=1)
    for size in (3, 3, 4, 4, 3):
        x = torch.randn(size)
        assert torch.equal(step(x), 2 * x)
    assert len(graphs) == 2


def test_recorded_anew_in_inference_mode(graphs):
    step, x = Replayed(doubled([]), after=1), torch.randn(3)
    for inference in (False, False, True, True, False, False):
        with torch.inference_mode(inference), torch.no_grad():
            assert torch.equal(step(x), 2 * x)
    assert len(graphs) == 3


@torch.no_grad()
def test_a_recording_that_fails_is_made_again(graphs):
    broken = [True]

    def function(x):
        if Graph.recording and broken.pop():
            Graph.recording = None
            raise RuntimeError("a hook looked at a value")
        return good(x)

    good, x = doubled([]), torch.ones(2)
    step = Replayed(function, after=0)
    with pytest.raises(RuntimeError, match="a hook looked"):
        step(x)
    broken.append(False)
    assert torch.equal(step(x), 2 * x)


def test_plain_where_gradients_are_wanted(graphs):
    step, x = Replayed(doubled([]), after=0), torch.ones(2, requires_grad=True)
    step(x).sum().backward()
    assert torch.equal(x.grad, torch.full((2,), 2.0)) and not graphs


def test_plain_on_the_cpu():
    calls = []
    step = Replayed(doubled(calls), after=0)
    with torch.no_grad():
        for _ in range(3):
            step(torch.ones(2))
        assert Replayed(lambda: 3)() == 3
    assert len(calls) == 3
