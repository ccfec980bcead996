"""Programmatic dependent launch (PDL): a kernel starts while the previous one still runs."""

import re

__all__ = ["LAUNCH_DEPENDENTS", "WAIT", "entry_body_offset", "pdl_text"]

WAIT = "griddepcontrol.wait;"
"""Waits until the previous kernel's writes are visible.  From sm_90 on both may overlap."""
LAUNCH_DEPENDENTS = "griddepcontrol.launch_dependents;"
"""The next kernel may start once every thread block has executed this.  It always follows WAIT:
before its own wait, a kernel may then read what the kernel before the previous one wrote."""


def entry_body_offset(text: str) -> int:
    """Offset of the entry's first instruction: behind declarations and comments."""
    body = text.index("{", text.index(".entry"))
    start = re.compile(r"\{(?:\s*//[^\n]*|\s*\.(?:reg|shared)[^;]*;)*").match(text, body)
    assert start is not None, "a body starts with a brace"
    return start.end()


def pdl_text(text: str) -> str:
    """A module's text with PDL, for sm_90 and up.  Source: PTX ISA 7.8, griddepcontrol.

    It waits for the previous kernel at lines `// -- pdl wait`, or else at its start.  It releases
    the next at lines `// -- pdl launch_dependents[, if %predicate]`, or else after the wait.
    """
    text = re.sub(r"^\.target sm_80", ".target sm_90", text, count=1, flags=re.M)
    wait = WAIT if "// -- pdl launch_dependents" in text else f"{WAIT} {LAUNCH_DEPENDENTS}"
    release = re.compile(r"^( *)// -- pdl launch_dependents(?:, if (%\w+))?.*$", re.M)
    text = release.sub(
        lambda at: f"{at[1]}{f'@{at[2]} ' if at[2] else ''}{LAUNCH_DEPENDENTS}", text
    )
    if "// -- pdl wait" in text:
        return re.sub(r"^( *)// -- pdl wait.*$", rf"\1{wait}", text, flags=re.M)
    start = entry_body_offset(text)
    return f"{text[:start]}\n    {wait}{text[start:]}"
