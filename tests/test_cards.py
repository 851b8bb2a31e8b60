"""The cards and the Parquet files of an export: read by the libraries that they are for."""

import contextlib
import dataclasses
import io
import json
import re
from types import SimpleNamespace

import datasets
import huggingface_hub
import pyarrow.parquet as pq
import pytest
import transformers
from folders import own_student
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from heal_jax.config import Config, ModelSpec, ProblemSpec, load
from heal_jax.model.lm import open_tokenizer
from heal_jax.problems.sources import Problem
from heal_jax.share import cards, dataset, markdown, naming
from heal_jax.store import EVALUATION, RunDirectory
from heal_jax.train.data import Example, read_stage

COMMONMARK = MarkdownIt("commonmark").enable("table")
ANY = st.text(max_size=60)
HOSTILE = "<script>alert(1)</script>`|[x](y)\n---\nlicense: mit\n*a* ![i](http://x/y)\u202e ```"


def blocks(text, language):
    return [token.content for token in COMMONMARK.parse(text) if token.type == "fence" and token.info == language]


def plain(text):
    """Inline Markdown as CommonMark shows it; None where anything in it is more than text."""
    tokens = [token for block in COMMONMARK.parseInline(text) for token in block.children or []]
    told = "".join(token.content for token in tokens)
    return told if {token.type for token in tokens} <= {"text", "text_special"} else None


@given(ANY | st.text("`|<>*_[]()!\\&;#ab \n", max_size=30))
def test_escaped_text_is_shown_as_it_is(text):
    shown = plain(markdown.escape(text))
    assert shown is not None and not set(shown) & set("\n\u202e\x1b")
    if text.isascii() and text.isprintable():
        assert shown == " ".join(text.split())
    (table, *rest) = COMMONMARK.parse(markdown.table(["a", "b"], [[markdown.escape(text) or "-", "end"]]))
    cells = [token.content for token in (table, *rest) if token.type == "inline"]
    assert len(cells) == 4 and cells[3] == "end"


@given(st.text("`~\nab -\\", max_size=60))
def test_code_stays_in_its_block(text):
    (fence,) = COMMONMARK.parse(markdown.code(text, "bash"))
    assert fence.type == "fence" and fence.content.rstrip("\n") == text.rstrip()


@given(st.dictionaries(st.text("abc", min_size=1), ANY, max_size=4), ANY)
def test_front_matter_comes_back_and_ends_where_it_ends(data, body):
    text = markdown.front_matter(data) + body
    assert markdown.read_front_matter(text) == {name: value for name, value in data.items() if value}
    assert text.endswith(body) and markdown.read_front_matter(body.replace("-", "")) == {}


@pytest.mark.parametrize(
    ("card", "want"),
    [
        ("---\nlicense: apache-2.0\ntags: [x]\n---\n# A model", {"license": "apache-2.0"}),
        (
            "---\r\nlicense: other\r\nlicense_name: own\r\nlicense_link: LICENSE\r\n---\r\n",
            {"license": "other", "license_name": "own", "license_link": "LICENSE"},
        ),
        ("# license: mit\n", {}),
        ("---\nlicense: [mit]\n---\n", {}),
        ("---\nlicense: '<b>'\n---\n", {}),
        ("---\nlicense: !!python/object/apply:os.getcwd []\n---\n", {}),
        ("---\nlicense_name: own\n---\n", {}),
        (None, {}),
    ],
)
def test_a_licence_is_the_student_s_own_card_s_or_none(tmp_path, card, want):
    if card is not None:
        (tmp_path / "README.md").write_bytes(card.encode())
    assert cards.licence(tmp_path) == want
    made = cards.model_card(Config(), {}, {}, want, chat=True)
    assert {k: v for k, v in markdown.read_front_matter(made).items() if k.startswith("license")} == want


