"""LoRA against PEFT: what its adapters start as, compute, learn and are exported as; what training with them keeps."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from conftest import TINY, start
from flax import nnx
from models import VOCAB, hf_folder, hf_logits
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import load_file
from test_train_loop import (
    CONFIG,
    LENGTH,
    PAD,
    RAW,
    SPEC,
    Stop,
    arrays,
    batches_of,
    examples,
    expected_rate,
    initial,
    run,
    same_bits,
    stop_at,
    torch_loss,
)

from heal_jax import cli
from heal_jax.config import TARGETS, LoraSpec, TrainSpec
from heal_jax.errors import InputError
from heal_jax.export import save_adapters
from heal_jax.model.decoder import Model, initialise
from heal_jax.model.layers import Remat
from heal_jax.model.lm import LanguageModel
from heal_jax.model.lora import adapted, count, merged, split
from heal_jax.model.mesh import make_mesh
from heal_jax.model.weights import load, save_weights, shardings
from heal_jax.train import loop
from heal_jax.train.loop import Phase
from heal_jax.train.step import loss_fn, train_step

LORA = dataclasses.replace(SPEC, lora=LoraSpec(rank=3), learning_rate=1e-2)
ADAPTERS = 3 * (2 * (32 + 32) + 2 * (32 + 8) + 3 * (32 + 48))  # weights: q and o, k and v, the MLP's three


def bfloat16(model: Model) -> Model:
    return dataclasses.replace(model, params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params))


def export(model: Model, base: Path, spec: LoraSpec, folder: Path) -> Path:
    save_adapters(LanguageModel(model, None, base, None), spec, folder)  # type: ignore[arg-type]
    return folder


def learned(model: Model) -> dict[Any, np.ndarray]:
    return arrays(dataclasses.replace(model, params=split(model.params)[0]))


def frozen(model: Model) -> Model:
    return dataclasses.replace(model, params=split(model.params)[1])


def random_adapters(model: Model, spec: LoraSpec) -> Model:
    """With B random, too: a new one is zero."""
    model = adapted(model, spec, None, 0)
    adapters, others = split(model.params)
    rng = np.random.default_rng(1)
    adapters = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), x.dtype), adapters)
    return dataclasses.replace(model, params=nnx.merge_state(adapters, others))


@functools.partial(jax.jit, static_argnums=0)
def _logits(graph: nnx.GraphDef, params: nnx.State, tokens: jax.Array) -> jax.Array:
    decoder = nnx.merge(graph, params)
    return decoder.logits(decoder(tokens))


def logits(model: Model, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(_logits(model.graph, model.params, jnp.asarray(tokens)))


# What adapters are


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe", "gemma3_text"])
def test_peft_computes_what_we_do(family: str, tmp_path: Path) -> None:
    """Beside the kernels, merged, and merged by PEFT; with biases, beside experts, between Gemma's norms."""
    hf_folder(tmp_path / "base", family)
    targets = ("v_proj", "o_proj") if family == "qwen3_moe" else TARGETS
    spec = LoraSpec(rank=4, alpha=6, targets=targets)
    base = load(tmp_path / "base")
    model = random_adapters(base, spec)
    folder = export(model, tmp_path / "base", spec, tmp_path / "adapter")
    assert {p.name for p in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    theirs: Any = peft.AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    theirs.get_base_model().set_experts_implementation("eager")  # the grouped one wants aligned sizes
    tokens = np.random.default_rng(0).integers(1, VOCAB, (3, 17)).astype(np.int32)
    expected = hf_logits(theirs, tokens)
    assert np.abs(expected - logits(base, tokens)).max() > 0.1
    np.testing.assert_allclose(logits(model, tokens), expected, atol=1e-4)
    np.testing.assert_allclose(logits(merged(model), tokens), expected, atol=1e-4)
    (tmp_path / "merged").mkdir()
    save_weights(merged(model), tmp_path / "merged")
    whole = theirs.merge_and_unload().state_dict()
    for name, weight in load_file(tmp_path / "merged" / "model.safetensors").items():
        if name.split(".")[-2] not in targets:
            continue  # transformers holds experts stacked
        np.testing.assert_allclose(weight, whole[name].numpy(), atol=1e-6, err_msg=name)


def test_new_adapters_change_nothing_and_differ_from_each_other() -> None:
    model, spec = initial(), LoraSpec(rank=3)
    new = adapted(model, spec, None, 7)
    assert merged(new).graph == model.graph and same_bits(merged(new), model)  # so that what is compiled is used again
    assert count(CONFIG, spec) == sum(x.size for x in learned(new).values()) == ADAPTERS
    firsts = {path: x for path, x in learned(new).items() if path[-1] == "lora_a"}
    assert len(firsts) == 7
    for path, a in firsts.items():
        bound = len(a) ** -0.5
        assert 0.9 * bound < np.abs(a).max() <= bound and abs(a.mean()) < bound / 4, path
    assert len({a.tobytes() for a in firsts.values()}) == 7
    again, other = (learned(adapted(model, spec, None, seed)) for seed in (7, 8))
    assert all((x == again[path]).all() for path, x in learned(new).items())
    assert all((x != other[path]).any() for path, x in firsts.items())
    assert adapted(model, LoraSpec(), None, 7) is model and merged(model) is model


def test_experts_are_refused(tmp_path: Path) -> None:
    hf_folder(tmp_path, "qwen3_moe")
    with pytest.raises(InputError, match="train.lora.targets: gate_proj is in the experts of this mixture") as error:
        adapted(load(tmp_path), LoraSpec(rank=2), None, 0)
    assert "\n" not in str(error.value)


# What they learn


def test_training_equals_peft(tmp_path: Path) -> None:
    """Loss, gradient norm and adapters of five steps, against PEFT's model and torch's AdamW, from the same start."""
    model = initialise(dataclasses.replace(CONFIG, num_layers=2), 2)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(RAW | {"num_hidden_layers": 2}))
    save_weights(model, tmp_path / "base")
    lora = LoraSpec(rank=4, alpha=8, targets=("q_proj", "v_proj", "o_proj", "down_proj"))
    spec = TrainSpec(
        batch=4, learning_rate=1e-2, warmup=0.4, weight_decay=0.1, clip_norm=0.02, accumulate=2, log_every=1, lora=lora
    )
    phase, seed = Phase("stage 1", examples(6), 5), 3
    lines: list[dict[str, Any]] = []
    trained = run(tmp_path / "checkpoints", lines.append, model=model, phases=[phase], spec=spec, seed=seed)
    first = export(adapted(model, lora, None, seed), tmp_path / "base", lora, tmp_path / "first")
    ours = load_file(export(trained, tmp_path / "base", lora, tmp_path / "last") / "adapter_model.safetensors")

    torch.set_num_threads(1)  # its threads spin
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    reference = peft.PeftModel.from_pretrained(base, first, is_trainable=True)
    weights = [p for p in reference.parameters() if p.requires_grad]
    assert sum(p.numel() for p in weights) == count(model.config, lora)
    adamw = torch.optim.AdamW(weights, betas=(0.9, loop.B2), eps=1e-8, weight_decay=0.1)
    assert len(lines) == 5
    for step, (line, (_, batch, *_)) in enumerate(zip(lines, loop._steps([phase], 0, None, 4, LENGTH, seed, PAD))):
        loss = torch_loss(reference, batch)
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
        adamw.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, 0.02).item()
        assert norm > 0.02  # clipping is at work
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)
        for group in adamw.param_groups:
            group["lr"] = expected_rate(spec, 5, step)
        adamw.step()
    theirs = {name.replace(".default", ""): p for name, p in reference.named_parameters() if p.requires_grad}
    assert set(theirs) == set(ours)
    before = load_file(first / "adapter_model.safetensors")
    for name, weight in theirs.items():
        assert np.abs(ours[name] - before[name]).max() > 5e-3  # five steps of up to 1e-2
        np.testing.assert_allclose(ours[name], weight.detach().numpy(), atol=2e-4, err_msg=name)


