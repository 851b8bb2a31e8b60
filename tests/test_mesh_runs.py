"""The same run on one device and on eight, with rows, weights and heads split."""

import pytest
from compare import EIGHT, finished, first_difference, metrics, perturbed_logits, same_rollout, same_run

from heal_jax.store import RunDirectory


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run on one device."""
    return finished(tmp_path_factory.mktemp("meshes") / "alone", data=1)


@pytest.mark.parametrize("mesh", [EIGHT, {"data": 4, "tensor": 2}, {"fsdp": 4, "tensor": 2}], ids=str)
def test_another_mesh_gives_the_same_run(alone, on_eight, teacher, tmp_path, mesh):
    out = on_eight if mesh == EIGHT else finished(tmp_path / "out", **mesh)
    assert {k: v for k, v in RunDirectory(out).manifest["mesh"].items() if v > 1} == mesh
    assert len(metrics(out)) == len(metrics(alone)) > 0
    # Close calls are rare: of some 170 rollouts a run at most a few part.
    assert same_run(teacher, alone, out) <= 5


def test_only_a_tie_may_part_rollouts(alone, teacher):
    """The comparison itself: a runner-up is refused, unless it is within the tie."""
    row = RunDirectory(alone).rollouts("base").to_pylist()[0]
    tokens, context, name = row["tokens"], row["context_tokens"], row["rollout_id"]
    for at in (0, 7, len(tokens) - 1):
        values = perturbed_logits(teacher, [*context, *tokens[:at]], name, at)
        best, second = (int(i) for i in values.argsort()[::-1][:2])
        assert best == tokens[at]
        other, gap = [*tokens[:at], second], float(values[best] - values[second])
        assert first_difference(tokens, other) == at
        with pytest.raises(AssertionError):
            same_rollout(teacher, context, name, tokens, other, tie=gap - 1e-4)
        assert not same_rollout(teacher, context, name, tokens, other, tie=gap + 1e-4)
    assert same_rollout(teacher, context, name, tokens, list(tokens))
    with pytest.raises(AssertionError):
        same_rollout(teacher, context, name, tokens, tokens[:-1])