def test_names_and_never_places_of_a_machine():
    cached = "/home/me/.cache/huggingface/hub/models--Qwen--Qwen3-0.6B/snapshots/0123abcd"
    names = {cached: "Qwen/Qwen3-0.6B", "/mnt/models/mine": "mine", "models/mine": "mine", "~/x/": "x"}
    assert {path: naming.model(path) for path in names} == names
    assert naming.on_hub("models/mine") is None  # a folder, whoever it is of
    assert naming.data_on_hub("hf:openai/gsm8k") == "openai/gsm8k" and naming.data_on_hub("hf:/home/me/set") is None
    config = Config(
        teacher=ModelSpec(cached),
        student=ModelSpec("../models/mine"),
        problems=ProblemSpec("jsonl:/home/me/a.jsonl", options={"data_dir": "/home/me/sets/b"}),
    )
    problems = {"c": dataclasses.replace(config.evaluate, problems=ProblemSpec("jsonl:~/c.jsonl"), sets={})}
    config = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, sets=problems))
    manifest = {"models": {"teacher": {"sha256": "0" * 64}}}
    for text in (cards.model_card(config, manifest, {}, {}, True), str(naming.origin(config, manifest))):
        assert "/home" not in text and "~/" not in text and "../models" not in text and "a.jsonl" in text
    front = markdown.read_front_matter(
        cards.model_card(dataclasses.replace(config, student=config.teacher), {}, {}, {}, True)
    )
    assert front["base_model"] == "Qwen/Qwen3-0.6B" and "license" not in front


def test_hostile_names_stay_names():
    config = Config(student=ModelSpec(f"/models/{HOSTILE.replace('/', '')}"), teacher=ModelSpec(HOSTILE))
    figures = {"mean": 0.5, "ci95": [0.25, 0.75], "n": 4, "per_level": {HOSTILE: {"mean": 0.5, "ci95": [0, 1], "n": 4}}}
    summary = {
        "accuracy": dict.fromkeys(("teacher", "student_base", "rejection_sampling", "heal"), figures),
        "difference": figures,
        "strata": {"solved": 1, "hard": 3, "unsolved": 2},
    }
    text = cards.model_card(config, {"config": HOSTILE, "versions": {HOSTILE: HOSTILE}}, summary, {}, True)
    front = markdown.read_front_matter(text)
    assert "license" not in front and "alert" in front["model-index"][0]["name"]
    tokens = COMMONMARK.parse(text.split("---\n\n", 1)[1])
    inner = [t for token in tokens for t in (token, *(token.children or []))]
    assert not {"html_block", "html_inline", "image"} & {token.type for token in inner}
    assert {t.attrs["href"] for t in inner if t.type == "link_open"} == {
        "https://arxiv.org/abs/2603.10359", "https://docs.vllm.ai",
    }  # fmt: skip
    assert len(blocks(text, "python")) == 1 and len(blocks(text, "bash")) == 2


def test_the_card_has_the_results_and_the_hub_s_library_reads_it(tiny):
    out = tiny[0]
    text = (out / "export" / "README.md").read_text()
    card = huggingface_hub.ModelCard(text)
    summary, manifest = (json.loads((out / name).read_text()) for name in ("summary.json", "manifest.json"))
    (result,) = card.data.eval_results
    assert result.metric_value == pytest.approx(summary["accuracy"]["heal"]["mean"], abs=1e-4)
    assert result.dataset_type == "world-sums" and card.data.library_name == "transformers"
    assert card.data.license is None and card.data.base_model is None  # nothing says them
    low, high = (f"{100 * x:.1f}" for x in summary["accuracy"]["teacher"]["ci95"])
    assert f"{100 * summary['accuracy']['teacher']['mean']:.1f} ({low} to {high})" in text
    assert f"n = {summary['accuracy']['heal']['n']}" in text and manifest["config"] in text
    for stage in ("1", "2", "3"):
        assert f"| stage {stage} | {summary['stages'][stage]['examples']} examples" in text
    for name in ("export", "dataset"):
        said = (out / name / "README.md").read_text()
        assert str(out) not in said and "/work" not in said and "/home" not in said and "/tmp" not in said


def test_the_card_s_snippet_works(tiny):
    (snippet,) = blocks(
        cards.addressed((tiny[0] / "export" / "README.md").read_text(), str(tiny[0] / "export")), "python"
    )
    found: dict = {}
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(snippet.replace("max_new_tokens=", "max_new_tokens=8 and "), found)
    prompt = found["inputs"]["input_ids"].shape[1]
    want = found["tokenizer"].decode(found["made"][0, prompt:], skip_special_tokens=True)
    assert said.getvalue() == want + "\n" and found["made"].shape[1] > prompt


