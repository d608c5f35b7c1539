"""Pieces of the report's page: its style sheet, tables, and numbers in words."""

from __future__ import annotations

import html

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1f; --soft: #5d5f66; --page: #fdfdfb; --line: #dcdcd6;
  --box: #f3f3ef; --mark: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e3; --soft: #a0a3aa; --page: #17181b;
  --line: #34363b; --box: #202226; --mark: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 3rem 1.25rem 5rem; max-width: 54rem; color: var(--ink);
  background: var(--page); font: 1.0625rem/1.6 "Source Sans 3", "Segoe UI", system-ui, sans-serif; }
h1 { font-size: 2.1rem; line-height: 1.2; margin: 0; letter-spacing: -0.01em; }
h2 { font-size: 1.3rem; margin: 3.2rem 0 0.6rem; }
p { margin: 0.6rem 0; max-width: 42rem; }
.lead { font-size: 1.2rem; line-height: 1.5; margin: 1rem 0 0; }
.soft, figcaption { color: var(--soft); font-size: 0.95rem; }
.missing { border-left: 3px solid var(--line); padding-left: 0.9rem; color: var(--soft); }
code, pre { font: 0.9rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre { background: var(--box); padding: 0.9rem 1.1rem; border-radius: 6px; overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1rem 0; }
th, td { padding: 0.3rem 1.3rem 0.3rem 0; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { font-weight: 600; color: var(--soft); font-size: 0.9rem; }
th:first-child, td:first-child { text-align: left; }
tr.student td { color: var(--mark); font-weight: 600; }
.scroll { overflow-x: auto; }
figure { margin: 1.2rem 0; }
figcaption { margin-top: 0.6rem; }
svg { width: 100%; height: auto; display: block; }
svg text { font-family: inherit !important; }
.strips { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 3px 1.2rem;
  align-items: center; }
.strips div { display: flex; gap: 3px; }
.strips img { flex: 1 1 0; width: 0; max-width: 5rem; height: auto;
  image-rendering: pixelated; border-radius: 2px; }
.strips .gap { grid-column: 1 / -1; height: 0.7rem; }
.strips span { font-size: 0.95rem; white-space: nowrap; }
details summary { cursor: pointer; color: var(--soft); }
"""


def missing(what: str, way_out: str) -> str:
    """A note in place of content."""
    return f'<p class="missing">{html.escape(what)} {html.escape(way_out)}</p>'


def number(value: float | int | None) -> str:
    """A number for a table: thousands separators, or three to four digits."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) >= 1 else f"{value:.3g}"


def duration(seconds: float | int) -> str:
    """Seconds in words: "12 s", "3 min 20 s", "5 h 06 min"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(num_bytes: float | int) -> str:
    """Bytes in decimal units."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if num_bytes < 1000 or unit == "TB":
            break
        num_bytes /= 1000
    return f"{num_bytes:.3g} {unit}"


def table(head: list[str], rows: list[list[str]], marked: set[int] | None = None) -> str:
    """An HTML table; rows whose index is in `marked` stand out."""
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = [f"<tr>{cells}</tr>"]
    for index, row in enumerate(rows):
        attribute = ' class="student"' if index in (marked or set()) else ""
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        lines.append(f"<tr{attribute}>{cells}</tr>")
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'
