"""The README's first snippet, as written but for the model's name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.parametrize("implementation", [None, "sdpa", "alaya"])
def test_first_snippet(tiny, implementation, capsys):
    snippet = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL).group(1)
    snippet = re.sub(r'name = ".*"', f"name = {str(tiny)!r}", snippet)
    if implementation is not None:
        snippet = snippet.replace(
            "dtype=torch.bfloat16", f"dtype=torch.bfloat16, attn_implementation={implementation!r}"
        )
    exec(compile(snippet, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()
