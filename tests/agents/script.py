"""The script of the model for agents: it answers a question, or does a task with the tools offered.

The task has three steps: read a file, write the word in it to another file, tell the word.  A
prompt that offers no tools, such as one for a title, gets text.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

__all__ = ["ANSWER", "QUESTION", "answer_prompt", "arguments_of", "task"]

QUESTION = "What is six times seven? Answer in one word, without tools."

ANSWER = "forty-two"

WORD = re.compile(r"osmium-[0-9a-f]{12}")
"""The word in the file, which no prompt has before a tool has read it."""

_JSON = re.compile(r"As JSON: (\{[^{}]*\})")
"""What a response with structured output has."""

_TASK = re.compile(r"Read the file (\S+), then write the word in it to the file (\S+),")

_RESULT = re.compile(r"<tool_response>|<\|im_start\|>user\nObservation:")
"""Where a tool's result begins: in the template's form, and as smolagents writes it in a text."""

_READERS = (
    "read_file", "read", "read_files", "view", "view_file", "open_file",
)  # fmt: skip
_WRITERS = (
    "write_file", "write", "create_new_file", "write_to_file", "create_file", "editor",
)  # fmt: skip
_SHELLS = (
    "bash", "shell", "exec_command", "shell_command", "run_shell_command", "run_commands",
    "execute_command", "run_terminal_command", "local_shell",
)  # fmt: skip

_PATHS = ("path", "file_path", "filepath", "filename", "absolute_path", "file", "target_file")
_TEXTS = ("content", "contents", "text", "file_text", "new_text", "data")
_COMMANDS = ("command", "cmd", "commands", "script")


def task(source: str, target: str) -> str:
    """The prompt of the task."""
    return (
        f"Read the file {source}, then write the word in it to the file {target}, then tell me it."
    )


def answer_prompt(prompt: str) -> str:
    """The response to a rendered prompt, with reasoning where the prompt begins it."""
    answer = _answer(prompt)
    thinks = prompt.rstrip().endswith("<think>")
    return f"I look at what is asked.\n</think>\n\n{answer}" if thinks else answer


def _answer(prompt: str) -> str:
    found, tools = [*_TASK.finditer(prompt)], [*_offered(prompt)]
    if not found:
        wanted = _JSON.findall(prompt)
        return _filled(tools, wanted[-1]) if wanted else f"Six times seven is {ANSWER}."
    source, target = found[-1].groups()
    results = _RESULT.split(prompt[found[-1].end() :])[1:]
    if not tools:
        return "A word in a file"
    if not results:
        return "I read the file.\n\n" + _call(tools, _READERS, source, f"cat '{source}'")
    words = WORD.findall("".join(results))
    if not words:
        return f"The tool did not return the word: {results[-1][:300]}"
    if len(results) == 1:
        word = words[-1]
        return _call(tools, _WRITERS, target, f"printf '%s\\n' {word} > '{target}'", f"{word}\n")
    return _tell(tools, f"The word is {words[-1]}.")


def _filled(tools: list[Mapping[str, Any]], wanted: str) -> str:
    """JSON as it is, or as the arguments of the tool that takes them."""
    values = json.loads(wanted)
    for tool in tools:
        if values.keys() <= (tool.get("parameters") or {}).get("properties", {}).keys():
            return _xml(tool["name"], values)
    return wanted


def _tell(tools: list[Mapping[str, Any]], text: str) -> str:
    """A text, as a call where a tool ends the conversation."""
    if any(tool["name"] == "final_answer" for tool in tools):
        return _xml("final_answer", {"answer": text})
    return text


def _offered(prompt: str) -> Iterator[Mapping[str, Any]]:
    """The functions that a prompt offers."""
    for line in prompt.partition("<tools>\n")[2].splitlines():
        if not line.startswith("{"):
            return
        tool = json.loads(line)
        yield tool.get("function", tool)


def _call(
    tools: list[Mapping[str, Any]],
    names: tuple[str, ...],
    path: str,
    command: str,
    text: str | None = None,
) -> str:
    """A call of the first tool with one of these names, else of a shell."""
    by_name = {tool["name"].lower(): tool for tool in tools}
    for name in (*names, *_SHELLS):
        if name in by_name:
            tool = by_name[name]
            arguments = arguments_of(tool.get("parameters") or {}, path, command, text)
            return _xml(tool["name"], arguments)
    return f"No tool can do this: {', '.join(sorted(by_name))}"


def _xml(name: str, arguments: Mapping[str, Any]) -> str:
    """A call in Qwen's XML: texts as they are, all others as JSON."""
    lines = ["<tool_call>", f"<function={name}>"]
    for key, value in arguments.items():
        shown = value if isinstance(value, str) else json.dumps(value)
        lines += [f"<parameter={key}>", shown, "</parameter>"]
    return "\n".join([*lines, "</function>", "</tool_call>"])


# -- arguments by a JSON schema --------------------------------------------------------------------


def arguments_of(
    schema: Mapping[str, Any], path: str, command: str, text: str | None = None
) -> dict[str, Any]:
    """Arguments for a schema's properties: the path, command and text by name, else by type."""
    required = schema.get("required") or ()
    arguments = {}
    for name, kind in (schema.get("properties") or {}).items():
        value = _named(name, kind, path, command, text)
        if value is None and name in required:
            value = _any(name, kind)
        if value is not None:
            arguments[name] = value
    return arguments


def _named(name: str, kind: Mapping[str, Any], path: str, command: str, text: str | None) -> Any:
    """The value of a property with a known name; None for others."""
    plain = name.lower().replace("-", "_")
    types = _types(kind)
    if "array" in types and "string" not in types:
        items = kind.get("items") or {}
        if _types(items) & {"object"}:
            return [arguments_of(items, path, command, text)]
        if plain in _COMMANDS:
            return [command] if plain == "commands" else ["bash", "-c", command]
        if plain.rstrip("s") in _PATHS:
            return [path]
        return None
    if plain in _COMMANDS and "enum" in kind:
        return "create" if "create" in kind["enum"] else None
    if plain in _PATHS or plain == "filepath":
        return path
    if plain in _COMMANDS:
        return command
    if plain in _TEXTS:
        return text
    return None


def _types(kind: Mapping[str, Any]) -> set[str]:
    given = kind.get("type")
    found = {given} if isinstance(given, str) else set(given or ())
    for part in (*(kind.get("anyOf") or ()), *(kind.get("oneOf") or ())):
        found |= _types(part)
    return found


def _any(name: str, kind: Mapping[str, Any]) -> Any:
    """A value of the type of a required property."""
    if kind.get("enum"):
        return kind["enum"][0]
    if "const" in kind:
        return kind["const"]
    types = _types(kind)
    if "string" in types or not types:
        return f"the {name} of {PurePosixPath(name).name}"
    if "boolean" in types:
        return False
    if types & {"integer", "number"}:
        return kind.get("minimum", 1)
    if "array" in types:
        return []
    return arguments_of(kind, "", "")
