"""The report's evidence of merges and quantized forms: what certificates measured reaches the page."""

from types import SimpleNamespace

from lora_kit import report_proofs
from lora_kit.report_document import Figure, Paragraph, Table

LAYER = {"projection": 0.97, "noise": 0.38, "sign": 0.93, "relative_norm": 0.004, "num_tensors": 7}
DELTA = {**LAYER, "by_layer": {"10": {**LAYER, "projection": 0.5}, "2": LAYER, "lm_head": LAYER}, "missing": []}
SHARE = {"share": 0.75, "ci_low": 0.5, "ci_high": 0.9}
ANSWERS = {"num_answers": 4, "num_same": 2, "num_near_ties": 1, "stopped": SHARE, "reference_stopped": SHARE,
           "new_tokens": 64, "samples": [{"first_difference": place} for place in (None, 9, 5, None)]}
KEPT = {"top_k": 1024, "mean_rest": 0.01, "num_whole": 64, "mean_missing": 1e-6, "max_missing": 1e-5, "num_bytes": 1}
PROSE = {"num_positions": 1500, "mean_kl": 0.02, "mean_kl_standard_error": 0.001, "top1_agreement": 0.97,
         "perplexity_ratio": 1.01}


def texts(blocks):
    return " ".join(block.text for block in blocks if isinstance(block, Paragraph))


def test_a_merge_shows_what_is_left_of_the_change_by_layer_in_order():
    blocks = report_proofs._proof_details({
        "delta": DELTA, "answers": ANSWERS, "merged": {"prose": PROSE, "kept": KEPT}, "size_bytes": 2_000_000,
        "bits_per_weight": 16.0, "untied": True})
    table = next(block for block in blocks if isinstance(block, Table))
    assert [row[0] for row in table.rows] == ["all", "2", "10", "lm_head"] and table.rows[2][1] == "0.500"
    said = texts(blocks)
    for part in ("On plain prose (1,500 tokens): mean KL 0.02 ± 0.001", "1024 likeliest tokens", "64 positions",
                 "2 the same", "1 part at a near tie, the first of them at token 5", "75.00% (before: 75.00%)",
                 "16 bits a weight", "they are two tensors now"):
        assert part in said, part


def test_an_older_certificate_shows_what_it_has():
    assert report_proofs._proof_details({}) == []
    assert report_proofs._kept_text({}) == "vocabulary's tokens"


def test_gain_and_change_left_as_texts():
    gain = {"value": 0.97, "ci_low": 0.95, "ci_high": 0.99}
    assert report_proofs._gain(gain) == "97% (95% to 99%)" and report_proofs._gain(None) == "–"
    assert report_proofs._gain({**gain, "value": None}) == "cannot tell"
    assert report_proofs._change_left(DELTA) == "0.97 ± 0.38" and report_proofs._change_left(None) == "–"


def found(choice, forms):
    return SimpleNamespace(figures=lambda stage: {"choice": choice, "forms": forms} if choice else {})


def test_the_frontier_is_drawn_and_the_choice_said():
    form = {"size_bytes": 90_000_000, "mean_kl": 0.1, "top1_agreement": 0.9, "tokens_per_second": 50.0,
            "gain": {"value": 0.97, "ci_low": None, "ci_high": None}}
    choice = {"recommended": "gguf-q8_0", "why": "the smallest", "frontier": ["merged", "gguf-q8_0"],
              "out": {"bitsandbytes-nf4": "gain kept under 95%"},
              "merged": {"size_bytes": 270_000_000, "tokens_per_second": 20.0}}
    forms = {"gguf-q8_0": form, "bitsandbytes-nf4": {**form, "mean_kl": 0.6, "size_bytes": 112_000_000}}
    blocks = report_proofs._choice_blocks(found(choice, forms))
    assert texts(blocks) == "Recommended: gguf-q8_0, the smallest."
    rows = next(block for block in blocks if isinstance(block, Table)).rows
    assert [row[-1] for row in rows] == ["no other is smaller and closer", "recommended", "gain kept under 95%"]
    figure = next(block for block in blocks if isinstance(block, Figure))
    assert "2 of 3 artifacts" in figure.words and figure.wide_svg.count("<circle") >= 3
    assert report_proofs._choice_blocks(found(None, {})) == []
    nothing = report_proofs._choice_blocks(found({**choice, "recommended": None, "why": "none"}, forms))
    assert texts(nothing) == "Nothing is recommended: none."
