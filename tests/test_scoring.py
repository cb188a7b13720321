"""One artifact's scores: the loss against torch's own, answers, errors that are no zeros."""

import json

import numpy
import pytest

from lora_kit import chat, scoring, tokens
from lora_kit.engines import Engine
from lora_kit.errors import MachineError, RecipeError
from lora_kit.suite import GenerateTask
from lora_kit.types import Artifact, Conversation, Example, Message
from tests import fake_run

CONVERSATIONS = [
    Conversation(messages=(Message(role="user", content=f"say {n}"), Message(role="assistant", content="ab" * n)),
                 origin=f"c:{n}") for n in (1, 2, 5)
]


@pytest.fixture
def artifact(tiny_model) -> Artifact:
    return Artifact(name="merged", path=str(tiny_model), kind="hf")


@pytest.fixture
def data_dir(tmp_path, tiny_model):
    tokenizer = chat.load_tokenizer(tiny_model)
    tokens.write_examples(tmp_path, "held_out", [chat.encode(tokenizer, each)[0] for each in CONVERSATIONS])
    return tmp_path


def score(artifact, work, spec=None, items=(), **fields):
    (work / "items").mkdir(exist_ok=True)
    (work / "items" / "t.json").write_text(json.dumps({"items": list(items), "examples": fields.pop("examples", [])}))
    arguments = dict(data_dir=str(work), work_dir=str(work), tools_mode="template", samples=[], sample_tokens=4,
                     threads=None, limit=None, seed=0, strict=False)
    tasks = [{"name": "t", "spec": spec or {"kind": "held_out_loss"}}]
    found = scoring.score_artifacts(artifacts=[artifact.as_dict()], tasks=tasks, **{**arguments, **fields})[0]
    lines = {path.parent.name: [json.loads(line) for line in path.read_text().splitlines()]
             for path in work.glob("*/items.jsonl")}
    return found, lines


def generate(metric="exact_match", **fields) -> dict:
    return GenerateTask(kind="generate", data="held_out", metrics=metric, max_new_tokens=6, **fields).model_dump()


def item(name: str, content: str, target: str = "x", **fields) -> dict:
    return {"item_id": name, "cluster": name, "messages": [{"role": "user", "content": content}], "tools": [],
            "target": target, "inputs": {}, **fields}


def test_bits_per_byte_are_torchs_over_all_tokens_after_the_first(artifact, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    asked = [{**item(f"m.py:{n}", ""), "messages": [], "target": text, "cluster": "m.py"}
             for n, text in enumerate(["naïve text", "x" * 3000])]
    _, lines = score(artifact, tmp_path, {"kind": "text", "data": "rows.jsonl"}, asked)
    line, too_long = lines["merged"]
    model = AutoModelForCausalLM.from_pretrained(artifact.path, dtype=torch.float32).eval()
    tokenizer = chat.load_tokenizer(artifact.path)
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer("naïve text", add_special_tokens=False)["input_ids"]]])
    with torch.no_grad():
        nats = model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    assert line["score"] == pytest.approx(nats / numpy.log(2) / 11, rel=1e-4)  # ï is two bytes
    assert (line["metric"], line["weight"], line["cluster"], line["prompt"]) == ("bits_per_byte", 11, "m.py",
                                                                                 "naïve text")
    assert too_long["score"] is None and "does not fit into 2048" in too_long["error"]


@pytest.mark.parametrize("cache", [False, True])
def test_a_base_and_its_adapter_are_scored_with_one_model_as_each_alone(data_dir, tiny_model, tmp_path, monkeypatch,
                                                                        cache):
    from lora_kit.engines import hf

    monkeypatch.setenv("LORA_KIT_CACHE", str(tmp_path / "cache"))
    fake_run.save_adapter(tiny_model, tmp_path / "adapter", size=0.1)
    base = Artifact(name="base", path=str(tiny_model), kind="hf")
    adapter = Artifact(name="adapter", path=str(tmp_path / "adapter"), kind="adapter", base=str(tiny_model))
    loads, load_base = [], hf.load_base
    monkeypatch.setattr(hf, "load_base", lambda *args, **options: loads.append(args) or load_base(*args, **options))
    written = {}
    for way, groups in {"alone": [[base], [adapter]], "together": [[base, adapter]]}.items():
        work = tmp_path / way
        (work / "items").mkdir(parents=True)
        (work / "items" / "a.json").write_text(json.dumps({"items": [item("1", "hi")], "examples": []}))
        tasks = [{"name": "t", "spec": {"kind": "held_out_loss"}}, {"name": "a", "spec": generate()}]
        del loads[:]
        found = [each for group in groups for each in scoring.score_artifacts(
            artifacts=[artifact.as_dict() for artifact in group], tasks=tasks, data_dir=str(data_dir),
            work_dir=str(work), tools_mode="template", samples=[], sample_tokens=4, threads=None, limit=None, seed=0,
            strict=True, cache=cache)]
        written[way] = [(work / name / "items.jsonl").read_text() for name in ("base", "adapter")]
        assert len(loads) == (0 if cache and way == "together" else len(groups))
        assert all(each["seconds"] >= sum(each["task_seconds"].values()) for each in found)
    assert written["alone"] == written["together"] and written["alone"][0] != written["alone"][1]


