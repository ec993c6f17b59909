"""How the pages look: light or dark as the reader's system is, on a telephone and on paper."""

STYLE = """
:root {
  --paper: #ffffff; --card: #f6f7f9; --ink: #1d2330; --quiet: #5b6474; --line: #d9dde5; --link: #1b5fb4;
  --good: #0b7a4b; --bad: #b3261e; --shade: 0, 114, 178;
  --series-0: #0072b2; --series-1: #d55e00; --series-2: #009e73; --series-3: #b5548e; --series-4: #b87a00;
  --series-5: #3a8fc4; --series-6: #75777b;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #14171d; --card: #1d222b; --ink: #e7eaf0; --quiet: #a2abba; --line: #343b48; --link: #8ab8ff;
    --good: #5fd39b; --bad: #ff8f86; --shade: 86, 180, 233;
    --series-0: #56a8e0; --series-1: #ff8a3d; --series-2: #2fc79a; --series-3: #e39ac6; --series-4: #f0b840;
    --series-5: #8fd0f5; --series-6: #a9adb5;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
body {
  margin: 0 auto; padding: 1.5rem clamp(1rem, 4vw, 3rem) 4rem; max-width: 76rem; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
}
h1 { font-size: clamp(1.5rem, 4vw, 2.1rem); line-height: 1.2; margin: 0.4rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.35rem; margin: 0 0 0.8rem; }
h3 { font-size: 1.05rem; margin: 1.6rem 0 0.6rem; }
a { color: var(--link); }
p { margin: 0.5rem 0; max-width: 70ch; overflow-wrap: anywhere; }
code, pre { font: 0.875em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; }
code { overflow-wrap: anywhere; }
pre code { font-size: inherit; }
pre { background: var(--card); padding: 0.9rem 1.1rem; border-radius: 8px; overflow-x: auto; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.quiet, .note, .absent, small { color: var(--quiet); }
.note, small { font-size: 0.875rem; }
.failed { color: var(--bad); }
nav { display: flex; flex-wrap: wrap; gap: 0.3rem 1.2rem; margin: 1.2rem 0; padding: 0.6rem 0;
  border-block: 1px solid var(--line); }
nav a { text-decoration: none; }
section { margin: 2.6rem 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 1.4rem;
  align-items: start; }
.columns { columns: 2 24rem; column-gap: 1.4rem; }
figure { margin: 0 0 1rem; break-inside: avoid; }
.tables { display: flex; flex-wrap: wrap; gap: 0 4rem; }
figcaption { font-weight: 600; font-size: 0.95rem; margin-bottom: 0.3rem; }
.chart svg { display: block; width: 100%; height: auto; max-width: 40rem; }
.chart svg * { stroke-linejoin: round; stroke-linecap: butt; }
.chart text { font-family: inherit !important; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.94rem; }
caption { text-align: left; font-weight: 600; padding-bottom: 0.35rem; }
th, td { padding: 0.32rem 0.9rem 0.32rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; }
thead th { color: var(--quiet); font-weight: 500; border-bottom-width: 2px; }
tbody th { font-weight: 500; }
.number { text-align: right; padding: 0.32rem 0.2rem 0.32rem 0.9rem; white-space: nowrap; }
.specs td { overflow-wrap: anywhere; min-width: 5.5rem; }
#plot svg { max-width: 60rem; }
.heat { background: rgba(var(--shade), calc(0.05 + 0.4 * var(--share))); padding-right: 0.5rem; }
.gained, .kept, .lost { padding-left: 0.8rem; white-space: nowrap; }
td.gained { color: var(--good); } td.lost { color: var(--bad); }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(15rem, 100%), 1fr)); gap: 0.6rem 1.4rem;
  margin: 1rem 0; }
dl div { min-width: 0; }
dt { color: var(--quiet); font-size: 0.875rem; }
dd { margin: 0; overflow-wrap: anywhere; }
.top dl { grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: 0.8rem; margin: 1.2rem 0; }
.top dl div { background: var(--card); border-radius: 10px; padding: 0.8rem 1rem; }
.top dt { color: var(--quiet); font-size: 0.875rem; }
.top dd { margin: 0; font-size: 1.35rem; font-weight: 600; font-variant-numeric: tabular-nums; }
details { margin: 1rem 0; }
summary { cursor: pointer; color: var(--link); }
.split { display: flex; height: 1.6rem; border-radius: 6px; overflow: hidden; background: var(--line); }
.split span { width: calc(var(--share) * 1%); }
.legend { display: flex; flex-wrap: wrap; gap: 0.3rem 1.3rem; list-style: none; padding: 0; margin: 0.6rem 0; }
.legend i { display: inline-block; width: 0.8em; height: 0.8em; border-radius: 3px; margin-right: 0.4em; }
.search { background: var(--card); border-radius: 10px; border-left: 5px solid var(--good); margin: 0.8rem 0;
  padding: 0.8rem 1rem; break-inside: avoid; }
.search.wrong { border-left-color: var(--bad); }
.search header { display: flex; flex-wrap: wrap; gap: 0.2rem 1rem; align-items: baseline; }
.verdict { color: var(--good); white-space: nowrap; } .wrong .verdict { color: var(--bad); }
blockquote { margin: 0; font-weight: 600; overflow-wrap: anywhere; }
.search ol { list-style: none; padding: 0; margin: 0.7rem 0 0; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(8.5rem, 28%), 1fr)); gap: 0.7rem; }
.search img, .missing { display: block; width: 100%; max-width: 12rem; aspect-ratio: 1; object-fit: cover;
  border-radius: 6px; border: 3px solid transparent; }
.missing { display: grid; place-items: center; text-align: center; background: var(--line); color: var(--quiet);
  font-size: 0.8rem; padding: 0.5rem; }
.own img, .own .missing { border-color: var(--good); }
.own b { color: var(--good); font-weight: 600; }
.pictures b { display: block; }
.beside { display: grid; grid-template-columns: minmax(7rem, 11rem) 1fr; gap: 1rem; margin-top: 0.6rem; }
.captions { min-width: 0; margin: 0 !important; }
.captions li { display: grid; grid-template-columns: 10.5rem 1fr; align-items: baseline; padding: 0.2rem 0;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
.captions li:last-child { border: 0; }
.captions .own q { font-weight: 600; }
@media (max-width: 44rem) { .beside, .captions li { grid-template-columns: 1fr; } }
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
@media print {
  body { max-width: none; padding: 0; font-size: 11pt; }
  nav { display: none; }
  .charts { grid-template-columns: 1fr 1fr; }
  .columns { columns: 2; }
  h2, h3, figcaption, caption { break-after: avoid; }
  figure, tr { break-inside: avoid; }
  :root { --card: #ffffff; --ink: #000000; }
  .search, .top dl div { border: 1px solid var(--line); }
  .search { border-left-width: 5px; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
