"""bench_retrieval.py: passages, vectors and look-up exactly; times from an engine with known ones; the verb."""

import json
import types

import numpy as np
import pytest

from lora_kit import bench_retrieval, report_serving
from lora_kit.errors import DataError
from tests import tiny

TEXTS = ["the cat sat on a mat", "a dog ran in the park", "stars and planets move", "bread needs salt and flour"]


class Engine:
    """Takes 1 ms for each token that it reads, and 5 ms to choose one."""

    name = "fake"

    def __init__(self, tokenizer, longest=10_000):
        self.tokenizer, self.read, self.made = tokenizer, [], 2
        self.model = types.SimpleNamespace(config=types.SimpleNamespace(max_position_embeddings=longest))

    def time_once(self, prompts, new_tokens):
        self.read.append(self.tokenizer.decode(prompts[0]))
        seconds = len(prompts[0]) * 1e-3
        return {"prefill_seconds": seconds, "first_token_seconds": seconds + 5e-3, "decode_seconds": 1e-3,
                "tokens_generated": self.made}


@pytest.fixture
def engine(tmp_path):
    return Engine(tiny.save_tokenizer(tmp_path))


def ask(engine, questions, **more):
    asked = [{"messages": [{"role": "user", "content": text}], "tools": []} for text in questions]
    return bench_retrieval.of_engine(engine, bench_retrieval.WordEmbedder(), TEXTS, asked, tools_mode="template",
                                     **{"passages": 2, **more})


def test_pieces_have_so_many_tokens(engine):
    # A byte is a token here.
    assert bench_retrieval.cut(engine.tokenizer, ["abcdefghij", "klm"], 4) == ["abcd", "efgh", "ij", "klm"]
    assert bench_retrieval.cut(engine.tokenizer, ["abcdefghij"], 8) == ["abcdefgh"]  # "ij" is under a half


def test_the_nearest_come_first():
    matrix_ND = np.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [0.6, 0.8]])
    assert bench_retrieval.nearest(matrix_ND, np.array([0.0, 1.0]), 3) == [2, 1, 3]


def test_words_find_their_passage():
    embedder = bench_retrieval.WordEmbedder()
    matrix = embedder.corpus(TEXTS)
    for row, question in enumerate(["where is the cat's mat", "dog in a park", "planets", "how much salt for bread"]):
        assert bench_retrieval.nearest(matrix, embedder.question(question), 1) == [row]


def test_means_of_hidden_states_as_directions(tiny_model):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    embedder = bench_retrieval.ModelEmbedder(model, tokenizer, longest=12)
    matrix_ND = embedder.corpus(TEXTS)
    means = []
    for text in TEXTS:
        tokens = torch.tensor([tokenizer(text)["input_ids"][:12]])
        with torch.inference_mode():
            means.append(model.model(input_ids=tokens).last_hidden_state[0].mean(0).numpy())
    wanted = np.stack(means) - np.mean(means, axis=0)
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    np.testing.assert_allclose(matrix_ND, wanted, atol=1e-5)
    for row, text in enumerate(TEXTS):  # a text's own vector is its row
        np.testing.assert_allclose(embedder.question(text), wanted[row], atol=1e-5)


def test_times_follow_from_the_tokens_that_are_read(engine):
    questions = [f"tell me about the cat and number {number}" for number in range(8)]
    found = ask(engine, questions)
    # What stands around the passages: bytes of the text that with_passages writes.
    around = len("Passages that may help:\n\n[1] \n\n[2] \n\nQuestion: ")
    added = [more - plain for plain, more in zip(found["plain"]["prompt_tokens"], found["read"]["prompt_tokens"],
                                                 strict=True)]
    assert len(added) == 8 and all(each - around in {len(a) + len(b) for a in TEXTS for b in TEXTS} for each in added)
    assert any(TEXTS[0] in text for text in engine.read)
    for number in range(8):
        plain, read = (found[kind]["first_token_seconds"][number] for kind in ("plain", "read"))
        looked = found["embed_seconds"][number] + found["look_up_seconds"][number]
        assert read - plain == pytest.approx(1e-3 * added[number] + looked)
    assert found["measured"]["ratio"] < 1 and found["measured"]["num_pairs"] == 8
    assert found["found"] == {"hits": 4, "tried": 4, **{key: found["found"][key] for key in ("ci_low", "ci_high")}}
    shown = report_serving.PARTS["retrieval"]
    whole = found | {"artifact": "merged", "corpus": "docs", "corpus_passages": 4, "passage_tokens": 20,
                     "embed": "tfidf"}
    alone, read = shown.rows(whole)
    assert alone[0] == "question alone" and read[0] == "with 2 passages" and {len(alone), len(read)} == {7}
    assert float(read[-1].split()[0]) == pytest.approx(1 / found["measured"]["ratio"], abs=0.01)
    assert any("in 4 of 4" in line for line in shown.lines(whole))


