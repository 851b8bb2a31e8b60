"""The decoder against transformers on the same weights, and against itself with a cache."""

import json
import shutil
from collections import defaultdict
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import FAMILIES, LENGTH, VOCAB, entropy64, error, hf_folder, hf_logits, settings_of

from heal_jax.errors import InputError
from heal_jax.model.config import FAMILIES as SUPPORTED
from heal_jax.model.config import FIXED, NEUTRAL, READ, both_spellings, decoder_config, read_config_json
from heal_jax.model.decoder import Decoder
from heal_jax.model.kv_cache import empty_cache, view
from heal_jax.model.layers import SCAN_FROM, stretches
from heal_jax.model.mesh import make_mesh, spec
from heal_jax.model.weights import load, save_weights, shardings, table
from heal_jax.rollout.draw import entropy_of

EXAMPLES = 6  # random models a family


def merged(model):
    return nnx.merge(model.graph, model.params)


@pytest.fixture(scope="module")
def parity():
    """Largest error of each family and way of computing; printed at the end as the README's table."""
    found = defaultdict(float)
    yield found
    if found:
        columns = ("full pass", "prefill and decode", "shared prefixes", "batch 1 and N", "entropies")
        print("\n| family | " + " | ".join(columns) + " |")
        for family in dict.fromkeys(family for family, _ in found):
            print(f"| {family} | " + " | ".join(f"{found[family, c]:.1e}" for c in columns) + " |")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_logits_equal_transformers(tmp_path_factory, family, parity):
    @settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.too_slow])
    @given(settings_of(family), st.integers(0, 99))
    def check(values, seed):
        folder = tmp_path_factory.mktemp("hf")
        theirs = hf_folder(folder, family, seed, **values)
        model = load(folder)
        shutil.rmtree(folder)
        compare(theirs, merged(model), seed, lambda what, e: note(what, e, values))

    def note(what, worst, values):
        parity[family, what] = max(parity[family, what], worst)
        assert worst < 1e-4, (what, worst, values)

    check()


def compare(theirs, decoder, seed, note):
    """A full pass, a prefill with single tokens after it, and batch 1 against batch N, on rows of mixed lengths."""
    tokens = np.random.default_rng(seed).integers(0, VOCAB, (3, LENGTH))
    want = hf_logits(theirs, tokens)
    scale = np.abs(want).max()
    forward = nnx.jit(lambda decoder, tokens: decoder.logits(decoder(tokens)))
    read = nnx.jit(lambda decoder, tokens, count, views: decoder.read(tokens, count, views))
    extend = nnx.jit(lambda decoder, tokens, cache, at, views: decoder.extend(tokens, cache, at, views))
    full = forward(decoder, jnp.asarray(tokens))
    note("full pass", error(full, want, scale))
    note("entropies", float(np.abs(np.asarray(entropy_of(full)[0]) - entropy64(want)).max()))

    counts = np.array([9, 1, 13])
    hidden, cache = read(decoder, jnp.asarray(tokens[:, :13]), jnp.asarray(counts), ())
    logits = np.asarray(decoder.logits(hidden))
    prefilled = logits
    for row, count in enumerate(counts):
        note("prefill and decode", error(logits[row, :count], want[row, :count], scale))
    own, rows = empty_cache(decoder.config, 3, 8, jnp.float32), np.arange(3)
    for i in range(8):
        hidden, own = extend(decoder, jnp.asarray(tokens[rows, counts + i]), own, jnp.int32(i), (view(cache),))
        note("prefill and decode", error(decoder.logits(hidden), want[rows, counts + i], scale))

    if seed % 3 == 0:  # compiles five programs more
        shared(theirs, decoder, tokens, read, extend, lambda worst: note("shared prefixes", worst))

    # A row alone, with no neighbour and no padding, against the same row among others of other lengths.
    alone = forward(decoder, jnp.asarray(tokens[2:, :13]))
    note("batch 1 and N", max(error(alone[0], want[2, :13], scale), error(alone[0], prefilled[2], scale)))


