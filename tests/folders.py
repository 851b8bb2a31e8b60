"""Model folders made for tests: a student with a tokenizer of its own, and teachers that think before they answer."""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE

from heal_jax.world import model_folder, traces
from heal_jax.world.base import PERFECT
from heal_jax.world.sums import Sums, question_of

# Our own words in the manner of templates for thinking models: what an earlier turn thought is dropped.
ANSWER_ONLY = "{% if m.role == 'assistant' %}{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}"
OWN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n" + ANSWER_ONLY + "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
WORLD_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>" + ANSWER_ONLY + "{% if m.role == 'assistant' %}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>OPENING{% endif %}"
)
# Seldom used tokens of the built-in tokenizer become tags and tokens that hold parts of tags beside other text.
ODD = {
    "~": "<think>", "`": "</think>", "^": "\n\n</", "@": "think>", "#": "</think>\n\n", "$": ">\n\n", "&": "1\n\n</th",
    "%": "<think>\n1", "?": " \n<", "!": "\n\n\n", ";": "=1\n", "'": "</think>1",
}  # fmt: skip


def own_student(folder: Path, normalizer: normalizers.Normalizer | None = None) -> Path:
    """A tiny random Llama with a byte-level BPE trained on the world's texts, another chat template and two EOS ids."""
    rng = np.random.default_rng(0)
    texts = []
    for _ in range(100):
        terms = [int(x) for x in rng.integers(10**10, 10**12, size=3)]
        texts += [question_of(terms), traces.unaided(Sums(), question_of(terms), PERFECT, rng)]
    fast = Fast(BPE())
    if normalizer is not None:
        fast.normalizer = normalizer
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(texts, trainer)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        chat_template=OWN_TEMPLATE,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.5, tie_word_embeddings=True,
        eos_token_id=[0, 2], pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    return folder


def thinking_teacher(folder: Path, opens: bool) -> Path:
    """The built-in teacher's weights with tags in its vocabulary; `opens`: its template opens the thinking part."""
    shutil.copytree(model_folder("teacher"), folder)
    fast = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = fast["model"]["vocab"]
    for old, new in ODD.items():
        vocabulary[new] = vocabulary.pop(old)
    for tag in ("<think>", "</think>"):
        fast["added_tokens"].append(fast["added_tokens"][0] | {"id": vocabulary[tag], "content": tag, "special": False})
    fast["added_tokens"].sort(key=lambda token: token["id"])
    (folder / "tokenizer.json").write_text(json.dumps(fast))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = WORLD_TEMPLATE.replace("OPENING", "<think>\n" if opens else "")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