def test_the_card_s_commands_give_the_config(tiny, tmp_path):
    text = (tiny[0] / "export" / "README.md").read_text()
    commands = blocks(text, "bash")[-1]
    config = re.search(r"<<'(\w+)'\n(.*?)\n\1\n", commands, re.DOTALL)
    (tmp_path / "config.yaml").write_text(config[2])
    assert load(tmp_path / "config.yaml") == load(tiny[0] / "config.yaml")


def test_datasets_loads_each_stage_by_name_and_it_is_what_was_trained_on(tiny, tmp_path):
    out = tiny[0]
    assert "configs" in huggingface_hub.DatasetCard((out / "dataset" / "README.md").read_text()).data.to_dict()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "export")
    problems = {p["id"]: p for p in pq.read_table(out / "problems.parquet").to_pylist()}
    (snippet,) = blocks((out / "dataset" / "README.md").read_text(), "python")
    assert f'load_dataset("{dataset.FOLDER}", "stage1"' in snippet
    seen = 0
    for stage in (1, 2, 3):
        if not (out / "curriculum" / f"stage{stage}").is_dir():
            continue
        data = datasets.load_dataset(str(out / "dataset"), f"stage{stage}", split="train", cache_dir=str(tmp_path))
        examples = read_stage(out / "curriculum" / f"stage{stage}")
        assert [(r["rollout_id"], r["problem_id"], r["kind"]) for r in data] == [
            (e.rollout_id, e.problem_id, e.kind) for e in examples
        ]
        for row, example in zip(data, examples):
            assert [m["role"] for m in row["prompt"] + row["completion"]] == ["user", "assistant"]
            # As TRL does it: the whole, of which the prompt is the beginning.
            whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
            asked = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
            assert whole.startswith(asked) and whole == tokenizer.decode(example.tokens)
            assert row["prompt_tokens"] == example.prompt_length
            assert row["prompt_tokens"] + row["completion_tokens"] == len(example.tokens)
            assert row["answer"] == problems[row["problem_id"]]["answer"]
            seen += 1
    assert seen == sum(s["examples"] for s in json.loads((out / "summary.json").read_text())["stages"].values()) > 5


def test_templates_that_drop_thoughts_are_told(tmp_path):
    tokenizer = open_tokenizer(own_student(tmp_path / "student"))
    assert tokenizer.keeps("1+2", "a: 1+2=3") and not tokenizer.keeps("1+2", "<think>\na\n</think>\n3")
    examples = {1: [Example("r", "p", "base", (1, 2, 3), 1)] * 4}
    assert "4 of 4" not in dataset.card(examples, {}, 4) and "makes of every row" in dataset.card(examples, {}, 4)
    assert "leaves 3 of 4 rows" in dataset.card(examples, {}, 3)


def test_without_a_chat_template_rows_are_text(tmp_path):
    tokenizer = open_tokenizer(own_student(tmp_path / "student"))
    problem = Problem("p", "s", "train", "", "What is 1+2?", "3", "text")
    run = SimpleNamespace(tokenizers={"student": tokenizer}, by_id={"p": problem}, config=Config())
    target = tokenizer.turn("a: 1+2=3")
    row = dataset.row(run, Example("r", "p", "base", (*tokenizer.encode("What is 1+2?"), *target), 5), chat=False)
    assert set(row) == set(dataset.schema(False).names)
    assert row["prompt"] == "What is 1+2?" and row["completion"].endswith("1+2=3")
    assert 'tokenizer(question, return_tensors="pt")' in cards.model_card(Config(), {}, {}, {}, chat=False)


def test_an_export_is_outdated_by_an_evaluation_after_it(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.begin("export")
    directory.finish("export")
    directory.shard("evaluation/heal-00000", lambda: [{"model": "heal"}], EVALUATION)
    assert directory.done("export") is not None  # until all of it is there
    directory.finish("evaluate")
    assert directory.outdated("export")
    assert "was not evaluated" in cards.model_card(Config(), {}, {}, {}, True)
