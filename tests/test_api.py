"""heal_jax as a program uses it: models and configs (runs: test_notebooks.py); what an import holds in memory."""

import filecmp
import json
import resource
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
import torch
import transformers
from conftest import ENVIRONMENT, TINY
from models import entropy64, error, hf_logits
from safetensors.numpy import load_file, save_file

import heal_jax
from heal_jax.config import load as load_config
from heal_jax.errors import InputError, RunError

QUESTION = "State the final answer to the following arithmetic problem: 4829110374 + 9938201847 + 7718829103 ="


@pytest.fixture(scope="module")
def lm():
    return heal_jax.load("builtin:teacher")


@pytest.fixture(scope="module")
def theirs(lm):
    return transformers.AutoModelForCausalLM.from_pretrained(lm.folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def rollouts(lm):
    return lm.generate([QUESTION, "1 + 2 ="], n=3, max_new_tokens=48, seed=5)


def test_logits_are_those_of_transformers(lm, theirs):
    tokens = np.random.default_rng(0).integers(0, 300, (3, 17))
    ours, wanted = lm.logits(tokens), hf_logits(theirs, tokens)
    assert ours.dtype == np.float32 and ours.shape == (3, 17, lm.model.config.vocab_size)
    assert error(ours, wanted, np.abs(wanted).max()) < 1e-4


def test_entropies_and_log_probabilities_are_those_of_the_tokens(theirs, rollouts):
    for several in rollouts:
        assert len(several) == 3
        for rollout in several:
            start = len(rollout.prompt_tokens)
            logits = hf_logits(theirs, [[*rollout.prompt_tokens, *rollout.tokens]])[0, start - 1 : -1]
            np.testing.assert_allclose(rollout.entropy, entropy64(logits), atol=1e-4)
            logprob = torch.log_softmax(torch.tensor(logits), -1).numpy()[range(len(rollout.tokens)), rollout.tokens]
            np.testing.assert_allclose(rollout.logprob, logprob, atol=1e-4)


def test_a_rollout_depends_on_its_prompt_index_and_seed_alone(lm, rollouts):
    ids = list(rollouts[1][0].prompt_tokens)
    for again in (
        lm.generate(["1 + 2 ="], n=4, max_new_tokens=48, seed=5, batch=4),
        lm.generate([ids], n=3, max_new_tokens=48, seed=5),
    ):
        for a, b in zip(again[0], rollouts[1]):
            np.testing.assert_array_equal(a.tokens, b.tokens)
            assert a.text == b.text and a.finish == b.finish
    other = lm.generate(["1 + 2 ="], n=3, max_new_tokens=48, seed=6)
    assert any(a.text != b.text for a, b in zip(other[0], rollouts[1]))


def test_a_mesh_changes_nothing(lm, rollouts):
    """Rows that the mesh does not divide are padded; at temperature 0 the texts are the same."""
    split = heal_jax.load("builtin:teacher", mesh={"data": -1, "tensor": 2})
    tokens = np.random.default_rng(0).integers(0, 300, (3, 17))
    np.testing.assert_allclose(split.logits(tokens), lm.logits(tokens), atol=2e-3, rtol=1e-4)
    texts = [[r.text for several in m.generate([QUESTION, "1 + 2 =", "3 + 4 ="], max_new_tokens=40, temperature=0)
              for r in several] for m in (lm, split)]  # fmt: skip
    assert texts[0] == texts[1]


def test_saved_and_loaded_again_nothing_has_changed(lm, tmp_path):
    heal_jax.save(lm, tmp_path / "out")
    heal_jax.save(lm, tmp_path / "out")  # over itself
    before, after = (load_file(f / "model.safetensors") for f in (lm.folder, tmp_path / "out"))
    assert before.keys() == after.keys() and all(np.array_equal(before[k], after[k]) for k in before)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert filecmp.cmp(lm.folder / name, tmp_path / "out" / name, shallow=False)
    again = heal_jax.load(tmp_path / "out")
    assert again.model.config == lm.model.config and again.tokenizer.eos_ids == lm.tokenizer.eos_ids
    assert not [p for p in tmp_path.iterdir() if p.name != "out"]


@pytest.mark.parametrize("also", [(), ("config.json", "model.safetensors")])
def test_what_is_more_than_a_model_is_not_replaced(lm, tmp_path, also):
    for name in ("precious", *also):
        (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match="other things than a model"):
        heal_jax.save(lm, tmp_path)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == dict.fromkeys(("precious", *also), "mine")


def test_a_full_disk_leaves_what_was_there(lm, tmp_path):
    heal_jax.save(lm, tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))  # the weights are larger
    try:
        with pytest.raises(RunError, match="out: cannot be written"):
            heal_jax.save(lm, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_mesh_made_elsewhere(lm):
    """With whatever kind of axes; one of other axes is refused."""
    mesh = jax.make_mesh((8, 1, 1, 1), ("data", "fsdp", "tensor", "expert"))
    tokens = np.arange(16).reshape(8, 2)
    np.testing.assert_allclose(
        heal_jax.load("builtin:teacher", mesh=mesh).logits(tokens), lm.logits(tokens), rtol=1e-4, atol=2e-3
    )
    with pytest.raises(InputError, match="axes rows"):
        heal_jax.load("builtin:teacher", mesh=jax.make_mesh((8,), ("rows",)))


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda lm: heal_jax.load("nowhere"), "no such model folder"),
        (lambda lm: heal_jax.load("builtin:teacher", dtype="int8"), "not one of float32"),
        (lambda lm: heal_jax.load("builtin:teacher", mesh={"tensor": 8}), "2 key-value heads"),
        (lambda lm: heal_jax.load("builtin:teacher", mesh={"data": 3}), "needs 3 devices"),
        (lambda lm: heal_jax.load("builtin:teacher", mesh={"tensr": 8}), "no axis tensr"),
        (lambda lm: lm.logits([[1.5]]), "integers of shape"),
        (lambda lm: lm.logits([[9999]]), "ids of 0 to"),
        (lambda lm: lm.logits(np.zeros((1, 600), int)), "at most 512"),
        (lambda lm: lm.generate(["a"], n=0), "n: 0 is out of range"),
        (lambda lm: lm.generate(["a"], temperature=-1), "temperature"),
        (lambda lm: lm.generate([[]]), "at least one token"),
        (lambda lm: lm.generate(["a"], max_new_tokens=10_000), "512 positions"),
    ],
)
def test_bad_arguments_are_one_line(lm, call, says):
    with pytest.raises(InputError) as raised:
        call(lm)
    assert says in str(raised.value) and "\n" not in str(raised.value)


