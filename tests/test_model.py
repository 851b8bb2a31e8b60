"""The decoder against transformers on the same weights, and against itself with a cache."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from heal_jax.errors import InputError
from heal_jax.model.config import config_json, decoder_config
from heal_jax.model.decoder import Decoder, empty_cache, repeat_rows
from heal_jax.model.mesh import make_mesh, spec
from heal_jax.model.weights import load, save_weights, shardings, table

FAMILIES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}


def hf_folder(path, family="llama", tied=True, heads=4, kv_heads=2, head_dim=8, layers=2, theta=5000.0, seed=0):
    """A random transformers model saved to `path`; returns it."""
    config_class, model_class = FAMILIES[family]
    torch.manual_seed(seed)
    config = config_class(
        vocab_size=61,
        hidden_size=heads * 6,
        intermediate_size=37,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        initializer_range=0.3,
        dtype=torch.float32,
    )
    model = model_class(config).eval()
    with torch.no_grad():  # norms that are all one would hide a wrong order of operations
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(path, safe_serialization=True)
    return model


def hf_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def close(ours, theirs, tolerance=1e-4):
    scale = np.abs(theirs).max()
    np.testing.assert_allclose(np.asarray(ours) / scale, theirs / scale, atol=tolerance)


@settings(max_examples=8)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    tied=st.booleans(),
    groups=st.sampled_from([(4, 4), (4, 2), (6, 2), (3, 1)]),
    head_dim=st.sampled_from([4, 10]),
    theta=st.sampled_from([500.0, 1e6]),
    seed=st.integers(0, 99),
)
def test_logits_equal_transformers(tmp_path_factory, family, tied, groups, head_dim, theta, seed):
    folder = tmp_path_factory.mktemp("hf")
    heads, kv_heads = groups
    theirs = hf_folder(folder, family, tied, heads, kv_heads, head_dim, theta=theta, seed=seed)
    model = load(folder)
    tokens = np.random.default_rng(seed).integers(0, 61, (3, 23))
    decoder = nnx.merge(model.graph, model.params)
    full = decoder.logits(decoder(jnp.asarray(tokens)))
    close(full, hf_logits(theirs, tokens))

    # The same logits from a prefill, a chunk at an odd offset, and single tokens, on rows of different length.
    cache = empty_cache(model.config, 3, 32, jnp.float32)
    counts = np.array([5, 1, 9])
    hidden, cache = decoder.extend(jnp.asarray(tokens[:, :9]), jnp.asarray(counts), cache)
    for row, count in enumerate(counts):
        close(decoder.logits(hidden)[row, :count], np.asarray(full)[row, :count])
    position = counts.copy()
    for width in (3, 1, 1):
        chunk = np.stack([tokens[row, p : p + width] for row, p in enumerate(position)])
        hidden, cache = decoder.extend(jnp.asarray(chunk), jnp.full(3, width), cache)
        for row, p in enumerate(position):
            close(decoder.logits(hidden)[row], np.asarray(full)[row, p : p + width])
        position += width
    np.testing.assert_array_equal(cache.length, position)


def test_repeated_rows_continue_alike(tmp_path):
    hf_folder(tmp_path)
    model = load(tmp_path)
    decoder = nnx.merge(model.graph, model.params)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 7)))
    _, cache = decoder.extend(tokens, jnp.array([7, 4]), empty_cache(model.config, 2, 16, jnp.float32))
    once, _ = decoder.extend(tokens[:, :1], jnp.ones(2, jnp.int32), cache)
    many, _ = decoder.extend(jnp.repeat(tokens[:, :1], 3, 0), jnp.ones(6, jnp.int32), repeat_rows(cache, 3))
    np.testing.assert_allclose(many, jnp.repeat(once, 3, axis=0), atol=1e-6)


def test_segments_keep_packed_rows_apart(tmp_path):
    hf_folder(tmp_path)
    model = load(tmp_path)
    decoder = nnx.merge(model.graph, model.params)
    tokens = np.random.default_rng(1).integers(0, 61, (1, 12))
    segments = jnp.array([[0] * 5 + [1] * 7])
    positions = jnp.array([[*range(5), *range(7)]])
    packed = decoder(jnp.asarray(tokens), segments, positions)
    np.testing.assert_allclose(packed[:, :5], decoder(jnp.asarray(tokens[:, :5])), atol=1e-5)
    np.testing.assert_allclose(packed[:, 5:], decoder(jnp.asarray(tokens[:, 5:])), atol=1e-5)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("tied", [True, False])
def test_weights_round_trip(tmp_path, family, tied):
    theirs = hf_folder(tmp_path, family, tied)
    model = load(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    save_weights(model, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(config_json(model.config, "float32", (1, 2), 0)))
    again = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ours, original = again.state_dict(), theirs.state_dict()
    assert set(ours) == set(original)
    for name in original:
        assert torch.equal(ours[name], original[name]), name
    assert again.generation_config.eos_token_id == [1, 2]
    assert decoder_config(out) == model.config


def test_table_names_every_parameter_once(tmp_path):
    for family in FAMILIES:
        hf_folder(tmp_path / family, family, tied=False)
        model = load(tmp_path / family)
        paths = [row.path for row in table(model.config)]
        assert sorted(map(str, paths)) == sorted(str(path) for path, _ in nnx.to_flat_state(model.params))


def test_bfloat16_is_near_float32(tmp_path):
    hf_folder(tmp_path)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 9)))
    logits = []
    for dtype in (jnp.float32, jnp.bfloat16):
        model = load(tmp_path, dtype)
        decoder = nnx.merge(model.graph, model.params)
        logits.append(np.asarray(decoder.logits(decoder(tokens))))
        assert logits[-1].dtype == np.float32
    close(logits[1], logits[0], 0.05)
    assert not np.array_equal(logits[0], logits[1])


def damaged(folder, how):
    from safetensors.numpy import load_file, save_file

    weights, config = folder / "model.safetensors", folder / "config.json"
    tensors, raw = load_file(weights), json.loads(config.read_text())
    name = "model.layers.1.mlp.up_proj.weight"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
        return "truncated"
    if how == "no weights":
        weights.unlink()
        return "no model.safetensors"
    if how == "nan":
        tensors[name][0, 0] = np.nan
    elif how == "missing and unexpected":
        tensors["strange"] = tensors.pop(name)
    elif how == "shape":
        tensors[name] = np.ascontiguousarray(tensors[name].T)
    elif how == "architecture":
        raw["model_type"] = "mamba"
    elif how == "scaling":
        raw["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 1.0, "factor": 4.0}
    elif how == "unknown field":
        raw["logit_softcapping"] = 30.0
    elif how == "bias":
        raw["attention_bias"] = True
    save_file(tensors, weights)
    config.write_text(json.dumps(raw))
    return {"nan": "not finite", "missing and unexpected": f"missing {name}; unexpected strange", "shape": "shape",
            "architecture": "mamba", "scaling": "yarn", "unknown field": "logit_softcapping",
            "bias": "attention_bias"}[how]  # fmt: skip


@pytest.mark.parametrize(
    "how",
    ["truncated", "no weights", "nan", "missing and unexpected", "shape", "architecture", "scaling", "unknown field",
     "bias"],
)  # fmt: skip
def test_damaged_folders_are_refused_in_one_line(tmp_path, how):
    hf_folder(tmp_path)
    says = damaged(tmp_path, how)
    with pytest.raises(InputError) as error:
        load(tmp_path)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_index_cannot_leave_the_folder(tmp_path):
    folder = tmp_path / "model"
    hf_folder(folder)
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    weight_map = {"model.norm.weight": "../model.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match="not a file in this folder"):
        load(folder)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 1, 4), (1, 4, 2), (2, 2, 2)])
def test_mesh_gives_the_same_logits_and_shards_what_it_can(tmp_path, shape):
    theirs = hf_folder(tmp_path, heads=8, kv_heads=4, tied=False)
    mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), shape)))
    model = load(tmp_path, mesh=mesh)
    tokens = np.random.default_rng(3).integers(0, 61, (8, 6))

    @jax.jit
    def logits(params, tokens):
        decoder = nnx.merge(model.graph, params)
        return decoder.logits(decoder(tokens))

    placed = jax.device_put(tokens, jax.NamedSharding(mesh, spec(mesh, ("batch", None), tokens.shape)))
    close(logits(model.params, placed), hf_logits(theirs, tokens))
    for array, want in zip(jax.tree.leaves(model.params), jax.tree.leaves(shardings(model, mesh)), strict=True):
        assert array.sharding.is_equivalent_to(want, array.ndim)
    kernel = model.params["blocks"][0]["q"]["kernel"][...]
    assert kernel.addressable_shards[0].data.size == kernel.size // (shape[1] * shape[2])


def test_mesh_that_does_not_fit_says_so():
    with pytest.raises(InputError, match="needs 3 devices, there are 8"):
        make_mesh({"data": 3, "fsdp": 1, "tensor": 1})


def test_initial_weights_depend_on_the_seed_alone(tmp_path):
    from heal_jax.model.decoder import initialise

    hf_folder(tmp_path)
    config = decoder_config(tmp_path)
    a, b, c = (initialise(config, seed).params["embed"][...] for seed in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)
    assert isinstance(nnx.merge(*nnx.split(Decoder(config, rngs=nnx.Rngs(0)))), Decoder)
