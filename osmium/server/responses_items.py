"""The output items of /v1/responses: reasoning, messages and calls, whole and as events.

An item is opened, gets pieces, and is closed; each step returns events without sequence numbers.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from osmium.server.responses_input import encrypted_reasoning, new_id
from osmium.server.responses_tools import CUSTOM_INPUT, ToolOrigin

__all__ = ["Call", "CustomCall", "Message", "OutputItem", "Reasoning"]

Events = list[dict[str, Any]]


class OutputItem:
    """One item of the output, at `index`."""

    prefix: str
    """Begins the item's id."""

    def __init__(self, index: int) -> None:
        self.index, self.id = index, new_id(self.prefix)
        self.status = "in_progress"
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def body(self) -> dict[str, Any]:
        """The item as it is now."""
        raise NotImplementedError

    def open(self) -> Events:
        """The events of its beginning."""
        return [self._item_event("response.output_item.added")]

    def close(self, status: str) -> Events:
        """The events of its end, which is "completed" or "incomplete"."""
        self.status = status
        return [self._item_event("response.output_item.done")]

    def _item_event(self, kind: str) -> dict[str, Any]:
        return {"type": kind, "output_index": self.index, "item": self.body()}

    def _event(self, kind: str, /, **fields: Any) -> dict[str, Any]:
        return {"type": f"response.{kind}", "item_id": self.id, "output_index": self.index,
                **fields}  # fmt: skip


class Message(OutputItem):
    """Text of the answer."""

    prefix = "msg"

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self._logprobs: list[dict[str, Any]] = []

    def body(self) -> dict[str, Any]:
        begun = self._pieces or self.status != "in_progress"
        return {
            "id": self.id, "type": "message", "status": self.status, "role": "assistant",
            "content": [self._part(self.text)] if begun else [],
        }  # fmt: skip

    def open(self) -> Events:
        part = self._event("content_part.added", content_index=0, part=self._part(""))
        return [*super().open(), part]

    def add(self, text: str, logprobs: Sequence[dict[str, Any]] = ()) -> Events:
        """A piece of the text, with log-probabilities of tokens, if they are asked for."""
        self._pieces.append(text)
        self._logprobs += logprobs
        return [self._event("output_text.delta", content_index=0, delta=text,
                            logprobs=list(logprobs))]  # fmt: skip

    def close(self, status: str) -> Events:
        text = self.text
        events = [
            self._event("output_text.done", content_index=0, text=text, logprobs=self._logprobs),
            self._event("content_part.done", content_index=0, part=self._part(text)),
        ]
        return events + super().close(status)

    def _part(self, text: str) -> dict[str, Any]:
        logprobs = self._logprobs if text else []
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


class Reasoning(OutputItem):
    """Text of the reasoning; with `summary` a summary, too, which is the whole text."""

    prefix = "rs"

    def __init__(self, index: int, *, summary: bool, encrypted: bool) -> None:
        super().__init__(index)
        self._summary, self._encrypted = summary, encrypted

    def body(self) -> dict[str, Any]:
        body: dict[str, Any] = {"id": self.id, "type": "reasoning", "summary": [],
                                "content": [], "status": self.status}  # fmt: skip
        if self.status == "in_progress" and not self._pieces:
            return body
        text = self.text
        body["content"] = [{"type": "reasoning_text", "text": text}]
        if self._summary:
            body["summary"] = [{"type": "summary_text", "text": text}]
        if self._encrypted:
            body["encrypted_content"] = encrypted_reasoning(text)
        return body

    def open(self) -> Events:
        part = {"type": "reasoning_text", "text": ""}
        events = [*super().open(), self._event("content_part.added", content_index=0, part=part)]
        if self._summary:
            part = {"type": "summary_text", "text": ""}
            events.append(self._event("reasoning_summary_part.added", summary_index=0, part=part))
        return events

    def add(self, text: str) -> Events:
        """A piece of the text."""
        self._pieces.append(text)
        events = [self._event("reasoning_text.delta", content_index=0, delta=text)]
        if self._summary:
            events.append(self._event("reasoning_summary_text.delta", summary_index=0, delta=text))
        return events

    def close(self, status: str) -> Events:
        text = self.text
        events = [
            self._event("reasoning_text.done", content_index=0, text=text),
            self._event("content_part.done", content_index=0,
                        part={"type": "reasoning_text", "text": text}),
        ]  # fmt: skip
        if self._summary:
            part = {"type": "summary_text", "text": text}
            events += [
                self._event("reasoning_summary_text.done", summary_index=0, text=text),
                self._event("reasoning_summary_part.done", summary_index=0, part=part),
            ]
        return events + super().close(status)


class Call(OutputItem):
    """A call of a function."""

    prefix = "fc"

    def __init__(self, index: int, call_id: str, origin: ToolOrigin) -> None:
        super().__init__(index)
        self.call_id, self.origin = call_id, origin

    def body(self) -> dict[str, Any]:
        namespace = self.origin.namespace
        return {
            "id": self.id, "type": "function_call", "status": self.status,
            "call_id": self.call_id, "name": self.origin.name, "arguments": self.text,
            **({"namespace": namespace} if namespace else {}),
        }  # fmt: skip

    def add(self, fragment: str) -> Events:
        """A piece of the arguments' JSON."""
        self._pieces.append(fragment)
        return [self._event("function_call_arguments.delta", delta=fragment)]

    def close(self, status: str) -> Events:
        done = self._event("function_call_arguments.done", name=self.origin.name,
                           arguments=self.text)  # fmt: skip
        return [done, *super().close(status)]


class CustomCall(Call):
    """A call of a custom tool: its input is a text, which is known at the end."""

    prefix = "ctc"

    def body(self) -> dict[str, Any]:
        namespace = self.origin.namespace
        return {
            "id": self.id, "type": "custom_tool_call", "status": self.status,
            "call_id": self.call_id, "name": self.origin.name,
            "input": "" if self.status == "in_progress" else self._input(),
            **({"namespace": namespace} if namespace else {}),
        }  # fmt: skip

    def add(self, fragment: str) -> Events:
        self._pieces.append(fragment)
        return []

    def close(self, status: str) -> Events:
        text = self._input()
        events = [self._event("custom_tool_call_input.delta", delta=text)] if text else []
        events.append(self._event("custom_tool_call_input.done", input=text))
        return events + OutputItem.close(self, status)

    def _input(self) -> str:
        """The text in the arguments; for others, and those that are cut off, their JSON."""
        text = self.text
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return text
        given = value.get(CUSTOM_INPUT) if isinstance(value, Mapping) else None
        return given if isinstance(given, str) else text