def shared(theirs, decoder, tokens, read, extend, note):
    """One prompt, two different texts kept after it, two rows after each: every level is held once. The rows have
    decoded different numbers of tokens. Against a whole pass over each row's tokens."""
    prompt, kept, lengths = tokens[:1, :7], tokens[1:, :6], np.array([6, 2])
    _, cache = read(decoder, jnp.asarray(prompt), jnp.array([7]), ())
    before = view(cache).repeat(2)
    hidden, cache = read(decoder, jnp.asarray(kept), jnp.asarray(lengths), (before,))
    views = tuple(level.repeat(2) for level in (before, view(cache, before)))
    own, begins = empty_cache(decoder.config, 4, 5, jnp.float32), np.array([0, 3, 1, 0])
    new = np.random.default_rng(1).integers(0, VOCAB, (4, 5))
    for i in range(5):
        at = np.maximum(i - begins, 0)  # a row that has not begun writes its first slot, again and again
        hidden, own = extend(decoder, jnp.asarray(new[np.arange(4), at]), own, jnp.asarray(at, jnp.int32), views)
        for row in range(4):
            text = [*prompt[0], *kept[row // 2, : lengths[row // 2]], *new[row, : at[row] + 1]]
            want = hf_logits(theirs, [text])[0]
            note(error(decoder.logits(hidden)[row], want[-1], np.abs(want).max()))


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_many_queries_go_in_blocks(tmp_path, family, monkeypatch):
    """Blocks of queries give what one block gives: logits, gradients, packed segments, a cache."""
    hf_folder(tmp_path, family)
    decoder = merged(load(tmp_path))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (2, 21)))
    segments = jnp.asarray([[0] * 9 + [1] * 12] * 2)
    positions = jnp.asarray([[*range(9), *range(12)]] * 2)

    def results(remat):
        @nnx.jit
        def compute(decoder):
            def loss(decoder):
                return jnp.sum(jnp.sin(decoder.logits(decoder(tokens, segments, positions, remat=remat))))

            before = view(decoder.read(tokens[:1, :5], jnp.array([5]))[1]).repeat(2)
            return nnx.value_and_grad(loss)(decoder), decoder.read(tokens, jnp.array([21, 5]), (before,))[0]

        return jax.tree.leaves(compute(decoder))

    whole, again = results("none"), results("block")
    monkeypatch.setattr("heal_jax.model.attention.QUERY_BLOCK", 8)
    for ours in (again, *map(results, ("none", "dots", "block"))):
        for a, b in zip(ours, whole, strict=True):
            assert error(a, b, np.abs(b).max()) < 1e-4


def test_segments_keep_packed_rows_apart(tmp_path):
    hf_folder(tmp_path)
    model = load(tmp_path)
    decoder = merged(model)
    tokens = np.random.default_rng(1).integers(0, 61, (1, 12))
    segments = jnp.array([[0] * 5 + [1] * 7])
    positions = jnp.array([[*range(5), *range(7)]])
    packed = decoder(jnp.asarray(tokens), segments, positions)
    np.testing.assert_allclose(packed[:, :5], decoder(jnp.asarray(tokens[:, :5])), atol=1e-5)
    np.testing.assert_allclose(packed[:, 5:], decoder(jnp.asarray(tokens[:, 5:])), atol=1e-5)


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_round_trip(tmp_path, family, dtype):
    """Read and written again, in several files, an untouched model has the same tensors and the same configuration."""
    source, out = tmp_path / "source", tmp_path / "out"
    hf_folder(source, family, dtype=DTYPES[dtype], tie_word_embeddings=family == "llama")
    model = load(source, jnp.dtype(dtype))
    out.mkdir()
    save_weights(model, out, limit=10_000)
    assert len(list(out.glob("*.safetensors"))) > 2
    (out / "config.json").write_text(json.dumps(both_spellings(read_config_json(source), dtype)))
    assert decoder_config(out) == model.config == decoder_config(source)
    again, original = (transformers.AutoModelForCausalLM.from_pretrained(x, dtype="auto") for x in (out, source))
    assert again.config.to_dict() | {"_name_or_path": ""} == original.config.to_dict() | {"_name_or_path": ""} | {
        name: again.config.to_dict()[name] for name in ("rope_theta", "rope_scaling", "num_experts", "torch_dtype",
                                                        "rope_local_base_freq") if name in again.config.to_dict()
    }  # fmt: skip
    ours, theirs = again.state_dict(), original.state_dict()
    assert set(ours) == set(theirs)
    for name in theirs:
        assert ours[name].dtype == DTYPES[dtype] and torch.equal(ours[name], theirs[name]), name


