"""What is found again in the cache, and that every part of the key makes another."""

import json
import shutil
import sqlite3

import numpy
import pytest

from lora_kit import chat, engines, score_cache, scoring
from lora_kit.types import Artifact, Generation
from tests.test_scoring import generate, item

COMPUTES = {"engine": "hf", "dtype": "fp32", "device": "cpu"}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_KIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "scores"


@pytest.fixture
def artifact(tiny_model, tmp_path) -> Artifact:
    """A base with a folder that stands for an adapter, each of its own, so that a test can change them."""
    for name in ("model", "adapter", "tokenizer"):
        shutil.copytree(tiny_model, tmp_path / name)
    return Artifact(name="adapter", path=str(tmp_path / "adapter"), kind="adapter", base=str(tmp_path / "model"),
                    tokenizer=str(tmp_path / "tokenizer"))


class Fake:
    """An engine that counts what it is asked."""

    name = "fake"

    def __init__(self, tokenizer=None):
        self.asked, self.tokenizer, self.closed = [], tokenizer, False

    def generate(self, prompts, *, max_new_tokens, ignore_stop=False, until=()):
        self.asked += [tuple(prompt) for prompt in prompts]
        return [Generation(tokens=tuple(prompt), stopped=True, text=f"é {sum(prompt)}") for prompt in prompts]

    def token_log_probs(self, tokens_T, positions_K):
        self.asked.append(tuple(tokens_T))
        return numpy.array([-0.1 * position for position in positions_K], numpy.float32)

    def extra(self):
        return "the real one's"

    def close(self):
        self.closed = True


def known(artifact, computes=None):
    fake = Fake(chat.load_tokenizer(artifact.tokenizer))
    return score_cache.known(artifact, computes or COMPUTES, lambda: fake), fake


def test_what_was_answered_is_not_asked_again(cache, artifact):
    first, fake = known(artifact)
    answers = first.generate([[1, 2], [3]], max_new_tokens=4)
    losses = first.token_log_probs(numpy.array([1, 2, 3]), [1, 2])
    first.close()
    assert fake.asked == [(1, 2), (3,), (1, 2, 3)] and fake.closed and (first.num_known, first.num_asked) == (0, 3)
    second, fake = known(artifact)
    assert second.generate([[3], [1, 2], [9]], max_new_tokens=4)[:2] == answers[::-1]
    assert numpy.array_equal(second.token_log_probs([1, 2, 3], [1, 2]), losses)
    assert fake.asked == [(9,)] and (second.num_known, second.num_asked) == (3, 4)
    assert second.name == "fake" and second.extra() == "the real one's"
    second.close()


def test_a_model_whose_answers_are_all_known_is_not_loaded(cache, artifact):
    first, _ = known(artifact)
    first.generate([[1]], max_new_tokens=4)
    first.close()
    second = score_cache.known(artifact, COMPUTES, lambda: pytest.fail("loaded"))
    assert second.generate([[1]], max_new_tokens=4)[0].text == "é 1" and second.tokenizer("a")["input_ids"]
    second.close()


@pytest.mark.parametrize("change", [
    {"prompts": [[1, 2, 4]]}, {"max_new_tokens": 5}, {"ignore_stop": True}, {"until": [["a"]]}])
def test_other_token_ids_or_settings_are_asked(cache, artifact, change):
    first, _ = known(artifact)
    first.generate([[1, 2]], max_new_tokens=4)
    first.close()
    second, fake = known(artifact)
    second.generate(**{"prompts": [[1, 2]], "max_new_tokens": 4, **change})
    assert len(fake.asked) == 1
    second.close()


def test_other_positions_and_other_questions_of_the_same_tokens_are_asked(cache, artifact):
    engine, fake = known(artifact)
    engine.token_log_probs([1, 2, 3], [1, 2])
    engine.token_log_probs([1, 2, 3], [2])
    engine.generate([[1, 2, 3]], max_new_tokens=4)
    assert len(fake.asked) == 3
    engine.close()


def flip(path):
    """One bit of a file, which keeps its size and its time."""
    import os

    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES = {
    "weights": lambda world: flip(world.folder / "model" / "model.safetensors"),
    "configuration": lambda world: flip(world.folder / "model" / "config.json"),
    "adapter": lambda world: flip(world.folder / "adapter" / "model.safetensors"),
    "tokenizer": lambda world: flip(world.folder / "tokenizer" / "tokenizer.json"),
    "a further file": lambda world: (world.folder / "model" / "generation_config.json").write_text("{}"),
    "engine": lambda world: world.computes.update(engine="llamacpp"),
    "dtype": lambda world: world.computes.update(dtype="bf16"),
    "device": lambda world: world.computes.update(device="cuda:0"),
    "kind": lambda world: world.fields.update(kind="hf"),
    "code": lambda world: world.monkeypatch.setattr(score_cache, "code_sha256", lambda: "0" * 64),
    "library": lambda world: world.monkeypatch.setattr(
        score_cache, "_version", lambda name, real=score_cache._version: "0" if name == "torch" else real(name)),
    "format": lambda world: world.monkeypatch.setattr(score_cache, "FORMAT", 0),
}