def test_what_is_too_long_or_short_of_tokens_is_not_believed(engine, tmp_path):
    with pytest.raises(DataError, match="over the model's 64"):
        ask(Engine(engine.tokenizer, longest=64), ["a question"] * 8)
    engine.made = 1
    with pytest.raises(Exception, match="generated 1 tokens where 2"):
        ask(engine, ["a question"] * 8)


def test_passages_stand_before_the_last_question():
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    more = bench_retrieval.with_passages(messages, ["one", "two"])
    assert more[:3] == messages[:3] and messages[3]["content"] == "c"
    assert more[3]["content"] == "Passages that may help:\n\n[1] one\n\n[2] two\n\nQuestion: c"
    assert bench_retrieval.question_of(messages) == "c"


def test_what_a_corpus_may_be(tmp_path):
    (tmp_path / "docs").mkdir()
    for name, text in (("b.md", "second"), ("a.txt", "first"), ("c.png", "no text"), ("d.rst", " \n")):
        (tmp_path / "docs" / name).write_text(text)
    assert bench_retrieval.corpus_texts("docs", tmp_path) == ["first", "second"]
    assert bench_retrieval.corpus_texts("docs/b.md", tmp_path) == ["second"]
    assert any("json" in text for text in bench_retrieval.corpus_texts("python:json", tmp_path))
    for corpus, said in (("nowhere", "no such file"), ("docs/d.rst", "has no text"), ("python:nothing_1", "nothing")):
        with pytest.raises(DataError, match=said):
            bench_retrieval.corpus_texts(corpus, tmp_path)


def test_the_verb_measures_retrieval_and_adapters(finished_world):
    told = finished_world.lora_kit("bench", finished_world.run, "--retrieval", "2", "--adapters", "1,2")
    assert told.returncode == 0, told.stderr
    assert "Retrieval for merged: 8 questions, 2 passages of 200 tokens from python:stdlib" in told.stdout
    assert "Adapters unmerged: 8 prompts" in told.stdout and "2 on one base" in told.stdout
    serving = json.loads((finished_world.run / "bench" / "bench.json").read_text())["serving"]
    found, rows = serving["retrieval"], serving["adapters"]["rows"]
    assert found["indexed"] == 256 and all(
        400 < read - plain < 500 for plain, read in zip(found["plain"]["prompt_tokens"], found["read"]["prompt_tokens"],
                                                        strict=True))
    assert [row["adapters"] for row in rows] == [1, 2]
    assert rows[1]["resident_bytes"] - rows[0]["resident_bytes"] == serving["adapters"]["adapter_bytes"] > 0
    assert rows[1]["process_bytes_added"] is not None and rows[0]["measured"]["num_pairs"] == 8
    report = finished_world.lora_kit("report", finished_world.run)
    text = (finished_world.run / "report" / "report.md").read_text()
    assert report.returncode == 0 and "Retrieval for merged" in text and "Adapters unmerged" in text


def test_a_corpus_that_is_not_there_is_told_before_anything_is_measured(finished_world):
    told = finished_world.lora_kit("bench", f"{finished_world.run}/merged", "--retrieval", "2000")
    assert told.returncode == 4 and "passages" in told.stderr and len(told.stderr.strip().splitlines()) == 1
    text = finished_world.recipe.read_text()
    finished_world.recipe.write_text(text.replace("bench: {", 'bench: {"retrieval": {"corpus": "nowhere"}, '))
    told = finished_world.lora_kit("run", finished_world.recipe)
    assert told.returncode == 4 and "nowhere: no such file" in told.stderr