@pytest.mark.parametrize("remat", ["none", "block"])
def test_a_loop_over_layers_has_the_same_gradients(remat: Remat, monkeypatch: pytest.MonkeyPatch) -> None:
    """As accelerators train, with the adapters of all layers stacked."""
    model = random_adapters(initialise(dataclasses.replace(CONFIG, num_layers=4), 0), LoraSpec(rank=2))
    adapters, others = split(model.params)
    batch, _ = next(batches_of(Phase("", examples(9), 1)))
    results = []
    for unrolled in (("cpu",), ()):
        monkeypatch.setattr("heal_jax.model.layers.UNROLLED", unrolled)
        step = jax.jit(lambda a, o: jax.value_and_grad(loss_fn)(a, model.graph, batch, None, None, remat, o))
        results.append(step(adapters, others))
        assert ("while" in step.lower(adapters, others).as_text()) == (unrolled == ())
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), *results)


# What training keeps


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Model]:
    folder = tmp_path_factory.mktemp("lora")
    return folder, run(folder, spec=LORA)


def test_frozen_weights_stay_and_checkpoints_hold_adapters_alone(uninterrupted: tuple[Path, Model]) -> None:
    folder, model = uninterrupted
    assert same_bits(frozen(model), initial())
    start = learned(adapted(initial(), LORA.lora, None, 3))
    assert all((x != start[path]).any() for path, x in learned(model).items())
    saved = [leaf for leaf in jax.tree.leaves(ocp.metadata(folder / "22").metadata) if leaf.shape]
    assert sum(np.prod(leaf.shape) for leaf in saved) == 3 * ADAPTERS  # and two moments of each
    assert {str(leaf.dtype) for leaf in saved} == {"float32"}


