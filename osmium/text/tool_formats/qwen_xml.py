"""Calls as Qwen3-Coder and Qwen3.5 write them.

    <tool_call>
    <function=NAME>
    <parameter=KEY>
    VALUE
    </parameter>
    </function>
    </tool_call>

Strings are raw, other values JSON, one newline on each side of a value is not part of it.
"""

from osmium.text.call_schema import CallableTool
from osmium.text.lark import LarkRules
from osmium.text.tool_formats import Opening, Place
from osmium.text.tool_formats.hermes import json_opening
from osmium.text.tool_schema import Tool
from osmium.text.xml_call import XmlCall
from osmium.text.xml_grammar import VALUE_END, call_rule
from osmium.text.xml_tags import CALL, CALL_END, body_start, function_header, skip_openers

__all__ = ["FORMAT", "QwenXml"]


class QwenXml:
    """The format."""

    name = "qwen_xml"
    first = "<"
    tags = (CALL, CALL_END)
    value_ends: tuple[str, ...] = (VALUE_END,)

    def matches(self, template: str) -> bool:
        return "<function=" in template

    def opening(self, text: str, at: int, final: bool, place: Place) -> Opening | bool:
        """<tool_call>, and <function=NAME> or a JSON object; or <function=NAME> of a known tool."""
        start, wrapped = skip_openers(text, at, final)
        if start is None:
            return True
        if wrapped:
            found = json_opening(text, start, final, place)
            if found is not False:
                return found
        header = function_header(text, start, final)
        if not isinstance(header, tuple):
            return header
        name, end = header
        known = name in place.tools
        if not known and (not wrapped or not place.line_start or place.in_reasoning):
            return False
        if not wrapped and not place.line_start:
            return False
        follows = body_start(text, end, final)
        if follows is not True:
            return follows is None
        return Opening(end, XmlCall(place.tools.get(name, Tool(name)), place))

    def call_rule(self, tool: CallableTool, rules: LarkRules) -> str:
        """See ToolFormat."""
        return call_rule(tool, rules)


FORMAT = QwenXml()
