"""The figures of a certificate against float64 arithmetic on whole logits, and the rows they are taken on."""

import numpy as np
import pytest

from lora_kit import certificate
from lora_kit.certificate import compare, held_out_rows, recorded
from lora_kit.engines import Engine
from lora_kit.errors import DataError, ModelError
from lora_kit.tokens import write_examples
from lora_kit.types import Artifact, Example
from tests import fake_run, tiny

VOCABULARY = 50


class Fixed(Engine):
    """Says the same of a row of tokens whenever it is asked: log-probabilities drawn from a seed."""

    name, device, tokenizer, stop_ids = "fixed", "cpu", None, ()

    def __init__(self, seed, *, scale=2.0, num_tokens=VOCABULARY, offset=0.0):
        self.seed, self.scale, self.num_tokens, self.offset, self.most_rows = seed, scale, num_tokens, offset, 0

    def logits(self, tokens):
        generator = np.random.default_rng([self.seed, *tokens])
        return generator.normal(0, self.scale, (len(tokens), self.num_tokens))

    def log_probs(self, tokens):
        logits = self.logits(tokens)
        self.most_rows = max(self.most_rows, len(tokens))
        return (logits - np.log(np.exp(logits).sum(1, keepdims=True)) + self.offset).astype(np.float32)

    def generate(self, prompts, *, max_new_tokens, ignore_stop=False):
        raise NotImplementedError

    def tokens_after(self, prompt, max_new_tokens):
        raise NotImplementedError

    def time_once(self, prompts, new_tokens):
        raise NotImplementedError

    def close(self):
        pass


def rows(lengths=(70, 5, 40, 2), trained_from=3):
    generator = np.random.default_rng(1)
    return [{"tokens": generator.integers(0, VOCABULARY, length).tolist(),
             "trained": [int(i >= trained_from) for i in range(length)], "origin": "r"} for length in lengths]


def measured(reference, candidate, rows_, tmp_path):
    with recorded(reference, rows_, tmp_path) as recording:
        assert recording.path.stat().st_size == 4 * VOCABULARY * sum(len(row["tokens"]) - 1 for row in rows_)
        figures = compare(recording, candidate)
    assert list(tmp_path.iterdir()) == []
    return figures


def direct(reference, candidate, rows_):
    """Everything at once in float64, from the logits."""
    kls, of_rows, losses, same, apart = [], [], [], [], []
    for row in rows_:
        p, q = ((lambda z: z - np.log(np.exp(z).sum(1, keepdims=True)))(engine.logits(row["tokens"])[:-1])
                for engine in (reference, candidate))
        kl = (np.exp(p) * (p - q)).sum(1)
        kls.extend(kl)
        of_rows.append(kl)
        same.extend(p.argmax(1) == q.argmax(1))
        apart.append(np.abs(p - q).max())
        for t, (token, flag) in enumerate(zip(row["tokens"][1:], row["trained"][1:], strict=True)):
            if flag:
                losses.append((-p[t, token], -q[t, token]))
    mean = np.mean(kls)
    residuals = np.array([kl.sum() - mean * len(kl) for kl in of_rows])
    error = np.sqrt(len(rows_) / (len(rows_) - 1) * (residuals**2).sum()) / len(kls)
    perplexity = np.exp(np.mean(losses, axis=0))
    return {"num_rows": len(rows_), "num_positions": len(kls), "num_answer_tokens": len(losses), "mean_kl": mean,
            "mean_kl_standard_error": error, "p95_kl": np.quantile(kls, 0.95), "p999_kl": np.quantile(kls, 0.999),
            "max_kl": max(kls), "top1_agreement": np.mean(same), "perplexity_reference": perplexity[0],
            "perplexity_candidate": perplexity[1], "perplexity_ratio": perplexity[1] / perplexity[0],
            "max_log_prob_difference": max(apart)}


def test_figures_equal_a_direct_float64_computation(tmp_path):
    reference, candidate = Fixed(1), Fixed(2, scale=1.0)
    found = measured(reference, candidate, rows(), tmp_path)
    expected = direct(reference, candidate, rows())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name
    assert 0.5 < found["mean_kl"] and found["top1_agreement"] < 0.5


def test_equal_models_are_at_zero_whatever_their_normalisation(tmp_path):
    found = measured(Fixed(1), Fixed(1, offset=1e-3), rows(), tmp_path)
    assert abs(found["mean_kl"]) < 1e-12 and found["top1_agreement"] == 1
    assert found["perplexity_ratio"] == pytest.approx(1, abs=1e-6)


def test_without_trained_tokens_perplexity_is_over_all(tmp_path):
    nothing_trained = rows(trained_from=10**6)
    found = measured(Fixed(1), Fixed(2), nothing_trained, tmp_path)
    assert found["num_answer_tokens"] == found["num_positions"] == 113


