import dataclasses
import pickle

import pytest
import torch

from stochproc.exceptions import SolverError
from stochproc.solvers import Convergence, Result, SolverState, Status


def ended(status, message=""):
    return Result("the best iterate", status, Convergence(3, 0.5, 0.1, message=message))


def test_only_converged_is_ok():
    assert [s for s in Status if ended(s).ok] == [Status.CONVERGED]


def test_there_are_six_ways_to_end():
    assert {s.value for s in Status} == {
        "converged",
        "max_iter",
        "stagnated",
        "breakdown",
        "nonfinite",
        "stopped",
    }


def test_unwrap_returns_the_value_of_a_converged_result():
    assert ended(Status.CONVERGED).unwrap() == "the best iterate"


@pytest.mark.parametrize("status", [s for s in Status if s is not Status.CONVERGED])
def test_unwrap_raises_the_message_of_any_other(status):
    with pytest.raises(SolverError, match=f"solver ended with status '{status.value}': more noise, please"):
        ended(status, "more noise, please").unwrap()


def test_unwrap_without_a_message_tells_the_numbers():
    with pytest.raises(SolverError, match=r"residual 0\.5 after 3 iterations, asked for 0\.1"):
        ended(Status.MAX_ITER).unwrap()


def test_value_is_there_whatever_the_status():
    assert all(ended(s).value == "the best iterate" for s in Status)


def test_status_compares_with_its_text():
    assert Status.MAX_ITER == "max_iter"


@pytest.mark.parametrize("instance", [ended(Status.CONVERGED), Convergence(1, 0.0, 0.0), SolverState(1, 0.0, None)])
def test_results_are_frozen(instance):
    name = dataclasses.fields(instance)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(instance, name, None)


def test_stats_are_not_shared_between_results():
    one, other = ended(Status.CONVERGED), ended(Status.CONVERGED)
    one.stats["jitter"] = 1.0
    assert other.stats == {}


def test_result_survives_pickling():
    before = Result(torch.ones(2), Status.STOPPED, Convergence(1, 0.5, 0.1, torch.tensor([0.5])), {"a": 1})
    after = pickle.loads(pickle.dumps(before))
    assert after.status is Status.STOPPED
    assert torch.equal(after.value, before.value)
    assert torch.equal(after.convergence.history, before.convergence.history)
    assert after.stats == before.stats