def test_single_file_for_a_small_model(tmp_path):
    hf_folder(tmp_path)
    (tmp_path / "out").mkdir()
    save_weights(load(tmp_path), tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.safetensors"]


def test_table_names_every_parameter_once(tmp_path):
    for family in FAMILIES:
        hf_folder(tmp_path / family, family, tie_word_embeddings=False)
        model = load(tmp_path / family)
        rows = table(model.config)
        assert len({row.tensor for row in rows}) == len(rows)
        assert {row.path for row in rows} == {path for path, _ in nnx.to_flat_state(model.params)}
        assert len({row.path for row in rows}) == len([row for row in rows if not row.expert])


def test_every_field_of_every_family_is_known():
    """What transformers' own classes hold is read, fixed or neutral: a new field there shows here."""
    assert set(SUPPORTED) == set(FAMILIES)
    for family, (config_class, _) in FAMILIES.items():
        unknown = set(config_class().to_dict()) - READ - NEUTRAL - set(FIXED)
        assert not unknown, (family, unknown)


OLD = {
    "llama": {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "gemma3_text": {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 2, "sliding_window": 5,
                    "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "qwen2": {"rope_theta": 1e6, "sliding_window": 4, "use_sliding_window": False, "max_window_layers": 1},
}  # fmt: skip


@pytest.mark.parametrize("family", sorted(OLD))
def test_old_spellings_of_config_json(tmp_path, family):
    """A config.json of version 4: the same logits as transformers makes of it."""
    hf_folder(tmp_path, family)
    raw = json.loads((tmp_path / "config.json").read_text())
    for name in ("rope_parameters", "layer_types", "dtype", "_sliding_window_pattern"):
        raw.pop(name, None)
    (tmp_path / "config.json").write_text(json.dumps(raw | OLD[family] | {"torch_dtype": "float32"}))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    compare(theirs, merged(load(tmp_path)), 0, lambda what, worst: np.testing.assert_array_less(worst, 1e-4))


def test_bfloat16_is_near_float32(tmp_path):
    hf_folder(tmp_path)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 9)))
    logits = []
    for dtype in (jnp.float32, jnp.bfloat16):
        model = load(tmp_path, dtype)
        decoder = merged(model)
        logits.append(np.asarray(decoder.logits(decoder(tokens))))
        assert logits[-1].dtype == np.float32
    assert error(logits[1], logits[0], np.abs(logits[0]).max()) < 0.1
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
        raw["rope_parameters"] = {"rope_type": "longrope", "rope_theta": 1.0, "factor": 4.0}
    elif how == "unknown field":
        raw["logit_softcapping"] = 30.0
    elif how == "bias":
        raw["attention_bias"] = True
    elif how == "softcap":
        raw["final_logit_softcapping"] = 30.0
    elif how == "window":
        raw["sliding_window"] = 4  # which Llama models do not read
    elif how == "scalar copy":
        tensors |= {k: np.ones((), np.float32) for k in ("lm_head.weight", "model.embed_tokens.weight")}
    elif how == "flat yarn":
        raw["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                                  "original_max_position_embeddings": 0.5}  # fmt: skip
    elif how == "remote code":
        raw["auto_map"] = {"AutoModelForCausalLM": "modeling.Evil"}
    elif how == "type":
        raw["hidden_size"] = "wide"
    elif how == "dtype":
        tensors[name] = tensors[name].astype(np.int32)
    elif how == "untied copy":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, weights)
    config.write_text(json.dumps(raw))
    return {"nan": "not finite", "missing and unexpected": f"missing {name}; unexpected strange", "shape": "shape",
            "architecture": "mamba", "scaling": "longrope", "unknown field": "logit_softcapping",
            "bias": "missing model.layers.0.self_attn.k_proj.bias", "softcap": "final_logit_softcapping",
            "window": "sliding_window", "scalar copy": "differs", "flat yarn": "original_max_position_embeddings",
            "remote code": "auto_map", "type": "hidden_size", "dtype": "I32", "untied copy": "lm_head.weight differs",
            }[how]  # fmt: skip