def test_held_out_loss_is_torchs_cross_entropy_over_trained_tokens(artifact, data_dir):
    import torch
    from transformers import AutoModelForCausalLM

    found, lines = score(artifact, data_dir)
    model = AutoModelForCausalLM.from_pretrained(artifact.path, dtype=torch.float32).eval()
    for line, example in zip(lines["merged"], tokens.read_examples(data_dir, "held_out"), strict=True):
        ids = torch.tensor(numpy.array(example.tokens_T), dtype=torch.int64)
        labels = torch.where(torch.tensor(numpy.array(example.loss_mask_T)) == 1, ids, -100)
        with torch.no_grad():
            expected = float(model(input_ids=ids[None], labels=labels[None]).loss)
        assert line["score"] == pytest.approx(expected, rel=1e-5)
        assert line["weight"] == int(example.loss_mask_T.sum()) and line["cluster"] == example.origin
    assert [line["weight"] for line in lines["merged"]] == [3, 5, 11]  # two letters a time and the stop token
    assert found["engines"]["t"].startswith("transformers") and found["not_measured"] == []


def test_a_row_without_trained_tokens_is_an_error(artifact, tmp_path):
    tokens.write_examples(tmp_path, "held_out", [Example(
        tokens_T=numpy.array([5, 6, 7], numpy.int32), loss_mask_T=numpy.array([1, 0, 0], numpy.uint8), origin="a:1")])
    _, lines = score(artifact, tmp_path)
    assert (lines["merged"][0]["score"], lines["merged"][0]["error"]) == (None, "no trained token")


def test_only_trained_positions_are_asked_of_a_model_that_may_compute_in_fp32(artifact, data_dir, monkeypatch):
    opened = []

    class Fake(Engine):
        name, tokenizer = "fake", chat.load_tokenizer(artifact.path)
        generate = log_probs = tokens_after = time_once = Engine.stream

        def token_log_probs(self, tokens_T, positions_K):
            return numpy.full(len(positions_K), -0.5, numpy.float32)

        def close(self):
            pass

    monkeypatch.setattr(scoring, "open_engine", lambda artifact, **options: opened.append(options) or Fake())
    _, lines = score(artifact, data_dir)
    assert [line["score"] for line in lines["merged"]] == [0.5] * 3
    assert [options["dtype"] for options in opened] == ["fastest"]


def test_limit_scores_fewer_rows(artifact, data_dir):
    _, lines = score(artifact, data_dir, limit=2)
    assert len(lines["merged"]) == 2


def test_answers_are_the_engines_and_each_is_scored(artifact, tmp_path):
    from lora_kit.engines import open_engine

    with open_engine(artifact) as engine:
        prompts = [chat.prompt_ids(engine.tokenizer, [{"role": "user", "content": text}], [])
                   for text in ("hi", "a long one")]
        first, second = engine.generate(prompts, max_new_tokens=6)
    _, lines = score(artifact, tmp_path, generate(["exact_match", "token_f1"]), [
        item("1", "hi", target=first.text), item("2", "a long one", target=second.text + "!"), item("3", "x" * 3000)])
    exact = [line for line in lines["merged"] if line["metric"] == "exact_match"]
    assert [line["prediction"] for line in exact] == [first.text, second.text, ""]
    assert [line["score"] for line in exact] == [1.0, 0.0, None]
    assert exact[0]["prompt"] == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert exact[0]["stopped"] == first.stopped
    assert exact[2]["error"].startswith("a prompt of 30") and "do not fit into 2048" in exact[2]["error"]
    assert len(lines["merged"]) == 6


def test_only_the_base_also_answers_with_examples(artifact, tmp_path):
    examples = [{"messages": [{"role": "user", "content": "e"}, {"role": "assistant", "content": "f"}], "tools": []}]
    base = Artifact(**{**artifact.as_dict(), "name": "base"})
    _, lines = score(base, tmp_path, generate(), [item("1", "hi")], examples=examples)
    prompt = lines["base-fewshot"][0]["prompt"]
    assert prompt.startswith("<|im_start|>user\ne<|im_end|>\n<|im_start|>assistant\nf<|im_end|>")
    assert "\nhi<|im_end|>" in prompt and "\ne<" not in lines["base"][0]["prompt"]
    (tmp_path / "other").mkdir()
    assert set(score(artifact, tmp_path / "other", generate(), [item("1", "hi")], examples=examples)[1]) == {"merged"}


def test_each_question_brings_its_own_functions_after_the_system_message():
    def tool(name):
        return {"type": "function", "function": {"name": name}}

    call = {"type": "function", "function": {"name": "one", "arguments": {}}}
    answer = {"role": "assistant", "content": None, "tool_calls": [call]}
    example = {"messages": [{"role": "user", "content": "e"}, answer], "tools": [tool("one")]}
    asked = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}], "tools": [tool("own")]}
    messages = scoring.with_examples(asked, [example])
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert messages[1]["content"] == chat.TOOL_PROMPT + '[{"name": "one"}]\n\ne'
    assert messages[3]["content"] == chat.TOOL_PROMPT + '[{"name": "own"}]\n\nq'
    assert messages[2] is example["messages"][1] and len(asked["messages"]) == 2
    plain = {"messages": [{"role": "user", "content": "q"}], "tools": []}
    assert scoring.with_examples(plain, []) == plain["messages"]


