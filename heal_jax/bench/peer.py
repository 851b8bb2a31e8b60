"""Another tool, in a process of its own: `python peer.py torch|tunix FOLDER THREADS`.

Run by the Python that has the tool, which need not have heal_jax: nothing of it is imported. A request is a line of
JSON on stdin, an answer one on stdout; the first line says which versions answer. Every request is one repeat and is
answered with the seconds of the work alone, or with an error.
"""

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Request = dict[str, Any]
Handler = Callable[[Request], dict[str, Any]]


def torch_tool(folder: str, threads: int) -> tuple[dict[str, Handler], tuple[str, ...]]:
    """transformers' generate and a training step, both PyTorch."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    torch.set_num_threads(threads)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain = model.forward
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    optimizer: list[torch.optim.Optimizer] = []

    def decode(request: Request) -> dict[str, Any]:
        """prompts [B, P] of one length, new: tokens a row; cache: dynamic or static; compiled: of torch.compile."""
        model.eval()
        compiled = request.get("compiled", False)
        if compiled and model.forward is plain:
            model.forward = torch.compile(plain)
        elif not compiled:
            model.forward = plain
        # Without an EOS nothing stops early, and nothing has to be forbidden to keep it from doing so.
        settings = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=request["new"],
            pad_token_id=0,
            cache_implementation=None if request["cache"] == "dynamic" else request["cache"],
        )
        settings.eos_token_id = None
        model.generation_config = settings
        torch.manual_seed(request["seed"])
        tokens = torch.tensor(request["prompts"], device=device)
        with torch.inference_mode():
            start = time.perf_counter()
            made = model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=settings).cpu()
            seconds = time.perf_counter() - start
        return {"seconds": seconds, "shape": [made.shape[0], made.shape[1] - tokens.shape[1]]}

    def train(request: Request) -> dict[str, Any]:
        """An update on tokens [B, T], full rows, that follows another: mean cross-entropy, clipping by global norm,
        AdamW (fused)."""
        model.train()
        model.forward = plain
        if not optimizer:
            settings = {"lr": request["learning_rate"], "betas": (0.9, 0.95), "weight_decay": 0.0, "fused": True}
            optimizer.append(torch.optim.AdamW(model.parameters(), **settings))
        tokens = torch.tensor(request["tokens"], device=device)

        def update() -> float:
            optimizer[0].zero_grad(set_to_none=True)
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer[0].step()
            return float(loss.detach())  # a device's work is waited for

        update()
        start = time.perf_counter()
        value = update()
        return {"seconds": time.perf_counter() - start, "loss": value}

    return {"decode": decode, "train": train}, ("torch", "transformers")


def tunix_tool(folder: str, threads: int) -> tuple[dict[str, Handler], tuple[str, ...]]:
    """Tunix's sampler. JAX takes the processor's cores itself; `threads` is not needed."""
    import jax
    import jax.numpy as jnp

    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        c = json.load(file)
    sizes = {
        "num_layers": c["num_hidden_layers"],
        "vocab_size": c["vocab_size"],
        "embed_dim": c["hidden_size"],
        "hidden_dim": c["intermediate_size"],
        "num_heads": c["num_attention_heads"],
        "head_dim": c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"],
        "num_kv_heads": c["num_key_value_heads"],
        "rope_theta": c.get("rope_theta") or c["rope_parameters"]["rope_theta"],
        "norm_eps": c["rms_norm_eps"],
    }
    # The two families that have a loader of safetensors folders and that heal_jax has, too.
    if c["model_type"] == "llama":
        from tunix.models.llama3 import model as family
        from tunix.models.llama3 import params

        config = family.ModelConfig(**sizes, weight_tying=c["tie_word_embeddings"])
    elif c["model_type"] == "qwen3":
        from tunix.models.qwen3 import model as family
        from tunix.models.qwen3 import params

        config = family.ModelConfig(**sizes, use_tied_embedding=c["tie_word_embeddings"])
    else:
        raise ValueError(f"no Tunix model is tried for model_type {c['model_type']}")
    from tunix.generate.sampler import CacheConfig, Sampler

    model = params.create_model_from_safe_tensors(folder, config, dtype=jnp.float32)

    class Rows:
        """The tokenizer: "3" is prompt 3. No id is padding or an end; 0 as the begin means that none is put first."""

        prompts: list[list[int]] = []

        def encode(self, text: str, **_: Any) -> list[int]:
            return self.prompts[int(text)]

        def decode(self, ids: list[int], **_: Any) -> str:
            return str(len(ids))

        def bos_id(self) -> int:
            return 0

        def pad_id(self) -> int:
            return -1

        eos_id = pad_id

    rows = Rows()
    samplers: dict[int, Any] = {}

    def decode(request: Request) -> dict[str, Any]:
        """prompts [B, P] of one length, a power of two; new: tokens a row."""
        prompts, new = request["prompts"], request["new"]
        size = len(prompts[0]) + new
        if size not in samplers:
            cache = CacheConfig(size, config.num_layers, config.num_kv_heads, config.head_dim)
            samplers[size] = Sampler(model, rows, cache)
        rows.prompts = prompts
        start = time.perf_counter()
        made = samplers[size](
            [str(i) for i in range(len(prompts))],
            max_generation_steps=new,
            max_prompt_length=len(prompts[0]),
            eos_tokens=[-1],
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            seed=jax.random.key(request["seed"]),
        )
        jax.block_until_ready(made.tokens)
        return {"seconds": time.perf_counter() - start, "shape": [len(made.tokens), len(made.tokens[0])]}

    return {"decode": decode}, ("google-tunix", "jax", "jaxlib")


def main() -> None:
    """Answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints is no answer
    tool, folder, threads = sys.argv[1:4]
    handlers, packages = {"torch": torch_tool, "tunix": tunix_tool}[tool](folder, int(threads))
    print(json.dumps({name: importlib.metadata.version(name) for name in packages}), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = handlers[request["do"]](request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