def test_one_row_has_no_standard_error(tmp_path):
    assert measured(Fixed(1), Fixed(2), rows((9,)), tmp_path)["mean_kl_standard_error"] is None


def test_another_vocabulary_and_broken_logits_are_errors(tmp_path):
    with recorded(Fixed(1), rows(), tmp_path) as recording:
        with pytest.raises(ModelError, match="has 60 tokens where the reference has 50"):
            compare(recording, Fixed(1, num_tokens=60))
        with pytest.raises(ModelError, match="not finite"):
            compare(recording, Fixed(1, offset=np.nan))


def examples(lengths, trained=1):
    return [Example(tokens_T=np.arange(length, dtype=np.int32), loss_mask_T=np.full(length, trained, np.uint8),
                    origin=f"f:{i}") for i, length in enumerate(lengths)]


def test_rows_come_from_held_out_within_the_budget(tmp_path):
    write_examples(tmp_path, "held_out", examples([900, 1, 300, 400, 700]))
    write_examples(tmp_path, "train", examples([50]))
    found = held_out_rows(tmp_path, max_tokens=1000)
    lengths = [len(row["tokens"]) for row in found["rows"]]
    assert found["split"] == "held_out" and sum(lengths) == 1000 and max(lengths) <= 512 and len(lengths) >= 2
    assert all(len(row["tokens"]) == len(row["trained"]) for row in found["rows"])
    assert "f:1" not in {row["origin"] for row in found["rows"]}  # one token predicts nothing
    assert found == held_out_rows(tmp_path, max_tokens=1000)


def test_training_rows_serve_when_none_is_held_out(tmp_path):
    write_examples(tmp_path, "held_out", [])
    write_examples(tmp_path, "train", examples([50, 60]))
    found = held_out_rows(tmp_path)
    assert found["split"] == "train" and sum(len(row["tokens"]) for row in found["rows"]) == 110
    write_examples(tmp_path, "train", examples([1]))
    with pytest.raises(DataError, match="no rows to measure on"):
        held_out_rows(tmp_path)


def test_sample_prompts_end_where_the_answer_begins():
    chosen = certificate.sample_prompts(rows((9, 4, 9), trained_from=3), 2)
    assert chosen == [row["tokens"][:3] for row in rows((9, 4, 9))[:2]]
    assert certificate.sample_prompts(rows((9,), trained_from=0), 2) == []


@pytest.mark.parametrize(("a", "b", "expected"), [
    ([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1], [1, 2], 1), ([], [5], 0), ([], [], None)])
def test_first_difference(a, b, expected):
    assert certificate.first_difference(a, b) == expected


def test_reference_is_fp32_where_memory_allows(monkeypatch):
    artifact = Artifact(name="merged", path="m", kind="hf", size_bytes=1000)
    for gpu, main, expected in ((0, 10**4, ("fp32", "cpu")), (10**4, 10**4, ("fp32", "cuda:0")),
                                (2000, 10**4, ("fp32", "cpu")), (1500, 2000, ("auto", "cuda:0")),
                                (0, 2000, ("auto", "cpu"))):
        monkeypatch.setattr(certificate, "_free_bytes", lambda free=(gpu, main): free)
        assert certificate.roomy(artifact) == expected


def test_a_model_against_itself_and_against_another(tmp_path):
    """The whole way through real engines: recorded once, measured twice, samples side by side."""
    folders = [tiny.save_model(tmp_path / f"m{seed}", seed=seed, initializer_range=0.1)[0] for seed in (0, 1)]
    _, tokenizer = folders[0], tiny.save_tokenizer(tmp_path / "tokenizer")
    data = fake_run.save_rows(tmp_path / "data", tokenizer, num=3)
    chosen = held_out_rows(data)["rows"]
    artifacts = [Artifact(name=folder.name, path=str(folder), kind="hf", size_bytes=1).as_dict() for folder in folders]
    reference = certificate.record_reference(artifact=artifacts[0], rows=chosen, path=str(tmp_path / "log_probs"),
                                             sample_tokens=5)
    same, other = (certificate.measure(reference=reference, candidate=artifact, prefer=None, rows=chosen)
                   for artifact in artifacts)
    assert same["mean_kl"] < 1e-12 and [sample["first_difference"] for sample in same["samples"]] == [None, None]
    assert other["mean_kl"] > 0.05 and other["top1_agreement"] < 0.5
    assert same["reference"] == same["engine"] == "transformers fp32"
    assert same["samples"][0]["prompt"].endswith("<|im_start|>assistant\n") and same["tokenizer_differences"] is None