def test_interrupted_gives_the_same_bits(uninterrupted: tuple[Path, Model], tmp_path: Path) -> None:
    compiled = train_step._cache_size()
    with pytest.raises(Stop):
        run(tmp_path, stop_at(20), spec=LORA)
    again = run(tmp_path, spec=LORA)
    assert same_bits(again, uninterrupted[1]) and again.graph == uninterrupted[1].graph
    assert train_step._cache_size() == compiled


def test_bfloat16_beside_float32_adapters(tmp_path: Path) -> None:
    base = bfloat16(initial())
    model = run(tmp_path, model=base, spec=LORA)
    assert same_bits(frozen(model), base)
    assert {x.dtype for x in learned(model).values()} == {np.dtype(np.float32)}
    whole = arrays(merged(model))
    kernels, adapters = arrays(base), learned(model)
    for path, kernel in kernels.items():
        if path[-1] == "kernel":
            a, b = (adapters[*path[:-1], name].astype(np.float64) for name in ("lora_a", "lora_b"))
            expected = (kernel.astype(np.float64) + 32 / 3 * (a @ b)).astype(np.float32)
            np.testing.assert_allclose(whole[path].astype(np.float32), expected, rtol=2**-8, err_msg=str(path))
        else:
            assert (whole[path] == kernel).all()
        assert whole[path].dtype == jnp.bfloat16


def test_on_a_mesh(uninterrupted: tuple[Path, Model], tmp_path: Path) -> None:
    """Eight devices: from the same adapters, one compilation, split as their kernels are, near the weights of one."""
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    placed = dataclasses.replace(initial(), params=jax.device_put(initial().params, shardings(initial(), mesh)))
    for path, x in learned(adapted(placed, LORA.lora, mesh, 3)).items():
        assert (x == learned(adapted(initial(), LORA.lora, None, 3))[path]).all()
    compiled = train_step._cache_size()
    model = run(tmp_path, model=placed, spec=LORA, mesh=mesh)
    assert train_step._cache_size() == compiled + 1
    whole = merged(model)
    for trained in (model, whole):
        where = shardings(trained, mesh)
        kept = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), trained.params, where)
        assert jax.tree.all(kept), kept
    for path, leaf in nnx.to_flat_state(split(model.params)[0]):
        assert leaf.addressable_shards[0].data.size == leaf.size / 2, path  # one of the two axes, by two
    assert same_bits(frozen(model), initial())
    one = arrays(merged(uninterrupted[1]))
    for path, weight in arrays(whole).items():
        np.testing.assert_allclose(weight, one[path], atol=2e-3, err_msg=str(path))


# The whole


def test_a_run(tmp_path: Path) -> None:
    """HEAL with adapters, by the command: the student merged, and its adapters, which PEFT puts together again."""
    out = tmp_path / "out"
    process = start("run", TINY, "--out", out, "--train.lora.rank", 4, "--train.learning_rate", 0.01)
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    student: Any = transformers.AutoModelForCausalLM.from_pretrained(out / "export", dtype=torch.float32).eval()
    theirs: Any = peft.AutoPeftModelForCausalLM.from_pretrained(out / "adapter", dtype=torch.float32).eval()
    tokens = np.random.default_rng(0).integers(3, 40, (2, 60))
    ours = hf_logits(student, tokens)
    np.testing.assert_allclose(ours, hf_logits(theirs, tokens), atol=1e-4)
    with theirs.disable_adapter():
        assert np.abs(ours - hf_logits(theirs, tokens)).max() > 0.1
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], set(config["target_modules"])) == (4, 32, set(TARGETS))
    sizes = [x.size for x in load_file(out / "adapter" / "adapter_model.safetensors").values()]
    for name in ("heal", "rejection_sampling"):
        last = max((out / "checkpoints" / name).glob("[0-9]*"), key=lambda folder: int(folder.name))
        saved = ocp.metadata(last).metadata
        assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(saved) if leaf.shape) == 3 * sum(sizes)


@pytest.mark.parametrize(
    ("lora", "says"),
    [
        ("{rank: -1}", "train.lora.rank: -1 is out of range"),
        ("{rank: 8, targets: []}", "train.lora.targets: at least one"),
        ("{rank: 8, targets: [q]}", "train.lora.targets[0]: 'q' is not allowed, use one of q_proj"),
    ],
)
def test_bad_input_is_one_line(lora: str, says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(f"train: {{lora: {lora}}}")
    assert cli.run(["run", str(tmp_path / "bad.yaml"), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and says in said and not (tmp_path / "out").exists()