def test_a_config_is_what_each_source_gives_over_the_ones_before(tmp_path):
    assert heal_jax.configure(TINY) == load_config(TINY)
    assert heal_jax.configure() == heal_jax.configure({})
    file = tmp_path / "own.yaml"
    file.write_text("seed: 3\nsample: {n: 5}\nproblems: {counts: {easy: 1, medium: 1, hard: 1}}\n")
    nested = heal_jax.configure(file, {"sample": {"n": 7}, "train": {"lora": {"rank": 2}}})
    by_path = heal_jax.configure(file, {"sample.n": 7, "train.lora.rank": 2})
    assert nested == by_path and nested.sample.n == 7 and nested.seed == 3 and nested.train.lora.rank == 2
    assert heal_jax.configure({"sample.n": 7}, file).sample.n == 5


@pytest.mark.parametrize(
    "given, says",
    [
        ({"sample.m": 3}, "sample.m: unknown key, allowed: prompt, n,"),
        ({"sample.n": 0}, "sample.n: 0 is out of range"),
        ({"sample.n": "8"}, "sample.n: '8' is not a whole number"),
        ({"sample.n.k": 8}, "sample.n: {'k': 8} is not a whole number"),
        ({"sample": 8}, "sample: 8 is not a mapping"),
    ],
)
def test_a_config_that_cannot_be_is_one_line(given, says):
    with pytest.raises(InputError) as raised:
        heal_jax.configure(given)
    assert says in str(raised.value) and "\n" not in str(raised.value)


def big_model(folder, dtype):
    """A model of 420 MB in float32 whose largest tensor is 32 MB, in several files."""
    hidden, vocab, layers, wide = 1024, 8192, 8, 2048
    config = {"model_type": "llama", "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": wide,
              "num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 8,
              "max_position_embeddings": 64, "tie_word_embeddings": True}  # fmt: skip
    rng, weight_map = np.random.default_rng(0), {}
    shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden, hidden),
              "self_attn.v_proj": (hidden, hidden), "self_attn.o_proj": (hidden, hidden),
              "mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden), "mlp.down_proj": (hidden, wide),
              "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}  # fmt: skip
    files = [{f"model.layers.{i}.{name}.weight": shape for name, shape in shapes.items()} for i in range(layers)]
    files.append({"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)})
    for i, tensors in enumerate(files):
        name = f"model-{i}.safetensors"
        save_file({k: rng.random(s, np.float32).astype(dtype) for k, s in tensors.items()}, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("stored", ["float32", "float16"])
@pytest.mark.parametrize("devices", [1, 4])
def test_import_holds_two_of_the_largest_tensor_at_most(tmp_path, stored, devices):
    """Peak memory of an import beyond the parameters' own buffers, from the kernel's account of the process."""
    big_model(tmp_path, np.dtype(stored))
    code = f"""
        import gc, jax, sys
        from pathlib import Path
        from heal_jax.model.mesh import make_mesh
        from heal_jax.model.weights import load
        from heal_jax.world import model_folder

        def memory(what):
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith(what))

        mesh = make_mesh({{"data": 1, "fsdp": -1}}) if {devices} > 1 else None
        load(model_folder("student"), mesh=mesh)  # what importing and compiling take is not the model's
        gc.collect()
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # peak := now
        model = load(Path({str(tmp_path)!r}), mesh=mesh)
        leaves = jax.tree.leaves(model.params)
        print(memory("VmHWM") - before, sum(x.nbytes for x in leaves), max(x.nbytes for x in leaves))
    """
    environment = ENVIRONMENT | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak, buffers, largest = map(int, done.stdout.split()[-3:])
    mib = 1 << 20
    print(f"peak {peak / mib:.0f} MiB, buffers {buffers / mib:.0f} MiB, largest tensor {largest / mib:.0f} MiB")
    constant = 32 * mib  # pieces of a file, before its pages are given back; the allocator
    assert buffers > 300 * mib
    assert peak - buffers < 2 * largest + constant
