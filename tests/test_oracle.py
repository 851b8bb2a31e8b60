"""The run's rollouts recomputed with PyTorch and NumPy: entropies, breakpoints, kept prefixes, PURE."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers

from heal_jax.store import RunDirectory


class Oracle:
    """The teacher of a run in float32 transformers, one sequence at a time, no cache."""

    def __init__(self, out: Path):
        path = json.loads((out / "manifest.json").read_text())["models"]["teacher"]["path"]
        self.model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)

    def score(self, context: list[int], tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Log-probability and entropy of each of `tokens` after `context`, float64."""
        with torch.no_grad():
            logits = self.model(torch.tensor([context + tokens])).logits[0, len(context) - 1 : -1].double()
        logp = torch.log_softmax(logits, -1)
        entropy = -(logp.exp() * logp).sum(-1)
        return logp[torch.arange(len(tokens)), torch.tensor(tokens)].numpy(), entropy.numpy()

    def texts(self, tokens: list[int]) -> list[str]:
        """The text of each token, as what it adds to the text before it; the EOS adds none."""
        whole = [self.tokenizer.decode(tokens[:i], skip_special_tokens=True) for i in range(len(tokens) + 1)]
        return [after[len(before) :] for before, after in zip(whole, whole[1:])]

    def steps(self, tokens: list[int]) -> list[list[int]]:
        """Token indices of each step, by splitting the text (no step of this world is blank)."""
        texts, steps = self.texts(tokens), [[]]
        for i, text in enumerate(texts):
            steps[-1].append(i)
            if text.endswith("\n\n"):
                steps.append([])
        if not any(texts[i] for i in steps[-1]):  # nothing or the EOS alone: part of the last step
            tail = steps.pop()
            steps[-1] += tail
        return steps


@pytest.fixture(scope="session")
def run(tiny):
    out = tiny[0]
    return Oracle(out), RunDirectory(out).rollouts().to_pylist(), out


def test_entropies_and_log_probabilities(run):
    oracle, rows, _ = run
    for row in rows[::3]:
        decoded = row["tokens"][row["kept_tokens"] or 0 :]
        logprob, entropy = oracle.score(row["context_tokens"], decoded)
        np.testing.assert_allclose(row["entropy"], entropy, atol=1e-4)
        np.testing.assert_allclose(row["logprob"], logprob, atol=1e-4)
        np.testing.assert_allclose(row["sampling_logprob"], logprob, atol=1e-4)  # temperature 1, nothing filtered


def test_steps(run):
    oracle, rows, _ = run
    for row in rows[::3]:
        assert row["step_starts"] == [step[0] for step in oracle.steps(row["tokens"])]


def test_paths_breakpoints_and_kept_prefixes(run):
    oracle, rows, out = run
    problems = pq.read_table(out / "problems.parquet").to_pylist()
    base = {row["rollout_id"]: row for row in rows if row["kind"] == "base"}
    repairs = [row for row in rows if row["kind"] == "repair"]
    wanted = []
    for problem in (p for p in problems if p["stratum"] == "unsolved"):
        failed, seen = [r for r in base.values() if r["problem_id"] == problem["id"] and r["grade"] != "correct"], []
        for row in failed:
            if row["tokens"] not in seen and len(seen) < 2:
                seen.append(row["tokens"])
                wanted.append(row["rollout_id"])
    assert list(dict.fromkeys(row["parent_id"] for row in repairs)) == wanted and wanted
    for parent_id in wanted:
        parent = base[parent_id]
        _, entropy = oracle.score(parent["context_tokens"], parent["tokens"])
        steps = oracle.steps(parent["tokens"])
        h = [float(np.mean(entropy[step])) for step in steps]
        surge = [h[k] - h[k - 1] for k in range(1, max(1, math.ceil(len(h) / 3 - 1e-9) - 1) + 1)]
        best = 1 + int(np.argmax(surge))
        for row in (r for r in repairs if r["parent_id"] == parent_id):
            k = row["breakpoint_step"]
            assert k == best or surge[k - 1] == pytest.approx(surge[best - 1], abs=1e-5)
            assert row["kept_tokens"] == sum(map(len, steps[: max(0, k - 1)]))
            assert row["tokens"][: row["kept_tokens"]] == parent["tokens"][: row["kept_tokens"]]


def test_pure(run):
    oracle, rows, _ = run
    scored = 0
    for i, row in enumerate(rows):
        if row["kind"] == "base" and i % 3:
            continue
        if row["pure_score"] is None:
            assert row["kind"] != "base" and row["grade"] != "correct"
            continue
        scored += 1
        tokens, kept = row["tokens"], row["kept_tokens"] or 0
        logprob, entropy = oracle.score(row["prompt_tokens"], tokens)
        texts = oracle.texts(tokens)
        text = "".join(texts)
        boxes = list(re.finditer(r"\\boxed\{([^{}]*)\}", text))
        answer = boxes[-1].span(1) if boxes else (0, 0)
        ends = np.cumsum([len(t) for t in texts])
        starts = ends - [len(t) for t in texts]
        groups: list[list[int]] = [[] for _ in range(len(oracle.steps(tokens)) + 1)]
        for k, step in enumerate(oracle.steps(tokens)):
            for t in step:
                if t >= kept and texts[t]:
                    in_answer = starts[t] < answer[1] and ends[t] > answer[0]
                    groups[-1 if in_answer else k].append(t)
        groups = [g for g in groups if g]
        ppl = [math.exp(-np.mean(logprob[g])) for g in groups]
        expected = [math.exp(np.mean(entropy[g])) for g in groups]
        ratio = [p / (e + 0.01) for p, e in zip(ppl, expected)]
        score = 0.8 * np.mean(ratio) + 0.2 * max(ratio)
        np.testing.assert_allclose(row["step_ppl"], ppl, rtol=1e-3)
        np.testing.assert_allclose(row["step_expected_ppl"], expected, rtol=1e-3)
        np.testing.assert_allclose(row["pure_score"], score, rtol=1e-3)
    assert scored > 10
