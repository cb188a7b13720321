"""report_document.py: Markdown that shows texts as they are, and the mask preview read back."""

from lora_kit.report_document import (
    Card,
    Cards,
    Cell,
    Code,
    Document,
    Marked,
    Paragraph,
    Sample,
    Section,
    Span,
    Table,
    Turn,
    missing,
    parse_marked,
    printable,
    rate_text,
    to_markdown,
)


def markdown(*blocks):
    section = Section(anchor="a", title="Section", blocks=blocks)
    return to_markdown(Document(title="T", subtitle="", facts=[], sections=[section]))


def test_tables_keep_their_shape_whatever_is_in_them():
    table = Table(columns=("a", "b", "c"), numeric=(1,), rows=[["x|y\nz", "`1`", Cell(text="PASS", tone="pass")],
                                                             ["row", missing("no <engine>", span=2)]])
    lines = markdown(table).splitlines()
    start = lines.index("| a | b | c |")
    assert lines[start + 1] == "|---|--:|---|"
    assert lines[start + 2] == "| x\\|y z | \\`1\\` | PASS |"
    assert lines[start + 3] == "| row | not measured: no \\<engine\\> |  |"


def test_texts_with_fences_stay_inside_theirs():
    text = "before\n```\nafter"
    lines = markdown(Code(title="c", text=text)).splitlines()
    assert lines[lines.index("````") :] == ["````", "before", "```", "after", "````"]


def test_samples_and_marks():
    sample = Sample(origin="f:1", turns=[Turn(role="user", text="Hi")], reference="",
                    answers=[("base", "Yes", "cut off"), ("merged", "No", "")])
    marked = Marked(origin="f:2", spans=[Span(text="ctx ", trained=False), Span(text="out", trained=True)])
    text = markdown(sample, marked,
                    Paragraph(text="*p*"), Cards(cards=[Card(label="l", value="1", note="n")]))
    assert "**base, cut off**" in text and "**merged**" in text and "reference" not in text
    assert "ctx ⟦out⟧" in text and "\\*p\\*" in text and "- **l**: 1 (n)" in text


def test_the_preview_is_read_back():
    text = ("Trained tokens stand between ⟦ and ⟧.\n\n--- a.jsonl:1\nsys ⟦one⟧ user ⟦two\nlines⟧\n\n"
            "--- a.jsonl:2\nplain\n")
    first, second = parse_marked(text)
    assert first.origin == "a.jsonl:1"
    assert [(span.text, span.trained) for span in first.spans] == [
        ("sys ", False), ("one", True), (" user ", False), ("two\nlines", True)]
    assert [(span.text, span.trained) for span in second.spans] == [("plain", False)]
    assert parse_marked("") == []


def test_text_that_no_file_can_hold_is_replaced():
    assert printable("a\x00b\ud800c\n\t") == "a\ufffdb\ufffdc\n\t"
    assert printable("😀") == "😀"


def test_rates():
    assert [rate_text(value) for value in (None, 0.5, 25.53, 2560.4)] == ["–", "0.5", "25.5", "2,560"]
