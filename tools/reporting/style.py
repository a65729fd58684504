"""The page's style sheet: light and dark, from 320 pixels up.

The series' colours are Okabe and Ito's, which differ for the colour-blind, made darker on white and
lighter on black. A scale of shades keeps one hue and the text on it legible.
"""

# Light and dark of each series; the last is of what belongs to none.
_SERIES = (
    ("#0067a8", "#5ab4f0"),
    ("#c04a00", "#f0984a"),
    ("#00795a", "#3cc79c"),
    ("#a3437f", "#e294c4"),
    ("#7a6a00", "#d9c84a"),
    ("#5b6470", "#a9b2bd"),
)
_DASHES = ("none", "7 4", "2 3", "10 3 2 3", "12 5", "none")
# Of the shades of a scale, the part of its colour in percent.
_ENTROPY = (0, 14, 28, 42, 56, 70, 84)
_LOG_PROB = (0, 14, 28, 44, 60, 76)

_SHEET = """
:root { color-scheme: light dark;
  --page: light-dark(#ffffff, #14171b); --card: light-dark(#f6f7f9, #1d2126);
  --ink: light-dark(#1c2126, #e4e7eb); --soft: light-dark(#59626d, #a2abb6);
  --rule: light-dark(#d8dce1, #363c44); --link: light-dark(#0067a8, #5ab4f0);
  --good: light-dark(#00694e, #3cc79c); --bad: light-dark(#a83a00, #f0984a);
  --shade-h: light-dark(#2c78be, #2a6aa6); --shade-p: light-dark(#c86e14, #b4651c); }
:root:has(#light:checked) { color-scheme: light; }
:root:has(#dark:checked) { color-scheme: dark; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 0 16px 48px; max-width: 1240px; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 20px 0 8px; }
h2 { font-size: 1.25rem; margin: 0 0 4px; }
h3 { font-size: 1rem; margin: 16px 0 4px; }
p { margin: 4px 0; } ul, ol { margin: 4px 0; padding-left: 22px; }
a { color: var(--link); }
a:focus-visible, summary:focus-visible, input:focus-visible, [tabindex]:focus-visible {
  outline: 3px solid var(--link); outline-offset: 2px; }
.skip { position: absolute; left: -999px; } .skip:focus { left: 8px; top: 8px; padding: 6px;
  background: var(--page); z-index: 2; }
.about, .lead { max-width: 74ch; } .note, .lead { color: var(--soft); font-size: 0.9rem; }
.runs { list-style: none; padding: 0; }
nav { display: flex; flex-wrap: wrap; gap: 4px 16px; align-items: center; padding: 8px 0;
  border-bottom: 1px solid var(--rule); }
nav fieldset { margin: 0 0 0 auto; padding: 0; border: 0; display: flex; gap: 10px;
  color: var(--soft); font-size: 0.9rem; }
nav legend { float: left; padding: 0; margin-right: 10px; }
section { margin-top: 24px; scroll-margin-top: 8px; }
.verdicts { padding: 0; list-style: none; } .verdicts li { margin: 4px 0; padding: 6px 10px;
  background: var(--card); border-left: 4px solid var(--link); }
.ways { margin: 4px 0; } .way { display: grid; gap: 0 16px; padding: 6px 0;
  border-top: 1px solid var(--rule); } .way dd { margin: 0; min-width: 0; }
.interval { display: grid; grid-template-columns: 1fr auto; gap: 0 12px; align-items: center; }
.interval .who { color: var(--soft); font-size: 0.85rem; overflow-wrap: anywhere; min-width: 0; }
.interval .value { font-variant-numeric: tabular-nums; text-align: right; white-space: nowrap;
  grid-column: 2; grid-row: 1; }
.interval .bar { grid-column: 1 / 3; }
@media (min-width: 760px) {
  .way { grid-template-columns: 250px 1fr; align-items: center; }
  .interval { grid-template-columns: 170px 1fr 170px; }
  .interval .bar { grid-column: 2; grid-row: 1; }
  .interval .value { grid-column: 3; }
  .scale { margin-left: 448px; margin-right: 182px; }
}
.scale { display: flex; justify-content: space-between; color: var(--soft);
  font-size: 0.8rem; margin-top: -4px; }
.bar { width: 100%; display: block; overflow: visible; }
.charts { display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); }
figure { margin: 0; padding: 10px 12px; background: var(--card); border-radius: 6px; min-width: 0;
  display: flex; flex-direction: column; }
figure h3 { margin: 0; } figcaption p { color: var(--soft); font-size: 0.85rem; margin: 0; }
figure > svg { width: 100%; height: auto; display: block; margin-top: auto; }
.legend { list-style: none; padding: 0; margin: 6px 0; display: flex; flex-wrap: wrap;
  gap: 2px 14px; font-size: 0.85rem; } .legend svg { vertical-align: middle; margin-right: 5px; }
svg text { font: 11.5px system-ui, sans-serif; fill: var(--ink); }
svg .axis { fill: var(--soft); paint-order: stroke; stroke: var(--card);
  stroke-width: 3px; } svg .right { text-anchor: end; } svg .middle {
  text-anchor: middle; } svg .end { font-weight: 600; }
.grid { stroke: var(--rule); stroke-width: 1; } .zero { stroke: var(--soft); }
.warm { fill: var(--rule); opacity: 0.55; } .track { fill: var(--rule); }
.line { fill: none; stroke-width: 2.2; stroke-linejoin: round; }
.faint { fill: none; stroke-width: 1; opacity: 0.4; stroke-linejoin: round; }
.whisker { stroke-width: 3; } .cap { stroke-width: 2; }
.open { fill: var(--page); stroke-width: 2.5; stroke: currentcolor; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }
p.text, .group .text { font: 13.5px/1.75 ui-monospace, "DejaVu Sans Mono", monospace; }
.text i, .text a { font-style: normal; unicode-bidi: isolate; border-radius: 2px; color: inherit;
  text-decoration: none; }
.easy { border-bottom: 2px dotted var(--soft); } .medium { border-bottom: 2px dashed var(--soft); }
.hard { border-bottom: 2px solid var(--soft); }
.text .chosen { outline: 2px solid var(--bad); outline-offset: 0; font-weight: 700;
  border-radius: 2px; } .text a.chosen { text-decoration: underline; }
.text .written { color: var(--soft); border: 1px dotted var(--soft); }
details { margin: 6px 0; } summary { cursor: pointer; padding: 4px 0; }
.group { border: 1px solid var(--rule); border-radius: 6px; padding: 2px 12px; }
.group:target { border-color: var(--bad); border-width: 2px; }
summary .context { font: 13px ui-monospace, "DejaVu Sans Mono", monospace; color: var(--soft);
  unicode-bidi: isolate; } .truth { font-family: ui-monospace, "DejaVu Sans Mono", monospace;
  background: var(--card); border-bottom: 2px solid var(--good); unicode-bidi: isolate; }
.facts { color: var(--soft); font-size: 0.9rem; } summary .facts { margin-left: 10px; }
.facts > span { display: inline-block; }
.facts span + span { margin-left: 12px; } .facts b { color: var(--ink); unicode-bidi: isolate; }
.facts .right { color: var(--good); font-weight: 600; }
.facts .wrong { color: var(--bad); font-weight: 600; }
.badge { margin-left: 10px; padding: 1px 8px; border-radius: 9px; border: 1px solid var(--soft);
  font-size: 0.85rem; white-space: nowrap; }
.rollouts { padding: 0; list-style: none; } .rollouts li { padding: 4px 0;
  border-top: 1px solid var(--rule); }
.wide { overflow-x: auto; margin: 8px 0; } table { border-collapse: collapse; min-width: 480px;
  font-variant-numeric: tabular-nums; font-size: 0.9rem; } caption { text-align: left;
  font-weight: 600; padding: 4px 0; } th, td { padding: 4px 12px 4px 0; text-align: right;
  border-bottom: 1px solid var(--rule); white-space: nowrap; } tr > :first-child {
  text-align: left; font-weight: 400; } thead th { color: var(--soft); font-weight: 600; }
.share { min-width: 90px; } .wide tr > :first-child { position: sticky; left: 0;
  background: var(--page); }
@media (max-width: 600px) { .wide tr > :first-child { white-space: normal; min-width: 110px; } }
"""


def mixed(name: str, share: int) -> str:
    """A shade of the scale ``name``."""
    return f"color-mix(in srgb, var(--shade-{name}) {share}%, transparent)"


def _rules() -> str:
    found = []
    for number, (light, dark) in enumerate(_SERIES):
        ink = f"light-dark({light}, {dark})"
        found.append(f".c{number} {{ stroke: {ink}; color: {ink}; }}")
        found.append(f".dot.c{number} {{ fill: {ink}; }} svg .t{number} {{ fill: {ink}; }}")
        found.append(f".d{number} {{ stroke-dasharray: {_DASHES[number]}; }}")
    found.append(".dot.open { fill: var(--page); }")
    for name, shades in (("h", _ENTROPY), ("p", _LOG_PROB)):
        for number, share in enumerate(shades):
            found.append(f".{name}{number} {{ background: {mixed(name, share)}; }}")
    return "\n".join(found)


STYLE = _SHEET + _rules()
