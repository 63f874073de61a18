"""The style sheet of the report page: light and dark, readable at 400 px, figures always on white cards."""

from __future__ import annotations

CSS = """\
:root {
  --page: #f6f6f4; --card: #ffffff; --line: #dcdcd8; --ink: #1d1f21; --soft: #5b6167;
  --bad: #b34700; --good: #00694d; --open: #0b5d94;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #16181a; --card: #212427; --line: #383c40; --ink: #e8e8e6; --soft: #a5abb1;
    --bad: #ff9a55; --good: #4fd0a5; --open: #6cbcf0;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 17px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1.1rem 4rem; }
.run { margin: 0; color: var(--soft); font-size: .9rem; overflow-wrap: anywhere; }
h1 {
  font-size: clamp(1.2rem, 2.6vw, 1.55rem); line-height: 1.35;
  margin: .5rem 0 1.2rem; padding-left: .8rem; border-left: .35rem solid;
}
h1.holds { border-color: var(--good); }
h1.fails { border-color: var(--bad); }
h1.open { border-color: var(--open); }
h2 { font-size: 1.2rem; line-height: 1.3; margin: 2.6rem 0 .7rem; }
h3 { font-size: 1.02rem; margin: 1.8rem 0 .6rem; }
.lead { max-width: 46rem; }
.caption { color: var(--soft); font-size: .92rem; margin: .6rem 0 0; max-width: 46rem; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .93rem; }
th, td { padding: .45rem .75rem; text-align: right; border-bottom: 1px solid var(--line); }
td { white-space: nowrap; }
tbody tr:last-child > * { border-bottom: 0; }
th:first-child { text-align: left; min-width: 8.5rem; }
thead th { font-weight: 600; color: var(--soft); font-size: .86rem; vertical-align: bottom; }
tbody th { font-weight: 500; }
figure { margin: 0; }
.card { background: #ffffff; border: 1px solid var(--line); border-radius: .5rem; padding: .7rem; }
.card img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
article {
  background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: .8rem; margin: .8rem 0;
}
.where, .label, .chips { margin: 0; font-size: .84rem; color: var(--soft); }
.label { margin: .5rem 0 .2rem; font-weight: 600; }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: .9rem; }
.side { min-width: 0; border-top: 3px solid var(--bad); margin-top: .8rem; }
.side.good { border-color: var(--good); }
.bad .label { color: var(--bad); }
.good .label { color: var(--good); }
pre {
  margin: 0; font: .86rem/1.45 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; max-height: 16rem; overflow-y: auto;
}
.empty { color: var(--soft); }
.chips { display: flex; flex-wrap: wrap; gap: .35rem; margin-top: .55rem; }
.chips span {
  border: 1px solid var(--line); border-radius: 1rem; padding: .05rem .55rem;
  font-variant-numeric: tabular-nums;
}
summary { cursor: pointer; padding: .5rem 0; color: var(--open); }
.notes { padding-left: 1.2rem; color: var(--soft); font-size: .92rem; overflow-wrap: anywhere; }
@media (max-width: 640px) {
  body { font-size: 16px; }
  main { padding: 1.2rem .8rem 3rem; }
  .sides { grid-template-columns: 1fr; gap: 0; }
  .card { padding: .3rem; }
  th, td { padding: .4rem .5rem; }
}
"""
