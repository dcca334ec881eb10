"""What ranks do together, on real processes."""

import math
from typing import Any

import pytest

from bcr.parallel.ranks import Ranks
from tests.parallel.launch import on_ranks


def collectives(ranks: Ranks) -> dict[str, Any]:
    me = ranks.rank
    return {
        "gather": ranks.gather({"me": me}),
        "gather_first": ranks.gather_first(me),
        "broadcast": ranks.broadcast(f"of {me}"),
        "sum": ranks.sum({"all": 0.1 * (me + 1), f"of {me}": 1.0}),
        "poisoned": ranks.sum({"opposite": math.inf if me else -math.inf, "one": math.inf if me else 1.0}),
        "max": ranks.max({"all": float(me), "odd": math.nan if me else 0.0}),
        "any": [ranks.any(me == 1), ranks.any(False)],
        "meshes": [(ranks.mesh(shard).mesh_dim_names, ranks.mesh(shard).mesh.tolist()) for shard in (None, 1, ranks.size)],
        "agreed": agreement(ranks),
    }


def agreement(ranks: Ranks) -> str:
    with ranks.agreeing():
        pass
    try:
        with ranks.agreeing():
            if ranks.rank == 1:
                raise ValueError("found by 1")
    except ValueError as error:
        return str(error)
    return ""


def test_collectives() -> None:
    first, second = on_ranks(2, collectives)
    for found in (first, second):
        assert found["gather"] == [{"me": 0}, {"me": 1}]
        assert found["broadcast"] == "of 0"
        assert found["sum"] == {"all": math.fsum([0.1, 0.2]), "of 0": 1.0, "of 1": 1.0}
        assert math.isnan(found["poisoned"]["opposite"])
        assert found["poisoned"]["one"] == math.inf
        assert found["max"]["all"] == 1.0
        assert math.isnan(found["max"]["odd"])
        assert found["any"] == [True, False]
        assert found["agreed"] == "found by 1"
        assert found["meshes"] == [(("shard",), [0, 1]), (("replicate", "shard"), [[0], [1]]), (("shard",), [0, 1])]
    assert (first["gather_first"], second["gather_first"]) == ([0, 1], [])


def hybrid(ranks: Ranks) -> Any:
    with pytest.raises(ValueError, match=r"parallel.shard_size is 3; it must divide"):
        ranks.mesh(3)
    return ranks.mesh().mesh.tolist(), ranks.mesh(4).mesh.tolist()


@pytest.mark.slow
def test_machines_replicate_and_their_ranks_shard() -> None:
    assert on_ranks(4, hybrid, nodes=2) == [([[0, 1], [2, 3]], [0, 1, 2, 3])] * 4


def test_one_process_needs_no_group() -> None:
    ranks = Ranks.alone()
    assert (ranks.first, ranks.gather(3), ranks.gather_first(3), ranks.broadcast(3)) == (True, [3], [3], 3)
    assert (ranks.sum({"a": 1.0}), ranks.max({"a": 1.0}), ranks.any(True)) == ({"a": 1.0}, {"a": 1.0}, True)
    with ranks.agreeing():
        pass
    with pytest.raises(ValueError, match=r"parallel.shard_size is 0; it must divide"):
        ranks.mesh(0)
    with pytest.raises(ValueError, match="mine"), ranks.agreeing():
        raise ValueError("mine")
    ranks.close()


def test_an_environment_that_torchrun_did_not_make_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="WORLD_SIZE is 2 and RANK is not set; start several processes with torchrun"):
        Ranks.start("cpu")
