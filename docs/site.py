"""Hook of mkdocs: pages that lie outside docs/, and links to them from inside and back."""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# Page of the site: the file that it shows
ELSEWHERE = {
    "index.md": "README.md",
    "slurm.md": "slurm/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "notebook.md": "docs/notebooks/ten_lines.ipynb",
}
PAGES = {(ROOT / file).resolve(): page for page, file in ELSEWHERE.items()}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The text of a page, with links as the site has its pages."""
    source = ROOT / "docs" / page.file.src_uri
    if page.file.src_uri in ELSEWHERE:
        source = ROOT / ELSEWHERE[page.file.src_uri]
        markdown = source.read_text()
    if source.suffix == ".ipynb":
        return "\n\n".join(map(cell_text, json.loads(markdown)["cells"]))
    return re.sub(r"(?<=\]\()([^)#:\s]+)(?=[)#])", lambda m: place(source, m[1]), markdown)


def place(source: Path, link: str) -> str:
    """Where the site has what `link` in the file `source` leads to."""
    target = (source.parent / link).resolve()
    if target in PAGES:
        return PAGES[target]
    docs = ROOT / "docs"
    return str(target.relative_to(docs)) if target.is_relative_to(docs) else link


def cell_text(cell: dict[str, Any]) -> str:
    """A cell of a notebook as Markdown, with what it has shown."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return source
    parts = [f"```python\n{source}\n```"]
    for output in cell["outputs"]:
        data = output.get("data", {"text/plain": output.get("text", "")})
        if "image/png" in data:
            parts.append(f"![](data:image/png;base64,{data['image/png'].strip()})")
        else:
            parts.append(f"```\n{''.join(data['text/plain'])}\n```")
    return "\n\n".join(parts)