@pytest.mark.parametrize("part", CHANGES)
def test_each_part_of_the_key_makes_another(cache, artifact, monkeypatch, tmp_path, part):
    from types import SimpleNamespace

    world = SimpleNamespace(folder=tmp_path, computes=dict(COMPUTES), monkeypatch=monkeypatch,
                            fields=artifact.as_dict())
    before = score_cache.artifact_key(artifact, COMPUTES)
    assert score_cache.artifact_key(artifact, dict(COMPUTES)) == before
    CHANGES[part](world)
    assert score_cache.artifact_key(Artifact(**world.fields), world.computes) != before


def test_names_and_places_make_no_difference(cache, artifact, tmp_path):
    before = score_cache.artifact_key(artifact, COMPUTES)
    for name in ("model", "adapter", "tokenizer"):
        shutil.copytree(tmp_path / name, tmp_path / "elsewhere" / name)
    moved = {key: str(value).replace(str(tmp_path), str(tmp_path / "elsewhere")) if key in ("path", "base", "tokenizer")
             else value for key, value in artifact.as_dict().items()}
    assert score_cache.artifact_key(Artifact(**{**moved, "name": "other"}), COMPUTES) == before


def test_the_code_is_hashed_whole(monkeypatch, tmp_path):
    package = tmp_path / "lora_kit"
    shutil.copytree(score_cache._PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    score_cache.code_sha256.cache_clear()
    real = score_cache.code_sha256()
    monkeypatch.setattr(score_cache, "_PACKAGE", package)
    score_cache.code_sha256.cache_clear()
    assert score_cache.code_sha256() == real
    (package / "engines" / "hf.py").write_text("# another\n")
    score_cache.code_sha256.cache_clear()
    assert score_cache.code_sha256() != real
    score_cache.code_sha256.cache_clear()


def test_a_broken_or_forbidden_cache_costs_only_the_work(cache, artifact, monkeypatch, tmp_path):
    key = score_cache.artifact_key(artifact, COMPUTES)
    cache.mkdir(parents=True)
    path = cache / f"{key}.sqlite"
    path.write_bytes(b"no database at all, but long enough to be looked at" * 40)
    engine, fake = known(artifact)
    engine.generate([[1]], max_new_tokens=4)
    engine.close()
    assert len(fake.asked) == 1 and path.read_bytes().startswith(b"SQLite")
    with sqlite3.connect(path) as file:  # an entry that is no answer
        file.execute("UPDATE found SET value = ? WHERE key != ?", (b"[1]", b"name"))
    file.close()
    engine, fake = known(artifact)
    assert engine.generate([[1]], max_new_tokens=4)[0].text == "é 1" and len(fake.asked) == 1
    engine.close()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORA_KIT_CACHE", str(tmp_path / "file"))
    engine, fake = known(artifact)
    engine.generate([[1]], max_new_tokens=4)
    engine.close()
    assert len(fake.asked) == 1


def test_an_evaluation_finds_its_answers_again(cache, tiny_model, tmp_path):
    artifact = Artifact(name="merged", path=str(tiny_model), kind="hf")
    found, lines = [], []
    for run in ("one", "two", "three"):
        work = tmp_path / run
        (work / "items").mkdir(parents=True)
        asked = [item("1", "hi"), item("2", "ho")] + [item("3", "new")] * (run == "three")
        (work / "items" / "t.json").write_text(json.dumps({"items": asked, "examples": []}))
        found.append(scoring.score_artifacts(
            artifacts=[artifact.as_dict()], tasks=[{"name": "t", "spec": generate()}], data_dir=str(work),
            work_dir=str(work), tools_mode="template", samples=[], sample_tokens=4, threads=None, limit=None, seed=0,
            strict=False, cache=True)[0])
        lines.append((work / "merged" / "items.jsonl").read_text().splitlines())
    assert [(each["num_known"], each["num_asked"]) for each in found] == [(0, 2), (2, 2), (2, 3)]
    assert lines[0] == lines[1] == lines[2][:2]
    assert found[0]["engines"] == found[1]["engines"]


def test_computes_is_what_the_engine_says(tiny_model):
    artifact = Artifact(name="merged", path=str(tiny_model), kind="hf")
    said = engines.computes(artifact, dtype="bf16")
    assert said == {"engine": "hf", "dtype": "bf16", "device": said["device"]}
    with engines.open_engine(artifact, dtype="bf16") as engine:
        assert engine.name == "transformers bf16" and engine.device == said["device"]
