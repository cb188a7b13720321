"""The report's blocks as one HTML file that needs nothing else.

No script, no request: styles stand in the page, drawings are inline SVG, and a content
security policy forbids everything else, so that a text out of data or a model can neither
run nor call home even if an escape were forgotten. Light and dark follow the reader's system; tables
scroll on a phone. Reads and writes nothing.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

from lora_kit.report_document import (
    TONES,
    Block,
    Cards,
    Cell,
    Code,
    Document,
    Figure,
    Link,
    Marked,
    Paragraph,
    Sample,
    Section,
    Table,
    VerdictLine,
    Verdicts,
    printable,
)

_STYLE = """
:root{color-scheme:light dark;--page:#f6f7f9;--panel:#fff;--text:#1b1f27;--soft:#5b6472;--line:#e0e4ea;--head:#f0f2f6;
--accent:#2456c9;--mark:#dcecd2;--pass:#17692f;--pass-bg:#dff2e4;--fail:#a61b1b;--fail-bg:#fde3e1;
--unsure:#7a5200;--unsure-bg:#fdf0cf;--s0:#2f6fde;--s1:#d9662b;--s2:#2a9d8f;--s3:#8a5cd0;--s4:#c9a227;--s5:#9aa3b0}
@media (prefers-color-scheme:dark){:root{--page:#12151a;--panel:#1a1e25;--text:#e4e8ee;--soft:#98a2b1;--line:#2c323c;
--head:#222831;--accent:#8ab0ff;--mark:#274a2c;--pass:#8ee0a5;--pass-bg:#173a22;--fail:#ffaaa3;--fail-bg:#4a1c1a;
--unsure:#f3cf7a;--unsure-bg:#43340f;--s0:#6d9dff;--s1:#f08a52;--s2:#4cc4b5;--s3:#b18cf0;--s4:#e0bf55;--s5:#6d7685}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif}
main,header,footer{max-width:1080px;margin:0 auto;padding:0 24px}
header{padding-top:36px;padding-bottom:8px}
h1{font-size:28px;line-height:1.2;margin:0 0 4px}
h2{font-size:19px;margin:0 0 6px}
h3{font-size:15px;margin:22px 0 8px}
p{margin:6px 0 12px}
.soft,.intro,figcaption,.note{color:var(--soft)}
.intro{max-width:76ch}
.facts{display:flex;flex-wrap:wrap;gap:4px 22px;margin:12px 0 0;padding:0;list-style:none;font-size:13.5px}
.facts b{font-weight:600;color:var(--soft);margin-right:6px}
.facts li{overflow-wrap:anywhere}
nav{position:sticky;top:0;z-index:1;background:var(--page);border-bottom:1px solid var(--line);margin-top:18px}
nav div{max-width:1080px;margin:0 auto;padding:8px 24px;display:flex;flex-wrap:wrap;gap:2px 18px;white-space:nowrap;
font-size:13.5px}
nav a{color:var(--soft);text-decoration:none}
nav a:hover{color:var(--accent)}
section{background:var(--panel);border:1px solid var(--line);border-radius:10px;padding:22px 24px 20px;margin:20px 0;
scroll-margin-top:52px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(165px,1fr));gap:12px;margin:14px 0 18px}
.card{border:1px solid var(--line);border-radius:8px;padding:12px 14px;background:var(--head)}
.card .label{font-size:12.5px;color:var(--soft)}
.card .value{font-size:22px;font-weight:650;line-height:1.3;font-variant-numeric:tabular-nums}
.card .note{font-size:12.5px}
.scroll{overflow-x:auto;margin:4px 0 6px}
table{border-collapse:separate;border-spacing:0;width:100%;font-size:13.5px;font-variant-numeric:tabular-nums}
th,td{text-align:left;vertical-align:top;padding:7px 12px 7px 0;border-bottom:1px solid var(--line)}
th{font-weight:600;color:var(--soft);font-size:12.5px;line-height:1.35;vertical-align:bottom}
td:first-child{font-weight:550}
td:not(.n):not(:first-child){overflow-wrap:anywhere;min-width:7.5em}
table.small{width:auto}
table.small td:first-child,table.small th:first-child{min-width:150px;padding-right:32px}
tr:last-child td{border-bottom:0}
.n{text-align:right}td.n{white-space:nowrap}
td.n,th.n{padding-right:20px}
.note{font-size:13px;max-width:86ch}
p.unsure{color:var(--unsure);background:var(--unsure-bg);border-radius:8px;padding:8px 12px}
td.missing,p.missing{color:var(--soft);font-style:italic;font-size:13px}
td.missing{white-space:normal;min-width:9em}
.badge{display:inline-block;border-radius:99px;padding:1px 9px;font-size:12px;font-weight:650;letter-spacing:.02em;
white-space:nowrap}
.badge.pass{color:var(--pass);background:var(--pass-bg)}
.badge.fail{color:var(--fail);background:var(--fail-bg)}
.badge.unsure{color:var(--unsure);background:var(--unsure-bg)}
.verdicts{list-style:none;padding:0;margin:12px 0}
.verdicts li{display:grid;grid-template-columns:118px 1fr;gap:2px 10px;padding:7px 0;
border-bottom:1px solid var(--line)}
.verdicts li:last-child{border-bottom:0}
.verdicts .evidence{grid-column:2;color:var(--soft);font-size:13.5px;overflow-wrap:anywhere}
figure{margin:14px 0 6px}
svg{width:100%;height:auto;display:block}
.narrow{display:none}
svg text{fill:var(--soft);font:12px system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif}
svg .name,svg .value{fill:var(--text)}
.grid{stroke:var(--line)}.axis{stroke:var(--soft)}
.line{fill:none;stroke-width:2;stroke-linejoin:round}.faint{opacity:.32}.line.faint{stroke-width:1.2}
.dot{stroke:var(--panel);stroke-width:1.5}
.s0{fill:var(--s0)}.s1{fill:var(--s1)}.s2{fill:var(--s2)}.s3{fill:var(--s3)}.s4{fill:var(--s4)}.s5{fill:var(--s5)}
.l0{stroke:var(--s0)}.l1{stroke:var(--s1)}.l2{stroke:var(--s2)}.l3{stroke:var(--s3)}.l4{stroke:var(--s4)}
figcaption{font-size:13px;max-width:86ch}
pre,.text{white-space:pre-wrap;overflow-wrap:anywhere;margin:6px 0 12px}
pre{font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.text{font-size:14px}
pre,.box{background:var(--head);border:1px solid var(--line);border-radius:8px;padding:10px 12px}
.text{unicode-bidi:plaintext}
mark{background:var(--mark);color:inherit;border-radius:3px;padding:1px 0}
.origin{font-size:12.5px;color:var(--soft);overflow-wrap:anywhere}
.sample{border-top:1px solid var(--line);padding:14px 0 4px}
.turn{margin:6px 0 0}.turn b,.box b{font-size:12.5px;color:var(--soft);font-weight:600;display:block}
.turn .text,.box .text{margin:0}
.answers{display:grid;grid-template-columns:repeat(auto-fit,minmax(230px,1fr));gap:12px;margin:12px 0}
details>summary{cursor:pointer;font-weight:600;font-size:13.5px;margin:10px 0}
a.more{color:var(--accent);font-weight:600}
footer{color:var(--soft);font-size:12.5px;padding-bottom:36px}
@media (max-width:640px){main,header,footer{padding-left:14px;padding-right:14px}
nav div{padding:8px 14px;flex-wrap:nowrap;overflow-x:auto}
section{padding:16px 14px}h1{font-size:23px}.wide{display:none}.narrow{display:block}
.cards{grid-template-columns:repeat(2,1fr)}.card .value{font-size:18px}
.verdicts li{grid-template-columns:1fr}.verdicts .evidence{grid-column:1}
td:not(.n):not(:first-child){min-width:11em}
td:first-child,th:first-child{position:sticky;left:0;background:var(--panel)}}
@media print{nav{display:none}section{break-inside:avoid-page;border-color:#ccc}}
"""


def to_html(document: Document) -> str:
    """The whole page as text; UTF-8 when written."""
    body = "<main>\n" + "\n".join(_section(section) for section in document.sections) + "\n</main>"
    return frame(
        title=document.title, subtitle=document.subtitle, facts=document.facts, body=body,
        links=[(f"#{section.anchor}", section.title) for section in document.sections],
        footer="Written by lora-kit. Every figure is measured, or derived from measured ones by the formula beside it.")


def frame(*, title: str, subtitle: str, facts: Sequence[tuple[str, str]], links: Sequence[tuple[str, str]],
          body: str, footer: str, style: str = "") -> str:
    """A page of the report around ``body``, which is HTML; everything else is plain text and is escaped.

    Args:
        links: (where to, text) of the bar that stays in sight; only places in the page and files beside it.
        style: CSS of this page alone.
    """
    told = "".join(f"<li><b>{_e(name)}</b>{_e(value)}</li>" for name, value in facts)
    bar = "".join(f'<a href="{_e(target)}">{_e(text)}</a>' for target, text in links)
    bar = f"<nav><div>{bar}</div></nav>\n" if bar else ""
    under = f'<p class="soft">{_e(subtitle)}</p>' if subtitle else ""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_e(title)}</title>\n<style>{_STYLE}{style}</style>\n</head>\n<body>\n"
        f'<header><h1>{_e(title)}</h1>{under}<ul class="facts">{told}</ul></header>\n'
        f"{bar}{body}\n<footer>{_e(footer)}</footer>\n</body>\n</html>\n"
    )


def _section(section: Section) -> str:
    intro = f'<p class="intro">{_e(section.intro)}</p>' if section.intro else ""
    blocks = "\n".join(block_html(block) for block in section.blocks)
    return f'<section id="{_e(section.anchor)}"><h2>{_e(section.title)}</h2>{intro}\n{blocks}\n</section>'


def block_html(block: Block) -> str:
    """One block as HTML."""
    match block:
        case Paragraph():
            return f'<p class="{block.tone}">{_e(block.text)}</p>' if block.tone else f"<p>{_e(block.text)}</p>"
        case Cards():
            return '<div class="cards">' + "".join(
                f'<div class="card"><div class="label">{_e(card.label)}</div><div class="value">{_e(card.value)}</div>'
                f'<div class="note">{_e(card.note)}</div></div>' for card in block.cards) + "</div>"
        case Verdicts():
            return '<ul class="verdicts">' + "".join(_verdict(line) for line in block.lines) + "</ul>"
        case Table():
            return _table(block)
        case Figure():
            return (f'<figure><div class="wide">{block.wide_svg}</div><div class="narrow">{block.narrow_svg}</div>'
                    f"<figcaption>{_e(block.caption)}</figcaption></figure>")
        case Marked():
            spans = "".join(f"<mark>{_e(span.text)}</mark>" if span.trained else _e(span.text) for span in block.spans)
            return f'<div class="origin">{_e(block.origin)}</div><pre dir="auto">{spans}</pre>'
        case Sample():
            return _sample(block)
        case Link():
            return f'<p><a class="more" href="{_e(block.target)}">{_e(block.text)}</a></p>'
        case Code():
            body = f"<pre>{_e(block.text)}</pre>"
            if block.folded:
                return f"<details><summary>{_e(block.title)}</summary>{body}</details>"
            return f"<h3>{_e(block.title)}</h3>{body}"


def _verdict(line: VerdictLine) -> str:
    return (f"<li><span>{_badge(line.outcome)}</span><span>{_e(line.claim)}</span>"
            f'<span class="evidence">{_e(line.evidence)}</span></li>')


def _badge(outcome: str, tone: str = "") -> str:
    return f'<span class="badge {tone or TONES.get(outcome, "unsure")}">{_e(outcome)}</span>'


def _table(table: Table) -> str:
    def kind(index: int) -> str:
        return ' class="n"' if index in table.numeric else ""

    title = f"<h3>{_e(table.title)}</h3>" if table.title else ""
    head = "".join(f"<th{kind(index)}>{_e(name)}</th>" for index, name in enumerate(table.columns))
    head = f"<thead><tr>{head}</tr></thead>" if any(table.columns) else ""
    rows = "".join("<tr>" + "".join(_cell(cell, kind(index)) for index, cell in enumerate(row)) + "</tr>"
                   for row in table.rows)
    note = f'<p class="note">{_e(table.note)}</p>' if table.note else ""
    # Few short columns spread over the whole page are hard to follow with the eye.
    small = ' class="small"' if len(table.columns) <= 3 and len(table.numeric) >= len(table.columns) - 1 else ""
    small = ' class="small"' if len(table.columns) <= 2 else small
    return f'{title}<div class="scroll"><table{small}>{head}<tbody>{rows}</tbody></table></div>{note}'


def _cell(cell: str | Cell, kind: str) -> str:
    if isinstance(cell, str):
        return f"<td{kind}>{_e(cell)}</td>"
    if cell.tone in ("pass", "fail", "unsure"):
        return f"<td{kind}>{_badge(cell.text, cell.tone)}</td>"
    if cell.tone == "missing":
        span = f' colspan="{cell.span}"' if cell.span > 1 else ""
        return f'<td class="missing"{span}>{_e(cell.text)}</td>'
    return f"<td{kind}>{_e(cell.text)}</td>"


def _sample(sample: Sample) -> str:
    def text(content: str) -> str:
        return f'<div class="text" dir="auto">{_e(content)}</div>'

    turns = "".join(f'<div class="turn"><b>{_e(turn.role)}</b>{text(turn.text)}</div>' for turn in sample.turns)
    shown = [*sample.answers, *([("reference", sample.reference, "")] if sample.reference else [])]
    answers = "".join(
        f'<div class="box"><b>{_e(" · ".join(filter(None, [name, remark])))}</b>{text(content)}</div>'
        for name, content, remark in shown)
    return (f'<div class="sample"><div class="origin">{_e(sample.origin)}</div>{turns}'
            f'<div class="answers">{answers}</div></div>')


def escaped(text: object) -> str:
    """``text`` as text of a page, in quotes or out of them."""
    return html.escape(printable(text), quote=True)


_e = escaped
