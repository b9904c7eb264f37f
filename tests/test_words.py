"""Docstrings, comments, messages and documentation use the words of the field."""

import ast
import io
import re
import tokenize

from conftest import REPOSITORY

# Pattern -> the words to use instead.
AVOID = {
    r"\b(tells?|told|telling)\b": "report, print, log",
    r"\b(says?|said|saying)\b": "state, report, print",
    r"\b(the|a|its|their|this|each) share\b|\bshares? of\b": "fraction",
    r"\bpictures?\b": "image, photo, plot",
    r"\banew\b": "again, restart, rebuild",
    r"(?<!standard )\bdeviations?\b": "standard deviation",
    r"\btop probabilit(y|ies)\b": "confidence",
    r"\b(hands?|handed|handing) (it |them )?(on|over)\b": "pass",
    r"\b(gives?|gave|giving)\b": "return, pass, produce, provide",
    r"\bleft alone\b": "uninterrupted",
    r"\b(goes|go|went|going) on\b": "resume, continue",
    r"\bset aside\b": "quarantine, rename to `*.damaged`",
    r"(?<!TTA )(?<!of )\bviews\b": "test-time augmentation (TTA) views",
    r"\border of (the )?examples\b": "sampling order, shuffling",
}
PYTHON = sorted(
    path
    for pattern in ("*.py", "cifar_flax/**/*.py", "configs/*.py", "benchmarks/**/*.py", "docs/*.py", "tests/**/*.py")
    for path in REPOSITORY.glob(pattern)
    if path.name != "test_words.py"
)
MARKDOWN = sorted(path for pattern in ("*.md", "docs/*.md", "benchmarks/*.md") for path in REPOSITORY.glob(pattern))


def prose_of_python(text):
    """Yield (line, text) of each comment and of each string that contains a space."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value


def prose_of_markdown(text):
    """Yield (line, text) of each line outside of code blocks."""
    in_code = False
    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith("```"):
            in_code = not in_code
        elif not in_code:
            yield number, line


def test_words_of_the_field():
    found = []
    for path in (*PYTHON, *MARKDOWN):
        prose = prose_of_python if path.suffix == ".py" else prose_of_markdown
        for line, passage in prose(path.read_text()):
            plain = re.sub(r"`[^`]*`|\"[^\"]*\"", "", " ".join(passage.split()))  # without code and quotations
            for pattern, instead in AVOID.items():
                matches = re.finditer(pattern, plain, re.IGNORECASE)
                found += [f"{path}:{line}: {match[0]!r}: use {instead}" for match in matches]
    assert not found, "\n".join(found)