def test_tools_reach_the_model_or_it_is_said(artifact, tmp_path):
    tool = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}
    asked = [item("1", "hi", tools=[tool], target="[]", inputs={"functions": "[]"})]
    with pytest.raises(RecipeError, match="data.tools: the model's chat template ignores tools"):
        score(artifact, tmp_path, generate("tool_call_valid"), asked)
    _, lines = score(artifact, tmp_path, generate("tool_call_valid"), asked, tools_mode="system")
    assert "get_time" in lines["merged"][0]["prompt"] and lines["merged"][0]["score"] == 0.0


def test_a_target_that_cannot_be_scored_leaves_the_others_scored():
    function = json.dumps([{"name": "f", "parameters": {"properties": {}, "required": []}}])
    asked = [item("1", "", target='[{"f": {}}]', inputs={"functions": function}), item("2", "", target="?",
             inputs={"functions": function}), item("3", "", target='[{"f": {}}]')]
    right = '{"name": "f", "arguments": {}}'
    found = scoring.score_all("tool_call", [right] * 3, asked)
    assert found[0] == {"score": 1.0, "reason": "", "error": None}
    assert found[1]["score"] is None and "the target is not one call" in found[1]["error"]
    assert found[2] == {"score": None, "reason": "", "error": "metric tool_call needs functions"}


def test_several_references_and_outcomes_reach_the_metric():
    asked = [item("1", "", target=["a cat", "a dog"]), item("2", "", target="a bird")]
    found = scoring.score_all("squad_em", ["The dog!", "cat"], asked)
    assert [each["score"] for each in found] == [1.0, 0.0] and "outcome" not in found[0]
    found = scoring.score_all("mcc", [" yes\n", "no"], [item("1", "", target="yes"), item("2", "", target="yes")])
    assert [each["outcome"] for each in found] == [["yes", "yes"], ["no", "yes"]]
    found = scoring.score_all("mcc", ["yes", "no"], asked)  # two labels are no label: the other item still counts
    assert found[0]["score"] is None and "takes one label" in found[0]["error"]
    assert found[1]["outcome"] == ["no", "a bird"]


def test_stop_strings_and_plain_prompts_reach_the_engine(artifact, tmp_path):
    from lora_kit.engines import open_engine

    with open_engine(artifact) as engine:
        free = engine.generate([engine.tokenizer("be kind\n\nhi")["input_ids"]], max_new_tokens=6)[0]
    asked = [item("1", "hi")]
    asked[0]["messages"].insert(0, {"role": "system", "content": "be kind"})
    _, lines = score(artifact, tmp_path, generate(chat_template=False, until=[free.text[1]]), asked)
    (line,) = lines["merged"]
    assert line["prompt"] == "be kind\n\nhi" and "<|im_start|>" not in line["prompt"]
    assert line["prediction"] == free.text[:free.text.index(free.text[1])] and line["stopped"] is True


def test_each_assertions_reason_is_in_the_items(artifact, tmp_path):
    asked = [item("1", "hi", inputs={"assertions": '[{"min_words": 99}, {"max_chars": 1000}]'}), item("2", "hi")]
    _, lines = score(artifact, tmp_path, generate("all_assertions", assertions=[{"min_words": 99}]), asked)
    assert lines["merged"][0]["score"] == 0.0
    assert lines["merged"][0]["reason"].startswith("min_words 99: has ")
    assert lines["merged"][0]["reason"].endswith("; 1 of 2 hold")
    assert lines["merged"][1]["error"] == "metric all_assertions needs assertions"


def test_a_missing_engine_is_not_measured_unless_asked_for(artifact, data_dir, monkeypatch):
    def no_engine(artifact, **_):
        raise MachineError("engine llamacpp", "is not installed", "install it")

    monkeypatch.setattr(scoring, "open_engine", no_engine)
    found, lines = score(artifact, data_dir)
    assert found["not_measured"] == [
        {"artifact": "merged", "task": "t", "why": "engine llamacpp: is not installed; install it"}]
    assert lines == {}
    with pytest.raises(MachineError):
        score(artifact, data_dir, strict=True)


def test_samples_are_greedy_answers_of_base_and_merged_only(artifact, data_dir):
    asked = [{"messages": [{"role": "user", "content": "hi"}], "tools": []}, {"messages": [{"role": "user",
             "content": "x" * 3000}], "tools": []}]
    found, _ = score(artifact, data_dir, samples=asked)
    assert found["samples"][0]["num_tokens"] <= 4 and isinstance(found["samples"][0]["stopped"], bool)
    assert "do not fit" in found["samples"][1]["error"]
    other = Artifact(**{**artifact.as_dict(), "name": "gguf-q8_0"})
    assert score(other, data_dir, samples=asked)[0]["samples"] is None