@pytest.mark.parametrize(
    "how",
    ["truncated", "no weights", "nan", "missing and unexpected", "shape", "architecture", "scaling", "unknown field",
     "bias", "softcap", "window", "scalar copy", "flat yarn", "remote code", "type", "dtype", "untied copy"],
)  # fmt: skip
def test_damaged_folders_are_refused_in_one_line(tmp_path, how):
    hf_folder(tmp_path)
    says = damaged(tmp_path, how)
    with pytest.raises(InputError) as error:
        load(tmp_path)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_too_large_for_the_dtype(tmp_path):
    hf_folder(tmp_path)
    from safetensors.numpy import load_file, save_file

    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"][0] = 1e6
    save_file(tensors, tmp_path / "model.safetensors")
    load(tmp_path)
    with pytest.raises(InputError, match="not finite in model.norm.weight as float16"):
        load(tmp_path, jnp.float16)


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
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 40, "vocab_size": 64}
    theirs = hf_folder(tmp_path, tie_word_embeddings=False, **sizes)
    mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), shape)))
    model = load(tmp_path, mesh=mesh)
    tokens = np.random.default_rng(3).integers(0, 61, (8, 6))

    @jax.jit
    def logits(params, tokens):
        decoder = nnx.merge(model.graph, params)
        return decoder.logits(decoder(tokens))

    placed = jax.device_put(tokens, jax.NamedSharding(mesh, spec(mesh, ("batch", None), tokens.shape)))
    want = hf_logits(theirs, tokens)
    assert error(logits(model.params, placed), want, np.abs(want).max()) < 1e-4
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


DEEP = {
    "qwen2": {"num_hidden_layers": 9, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 4},
    "qwen3_moe": {"num_hidden_layers": 9, "decoder_sparse_step": 2},
    "gemma3_text": {"layer_types": (["sliding_attention", "full_attention"] * 5)[:9], "num_hidden_layers": 9},
}


@pytest.mark.parametrize(("family", "remat"), [("qwen2", "none"), ("qwen3_moe", "block"), ("gemma3_text", "dots")])
def test_scanned_layers_give_what_layers_in_a_row_do(tmp_path, family, remat, monkeypatch):
    """Logits and gradients, of packed rows; and the program is smaller."""
    hf_folder(tmp_path, family, **DEEP[family])
    decoder = merged(load(tmp_path))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (2, 21)))
    segments, positions = jnp.asarray([[0] * 9 + [1] * 12] * 2), jnp.asarray([[*range(9), *range(12)]] * 2)

    def results():
        def loss(decoder):
            return jnp.sum(jnp.sin(decoder.logits(decoder(tokens, segments, positions, remat=remat))))

        compute = nnx.jit(nnx.value_and_grad(loss))
        return jax.tree.leaves(compute(decoder)), len(compute.lower(decoder).as_text())

    in_a_row, size = results()
    monkeypatch.setattr("heal_jax.model.layers.UNROLLED", ())
    scanned, smaller = results()
    assert smaller < 0.9 * size
    for a, b in zip(scanned, in_a_row, strict=True):
        assert error(a, b, np.abs(b).max()) < 1e-4


@given(st.lists(st.booleans(), min_size=1, max_size=24))
def test_stretches_cover_every_layer_once(sliding):
    config = Stretched(len(sliding), tuple(sliding))
    found = list(stretches(config))
    assert [start for start, *_ in found] == list(np.cumsum([0, *(p * n for _, p, n in found)]))[:-1]
    assert sum(period * times for _, period, times in found) == len(sliding)
    for start, period, times in found:
        assert times == 1 == period or times >= SCAN_FROM
        assert sliding[start : start + period] * times == sliding[start : start + period * times]


@pytest.mark.parametrize(
    ("sliding", "found"),
    [
        ([False] * 36, [(0, 1, 36)]),
        ([False] * 3, [(0, 1, 1), (1, 1, 1), (2, 1, 1)]),
        (([True] * 5 + [False]) * 4 + [True] * 2, [(0, 6, 4), (24, 1, 1), (25, 1, 1)]),  # Gemma 3 1B
        ([False] * 10 + [True] * 20, [(0, 1, 10), (10, 1, 20)]),
        ([True] + [False] * 8, [(0, 1, 1), (1, 1, 8)]),
    ],
)
def test_stretches(sliding, found):
    assert list(stretches(Stretched(len(sliding), tuple(sliding)))) == found


class Stretched(NamedTuple):
    """As much of a configuration as decides which layers are alike."""

    num_layers: int
    sliding: tuple[bool, ...]

    def layer_window(self, layer):
        return 5 * self.sliding[layer]

    def layer_rope(self, layer):
        return self.sliding[layer]

    def has_experts(self, layer):
        return False
